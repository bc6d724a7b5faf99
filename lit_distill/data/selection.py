"""Selection: validation rows, training rows, teacher outputs and targets."""

import math
import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from lit_distill.annotation.conditions import columns_of, condition, is_condition
from lit_distill.annotation.record import COLUMNS, Agree, same_answer, vote
from lit_distill.data.store import Array, Lazy, chunks, hashes, read
from lit_distill.data.workers import in_order
from lit_distill.errors import UserError
from lit_distill.tasks import Row, RowFilter, Task, TeacherOutput, find_function

KEPT_COLUMNS = tuple(name for name in COLUMNS if name not in ("text", "rationale", "input", "key"))
"""The columns of a sample that its output has, too; the others are fields of an output, or of the file alone."""

VAL_FRACTION = 0.1
"""Fraction of train used as val if none is released (as in the paper)."""


class Flag:
    """Bits for what is counted of a row and its first output; plain integers, as enums are slow."""

    NO_OUTPUT = 1
    UNPARSED = 2
    ANSWERED = 4  # the teacher's label is there,
    CORRECT = 8  # agrees with the row's,
    OUTSIDE = 16  # is none of the choices
    UNLABELLED = 32  # without a gold label
    RATIONALE = 64
    CHOICES = 128  # of its own


@dataclass(frozen=True)
class UsedRows:
    """The rows of a split that a run uses."""

    rows: Sequence[Row]  # with the label to train on, and the outputs that passed the filter
    gold: Sequence[str | None]  # their gold labels
    counts: dict[str, int]  # numbers of rows that were used, and left out for each reason
    with_rationale: Array  # positions of those with a rationale
    key: str | None = None  # of the content of the rows, if known
    majority: int | None = None  # position of the first row with the most frequent label of train

    @property
    def majority_label(self) -> str | None:
        """The most frequent label of train; ``None`` without any."""
        return None if self.majority is None else self.rows[self.majority].label


@dataclass(frozen=True)
class Selection:
    """Which rows of train are used."""

    positions: Array
    counts: dict[str, int]
    drawn: Array  # whether each is of the fraction
    with_rationale: Array  # positions among the used
    majority: int | None  # position, among the used, of the first row with the most frequent label


class Target(NamedTuple):
    """One target of a task."""

    source: str  # the student's input, with the prefix
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

        def holds(row: Row) -> bool:
            (output,) = row.outputs
            known: dict[str, Any] = {"teacher": output.teacher or "", "kind": output.kind}
            if row.label is not None and output.label is not None:
                known["agrees"] = agree(output.label, row.label)
            return test(known | dict(output.columns))

        return holds
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


def check_columns(rationale_filter: str, columns: Iterable[str], argument: str = "rationale_filter") -> None:
    """Raise a ``UserError`` if a column in a filter's conditions is none of the outputs' columns."""
    if names_columns(rationale_filter):
        known = dict.fromkeys((*KEPT_COLUMNS, *columns))
        if missing := [name for name in columns_of(rationale_filter) if name not in known]:
            raise UserError(f"{argument}: no column {missing[0]!r}; there are {', '.join(known)}")


def hold_out(inputs: Array) -> tuple[Array, Array]:
    """Split train into train and val: a tenth of its inputs, rounded up, each with all of its rows.

    The permutation depends on the number of inputs alone, so that runs of any seed and fraction share their val. Raises
    a ``UserError`` if there are fewer than two inputs.

    Args:
        inputs: a hash of each row's input ``(rows,)``.

    Returns:
        The positions of the rows of train and of val, in order.
    """
    _, first, groups = np.unique(inputs, return_index=True, return_inverse=True)
    if len(first) < 2:
        found = f"{len(inputs)} row(s) with {len(first)} different input(s)"
        raise UserError(f"train has {found}: no validation split can be taken from it")
    # inputs are numbered as they occur; RandomState's streams are stable, unlike those of newer generators
    order = np.random.RandomState(0).permutation(len(first))
    held = np.zeros(len(first), bool)
    held[first.argsort()[order[: math.ceil(VAL_FRACTION * len(first))]]] = True
    return np.flatnonzero(~held[groups]), np.flatnonzero(held[groups])


