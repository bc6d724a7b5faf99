"""The order of rows on each rank: a pure function of seed, epoch and lengths."""

from collections.abc import Iterator, Sequence, Sized

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from lit_distill.batch import PADDING_ROW

WINDOW = 50
"""Maximum batches (of all ranks) that are sorted by length together: enough for similar lengths, few enough to mix rows
differently in each epoch.
"""


class EpochSampler(DistributedSampler[int]):
    """Distributes the rows of an epoch over ranks; can start within an epoch.

    Rank ``r`` takes positions ``r, r + world, r + 2 * world, ...``. The last round is filled by wrapping around when
    shuffling (training), and with ``PADDING_ROW`` otherwise (evaluation), so that no row counts twice.

    A `DistributedSampler`, so that Lightning does not replace it and calls `set_epoch`.

    Args:
        dataset: only its length is used.
        num_replicas: number of ranks.
        rank: this rank.
        shuffle: another order in each epoch (training), or the given order with padding (evaluation).
        seed: of the run.
        lengths: of the rows: for batches of similar length when shuffling (`by_length`), else longest first.
        batch_size: rows of a batch on one rank, for batches by length.
        first: without shuffling, this many first rows come before all others; all rows by default.
        with_epoch: when shuffling, give ``epoch * rows + position``, for datasets that sample in each epoch.
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
        first: int | None = None,
        with_epoch: bool = False,
    ) -> None:
        # annotated as `Dataset` in the base class, which only uses the length
        super().__init__(dataset, num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]
        self.rows = len(dataset)
        self.offset = 0
        self.lengths = lengths
        self.batch_size = batch_size
        self.first = self.rows if first is None else first
        self.with_epoch = with_epoch

    def __iter__(self) -> Iterator[int]:
        own = self._order()[self.rank :: self.num_replicas]
        begin, self.offset = self.offset, 0
        shift = self.epoch * self.rows if self.with_epoch else 0
        return iter([position + shift for position in own[begin:]])

    def __len__(self) -> int:
        return int(self.num_samples)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass; another epoch starts at its first row."""
        if epoch != self.epoch:
            self.offset = 0
        self.epoch = epoch

    def start(self, epoch: int, rows: int) -> None:
        """Start the next pass after the first ``rows`` rows of this rank; `len` stays the full length."""
        self.epoch = epoch
        self.offset = rows

    def _order(self) -> list[int]:
        positions = self.num_samples * self.num_replicas
        if not self.shuffle:
            order = list(range(self.rows))
            if self.lengths is not None:
                order[: self.first] = sorted(order[: self.first], key=self.lengths.__getitem__, reverse=True)
            return order + [PADDING_ROW] * (positions - self.rows)
        # unlike `seed + epoch`, without collisions between neighbouring seeds
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        shuffled = torch.randperm(self.rows, generator=generator)
        if positions > self.rows:
            shuffled = shuffled.repeat(-(-positions // self.rows))[:positions]
        if self.lengths is not None:
            batch_size = self.batch_size * self.num_replicas
            shuffled = by_length(shuffled, torch.tensor(self.lengths), batch_size, generator)
        order = shuffled.tolist()
        return order


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


def rows_read(limit: float, rows: int, batch_size: int, world: int) -> int:
    """Number of rows (of all ranks) that a limited evaluation reads.

    ``limit`` is ``limit_<stage>_batches``: an integer is a number of batches, a float a fraction.
    """
    batches = -(-rows // (batch_size * world))
    read = min(limit, batches) if isinstance(limit, int) else int(batches * limit)
    return min(rows, int(read) * batch_size * world)
