"""Selection: validation rows, training rows, teacher outputs and targets."""

import math
import operator
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from lit_distill.annotation.conditions import columns_of, condition, is_condition
from lit_distill.annotation.record import COLUMNS, Agree, same_answer, vote
from lit_distill.errors import UserError
from lit_distill.tasks import Row, RowFilter, Task, TeacherOutput, find_function

KEPT_COLUMNS = tuple(name for name in COLUMNS if name not in ("text", "rationale", "input", "key"))
"""The columns of a sample that its output has, too; the others are fields of an output, or of the file alone."""

VAL_FRACTION = 0.1
"""Fraction of train used as val if none is released (as in the paper)."""


@dataclass(frozen=True)
class UsedRows:
    """The rows of a split that a run uses."""

    rows: Sequence[Row]  # with the label to train on, and the outputs that passed the filter
    gold: Sequence[str | None]  # their gold labels
    counts: dict[str, int]  # numbers of rows that were used, and left out for each reason


class Target(NamedTuple):
    """One target of a task."""

    text: str
    label: str | None  # the label in it, which truncation keeps


def make_filter(rationale_filter: str | RowFilter, agree: Agree) -> RowFilter | None:
    """The filter for ``rationale_filter``; ``None`` keeps all. Raises a ``UserError`` if the value is invalid."""
    allowed = "allowed are none, label_agrees, conditions on columns, or a function (package.module.function)"
    if rationale_filter == "none":
        return None
    if rationale_filter == "label_agrees":
        # None agrees with no label
        return lambda row: None not in (row.teacher_label, row.label) and agree(str(row.teacher_label), str(row.label))
    if isinstance(rationale_filter, str):
        # anything beyond dotted names is meant as conditions
        if re.fullmatch(r"[\w.]+", rationale_filter) and not is_condition(rationale_filter):
            try:
                return find_function("rationale_filter", rationale_filter)
            except UserError as error:
                raise UserError(f"{error}; {allowed}") from error
        test = condition(rationale_filter)
        return lambda row: test(row.columns)
    if not callable(rationale_filter):
        raise UserError(f"rationale_filter: got {rationale_filter!r}; {allowed}")
    return rationale_filter


def filter_name(rationale_filter: str | RowFilter) -> str:
    """The text from which `make_filter` makes a filter, if it has one."""
    if isinstance(rationale_filter, str):
        return rationale_filter
    named = rationale_filter if hasattr(rationale_filter, "__qualname__") else type(rationale_filter)
    return f"{named.__module__}.{named.__qualname__}"


def names_columns(rationale_filter: str) -> bool:
    """Whether a filter is a condition on columns."""
    return rationale_filter not in ("none", "label_agrees") and is_condition(rationale_filter)


def check_columns(rationale_filter: str, rows: Sequence[Row]) -> None:
    """Raise a ``UserError`` if a column in a filter's conditions does not exist."""
    if names_columns(rationale_filter):
        known = dict.fromkeys(KEPT_COLUMNS)
        known |= dict.fromkeys(name for row in rows for output in row.outputs for name in output.columns)
        if missing := [name for name in columns_of(rationale_filter) if name not in known]:
            raise UserError(f"rationale_filter: no column {missing[0]!r}; there are {', '.join(known)}")