def subset(rows: int, fraction: float, seed: int) -> Array:
    """Positions of a fraction of the rows, at least one, or above 1 of so many rows.

    Smaller ones of a seed are subsets of larger ones. Raises a ``UserError`` if there are not so many rows.
    """
    if fraction > max(rows, 1):
        raise UserError(f"train_fraction: {fraction:,.0f} rows of train, which has {rows:,}")
    count = round(fraction) if fraction > 1 else max(1, round(fraction * rows)) if rows else 0
    return np.arange(rows) if count == rows else np.sort(np.random.RandomState(seed).permutation(rows)[:count])


@dataclass(frozen=True)
class Selector:
    """What becomes of a row in training. ``keep`` gets a row with its gold label and one output."""

    tasks: Sequence[Task]
    teacher_labels: bool  # the label is that of the first output with one that passes `keep`, else of the first one
    keep: RowFilter | None
    agree: Agree = operator.eq
    pseudo: str | None = None  # the teacher whose outputs alone that pass a row without a gold label has, and its label

    def is_labelled(self, row: Row, drawn: bool) -> bool:
        """Whether a row keeps its gold label; with ``pseudo`` only one that is drawn and trains on it."""
        return self.pseudo is None or (drawn and row.label is not None and not self.teacher_labels)

    def __call__(self, original: Row, drawn: bool = True) -> tuple[Row | None, str | None, bool]:
        """The row to train on, or why it is left out; and whether none of its rationales passed ``keep``."""
        if not (labelled := self.is_labelled(original, drawn)):
            own = (output for output in original.outputs if output.teacher == self.pseudo)
            original = replace(original, label=None, outputs=tuple(own))
        said = [output for output in original.outputs if output.text is not None]
        kept = [output for output in said if self.keep is None or self.keep(replace(original, outputs=(output,)))]
        filtered = bool(said) and not kept
        if all(output.label is None for output in kept):
            # a label may be left where no rationale is; a pseudo-label has to pass by itself
            left = [output for output in original.outputs if output.label is not None]
            if not labelled and self.keep is not None:
                left = [output for output in left if self.keep(replace(original, outputs=(output,)))]
            kept += [replace(output, text=None) for output in left]
        label = original.label
        if self.teacher_labels or not labelled:
            # not the wrong answer, or the verdict, that another kind of output has
            asking = [task for task in self.tasks if task.needs_label]
            own = (one for one in kept if not asking or any(task.accepts(one) for task in asking))
            label = next((one.label for one in own if one.label is not None), None)
            if label is None:
                return None, "dropped_without_teacher_label", filtered
        unchanged = label == original.label and len(kept) == len(original.outputs) and kept == said
        row = original if unchanged else replace(original, label=label, outputs=tuple(kept))
        if not any(targets(task, row, self.agree, teacher_labels=self.teacher_labels) for task in self.tasks):
            return None, "dropped_without_target", filtered
        return row, None, filtered

    def rows(self, originals: Iterable[Row], drawn: Iterable[bool] = repeat(True)) -> list[Row]:
        """The rows to train on."""
        both = zip(originals, drawn, strict=False)
        return [row for original, known in both if (row := self(original, known)[0]) is not None]


def select_rows(rows: Sequence[Row], select: Selector, fraction: float, seed: int) -> Selection:
    """Which rows of train are used.

    The fraction is drawn first, so that label sources and filters are compared on the same rows. Rows without a label
    or any target are left out. With pseudo-labels the others are used, too.
    """
    drawn = subset(len(rows), fraction, seed)
    places_of = drawn if select.pseudo is None else np.arange(len(rows))
    of_fraction = np.isin(places_of, drawn)

    def some(places: Array) -> tuple[Array, Counter[str], Array, Array]:
        both = zip(read(rows, places_of[places]), of_fraction[places].tolist(), strict=True)
        asked = [(row, known, select(row, known)) for row, known in both]
        found = [one for *_, one in asked]
        reasons = Counter(reason for _, reason, _ in found if reason is not None)
        reasons["rationale_filtered"] = sum(filtered for *_, filtered in found)
        reasons["pseudo_labelled"] = sum(
            one[0] is not None and not select.is_labelled(row, known) for row, known, one in asked
        )
        used = [row for row, *_ in found if row is not None]
        # a label is not empty: that is none
        labels = hashes("" if row.label is None else f"={row.label}" for row in used)
        kept, said = [row is not None for row, *_ in found], [row.rationale is not None for row in used]
        return np.array(kept), reasons, np.array(said, bool), labels

    names = ("left_out_by_fraction", "rationale_filtered", "dropped_without_teacher_label", "dropped_without_target")
    none = np.zeros(0, bool), Counter[str](), np.zeros(0, bool), hashes([])
    kept, reasons, said, labels = zip(none, *in_order(some, chunks(len(places_of))), strict=True)
    counts, used = sum(reasons, Counter[str]()), np.concatenate(kept)
    positions, with_rationale = places_of[used], np.flatnonzero(np.concatenate(said))
    counts["left_out_by_fraction"], counts["used"] = len(rows) - len(places_of), len(positions)
    told = {name: counts[name] for name in (*names, *(["pseudo_labelled"] if select.pseudo else []), "used")}
    return Selection(positions, told, of_fraction[used], with_rationale, _majority(labels))


