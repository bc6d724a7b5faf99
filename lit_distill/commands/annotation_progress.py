"""How far a job of asking is: counted sample by sample, shown as a bar."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from lit_distill.annotation.record import Annotation

LINE_SECONDS = 30.0
"""Between two lines where no bar can be drawn."""


class Tally:
    """Counts of a job's samples so far, those of its earlier runs included.

    Args:
        counts: whether a sample is one of the job's.
    """

    def __init__(self, counts: Callable[[Annotation], bool]) -> None:
        self._counts = counts
        self.total = 0
        self.done = self.answers = self.parsed = self.judged = self.agree = self.errors = self.tokens = 0
        self.cost: float | None = None
        self._before, self._began = 0, time.monotonic()

    def add(self, annotation: Annotation) -> None:
        """Count a sample."""
        if not self._counts(annotation):
            return
        self.done += 1
        self.tokens += (annotation.input_tokens or 0) + (annotation.output_tokens or 0)
        if annotation.cost is not None:
            self.cost = (self.cost or 0.0) + annotation.cost
        if annotation.text is None:
            self.errors += 1
            return
        self.answers += 1
        self.parsed += bool(annotation.parsed)
        self.judged += annotation.agrees is not None
        self.agree += bool(annotation.agrees)

    def begin(self, total: int) -> None:
        """From here on time counts; ``total`` samples are wanted."""
        self.total, self._before, self._began = total, self.done, time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def line(self) -> str:
        """The counts in words."""
        rate = (self.done - self._before) / max(self.seconds, 1e-9)
        parts = [f"{rate:.1f}/s"]
        if rate:
            parts.append(f"{timedelta(seconds=round(max(0, self.total - self.done) / rate))} left")
        parts.append(f"{_short(self.tokens)} tokens")
        if self.cost is not None:
            parts.append(f"${self.cost:.2f}")
        if self.answers:
            parts.append(f"parsed {self.parsed / self.answers:.0%}")
        if self.judged:
            parts.append(f"agree {self.agree / self.judged:.0%}")
        if self.errors:
            parts.append(f"errors {self.errors}")
        return ", ".join(parts)


@contextmanager
def progress(tally: Tally, name: str) -> Iterator[None]:
    """Show a bar on stderr as long as the block runs; where that is no terminal, a line from time to time."""
    console = Console(stderr=True)
    if not console.is_terminal:
        ended = threading.Event()

        def tell() -> None:
            while not ended.wait(LINE_SECONDS):
                print(f"{name}: {tally.done} of {tally.total}, {tally.line()}", file=sys.stderr, flush=True)

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        return
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        _Counts(tally),
        console=console,
        refresh_per_second=4,
    )
    with bar:
        task = bar.add_task(name, total=tally.total)
        try:
            yield
        finally:
            bar.update(task, completed=min(tally.done, tally.total))


class _Counts(ProgressColumn):
    """Reads the tally each time it is drawn, and moves the bar by it."""

    max_refresh = 0.25

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def render(self, task: Task) -> Text:
        task.completed = min(self._tally.done, self._tally.total)
        return Text(self._tally.line(), no_wrap=True, overflow="ellipsis")


def _short(number: int) -> str:
    for size, letter in ((1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return str(number)
