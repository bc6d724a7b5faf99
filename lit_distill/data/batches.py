"""From tokenised rows to batches: the order of rows on each rank, their padding, and a loader that resumes."""

from collections.abc import Iterator, Sequence, Sized
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lit_distill.batch import PADDING_ROW, TaskBatch, pad_rows
from lit_distill.data.tokenize import TokenRow, TokenRows

# Maximum batches (of all ranks) that are sorted by length together: enough for similar lengths, few enough to mix rows
# differently in each epoch.
WINDOW = 50


class EpochSampler(DistributedSampler[int]):
    """The order of rows on one rank, a function of seed, epoch and lengths.

    Rank ``r`` takes positions ``r, r + world, r + 2 * world, ...``. The last round is filled by wrapping around when
    shuffling (training), and with ``PADDING_ROW`` otherwise (evaluation), so that no row counts twice.

    A `DistributedSampler`, so that Lightning does not replace it and calls `set_epoch`. Beyond its arguments:

    Args:
        lengths: of the rows: for batches of similar length when shuffling (`by_length`), else longest first.
        batch_size: rows of a batch on one rank, for batches by length.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int = 1,
        rank: int = 0,
        shuffle: bool = True,
        seed: int = 0,
        *,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
    ) -> None:
        # annotated as `Dataset` in the base class, which only uses the length
        super().__init__(dataset, num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]
        self.rows = len(dataset)
        self.lengths = lengths
        self.batch_size = batch_size
        # `TokenRows` tell from a position the epoch that they sample in
        self.with_epoch = shuffle and isinstance(dataset, TokenRows)

    def __iter__(self) -> Iterator[int]:
        shift = self.epoch * self.rows if self.with_epoch else 0
        return iter([position + shift for position in self._order()[self.rank :: self.num_replicas]])

    def _order(self) -> list[int]:
        positions = self.num_samples * self.num_replicas
        if not self.shuffle:
            order = list(range(self.rows))
            if self.lengths is not None:
                order.sort(key=self.lengths.__getitem__, reverse=True)
            return order + [PADDING_ROW] * (positions - self.rows)
        # unlike `seed + epoch`, without collisions between neighbouring seeds
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        shuffled = torch.randperm(self.rows, generator=generator)
        if positions > self.rows:
            shuffled = shuffled.repeat(-(-positions // self.rows))[:positions]
        if self.lengths is not None:
            batch_size = self.batch_size * self.num_replicas
            shuffled = by_length(shuffled, torch.tensor(self.lengths), batch_size, generator)
        return cast(list[int], shuffled.tolist())


def by_length(order: Tensor, lengths: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """Rearrange an epoch's order ``(positions,)`` into batches of rows of similar length (length bucketing).

    Windows of the order are sorted by ``lengths`` ``(rows,)`` and cut into batches (``batch_size`` counts all ranks),
    which are then shuffled. The rows that do not fill a batch are the last of the order whatever their length, and stay
    last, so no length is favoured. Rows are sorted within a batch, so that ranks have similar lengths, too.
    """
    count = len(order) // batch_size
    # several windows even for few batches: one would make the same batches in each epoch
    window_size = batch_size * min(WINDOW, max(1, count // 4))
    whole = count * batch_size
    windows = [*order[:whole].split(window_size), order[whole:]]
    *windows, rest = [window[lengths[window].argsort(stable=True)] for window in windows]
    batches = [batch for window in windows for batch in window.split(batch_size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return torch.cat([*(batches[i] for i in shuffled), rest])


def collate(rows: Sequence[TokenRow], *, tasks: Sequence[str], pad_token_id: int, evaluation: bool) -> TaskBatch:
    """Pad rows to a batch: task name -> its tensors.

    In training a task has a row for each target, possibly none; in evaluation each task has every row once, in the same
    order, with only ``IGNORE_INDEX`` labels if there is no target.
    """
    batch: TaskBatch = {}
    for task in tasks:
        pairs = [
            (row, target)
            for row in rows
            for target in ((row[f"{task}.labels"] or [[]])[:1] if evaluation else row[f"{task}.labels"])
        ]
        sources = [row[f"{task}.input_ids"] for row, _ in pairs]
        batch[task] = pad_rows(sources, [target for _, target in pairs], pad_token_id)
        batch[task]["index"] = torch.tensor([row["index"] for row, _ in pairs], dtype=torch.long)
    return batch


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` with a state: the epoch and the number of its batches that were handed out.

    Has the arguments of `DataLoader`, so that Lightning can rebuild it. A trainer that prefetches must save the number
    of consumed batches instead.
    """

    _epoch = 0
    _batches = 0  # handed out in that epoch
    _skip = 0  # in the next pass

    def __iter__(self) -> Iterator[TaskBatch]:  # type: ignore[override]
        self._batches = self._skip
        return self._pass()

    def _pass(self) -> Iterator[TaskBatch]:
        # lazily, at the first batch: Lightning makes the iterator before it sets the epoch
        state, self._skip = self.state_dict(), 0
        self._epoch, self._batches = state["epoch"], state["batches"]
        if not self._batches:
            batches = super().__iter__()
        else:
            rest = DataLoader(
                self.dataset,
                batch_sampler=list(islice(cast(BatchSampler, self.batch_sampler), self._batches, None)),
                collate_fn=self.collate_fn,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                worker_init_fn=self.worker_init_fn,
                multiprocessing_context=self.multiprocessing_context,
            )
            batches = iter(rest)
        for batch in batches:
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of batches handed out."""
        # the sequential sampler that Lightning takes for `overfit_batches` has no epoch
        epoch = getattr(self.sampler, "epoch", 0)
        return {"epoch": epoch, "batches": self._batches if epoch == self._epoch else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue within that epoch at the next pass."""
        self._epoch, self._batches = state["epoch"], state["batches"]
        self._skip = self._batches
        if isinstance(self.sampler, EpochSampler):
            self.sampler.set_epoch(self._epoch)
