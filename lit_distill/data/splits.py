"""Which rows are validation, which are trained on, and what became of each of the others."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lit_distill.errors import UserError
from lit_distill.rationales import RationaleFilter
from lit_distill.tasks import Row, Task, TeacherOutput

VAL_FRACTION = 0.1
"""The part of train that is validation where a dataset releases none (the paper's)."""

Agree = Callable[[str, str], bool]
"""``(answer, gold answer) -> right``."""


@dataclass(frozen=True)
class SplitRows:
    """The rows of a split as they were released, the teacher's outputs joined to them."""

    examples: Sequence[Row]
    """The rows, in the file's order, with gold labels."""
    unparsed: frozenset[int] = frozenset()
    """Positions of the rows whose teacher output did not parse (their rationale and teacher label are ``None``)."""
    samples: Mapping[int, tuple[Row, ...]] = field(default_factory=dict)
    """Position -> the row again with each of the teacher's further samples; the first one is in ``examples``."""

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, positions: Sequence[int]) -> "SplitRows":
        """The rows at some positions, in that order."""
        unparsed = frozenset(new for new, old in enumerate(positions) if old in self.unparsed)
        samples = {new: self.samples[old] for new, old in enumerate(positions) if old in self.samples}
        return SplitRows([self.examples[position] for position in positions], unparsed, samples)

    def said(self, position: int) -> list[Row]:
        """A row with each of the teacher's samples that has a rationale, in their order."""
        samples = (self.examples[position], *self.samples.get(position, ()))
        return [example for example in samples if example.rationale is not None]

    def kept(self, keep: RationaleFilter | None) -> int:
        """How many rows have a rationale that a filter keeps."""
        return sum(any(keep is None or keep(one) for one in self.said(p)) for p in range(len(self)))


@dataclass(frozen=True)
class UsedRows:
    """The rows of a split as this run uses them."""

    examples: Sequence[Row]
    """The rows; ``label`` is the one to train on."""
    gold: Sequence[str | None]
    """The rows' gold labels."""
    counts: dict[str, int]
    """What became of the rows of the split."""


def hold_out(rows: SplitRows) -> tuple[SplitRows, SplitRows]:
    """Split train into train and val: a tenth of its inputs, rounded up, each with all of its rows.

    The permutation is decided by the number of inputs alone and no argument moves it, so that runs of any seed and
    fraction are validated on the same rows. Where no input repeats it is a tenth of the rows.

    Raises:
        UserError: there are fewer than two inputs.
    """
    groups: dict[str, list[int]] = {}
    for position, example in enumerate(rows.examples):
        groups.setdefault(example.input, []).append(position)
    if len(groups) < 2:
        found = f"{len(rows)} row(s) with {len(groups)} different input(s)"
        raise UserError(f"train has {found}: no validation split can be taken off it")
    count = math.ceil(VAL_FRACTION * len(groups))
    # RandomState's streams are frozen for good, those of newer generators are not
    order = np.random.RandomState(0).permutation(len(groups)).tolist()
    of_input = list(groups.values())
    train, val = ([p for group in part for p in of_input[group]] for part in (order[count:], order[:count]))
    return rows.take(sorted(train)), rows.take(sorted(val))


def sample(rows: int, fraction: float, seed: int) -> list[int]:
    """Positions of a fraction of the rows, at least one; a smaller fraction of a seed is part of a larger one."""
    count = max(1, round(fraction * rows)) if rows else 0
    return sorted(np.random.RandomState(seed).permutation(rows)[:count].tolist())


