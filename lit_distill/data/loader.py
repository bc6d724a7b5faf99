"""A training loader that says how far an epoch is, and goes on from there."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from lit_distill.batch import TaskBatch
from lit_distill.data.sampler import EpochSampler


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` with a state: the epoch, and how many of its batches were handed out.

    Takes the arguments of `DataLoader` and nothing else, so that Lightning can build it again. Its state counts what
    was handed out; a trainer that fetches ahead has to save the number that it consumed instead.
    """

    _batches = 0
    _pass_epoch: int | None = None
    _skip = 0

    def __iter__(self) -> Iterator[TaskBatch]:  # type: ignore[override]
        self._pass_epoch = None
        return self._pass()

    def _pass(self) -> Iterator[TaskBatch]:
        # lazily, with the first batch: Lightning makes the iterator before it tells the sampler the epoch
        skip, self._skip = self._skip, 0
        if isinstance(self.sampler, EpochSampler):
            self._pass_epoch, self._batches = self.sampler.epoch, self.sampler.offset // self._rows_a_batch()
        else:
            self._pass_epoch, self._batches = 0, skip
        for batch in islice(super().__iter__(), skip, None):
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of its batches that were handed out."""
        if not isinstance(self.sampler, EpochSampler):
            return {"epoch": 0, "batches": self._skip if self._pass_epoch is None else self._batches}
        epoch = self.sampler.epoch
        if self._pass_epoch == epoch:
            return {"epoch": epoch, "batches": self._batches}
        return {"epoch": epoch, "batches": self.sampler.offset // self._rows_a_batch()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next pass be the rest of that epoch."""
        self._pass_epoch = None
        if isinstance(self.sampler, EpochSampler):
            self.sampler.start(state["epoch"], state["batches"] * self._rows_a_batch())
        else:
            # Lightning puts a sequential sampler here for `overfit_batches`: what was seen is read again and dropped
            self._skip = state["batches"]

    def _rows_a_batch(self) -> int:
        size = self.batch_size if self.batch_size is not None else getattr(self.batch_sampler, "batch_size", None)
        if size is None:
            raise TypeError("a ResumableLoader needs a batch size")
        return size
