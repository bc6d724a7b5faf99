"""Progress: tqdm bars on a terminal, plain lines otherwise."""

import logging
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from torch.utils.data import DataLoader
from tqdm import tqdm  # type: ignore[import-untyped]
from tqdm.contrib.logging import logging_redirect_tqdm  # type: ignore[import-untyped]

_LINE_SECONDS = 10.0
"""Minimum seconds between plain lines; in a long run a hundredth of its time."""
_BAR_SECONDS = 0.2
"""Minimum seconds between updates of a bar, which read losses from the device."""


class _Bar(tqdm):  # type: ignore[misc]  # it has no types
    """A bar on a terminal, else lines, over the steps of a fit or the rows of an evaluation.

    Args:
        desc: what is counted.
        total: steps or rows; ``None`` if unknown.
        numbers: gives the metrics to show; only for a fit.
        initial: steps of earlier runs.
    """

    # no tqdm thread, which data loader workers would inherit
    monitor_interval = 0

    def __init__(
        self, desc: str, total: int | None, numbers: Callable[[], str] | None = None, initial: int = 0
    ) -> None:
        self.numbers = numbers
        self.on_terminal = sys.stdout.isatty()
        self.paused = 0.0
        """Seconds spent in evaluation."""
        shape = "{desc} {bar} {n_fmt}/{total_fmt} {pace:.3g}/s {left} {numbers}"
        super().__init__(
            desc=desc,
            total=total,
            initial=initial,
            file=sys.stdout,
            leave=False,
            dynamic_ncols=self.on_terminal,
            bar_format=shape,
            miniters=1,
            # no line before there is progress
            delay=0.0 if self.on_terminal else 1e-9,
        )
        self.desc = desc

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return float(super().format_dict["elapsed"])

    @property
    def format_dict(self) -> dict[str, Any]:
        """For tqdm: the rate without evaluation, the remaining time with it."""
        known: dict[str, Any] = super().format_dict
        done, seconds = self.n - self.initial, known["elapsed"]
        left = _clock(seconds / done * (self.total - self.n)) if done and self.total is not None else ""
        pace = done / max(seconds - self.paused, 1e-9)
        return known | {"pace": pace, "left": left, "numbers": self.numbers() if self.numbers is not None else ""}

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar, or print a line."""
        if self.on_terminal:
            return bool(super().display(msg, pos))
        if msg is None:
            shown = self.format_dict
            left = f", {shown['left']} left" if shown["left"] else ""
            if self.numbers is not None:
                print(f"{self.step}: {shown['numbers']}; {shown['pace']:.3g} steps/s{left}", flush=True)
            elif self.n != self.total:
                print(f"{self.desc}: {self.n} of {self.total} rows{left}", flush=True)
        return False

    @property
    def step(self) -> str:
        """The current step of a fit."""
        return f"step {self.n}" if self.total is None else f"step {self.n} of {self.total}"

    def advance(self, n: int) -> None:
        """Count, and show if it is time; always for the first and last step of a fit."""
        must = self.numbers is not None and (self.n == self.initial or self.n + n == self.total)
        every = _BAR_SECONDS if self.on_terminal else max(_LINE_SECONDS, self.seconds / 100)
        self.mininterval = 0 if must else every
        self.update(n if self.total is None else min(n, self.total - self.n))


class Progress(ProgressBar):
    """Shows progress on rank 0: optimizer steps of a fit, rows of an evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._fit: _Bar | None = None
        self._rows: _Bar | None = None
        self._logs = ExitStack()

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print Lightning's messages above the bars."""
        super().setup(trainer, pl_module, stage)
        log = logging.getLogger("lightning.pytorch")
        if self._enabled and sys.stdout.isatty():
            self._logs.enter_context(logging_redirect_tqdm([log]))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the bar of steps."""
        steps, done = trainer.estimated_stepping_batches, trainer.global_step
        total = None if math.isinf(steps) else int(steps)
        self._line(f"fit: {'' if total is None else f'{total} '}steps{f', {done} of them done' if done else ''}")
        if self._enabled:
            self._fit = _Bar("fit", total, lambda: self._losses(trainer), done)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Count a complete step."""
        if self._fit is not None and self._fit.n != trainer.global_step:
            self._fit.advance(trainer.global_step - self._fit.n)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the bar of rows."""
        name = {"val": "validation"}.get(prefix := str(trainer.state.stage.dataloader_prefix), prefix)  # type: ignore[union-attr]
        batches = getattr(trainer, f"num_{prefix}_batches")
        if trainer.sanity_checking:
            name, batches = "sanity check", trainer.num_sanity_val_batches
        rows, loader = None, getattr(trainer, f"{prefix}_dataloaders")
        # Lightning wraps the sampler of predict, and the loader has no length then
        batch_size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        if isinstance(loader, DataLoader) and batch_size is not None and not math.isinf(sum(batches)):
            read = int(sum(batches)) * batch_size * trainer.world_size
            rows = min(read, len(loader.dataset))  # type: ignore[arg-type]  # sized, or its batches had no number
        self._line(f"{name} begins" if rows is None else f"{name}: {rows} rows")
        if self._enabled:
            if self._fit is not None and self._fit.on_terminal:
                self._fit.refresh()
            self._rows = _Bar(name, rows)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Count the rows of a batch."""
        if self._rows is not None:
            rows = max((len(inputs["labels"]) for inputs in args[2].values()), default=0)
            self._rows.advance(rows * trainer.world_size)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end  # type: ignore[assignment]  # any arguments

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the metrics on a line of their own."""
        if (rows := self._rows) is None:
            return
        if self._fit is not None:
            self._fit.paused += rows.seconds
            found = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            if found and not trainer.sanity_checking:
                (tqdm.write if rows.on_terminal else print)(f"{self._fit.step}: {_numbers(found)}")
        self._line(f"{rows.desc}: {rows.n} rows in {_clock(rows.seconds)}")
        rows.close()
        self._rows = None

    on_test_end = on_predict_end = on_validation_end

    def on_train_end(self, *args: Any) -> None:
        """Close the bar."""
        for bar in (self._rows, self._fit):
            if bar is not None:
                bar.close()
        self._rows = self._fit = None

    on_exception = on_train_end  # type: ignore[assignment]  # any arguments

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close all bars and restore Lightning's messages."""
        self.on_train_end()
        self._logs.close()

    def _losses(self, trainer: pl.Trainer) -> str:
        if sys.stdout.isatty():
            return _numbers({name.rpartition("/")[2]: x for name, x in trainer.progress_bar_metrics.items()}, " ")
        known = trainer.callback_metrics
        return _numbers({name: x for name, x in known.items() if name.startswith("train/") and name.endswith("loss")})

    def _line(self, text: str) -> None:
        if self._enabled and not sys.stdout.isatty():
            # flush, for readers that follow the file
            print(text, flush=True)


def _numbers(values: Mapping[str, Any], between: str = ", ") -> str:
    return between.join(f"{name} {float(value):.4g}" for name, value in sorted(values.items()))


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
