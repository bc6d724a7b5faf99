"""The rows that losses are checked on, and the same rows in other batches."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.batch import IGNORE_INDEX, TaskBatch, TaskInputs, join, sources_of, take, targets_of
from lit_distill.errors import UserError

_LONGEST_TARGET = 12
"""Tokens that a target is cut to: the output head takes most of a step in float64."""


def pick_rows(loader: Iterable[TaskBatch], number: int, *, cut: bool = True) -> TaskBatch:
    """So many rows of the first batches: short ones; ``cut`` to short targets of different lengths."""
    parts, found = [], 0
    for batch in loader:
        parts.append(batch)
        found += max(len(inputs["labels"]) for inputs in batch.values())
        if found >= 8 * number:
            break
    if not parts:
        raise UserError("data: train has no rows")
    whole: TaskBatch = {task: join([part[task] for part in parts]) for task in parts[0]}
    owners, lengths = owners_of(whole), torch.zeros(number_of(whole), dtype=torch.long)
    for task, inputs in whole.items():
        tokens = (inputs["labels"] != IGNORE_INDEX).sum(dim=1) + inputs["attention_mask"].sum(dim=1)
        lengths.index_add_(0, owners[task], tokens)
    rows: list[int] = lengths.argsort(stable=True).tolist()
    shorter = rows[: max(number, len(rows) // 4)]
    chosen = [shorter[i * len(shorter) // number] for i in range(number)] if len(shorter) > number else shorter
    # as data has them, in no order of length
    picked = part(whole, chosen[::2] + chosen[1::2])
    return {task: trimmed(_uneven(inputs)) for task, inputs in picked.items()} if cut else picked


def _uneven(inputs: TaskInputs) -> TaskInputs:
    """With short targets of different lengths, without which a mean over rows would be one over tokens."""
    lengths = [min(length, _LONGEST_TARGET) for length in targets_of(inputs).ends]
    if len(set(lengths)) == 1:
        lengths = [max(1, length - row % 3) for row, length in enumerate(lengths)]
    labels = inputs["labels"].clone()
    for row, length in enumerate(lengths):
        labels[row, length:] = IGNORE_INDEX
    return {**inputs, "labels": labels}


def part(batch: TaskBatch, rows: Iterable[int]) -> TaskBatch:
    """Some rows of a batch, in this order, without columns of padding."""
    owners, chosen = owners_of(batch), list(rows)
    places = {
        task: [i for row in chosen for i in (own == row).nonzero()[:, 0].tolist()] for task, own in owners.items()
    }
    return {task: trimmed(take(inputs, places[task])) for task, inputs in batch.items()}


def number_of(batch: TaskBatch) -> int:
    """Number of rows, of which a task may have several or none."""
    return len(torch.cat(list(owners_of(batch).values())).unique())


def owners_of(batch: TaskBatch) -> dict[str, Tensor]:
    """The row that each row of a task belongs to, numbered as they come."""
    indices = {
        # a task that an objective has added may lack it, and then has the rows of another one
        task: inputs["index"] if "index" in inputs else _like(batch, len(inputs["labels"]))
        for task, inputs in batch.items()
    }
    numbers: dict[int, int] = {}
    for index in sorted(indices.values(), key=len, reverse=True):
        for row in index.tolist():
            numbers.setdefault(row, len(numbers))
    return {task: torch.tensor([numbers[row] for row in index.tolist()]) for task, index in indices.items()}


def _like(batch: TaskBatch, rows: int) -> Tensor:
    found = (inputs["index"] for inputs in batch.values() if "index" in inputs and len(inputs["labels"]) == rows)
    return next(found, torch.arange(rows))


def trimmed(inputs: TaskInputs) -> TaskInputs:
    """Without columns of padding."""
    source, target = (max([1, *rows.ends]) for rows in (sources_of(inputs), targets_of(inputs)))
    return {
        **inputs,
        "input_ids": inputs["input_ids"][:, :source],
        "attention_mask": inputs["attention_mask"][:, :source],
        "labels": inputs["labels"][:, :target],
    }


def padded(batch: TaskBatch) -> TaskBatch:
    """With more columns of padding."""

    def wider(inputs: TaskInputs) -> TaskInputs:
        last = inputs["input_ids"][:, -1:] * (inputs["attention_mask"][:, -1:] == 0)
        return {
            **inputs,
            "input_ids": torch.cat([inputs["input_ids"], last.expand(-1, 5)], dim=1),
            "attention_mask": F.pad(inputs["attention_mask"], (0, 5)),
            "labels": F.pad(inputs["labels"], (0, 7), value=IGNORE_INDEX),
        }

    return {task: wider(inputs) for task, inputs in batch.items()}


def without_targets(batch: TaskBatch) -> TaskBatch:
    """The same sources, with ``IGNORE_INDEX`` labels alone."""
    return {
        task: {**inputs, "labels": torch.full_like(inputs["labels"], IGNORE_INDEX)} for task, inputs in batch.items()
    }


def differ(left: TaskBatch, right: TaskBatch) -> bool:
    """Whether two batches have other tasks or labels."""
    return left.keys() != right.keys() or not all(left[task]["labels"].equal(right[task]["labels"]) for task in left)
