"""From tokenised rows to a batch: the contract of `lit_distill.batch`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_distill.batch import IGNORE_INDEX, PADDING_ROW, TaskBatch, TaskInputs

if TYPE_CHECKING:
    from datasets import Dataset as ArrowDataset  # type: ignore[import-untyped]

Row = dict[str, Any]
"""``index``, and for each task ``<task>.input_ids`` and ``<task>.labels`` (``None`` where it has no target)."""


class TokenRows(Dataset[Row]):
    """The rows of a tokenised split by position; ``PADDING_ROW`` is a copy of the first one without targets.

    Args:
        table: the Arrow data that `lit_distill.data.tokenize` wrote.
        tasks: the tasks to read.
    """

    def __init__(self, table: ArrowDataset, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self._table = table.select_columns(
            ["index", *(f"{task}.{part}" for task in tasks for part in ("input_ids", "labels"))]
        )

    def __len__(self) -> int:
        return len(self._table)

    def lengths(self, *, evaluation: bool) -> list[int]:
        """What each row costs: the tokens of its sources and targets, summed over the tasks.

        In training a task without a target does not hold the row, whose source then costs nothing.
        """
        columns = self._table.with_format("arrow")[:]
        total = 0
        for task in self.tasks:
            source, target = (pc.list_value_length(columns[f"{task}.{part}"]) for part in ("input_ids", "labels"))
            if evaluation:
                target = pc.fill_null(target, 0)
            # without a target the sum is null as well
            total = pc.add(total, pc.fill_null(pc.add(source, target), 0))
        lengths: list[int] = total.to_pylist()  # type: ignore[attr-defined]
        return lengths

    def target_lengths(self, task: str) -> list[int]:
        """Tokens of the targets of a task, of the rows that have one."""
        column = self._table.with_format("arrow")[:][f"{task}.labels"]
        lengths: list[int] = pc.list_value_length(column).drop_null().to_pylist()
        return lengths

    def __getitem__(self, position: int) -> Row:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[Row]:
        """The rows of one batch, read from the Arrow data at once (PyTorch's loader asks for this by name)."""
        columns = self._table[[max(position, 0) for position in positions]]
        rows = [{name: values[i] for name, values in columns.items()} for i in range(len(positions))]
        for row, position in zip(rows, positions, strict=True):
            if position == PADDING_ROW:
                row["index"] = PADDING_ROW
                row.update({f"{task}.labels": None for task in self.tasks})
        return rows


class RationaleCollator:
    """Pads rows to a batch: task name -> that task's tensors.

    In training a task holds only the rows that have a target for it, perhaps none; in evaluation each task holds every
    row, in the same order, and a row without a target has only ``IGNORE_INDEX`` labels.

    Args:
        pad_token_id: fills ``input_ids`` up to the longest row.
        tasks: the tasks to build.
        evaluation: whether the batch is one of evaluation.
        pad_to_multiple_of: the widths of sources and targets are rounded up to a multiple of this.
    """

    def __init__(
        self, pad_token_id: int, tasks: Sequence[str], evaluation: bool, pad_to_multiple_of: int | None = None
    ) -> None:
        self.pad_token_id = pad_token_id
        self.tasks = tuple(tasks)
        self.evaluation = evaluation
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[Row]) -> TaskBatch:
        """One batch of these rows."""
        return {task: self._task(task, rows) for task in self.tasks}

    def _task(self, task: str, rows: Sequence[Row]) -> TaskInputs:
        if not self.evaluation:
            rows = [row for row in rows if row[f"{task}.labels"] is not None]
        sources = [row[f"{task}.input_ids"] for row in rows]
        input_ids = self._pad(sources, self.pad_token_id)
        lengths = torch.tensor([len(source) for source in sources], dtype=torch.long)
        # by length, not by id: a tokenizer's padding id can be an ordinary token's, too
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        targets = [row[f"{task}.labels"] or [] for row in rows]
        batch: TaskInputs = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": self._pad(targets, IGNORE_INDEX),
            "source_lengths": tuple(map(len, sources)),
            "target_lengths": tuple(map(len, targets)),
            "index": torch.tensor([row["index"] for row in rows], dtype=torch.long),
        }
        return batch

    def _pad(self, sequences: Sequence[Sequence[int]], value: int) -> Tensor:
        """``(batch, length)``; at least one column wide, so that a batch of nothing has a valid shape."""
        width = max(1, *map(len, sequences)) if sequences else 1
        if self.pad_to_multiple_of and sequences:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        padded = torch.full((len(sequences), width), value, dtype=torch.long)
        for row, sequence in zip(padded, sequences, strict=True):
            row[: len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        return padded
