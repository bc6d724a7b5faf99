"""Progress: bars on a terminal, a line every ten seconds elsewhere."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from tqdm import tqdm  # type: ignore[import-untyped]

LINE_SECONDS = 10.0
"""Seconds between two lines."""

BAR_DELAY = 1.0
"""Seconds that work takes before it is worth a bar."""

# no thread of tqdm's, which data loader workers would inherit
tqdm.monitor_interval = 0


def progress_bar() -> ProgressBar:
    """Lightning's own bar on a terminal, else `ProgressLines`."""
    return _Bars() if sys.stdout.isatty() else ProgressLines()


class _Bars(TQDMProgressBar):
    """Lightning's bars; what is printed after an exception stands below them."""

    def on_exception(self, *args: Any) -> None:
        for bar in (self._train_progress_bar, self._val_progress_bar, self._test_progress_bar):
            if bar is not None:
                bar.close()


class ProgressLines(ProgressBar):
    """Prints the metrics of each validation, and every ten seconds where a fit or an evaluation is."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._printed = -math.inf  # when the last line was
        self._began = 0.0
        self._first_step = 0
        self._steps = math.inf

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began, self._printed = time.monotonic(), -math.inf
        self._first_step, self._steps = trainer.global_step, trainer.estimated_stepping_batches

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        done = trainer.global_step - self._first_step
        if done and self._is_due():
            left = (time.monotonic() - self._began) / done * (self._steps - trainer.global_step)
            clock = "" if math.isinf(left) else f"; {timedelta(seconds=round(left))} left"
            self._print(self._metrics(trainer, "train/", "loss") + clock)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        stage = trainer.state.stage
        if stage is not None and self._is_due():
            batches = sum(getattr(trainer, f"num_{stage.dataloader_prefix}_batches"))
            self._print(f"{stage.value.replace('_', ' ')}: batch {args[3] + 1} of {batches}")

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end  # type: ignore[assignment]  # any arguments

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._print(self._metrics(trainer, "val/"))

    def _metrics(self, trainer: pl.Trainer, start: str, end: str = "") -> str:
        metrics = sorted(trainer.callback_metrics.items())
        numbers = [f"{name} {value:.4g}" for name, value in metrics if name.startswith(start) and name.endswith(end)]
        of_all = "" if math.isinf(self._steps) else f" of {self._steps}"
        return f"step {trainer.global_step}{of_all}: {', '.join(numbers)}"

    def _is_due(self) -> bool:
        return time.monotonic() - self._printed >= LINE_SECONDS

    def _print(self, line: str) -> None:
        self._printed = time.monotonic()
        if self._enabled:
            # flush, for readers that follow the file
            print(line, flush=True)


@contextmanager
def ticker(name: str, total: int | None, done: int = 0, unit: str = "it") -> Iterator[Callable[..., None]]:
    """Show on stderr how much of ``total`` is done; yields the function that adds a number, and a note to show."""
    printed = time.monotonic()
    bar = tqdm(
        desc=name, total=total, initial=done, unit=unit, unit_scale=unit == "B",
        disable=not sys.stderr.isatty(), dynamic_ncols=True, delay=BAR_DELAY,
    )  # fmt: skip

    def advance(number: int, note: str = "") -> None:
        nonlocal done, printed
        done += number
        bar.set_postfix_str(note, refresh=False)
        bar.update(number)
        if bar.disable and time.monotonic() - printed >= LINE_SECONDS:
            printed = time.monotonic()
            of_all = "" if total is None else f" of {total:,}"
            print(f"{name}: {done:,}{of_all}{note and ', '}{note}", file=sys.stderr, flush=True)

    with bar:
        yield advance
