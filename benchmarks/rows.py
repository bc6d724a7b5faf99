"""The rows of a benchmark: which examples both sides see, in which batches, and what those hold."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from operations import NOTHING, Batches, Content, Lengths
from options import Settings
from torch import Tensor
from torch.utils.data import DataLoader

from lit_distill.batch import IGNORE_INDEX
from lit_distill.data import (
    ANLIDataModule,
    CQADataModule,
    ESNLIDataModule,
    RationaleDataModule,
    SVAMPDataModule,
)
from lit_distill.data.selection import UsedRows
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.modules import StepByStepModule
from lit_distill.tasks import Row

_DATASETS: dict[str, type[RationaleDataModule]] = {
    "cqa": CQADataModule,
    "svamp": SVAMPDataModule,
    "esnli": ESNLIDataModule,
    "anli": ANLIDataModule,
}


def open_data(
    settings: Settings,
    part: tuple[Split, Sequence[int]] | None = None,
    source: RationaleDataModule | None = None,
    **arguments: Any,
) -> Any:
    """A data module of the dataset, whose training batches can be given, or one of whose splits is a part of itself.

    Args:
        settings: the benchmark's.
        part: a split, and the positions of the rows that it is to consist of.
        source: another one of the same dataset, whose files need not be read again.
        **arguments: further arguments of the data module.
    """
    base = _DATASETS[settings.dataset]

    class Opened(_Part, _Replay, base):  # type: ignore[misc,valid-type]
        pass

    module = Opened(
        data_dir=settings.data_dir,
        tokenizer=settings.student,
        batch_size=settings.batch_size,
        tasks=StepByStepModule.all_tasks({}),
        seed=settings.seed,
        allow_extra_outputs=True,
        **arguments,
    )
    module.part, module.source = part, source
    return module


class _Part(RationaleDataModule):
    """A data module one of whose splits consists of some of its rows."""

    part: tuple[Split, Sequence[int]] | None = None
    source: RationaleDataModule | None = None

    def released(self, split: Split) -> Sequence[Row] | None:
        """As the base's; read once for all parts."""
        return super().released(split) if self.source is None else self.source.released(split)

    def used_rows(self, split: Split) -> UsedRows:
        """As the base's, at the given positions alone."""
        used = super().used_rows(split)
        if self.part is None or split != self.part[0]:
            return used
        positions = self.part[1]
        rows, gold = [used.rows[p] for p in positions], [used.gold[p] for p in positions]
        return UsedRows(rows, gold, used.counts, np.flatnonzero(np.isin(positions, used.with_rationale)))


class _Replay(RationaleDataModule):
    """A data module whose training batches can be given: the real rows and collator in an order that others share."""

    replayed: Batches | None = None

    def train_dataloader(self) -> DataLoader[Any]:
        """The given batches; without any, the data module's own."""
        loader = super().train_dataloader()
        if self.replayed is None:
            return loader
        return DataLoader(
            loader.dataset,
            batch_sampler=self.replayed,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
        )


def whole_batches(module: Any, size: int) -> Batches:
    """The training batches of an epoch in the data module's own order, without a smaller last one.

    Raises:
        UserError: there are too few rows for a batch.
    """
    batches = [list(batch) for batch in module.train_dataloader().batch_sampler]
    whole = [batch for batch in batches if len(batch) == size]
    if not whole:
        raise UserError(f"batch_size: {size} is more than the {sum(map(len, batches))} rows there are to train on")
    return whole


def taken(batches: Batches, start: int, count: int) -> Batches:
    """So many batches from a place on; after the last one comes the first."""
    return [batches[(start + i) % len(batches)] for i in range(count)]


def drawn(batches: Batches, count: int, seed: int) -> Batches:
    """So many batches at random, none twice unless there are too few."""
    order = random.Random(seed).sample(batches, len(batches))  # noqa: S311 - no secret
    return taken(order, 0, count)


def content(batch: Mapping[str, Mapping[str, Tensor]]) -> Content:
    """What a batch of either side holds: task -> ``input_ids``, ``attention_mask`` and ``labels``."""
    total = NOTHING
    for task, inputs in batch.items():
        real = int(inputs["attention_mask"].sum()) + int((inputs["labels"] != IGNORE_INDEX).sum())
        rows = len(inputs["labels"]) if task == "label" else 0
        total += Content(rows, real, inputs["input_ids"].numel() + inputs["labels"].numel())
    return total


def row_lengths(rows: Sequence[Mapping[str, Any]]) -> list[Lengths]:
    """The tokens of tokenised rows, as the data module's loaders read them; of a task's targets the first."""

    def first(row: Mapping[str, Any], task: str) -> int | None:
        return len(row[f"{task}.labels"][0]) if row[f"{task}.labels"] else None

    return [
        (
            len(row["label.input_ids"][0]),
            first(row, "label") or 0,
            None if first(row, "rationale") is None else len(row["rationale.input_ids"][0]),
            first(row, "rationale"),
        )
        for row in rows
    ]


def choose(rows: int, count: int, seed: int) -> list[int]:
    """Positions of so many rows at random, in the data's order; all where there are no more."""
    return sorted(random.Random(seed).sample(range(rows), min(count, rows)))  # noqa: S311 - no secret
