"""Batches written by hand, and a data module that serves them."""

from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from lit_distill.batch import IGNORE_INDEX, PADDING_ROW, TaskBatch, TaskInputs
from lit_distill.evaluation.answers import AnswerKey, Split
from tests.students import WORDS

Row = dict[str, tuple[list[int], list[int]]]
"""Task -> source ids and target ids; a task without a target is absent."""


def pad(rows: Sequence[list[int]], value: int, extra: int = 0) -> torch.Tensor:
    length = max((len(row) for row in rows), default=1) + extra
    return torch.tensor([row + [value] * (length - len(row)) for row in rows], dtype=torch.long).reshape(-1, length)


def collate(rows: Sequence[Row], tasks: Iterable[str], extra: int = 0) -> TaskBatch:
    """Rows to a batch, by the plainest means; ``extra`` adds that much padding."""
    batch: TaskBatch = {}
    for task in tasks:
        own = [row[task] for row in rows if task in row]
        sources = [source for source, _ in own]
        ids = pad(sources, 0, extra)
        inputs: TaskInputs = {
            "input_ids": ids,
            "attention_mask": pad([[1] * len(source) for source in sources], 0, extra),
            "labels": pad([target for _, target in own], IGNORE_INDEX, extra),
        }
        batch[task] = inputs
    return batch


def random_rows(number: int, seed: int = 0, *, without_rationale: Sequence[int] = (3,)) -> list[Row]:
    """Rows with ragged sources and targets, some without a rationale."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return [*torch.randint(3, len(WORDS), (length,), generator=generator).tolist(), 1]

    rows: list[Row] = []
    for i in range(number):
        source = ids(2, 9)
        row: Row = {"label": ([3, *source], ids(1, 4))}
        if i not in without_rationale:
            row["rationale"] = ([4, *source], ids(2, 12))
        rows.append(row)
    return rows


class Rows(Dataset[tuple[int, Row]]):
    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Row]:
        return index, self.rows[index]


class RowsData(pl.LightningDataModule):
    """Serves rows unshuffled."""

    def __init__(self, rows: Sequence[Row], batch_size: int, tasks: Iterable[str], **loader: Any) -> None:
        super().__init__()
        self.rows, self.batch_size, self.tasks, self.loader = rows, batch_size, tuple(tasks), loader

    def _collate(self, items: Sequence[tuple[int, Row]]) -> TaskBatch:
        return collate([row for _, row in items], self.tasks)

    def _collate_evaluation(self, items: Sequence[tuple[int, Row]]) -> TaskBatch:
        whole = [{task: row.get(task, (row["label"][0], [IGNORE_INDEX])) for task in self.tasks} for _, row in items]
        batch = collate(whole, self.tasks)
        for inputs in batch.values():
            inputs["index"] = torch.tensor([index for index, _ in items])
        return batch

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Rows(self.rows), batch_size=self.batch_size, collate_fn=self._collate, **self.loader)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Rows(self.rows), batch_size=self.batch_size, collate_fn=self._collate_evaluation)

    test_dataloader = val_dataloader

    def answer_key(self, split: Split) -> AnswerKey:
        def words(ids: list[int]) -> str:
            return " ".join(WORDS[i] for i in ids if i > 1)

        return AnswerKey(
            ids=[str(i) for i in range(len(self.rows))],
            inputs=[words(row["label"][0]) for row in self.rows],
            labels=[words(row["label"][1]) for row in self.rows],
            rationales=[words(row["rationale"][1]) if "rationale" in row else None for row in self.rows],
            metric="exact_match",
            label_set=None,
            choices=None,
            majority_label=None,
        )


__all__ = ["PADDING_ROW", "Row", "Rows", "RowsData", "collate", "random_rows"]
