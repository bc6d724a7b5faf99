"""From tokenised rows to batches: the order of rows on each rank, their padding, and a loader that resumes."""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lit_distill.batch import PADDING_ROW, TaskBatch, pad_rows
from lit_distill.data.tokenize import TokenRow, TokenRows, paired
from lit_distill.errors import UserError
from lit_distill.files import cache_folder

# Maximum batches (of all ranks) that are sorted by length together: enough for similar lengths, few enough to mix rows
# differently in each epoch.
WINDOW = 50

IN_MEMORY = 2**20  # elements; an order with more is in a file
CHUNK = 2**14  # positions that are looked up together

Array = np.ndarray[Any, Any]


class EpochSampler(DistributedSampler[int]):
    """The order of rows on one rank, a function of seed, epoch and lengths.

    Rank ``r`` takes positions ``r, r + world, r + 2 * world, ...``. The last round is filled by wrapping around when
    shuffling (training), and with ``PADDING_ROW`` otherwise (evaluation), so that no row counts twice.

    The order is made at the start of a pass, four bytes a row (eight for longest first), and looked up as it is read.

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
        lengths: Sequence[int] | Array | None = None,
        batch_size: int = 1,
    ) -> None:
        # annotated as `Dataset` in the base class, which only uses the length
        super().__init__(dataset, num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]
        self.rows = len(dataset)
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.batch_size = batch_size
        # `TokenRows` tell from a position the epoch that they sample in
        self.with_epoch = shuffle and isinstance(dataset, TokenRows)

    def __iter__(self) -> Iterator[int]:
        return self.after(0)

    def after(self, skipped: int) -> Iterator[int]:
        """The rank's rows without the first ``skipped``, which are not looked up."""
        shift = self.epoch * self.rows if self.with_epoch else 0
        rows_at = self._shuffled() if self.shuffle else self._in_order()
        for start in range(skipped, self.num_samples, CHUNK):
            samples = np.arange(start, min(start + CHUNK, self.num_samples))
            yield from (rows_at(samples * self.num_replicas + self.rank) + shift).tolist()

    def _in_order(self) -> Callable[[Array], Array]:
        """Position -> row in evaluation."""
        if self.lengths is None:
            return lambda positions: np.where(positions < self.rows, positions, PADDING_ROW)
        # one number per row, all different, so that they are sorted in place: the length above the position
        order = _scratch(self.rows, np.int64)
        for start in range(0, self.rows, CHUNK):
            part = self.lengths[start : start + CHUNK].astype(np.int64)
            order[start : start + CHUNK] = -part << 32 | np.arange(start, start + len(part))
        order.sort()
        last = self.rows - 1
        return lambda positions: np.where(
            positions <= last, order[np.minimum(positions, last)] & 0xFFFFFFFF, PADDING_ROW
        )

    def _shuffled(self) -> Callable[[Array], Array]:
        """Position -> row in training, in 64 bits."""
        # unlike `seed + epoch`, without collisions between neighbouring seeds
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = _scratch(self.num_samples * self.num_replicas, np.int32)
        _permute(order[: self.rows], generator)
        for position in range(self.rows, len(order)):
            order[position] = order[position - self.rows]
        if self.lengths is not None:
            return by_length(order, self.lengths, self.batch_size * self.num_replicas, generator)
        return lambda positions: order[positions].astype(np.int64)


def by_length(order: Array, lengths: Array, batch_size: int, generator: torch.Generator) -> Callable[[Array], Array]:
    """Rearrange an epoch's order ``(positions,)`` into batches of rows of similar length (length bucketing).

    Windows of the order are sorted by ``lengths`` ``(rows,)``, in place, and cut into batches (``batch_size`` counts
    all ranks), which are then shuffled. The rows that do not fill a batch are the last of the order whatever their
    length, and stay last, so no length is favoured. Rows are sorted within a batch, so that ranks have similar lengths,
    too. Returns position -> row.
    """
    count = len(order) // batch_size
    # several windows even for few batches: one would make the same batches in each epoch
    window_size = batch_size * min(WINDOW, max(1, count // 4))
    whole = count * batch_size
    for start in range(0, len(order), window_size):
        # the rest is a window of its own
        for window in np.split(order[start : start + window_size], [max(whole - start, 0)]):
            window[:] = window[lengths[window].argsort(kind="stable")]
    batches = _scratch(count, np.int32)
    _permute(batches, generator)

    def rows_at(positions: Array) -> Array:
        batch, place = np.divmod(positions, batch_size)
        inside = batch < count
        batch[inside] = batches[batch[inside]]
        return cast(Array, order[batch * batch_size + place].astype(np.int64))

    return rows_at


def _permute(array: Array, generator: torch.Generator) -> None:
    """Fill an array with a random permutation, the same whatever its type."""
    out = torch.from_numpy(array)
    torch.randperm(len(array), generator=generator, out=out, dtype=out.dtype)


def _scratch(count: int, dtype: type) -> Array:
    """An array to fill: a large one in a file without a name, whose pages the system can take from the process."""
    if count <= IN_MEMORY:
        return np.empty(count, dtype)
    size, root = count * np.dtype(dtype).itemsize, cache_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root) as file:
            # a full disk is an error here, and would kill the process where a page is written
            for start in range(0, size, 2**20):
                file.write(bytes(min(2**20, size - start)))
            file.flush()
            return np.memmap(file, dtype, "r+", shape=count).view(np.ndarray)
    except OSError as error:
        told = f"the order of {count} rows cannot be kept in {str(root)!r} ({error}); set LIT_DISTILL_CACHE"
        raise UserError(told) from error


def collate(rows: Sequence[TokenRow], *, tasks: Sequence[str], pad_token_id: int, evaluation: bool) -> TaskBatch:
    """Pad rows to a batch: task name -> its tensors.

    In training a task has a row for each target, possibly none; in evaluation each task has every row once, in the same
    order, with only ``IGNORE_INDEX`` labels if there is no target.
    """
    batch: TaskBatch = {}
    for task in tasks:
        pairs: list[tuple[list[int], list[int]]] = []
        index: list[int] = []
        for row in rows:
            sources, targets = row[f"{task}.input_ids"], row[f"{task}.labels"]
            own = [(sources[0], (targets or [[]])[0])] if evaluation else paired(sources, targets)
            pairs += own
            index += [row["index"]] * (len(pairs) - len(index))
        batch[task] = pad_rows([source for source, _ in pairs], [target for _, target in pairs], pad_token_id)
        batch[task]["index"] = torch.tensor(index, dtype=torch.long)
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
                batch_sampler=self._rest(),
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

    def _rest(self) -> Iterable[list[int]]:
        """The batches of a pass that were not handed out."""
        batches = cast(BatchSampler, self.batch_sampler)
        if not isinstance(self.sampler, EpochSampler):
            return islice(batches, self._batches, None)
        # far into ten million rows, walking to the next takes seconds
        rows = self.sampler.after(self._batches * batches.batch_size)
        return BatchSampler(rows, batches.batch_size, batches.drop_last)

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
