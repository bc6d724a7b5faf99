"""Collate tokenised rows to the batches of `lit_distill.batch`."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_distill.batch import IGNORE_INDEX, PADDING_ROW, TaskBatch, TaskInputs
from lit_distill.data.tokenize import TokenSettings

TokenRow = dict[str, Any]
"""``index``, and for each task ``<task>.input_ids`` and ``<task>.labels``, a possibly empty list of targets."""


class TokenRows(Dataset[TokenRow]):
    """The rows of a tokenised split by position.

    Position ``epoch * rows + i`` is row ``i`` in a later epoch, for tasks that ``sample`` a target: the sample depends
    on seed, epoch and row alone. ``PADDING_ROW`` is the first row without targets.

    Args:
        table: from `lit_distill.data.tokenize.tokenize_once`.
        settings: tasks and lengths.
        seed: of the samples.
    """

    def __init__(self, table: Any, settings: TokenSettings, seed: int = 0) -> None:
        self.settings = settings
        self.seed = seed
        self._sampled = [name for name, task in settings.tasks.items() if task.select == "sample"]
        self._columns = table.data
        self._table = table.select_columns(
            [f"{name}.{part}" for name in settings.tasks for part in ("input_ids", "labels")]
        )

    def __len__(self) -> int:
        return len(self._table)

    def column(self, name: str) -> list[Any]:
        """A column of `lit_distill.data.tokenize.encode_rows`."""
        found: list[Any] = self._columns[name].to_pylist()
        return found

    @property
    def samples(self) -> bool:
        """Whether a task samples a target in each epoch."""
        return bool(self._sampled)

    def target_lengths(self, task: str) -> list[list[int]]:
        """Tokens of each row's targets, after truncation."""
        lengths = self.column(f"{task}.target_lengths")
        return [[min(length, self.settings.max_target_length) for length in several] for several in lengths]

    def lengths(self, *, evaluation: bool) -> list[int]:
        """Source and target tokens of each row, summed over the tasks.

        In training a source counts for each of its targets; if one is sampled, the longest counts.
        """
        total = [0] * len(self)
        for name, task in self.settings.tasks.items():
            sources = self.column(f"{name}.input_length")
            for position, (length, several) in enumerate(zip(sources, self.target_lengths(name), strict=True)):
                length = min(length, self.settings.max_source_length)
                if evaluation:
                    total[position] += length + sum(several[:1])
                elif several:
                    read = [max(several)] if task.select == "sample" else several
                    total[position] += length * len(read) + sum(read)
        return total

    def __getitem__(self, position: int) -> TokenRow:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[TokenRow]:
        """Read the rows of a batch from Arrow at once; called by PyTorch's loader."""
        columns = self._table[[max(position, 0) % len(self) for position in positions]]
        rows = [{name: values[i] for name, values in columns.items()} for i in range(len(positions))]
        for row, position in zip(rows, positions, strict=True):
            epoch, row["index"] = divmod(position, len(self)) if position != PADDING_ROW else (0, PADDING_ROW)
            if position == PADDING_ROW:
                row.update({f"{name}.labels": [] for name in self.settings.tasks})
            for name in self._sampled:
                found = row[f"{name}.labels"]
                draw = random.Random(f"{self.seed}-{epoch}-{row['index']}").random()  # noqa: S311 - no secret
                row[f"{name}.labels"] = found and [found[int(draw * len(found))]]
        return rows


class RationaleCollator:
    """Pads rows to a batch: task name -> its tensors.

    In training a task has a row for each target, possibly none; in evaluation each task has every row once, in the same
    order, with only ``IGNORE_INDEX`` labels if there is no target.

    Args:
        pad_token_id: pads ``input_ids``.
        tasks: the tasks to build.
        evaluation: whether this is an evaluation batch.
        pad_to_multiple_of: round lengths up to a multiple of this.
    """

    def __init__(self, pad_token_id: int, tasks: Sequence[str], evaluation: bool, pad_to_multiple_of: int = 1) -> None:
        self.pad_token_id = pad_token_id
        self.tasks = tuple(tasks)
        self.evaluation = evaluation
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[TokenRow]) -> TaskBatch:
        """Collate rows."""
        return {task: self._task(task, rows) for task in self.tasks}

    def _task(self, task: str, rows: Sequence[TokenRow]) -> TaskInputs:
        pairs = [
            (row, target)
            for row in rows
            for target in ((row[f"{task}.labels"] or [[]])[:1] if self.evaluation else row[f"{task}.labels"])
        ]
        sources = [row[f"{task}.input_ids"] for row, _ in pairs]
        input_ids = self._pad(sources, self.pad_token_id)
        lengths = torch.tensor([len(source) for source in sources], dtype=torch.long)
        # by length, as the padding id can be that of an ordinary token
        mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": self._pad([target for _, target in pairs], IGNORE_INDEX),
            "index": torch.tensor([row["index"] for row, _ in pairs], dtype=torch.long),
        }

    def _pad(self, sequences: Sequence[Sequence[int]], value: int) -> Tensor:
        """``(batch, length)``; at least one column, so that empty batches have a valid shape."""
        width = max(1, *map(len, sequences)) if sequences else 1
        if sequences:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        padded = torch.full((len(sequences), width), value, dtype=torch.long)
        for row, sequence in zip(padded, sequences, strict=True):
            row[: len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        return padded