def hold_out(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Split train into train and val: a tenth of its inputs, rounded up, each with all of its rows.

    The permutation depends on the number of inputs alone, so that runs of any seed and fraction share their val. Raises
    a ``UserError`` if there are fewer than two inputs.
    """
    groups: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        groups.setdefault(row.input, []).append(position)
    if len(groups) < 2:
        found = f"{len(rows)} row(s) with {len(groups)} different input(s)"
        raise UserError(f"train has {found}: no validation split can be taken from it")
    # RandomState's streams are stable, unlike those of newer generators
    order = np.random.RandomState(0).permutation(len(groups)).tolist()
    of_input, count = list(groups.values()), math.ceil(VAL_FRACTION * len(groups))
    val = {position for group in order[:count] for position in of_input[group]}
    train = [row for position, row in enumerate(rows) if position not in val]
    return train, [rows[position] for position in sorted(val)]


def subset(rows: int, fraction: float, seed: int) -> list[int]:
    """Positions of a fraction of the rows, at least one; smaller fractions of a seed are subsets of larger ones."""
    count = max(1, round(fraction * rows)) if rows else 0
    return sorted(np.random.RandomState(seed).permutation(rows)[:count].tolist())


def train_rows(
    rows: Sequence[Row],
    *,
    tasks: Sequence[Task],
    teacher_labels: bool,
    keep: RowFilter | None,
    fraction: float,
    seed: int,
    agree: Agree = operator.eq,
) -> UsedRows:
    """The training rows: a fraction of the split, with labels and filtered teacher outputs.

    The fraction is drawn first, so that label sources and filters are compared on the same rows. With
    ``teacher_labels`` the label is that of the first output with one that passes ``keep``, else of the first with one.
    ``keep`` gets a row with its gold label and one output. Rows without a label or any target are left out.
    """
    drawn = [rows[position] for position in subset(len(rows), fraction, seed)]
    names = ("left_out_by_fraction", "rationale_filtered", "dropped_without_teacher_label", "dropped_without_target")
    counts = dict.fromkeys(names, 0) | {"left_out_by_fraction": len(rows) - len(drawn)}
    used: list[Row] = []
    gold: list[str | None] = []
    for original in drawn:
        said = [output for output in original.outputs if output.text is not None]
        kept = [output for output in said if keep is None or keep(replace(original, outputs=(output,)))]
        counts["rationale_filtered"] += bool(said) and not kept
        if all(output.label is None for output in kept):
            # a label may be left where no rationale is
            kept += [replace(output, text=None) for output in original.outputs if output.label is not None]
        label = original.label
        if teacher_labels and (label := next((one.label for one in kept if one.label is not None), None)) is None:
            counts["dropped_without_teacher_label"] += 1
            continue
        row = replace(original, label=label, outputs=tuple(kept))
        if not any(targets(task, row, agree, teacher_labels=teacher_labels) for task in tasks):
            counts["dropped_without_target"] += 1
            continue
        used.append(row)
        gold.append(original.label)
    return UsedRows(used, gold, counts | {"used": len(used)})


def shuffle_rationales(used: UsedRows, seed: int) -> UsedRows:
    """Control: the same teacher outputs, each paired with another row's input.

    The rows with a text form a random cycle (by ``seed``), along which outputs move by one. Labels stay. Raises a
    ``UserError`` if fewer than two rows have a text.
    """
    having = [position for position, row in enumerate(used.rows) if row.rationale is not None]
    if len(having) < 2:
        raise UserError(f"rationale_pairing: shuffled needs rationales of two rows or more, and {len(having)} has one")
    ring = np.random.RandomState(seed).permutation(having).tolist()
    rows = list(used.rows)
    for giver, taker in zip(ring, [*ring[1:], ring[0]], strict=True):
        outputs = (replace(output, label=rows[taker].label) for output in used.rows[giver].outputs)
        rows[taker] = replace(rows[taker], outputs=tuple(outputs))
    return UsedRows(rows, used.gold, used.counts | {"rationale_shuffled": len(having)})


def targets(
    task: Task, row: Row, agree: Agree = operator.eq, *, teacher_labels: bool = False, evaluation: bool = False
) -> list[Target]:
    """A task's targets for a row, one for each selected teacher output; at most one in evaluation.

    With ``teacher_labels`` a target has the label of its own output.
    """
    accepted = [output for output in row.outputs if task.accepts(output)]
    chosen: Sequence[TeacherOutput | None]
    if task.uses_output:
        chosen = [output for output in accepted if output.text is not None]
    else:
        chosen = [output for output in accepted if teacher_labels and output.label is not None] or [None]
    if task.select == "vote" and chosen != [None]:
        labels = [output.label for output in chosen if output is not None]
        winner, _ = vote(labels, agree)
        pairs = zip(chosen, labels, strict=True)
        chosen = [one for one, label in pairs if label and winner and same_answer(label, winner, agree)][:1]
    elif task.select == "first" or evaluation:
        chosen = chosen[:1]
    found = []
    for output in chosen:
        label = output.label if teacher_labels and output is not None and output.label is not None else row.label
        text = task.render(row if label == row.label else replace(row, label=label), output)
        if text is not None:
            found.append(Target(text, label))
    return found


def teacher_counts(rows: Sequence[Row], agree: Agree, label_set: tuple[str, ...] | None) -> dict[str, int]:
    """Counts over each row's first output: ``rows = parsed + unparsed + no_output``."""
    names = ("rows", "parsed", "unparsed", "no_output", "teacher_correct", "outside_label_set")
    counts = Counter({"rows": len(rows)})
    for row in rows:
        label = row.teacher_label
        counts["no_output" if not row.outputs else "unparsed" if _is_unparsed(row) else "parsed"] += 1
        if label is not None:
            counts["teacher_correct"] += row.label is not None and agree(label, row.label)
            choices = row.choices or label_set
            counts["outside_label_set"] += choices is not None and label not in choices
    return {name: counts[name] for name in names}


def teacher_accuracy(rows: Sequence[Row], agree: Agree) -> float | None:
    """Fraction of correct labels among the rows' first outputs (unparsed is wrong); ``None`` without any.

    Rows without a gold label, and outputs of a rationale alone, do not count.
    """
    judged = [
        row.teacher_label is not None and agree(row.teacher_label, row.label)
        for row in rows
        if row.label is not None and (row.teacher_label is not None or _is_unparsed(row))
    ]
    return sum(judged) / len(judged) if judged else None


def _is_unparsed(row: Row) -> bool:
    return bool(row.outputs) and row.rationale is None and row.teacher_label is None
