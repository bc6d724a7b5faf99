"""Which rows a rank sees, and in which order: a pure function of the seed, the epoch and perhaps the rows' lengths."""

from collections.abc import Iterator, Sequence, Sized

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from lit_distill.batch import PADDING_ROW

WINDOW = 50
"""Batches (of all ranks) whose rows are sorted by length together, at most: enough for batches of similar length, few
enough that rows meet other rows in another epoch."""


class EpochSampler(DistributedSampler[int]):
    """Deals the rows of an epoch out to the ranks, and can begin in the middle of one.

    Rank ``r`` takes positions ``r, r + world, r + 2 * world, ...`` of the epoch's order. All ranks take as many: when
    shuffling (training), the order wraps around to fill the last round; without shuffling (evaluation) the last round
    is filled with ``PADDING_ROW``, so that no row counts twice.

    It is a `DistributedSampler` so that Lightning leaves it alone and calls `set_epoch`.

    Args:
        dataset: what is sampled; only its length is used.
        num_replicas: number of ranks.
        rank: this rank.
        shuffle: another order each epoch (training), or keep the order and pad (evaluation).
        seed: the run's seed.
        lengths: the rows' lengths: shuffling then makes batches of similar length (`by_length`), and without shuffling
            the longest row comes first.
        batch_size: rows of a batch on one rank, for batches by length.
        first: without shuffling, how many rows of the dataset come before all others whatever their length; all rows
            if not given.
        with_epoch: when shuffling, give ``epoch * rows + position``, for a dataset that draws anew each epoch.
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
        # the base class's annotation asks for a `Dataset`, of which it uses the length alone
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
        """Choose the epoch of the next pass; a pass of another epoch begins at its first row."""
        if epoch != self.epoch:
            self.offset = 0
        self.epoch = epoch

    def start(self, epoch: int, rows: int) -> None:
        """Let the next pass be the rest of an epoch: what follows the first ``rows`` rows of this rank.

        Only the next pass begins there; `len` stays the length of the whole epoch.
        """
        self.epoch = epoch
        self.offset = rows

    def _order(self) -> list[int]:
        positions = self.num_samples * self.num_replicas
        if not self.shuffle:
            order = list(range(self.rows))
            if self.lengths is not None:
                order[: self.first] = sorted(order[: self.first], key=self.lengths.__getitem__, reverse=True)
            return order + [PADDING_ROW] * (positions - self.rows)
        # one integer out of two, without the collisions of `seed + epoch` between runs of neighbouring seeds
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
    """An epoch's order ``(positions,)``, rearranged so that each batch holds rows of similar length (length bucketing).

    Windows of the order are sorted by ``lengths`` ``(rows,)`` and cut into batches (``batch_size`` counts all ranks),
    and the batches of all windows are shuffled. The rows that do not fill a batch are the order's last ones, whatever
    their length, and stay the last: no length is favoured. Within a batch the rows are sorted, so that ranks that take
    turns have rows of similar length as well.
    """
    count = len(order) // batch_size
    # several windows where there are few batches: a single one would make the same batches in each epoch
    window_size = batch_size * min(WINDOW, max(1, count // 4))
    whole = count * batch_size
    windows = [*order[:whole].split(window_size), order[whole:]]
    *windows, rest = [window[lengths[window].argsort(stable=True)] for window in windows]
    batches = [batch for window in windows for batch in window.split(batch_size)]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return torch.cat([*(batches[i] for i in shuffled), rest])


def rows_read(limit: float, rows: int, batch_size: int, world: int) -> int:
    """How many rows, the first ones of all ranks together, an evaluation reads that Lightning limits.

    ``limit`` is the trainer's ``limit_<stage>_batches``: an integer is a number of batches, a float a part of them.
    """
    batches = -(-rows // (batch_size * world))
    read = min(limit, batches) if isinstance(limit, int) else int(batches * limit)
    return min(rows, int(read) * batch_size * world)
