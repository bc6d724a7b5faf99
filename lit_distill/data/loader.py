"""A resumable training loader."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from lit_distill.batch import TaskBatch
from lit_distill.data.sampler import EpochSampler


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` with a state: the epoch and the number of its batches that were handed out.

    Has the arguments of `DataLoader`, so that Lightning can rebuild it. A trainer that prefetches must save the number
    of consumed batches instead.
    """

    _batches = 0
    _pass_epoch: int | None = None
    _skip = 0

    def __iter__(self) -> Iterator[TaskBatch]:  # type: ignore[override]
        self._pass_epoch = None
        return self._pass()

    def _pass(self) -> Iterator[TaskBatch]:
        # lazily, at the first batch: Lightning makes the iterator before it sets the epoch
        skip, self._skip = self._skip, 0
        if isinstance(self.sampler, EpochSampler):
            self._pass_epoch, self._batches = self.sampler.epoch, self.sampler.offset // self._rows_a_batch()
        else:
            self._pass_epoch, self._batches = 0, skip
        for batch in islice(super().__iter__(), skip, None):
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of batches handed out."""
        if not isinstance(self.sampler, EpochSampler):
            return {"epoch": 0, "batches": self._skip if self._pass_epoch is None else self._batches}
        epoch = self.sampler.epoch
        if self._pass_epoch == epoch:
            return {"epoch": epoch, "batches": self._batches}
        return {"epoch": epoch, "batches": self.sampler.offset // self._rows_a_batch()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue within that epoch at the next pass."""
        self._pass_epoch = None
        if isinstance(self.sampler, EpochSampler):
            self.sampler.start(state["epoch"], state["batches"] * self._rows_a_batch())
        else:
            # Lightning's sequential sampler for `overfit_batches`: skip what was seen
            self._skip = state["batches"]

    def _rows_a_batch(self) -> int:
        size = self.batch_size if self.batch_size is not None else getattr(self.batch_sampler, "batch_size", None)
        if size is None:
            raise TypeError("a ResumableLoader needs a batch size")
        return size
