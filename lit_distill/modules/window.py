"""Read the micro-batches of one optimizer step ahead, to count its targets before it begins."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

from lightning.pytorch.utilities import CombinedLoader

from lit_distill.batch import TaskBatch, target_tokens

Counts = Mapping[str, int]
"""Loss term -> number of items (target tokens of a task, say) that it is a mean over."""


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step on this rank."""

    start: int  # micro-batches of the epoch before this window
    size: int  # number of micro-batches: `accumulate_grad_batches`, or fewer at the end of an epoch
    counts: dict[str, int]  # counts of each term, summed over the window
    batch_counts: tuple[Counts, ...]  # counts of each term, for each micro-batch
    examples: int  # number of rows (of the task with the most)
    tokens: int  # number of source and target tokens, without padding


def _tokens(batch: TaskBatch) -> int:
    return sum(int(inputs["attention_mask"].sum()) + target_tokens(inputs) for inputs in batch.values())


class WindowLoader(CombinedLoader):
    """The training data loader, which reads one optimizer step ahead.

    It reads a step's micro-batches at once, counts their targets, and yields them one by one. Checkpoints save the
    loaders' states from before the incomplete step.

    Args:
        iterables: the training data loader, or a collection as ``CombinedLoader`` takes it.
        mode: how a collection is combined.
        size: gives the number of micro-batches in the next step.
        count: counts the items of each term in a micro-batch.
        prepare: may change a step's micro-batches in place, before they are counted.
        position: micro-batches of the first epoch that an earlier run has consumed.
        states: the loaders' states at that position, if they have any.
    """

    def __init__(
        self,
        iterables: Any,
        mode: Any,
        *,
        size: Callable[[], int],
        count: Callable[[TaskBatch], Counts],
        prepare: Callable[[list[TaskBatch]], None],
        position: int = 0,
        states: Sequence[dict[str, Any]] = (),
    ) -> None:
        super().__init__(iterables, mode)
        self._size, self._count, self._prepare = size, count, prepare
        self._position = self._to_skip = position
        self._to_load = list(states)
        self._ahead: deque[Any] = deque()
        self._handed_out: deque[Window] = deque()
        self._before: tuple[int, list[dict[str, Any]]] | None = None

    def __iter__(self) -> Self:
        states, self._to_load = self._to_load, []
        # Lightning does not load them into loaders that it made early, to count the steps
        self._load_state_dicts(states)
        super().__iter__()
        self._ahead.clear()
        self._handed_out.clear()
        self._before = None
        self._position, self._to_skip = self._to_skip, 0
        if not states:
            # stateless loaders: skip what was consumed
            for _ in range(self._position):
                next(self._iterator)  # type: ignore[arg-type]
        return self

    def __next__(self) -> Any:
        if not self._ahead:
            self._read_window()
        item, window = self._ahead.popleft()
        self._handed_out.append(window)
        return item

    def next_window(self) -> Window:
        """The window of the next micro-batch to train on (Lightning may have fetched further)."""
        return self._handed_out.popleft()

    def states_at(self, boundary: int) -> list[dict[str, Any]]:
        """The loaders' states after ``boundary`` micro-batches of the epoch, the last complete step."""
        if self._before is not None and boundary <= self._before[0]:
            return self._before[1]
        return super()._state_dicts()

    def _read_window(self) -> None:
        self._before = (self._position, super()._state_dicts())
        size = self._size()
        if self._iterator is not None and (length := len(self)) != float("inf"):
            # a resumed epoch's iterator would run past the full epoch's length
            size = min(size, int(length) - self._position)
        items: list[Any] = list(islice(iter(super().__next__, None), max(size, 1)))
        if not items:
            raise StopIteration
        batches: list[TaskBatch] = [batch for batch, _, _ in items]
        self._prepare(batches)
        batch_counts = tuple(self._count(batch) for batch in batches)
        names = {name: None for counts in batch_counts for name in counts}
        window = Window(
            start=self._position,
            size=len(items),
            counts={name: sum(counts.get(name, 0) for counts in batch_counts) for name in names},
            batch_counts=batch_counts,
            examples=sum(max((len(inputs["labels"]) for inputs in batch.values()), default=0) for batch in batches),
            tokens=sum(map(_tokens, batches)),
        )
        self._position += len(items)
        self._ahead.extend((item, window) for item in items)


class WindowSource:
    """Replaces a trainer's data source and wraps the loaders that it makes."""

    def __init__(self, source: Any, wrap: Callable[[Any], WindowLoader]) -> None:
        self.inner = source
        self._wrap = wrap

    def dataloader(self) -> WindowLoader:
        """The wrapped training loader."""
        return self._wrap(self.inner.dataloader())

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            # while it is being copied
            raise AttributeError(name)
        return getattr(self.inner, name)