def _majority(labels: Sequence[Array]) -> int | None:
    found, first, counts = np.unique(np.concatenate(labels), return_index=True, return_counts=True)
    counts[found == hashes([""])] = 0
    # the first of equals
    return None if not counts.any() else int(first[counts == counts.max()].min())


def train_rows(rows: Sequence[Row], selection: Selection, select: Selector, key: str | None = None) -> UsedRows:
    """The selected training rows, with labels and filtered teacher outputs."""
    positions = selection.positions
    used = Lazy(len(positions), lambda at: select.rows(read(rows, positions[at]), selection.drawn[at].tolist()))
    gold = Lazy(len(positions), lambda at: [row.label for row in read(rows, positions[at])])
    return UsedRows(used, gold, selection.counts, selection.with_rationale, key, selection.majority)


def targets(
    task: Task, row: Row, agree: Agree = operator.eq, *, teacher_labels: bool = False, evaluation: bool = False
) -> list[Target]:
    """A task's targets for a row, one for each selected teacher output; at most one in evaluation.

    With ``teacher_labels`` a target has the label of its own output.
    """
    chosen: Sequence[TeacherOutput | None]
    if task.uses_output:
        chosen = task.said(row)
    else:
        accepted = (output for output in row.outputs if teacher_labels and task.accepts(output))
        chosen = [output for output in accepted if output.label is not None] or [None]
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
            found.append(Target(task.source(row, output), text, label))
    return found


def flags_of(row: Row, agree: Agree, label_set: tuple[str, ...] | None) -> int:
    """What is counted of a row, see `Flag`."""
    found, label, rationale = 0, row.teacher_label, row.rationale
    if not row.outputs:
        found |= Flag.NO_OUTPUT
    elif rationale is None and label is None:
        found |= Flag.UNPARSED
    if label is not None:
        found |= Flag.ANSWERED
        if row.label is not None and agree(label, row.label):
            found |= Flag.CORRECT
        choices = row.choices or label_set
        if choices is not None and label not in choices:
            found |= Flag.OUTSIDE
    found |= Flag.UNLABELLED * (row.label is None)
    found |= Flag.RATIONALE * (rationale is not None)
    return found | Flag.CHOICES * bool(row.choices)


Tally = Mapping[int, int]
"""Flags -> the number of rows that have just these."""


def tally_of(flags: Array) -> dict[int, int]:
    """How many rows have which flags."""
    counts = np.bincount(flags)
    return {int(found): int(counts[found]) for found in np.flatnonzero(counts)}


def having(tally: Tally, flag: int) -> int:
    """The number of rows with a flag."""
    return sum(count for flags, count in tally.items() if flags & flag)


def teacher_counts(tally: Tally) -> dict[str, int]:
    """Counts over each row's `Row.first` output: ``rows = parsed + unparsed + no_output``."""
    rows, unparsed, no_output = sum(tally.values()), having(tally, Flag.UNPARSED), having(tally, Flag.NO_OUTPUT)
    return {
        "rows": rows,
        "parsed": rows - unparsed - no_output,
        "unparsed": unparsed,
        "no_output": no_output,
        "teacher_correct": having(tally, Flag.CORRECT),
        "outside_label_set": having(tally, Flag.OUTSIDE),
    }


def teacher_accuracy(tally: Tally) -> float | None:
    """Fraction of correct labels among the rows' `Row.first` outputs (unparsed is wrong); ``None`` without any.

    Rows without a gold label, and outputs of a rationale alone, do not count.
    """
    judged = {
        flags: count
        for flags, count in tally.items()
        if not flags & Flag.UNLABELLED and flags & (Flag.ANSWERED | Flag.UNPARSED)
    }
    return having(judged, Flag.CORRECT) / sum(judged.values()) if judged else None
