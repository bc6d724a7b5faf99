"""Which rows a rank sees, and in which order: a pure function of the seed and the epoch."""

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import DistributedSampler

from lit_distill.batch import PADDING_ROW


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
        shuffle: shuffle anew each epoch (training), or keep the order and pad (evaluation).
        seed: the run's seed; an epoch's order depends on it and on the epoch alone.
    """

    def __init__(
        self, dataset: Sized, num_replicas: int = 1, rank: int = 0, shuffle: bool = True, seed: int = 0
    ) -> None:
        # the base class's annotation asks for a `Dataset`, of which it uses the length alone
        super().__init__(dataset, num_replicas, rank, shuffle, seed)  # type: ignore[arg-type]
        self.rows = len(dataset)
        self.offset = 0

    def __iter__(self) -> Iterator[int]:
        own = self._order()[self.rank :: self.num_replicas]
        begin, self.offset = self.offset, 0
        return iter(own[begin:])

    def __len__(self) -> int:
        return int(self.num_samples)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; where it is another one, that pass begins at its first row."""
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
        missing = self.num_samples * self.num_replicas - self.rows
        if not self.shuffle:
            return list(range(self.rows)) + [PADDING_ROW] * missing
        # one integer out of two, without the collisions of `seed + epoch` between runs of neighbouring seeds
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order: list[int] = torch.randperm(self.rows, generator=generator).tolist()
        while missing > 0:
            order += order[:missing]
            missing = self.num_samples * self.num_replicas - len(order)
        return order