def train_rows(
    rows: SplitRows,
    *,
    tasks: Sequence[Task],
    teacher_labels: bool,
    keep: RationaleFilter | None,
    fraction: float,
    seed: int,
) -> UsedRows:
    """The rows to train on: a fraction of the split, with their labels, and the rationales that are kept.

    The fraction is drawn first, so that gold and teacher labels, filtered or not, are compared on the same rows. Of a
    teacher's several samples the first with a rationale that is kept is trained on.

    Args:
        rows: train, after validation was taken off.
        tasks: a row without a target for any of them is left out.
        teacher_labels: train on the teacher's labels; rows without one are left out.
        keep: which rationales are kept; it sees the example with its gold label.
        fraction: part of the rows.
        seed: decides which part.
    """
    drawn = rows.take(sample(len(rows), fraction, seed))
    counts = Counter(left_out_by_fraction=len(rows) - len(drawn))
    examples: list[Row] = []
    gold: list[str | None] = []
    for position, original in enumerate(drawn.examples):
        said = drawn.said(position)
        example = next((one for one in said if keep is None or keep(one)), None)
        if example is None:
            counts["rationale_filtered"] += bool(said)
            # a label may be left where no rationale is
            labelled = (one for one in (original, *said) if one.teacher_label is not None)
            example = next(labelled, original)
            example = replace(example, outputs=tuple(replace(output, text=None) for output in example.outputs))
        if teacher_labels:
            if example.teacher_label is None:
                counts["dropped_without_teacher_label"] += 1
                continue
            example = replace(example, label=example.teacher_label)
        if all(task.render(example, _first(example)) is None for task in tasks):
            counts["dropped_without_target"] += 1
            continue
        examples.append(example)
        gold.append(original.label)
    names = ("left_out_by_fraction", "rationale_filtered", "dropped_without_teacher_label", "dropped_without_target")
    return UsedRows(examples, gold, {name: counts[name] for name in names} | {"used": len(examples)})


def _first(row: Row) -> TeacherOutput | None:
    return row.outputs[0] if row.outputs else None


def shuffle_rationales(used: UsedRows, seed: int) -> UsedRows:
    """The same rationales, each with another row's input: a control that keeps all of their text but its pertinence.

    Rows are drawn into one ring, along which each rationale goes on by one, so that none comes back to its own row.

    Args:
        used: the rows to train on.
        seed: of the ring.

    Raises:
        UserError: there are not two rationales to exchange.
    """
    having = [position for position, example in enumerate(used.examples) if example.rationale is not None]
    if len(having) < 2:
        raise UserError(f"rationale_pairing: shuffled needs two rationales at least, and there are {len(having)}")
    ring = np.random.RandomState(seed).permutation(having).tolist()
    examples = list(used.examples)
    for giver, taker in zip(ring, [*ring[1:], ring[0]], strict=True):
        (output,) = examples[taker].outputs
        outputs = (replace(output, text=used.examples[giver].rationale),)
        examples[taker] = replace(examples[taker], outputs=outputs)
    return UsedRows(examples, used.gold, used.counts | {"rationale_shuffled": len(having)})


def evaluation_rows(rows: SplitRows) -> UsedRows:
    """Every row of a split, with its gold label."""
    return UsedRows(rows.examples, [example.label for example in rows.examples], {"used": len(rows)})


def teacher_counts(rows: SplitRows, agree: Agree, label_set: tuple[str, ...] | None) -> dict[str, int]:
    """Every row accounted for: rows, and what the teacher said of them.

    ``rows = parsed + unparsed + no_output``; the others count among the parsed.
    """
    counts = Counter(rows=len(rows), unparsed=len(rows.unparsed))
    for position, example in enumerate(rows.examples):
        if example.rationale is None and example.teacher_label is None:
            counts["no_output"] += position not in rows.unparsed
            continue
        counts["parsed"] += 1
        if example.teacher_label is None:
            continue
        counts["teacher_correct"] += example.label is not None and agree(example.teacher_label, example.label)
        choices = example.choices or label_set
        counts["outside_label_set"] += choices is not None and example.teacher_label not in choices
    names = ("rows", "parsed", "unparsed", "no_output", "teacher_correct", "outside_label_set")
    return {name: counts[name] for name in names}


def teacher_accuracy(rows: SplitRows, agree: Agree) -> float | None:
    """Of the rows with a label and an output that should hold one; what does not parse is wrong. ``None`` of no row."""
    judged = [
        example.teacher_label is not None and agree(example.teacher_label, example.label)
        for position, example in enumerate(rows.examples)
        if example.label is not None and (example.teacher_label is not None or position in rows.unparsed)
    ]
    return sum(judged) / len(judged) if judged else None
