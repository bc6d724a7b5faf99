"""One optimizer step: read its micro-batches ahead, count its targets, seed it, and rewind a checkpoint to its start.

Lightning saves the position of its loops, which may be inside an accumulation window, but neither random states nor the
sampler's position. Here a checkpoint is rewound to the start of the open window (the weights have not moved since), and
a step's random state is a function of the run's seed, the step and the rank.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import CombinedLoader

from lit_distill.batch import TaskBatch, target_tokens

Counts = Mapping[str, int]
"""Loss term -> number of items (target tokens of a task, say) that it is a mean over."""

Position = tuple[int, list[dict[str, Any]]]
"""Micro-batches of an epoch that are consumed, and the data loader's states then, if it has any."""


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step on this rank."""

    start: int  # micro-batches of the epoch before this window
    counts: list[Counts]  # of each micro-batch: `accumulate_grad_batches`, or fewer at the end of an epoch
    examples: int  # number of rows (of the task with the most)
    tokens: int  # number of source and target tokens, without padding

    @property
    def last(self) -> int:
        """Number of the last micro-batch in its epoch."""
        return self.start + len(self.counts) - 1

    @property
    def totals(self) -> dict[str, int]:
        """Counts of each term, summed over the micro-batches."""
        names = sorted({name for counts in self.counts for name in counts})
        return {name: sum(counts.get(name, 0) for counts in self.counts) for name in names}


class WindowLoader(CombinedLoader):
    """The training data loader, which reads a step's micro-batches at once, counts, and yields them one by one.

    Args:
        loader: the training data loader.
        size: gives the number of micro-batches in the next step.
        count: counts the items of each term in each of a step's micro-batches, and may change these in place before.
        resumed: see `Position`; of the first epoch.
    """

    def __init__(
        self, loader: Any, size: Callable[[], int], count: Callable[[list[TaskBatch]], list[Counts]], resumed: Position
    ) -> None:
        combined = isinstance(loader, CombinedLoader)
        super().__init__(*((loader.iterables, loader._mode) if combined else (loader, "max_size_cycle")))
        self._size, self._count, self._resumed = size, count, resumed
        self._items: Iterator[tuple[Any, Window]]
        self._handed_out: deque[Window] = deque()
        # where the step that is trained on begins, and each that was read after it
        self._positions: deque[Position] = deque()

    def __iter__(self) -> Self:
        (position, states), self._resumed = self._resumed, (0, [])
        # Lightning does not load them into loaders that it made early, to count the steps
        self._load_state_dicts(states)
        super().__iter__()
        if not states:
            # stateless loaders: skip what was consumed
            for _ in range(position):
                next(self._iterator)  # type: ignore[arg-type]
        self._positions.clear()
        self._handed_out.clear()
        self._items = self._read(position)
        return self

    def __next__(self) -> Any:
        item, window = next(self._items)
        self._handed_out.append(window)
        return item

    def next_window(self) -> Window:
        """The window of the next micro-batch to train on (Lightning may have fetched further)."""
        window = self._handed_out.popleft()
        while self._positions[0][0] < window.start:
            self._positions.popleft()
        return window

    def states_at(self, boundary: int) -> list[dict[str, Any]]:
        """The loader's states after ``boundary`` micro-batches of the epoch, the last complete step."""
        known = (states for position, states in self._positions if position >= boundary)
        return next(known, None) or super()._state_dicts()

    def _read(self, position: int) -> Iterator[tuple[Any, Window]]:
        """Each micro-batch from a position on, with its window, which is read at once."""
        while True:
            self._positions.append((position, super()._state_dicts()))
            size = self._size()
            # without one, a stream
            if self._iterator is not None and (length := sized_len(self)) is not None:
                # a resumed epoch's iterator would run past the full epoch's length
                size = min(size, length - position)
            items: list[Any] = list(islice(iter(super().__next__, None), max(size, 1)))
            if not items:
                return
            batches: list[TaskBatch] = [batch for batch, _, _ in items]
            window = Window(
                start=position,
                counts=self._count(batches),
                examples=sum(max((len(inputs["labels"]) for inputs in batch.values()), default=0) for batch in batches),
                tokens=sum(map(_tokens, batches)),
            )
            position += len(items)
            for item in items:
                yield item, window


def _tokens(batch: TaskBatch) -> int:
    return sum(int(inputs["attention_mask"].sum()) + target_tokens(inputs) for inputs in batch.values())


def seed_step(seed: int, step: int, rank: int, *, preparing: bool = False) -> None:
    """Seed every random generator for one optimizer step (for dropout above all), or for its `prepare`."""
    words = np.random.SeedSequence((seed, step, rank, 1) if preparing else (seed, step, rank)).generate_state(2)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
    random.seed(int(words[1]))


def rewind(checkpoint: dict[str, Any], trainer: pl.Trainer) -> None:
    """Set the loop's progress in a checkpoint back to the last complete optimizer step."""
    windows = trainer.fit_loop._combined_loader
    if not isinstance(windows, WindowLoader):
        return
    state, accumulate = checkpoint["loops"]["fit_loop"], trainer.accumulate_grad_batches
    batches, epochs = state["epoch_loop.batch_progress"], state["epoch_progress"]
    ready, processed = batches["current"]["ready"], batches["current"]["processed"]
    over = epochs["current"]["started"] == epochs["current"]["completed"]
    # between two epochs the loop still counts the last epoch's batches as the next one's
    between = over and batches["is_last_batch"]
    whole = batches["is_last_batch"] and processed == ready
    boundary = 0 if between else processed if whole else processed // accumulate * accumulate
    open_batches = 0 if between else ready - boundary
    total = batches["total"]["ready"] - open_batches
    for progress, value in ((batches["current"], boundary), (batches["total"], total)):
        progress.update(ready=value, started=value, processed=value, completed=value)
    if open_batches or between:
        batches["is_last_batch"] = False
    for progress in (epochs["current"], epochs["total"]):
        if over and ready and not between:
            # training stopped inside this epoch, but Lightning counted it as complete
            progress["completed"] -= 1
        # an epoch whose batches are all done but whose end is not: resumed from between its end's own hooks, Lightning
        # takes the next epoch for done as well
        progress["processed"] = progress["completed"]
    # loggers count steps by this one; Lightning raises it only after the hooks that save
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = trainer.global_step
    # a validation that was interrupted by the checkpoint is not resumed
    validation = state["epoch_loop.val_loop.batch_progress"]
    for progress in (validation["current"], validation["total"]):
        progress.update(dict.fromkeys(progress, 0))
    validation["is_last_batch"] = False
    state["state_dict"].pop("combined_loader", None)
    if (states := windows.states_at(boundary)) and not between:
        state["state_dict"]["combined_loader"] = _of_ranks(states, trainer.world_size)


def _of_ranks(states: list[dict[str, Any]], world: int) -> list[dict[str, Any]]:
    """The loaders' states, of all ranks where each reads its own shards: rank 0 alone writes a checkpoint."""
    if world == 1 or not any("streams" in state for state in states):
        return states
    gathered: list[Any] = [None] * world
    # like the barrier after saving, on all ranks
    torch.distributed.all_gather_object(gathered, states)
    return [{"ranks": list(of_loader)} for of_loader in zip(*gathered, strict=True)]
