"""How far a run is: bars on a terminal, plain lines in a file."""

import logging
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeGuard

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, Timer
from rich import progress as rich
from rich.console import Console
from torch.utils.data import DataLoader

_LINE_SECONDS = 10.0
"""Between two plain lines at least; in a long run a hundredth of its time, so that there are some hundreds of them."""
_BAR_SECONDS = 0.2
"""Between two updates of a bar at least: each reads the losses, for which a device is waited for."""


@dataclass
class _Stage:
    """A pass over something: the steps of a fit, the rows of an evaluation."""

    name: str
    total: int | None
    """Steps or rows; ``None`` where nobody knows."""
    first: int
    """Steps that an earlier run has taken."""
    done: int
    began: float
    shown: float = -math.inf
    """When it was last shown."""
    paused: float = 0.0
    """Seconds that evaluation took within it."""
    task: rich.TaskID | None = None
    """Its bar."""

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def left(self) -> float | None:
        """Seconds that the rest takes if it is as fast as what was done, evaluation included."""
        done = self.done - self.first
        return None if self.total is None or not done else self.seconds() / done * (self.total - self.done)


class Progress(ProgressBar):
    """Shows how far a run is, on rank 0: of a fit the optimizer steps of the whole run, of an evaluation its rows.

    On a terminal these are bars. Elsewhere (a file, a pipe, a notebook) they are plain lines: after the first step and
    the last one, every ten seconds in between, and when an evaluation begins and ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bars: rich.Progress | None = None
        self._logs: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._fit: _Stage | None = None
        self._evaluation: _Stage | None = None

    def disable(self) -> None:
        """Show nothing: Lightning asks for it on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    # ------------------------------------------------------------------ training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the run's steps."""
        steps = trainer.estimated_stepping_batches
        self._fit = self._begin("fit", None if math.isinf(steps) else int(steps), first=trainer.global_step)
        if self._fit is not None:
            resumed = f", {self._fit.first} of them done" if self._fit.first else ""
            self._line(f"fit: {'' if self._fit.total is None else f'{self._fit.total} '}steps{resumed}")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Show a complete step, where it is time to."""
        stage = self._fit
        if stage is None or stage.done == trainer.global_step:
            return
        stage.done = trainer.global_step
        if not self._due(stage):
            return
        pace = (stage.done - stage.first) / max(stage.seconds() - stage.paused, 1e-9)
        left = _shortest(stage.left(), _time_limit(trainer))
        if self._bars is not None:
            known = trainer.progress_bar_metrics
            losses = {name.rpartition("/")[2]: value for name, value in known.items()}
            self._bar(stage, f"{pace:.3g}/s", left, _numbers(losses, " "))
        else:
            losses = {name: float(value) for name, value in trainer.callback_metrics.items() if _is_train_loss(name)}
            rest = "" if left is None else f", {_clock(left)} left"
            self._line(f"{_step(stage)}: {_numbers(losses)}; {pace:.3g} steps/s{rest}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The bars go."""
        self._end(self._fit)
        self._fit = None

    # ------------------------------------------------------------------ evaluation

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the rows."""
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        name = "sanity check" if trainer.sanity_checking else "validation"
        self._begin_rows(trainer, name, trainer.val_dataloaders, batches)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the rows."""
        self._begin_rows(trainer, "test", trainer.test_dataloaders, trainer.num_test_batches)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the rows."""
        self._begin_rows(trainer, "predict", trainer.predict_dataloaders, trainer.num_predict_batches)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Show its rows, where it is time to."""
        self._advance(trainer, args[2])

    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Show its rows, where it is time to."""
        self._advance(trainer, args[2])

    def on_predict_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Show its rows, where it is time to."""
        self._advance(trainer, args[2])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show what it found."""
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self._end_rows({} if trainer.sanity_checking else found)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A table follows."""
        self._end_rows({})

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The bars go."""
        self._end_rows({})

    def _begin_rows(self, trainer: pl.Trainer, name: str, loader: Any, batches: Any) -> None:  # noqa: ANN401 - Lightning's
        if self._fit is not None and self._fit.task is not None and self._bars is not None:
            # a step that came too soon after the last that was shown
            self._bars.update(self._fit.task, completed=self._fit.done)
        rows = None
        # Lightning wraps the sampler of predict, and then the loader itself has no size
        batch_size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        if isinstance(loader, DataLoader) and batch_size is not None and not math.isinf(sum(batches)):
            read = int(sum(batches)) * batch_size * trainer.world_size
            rows = min(read, len(loader.dataset))  # type: ignore[arg-type]  # sized, or its batches had no number
        self._evaluation = self._begin(name, rows)
        self._line(f"{name} begins" if rows is None else f"{name}: {rows} rows")
        if self._evaluation is not None:
            # that it began has just been shown
            self._evaluation.shown = time.monotonic()

    def _advance(self, trainer: pl.Trainer, batch: Mapping[str, Any]) -> None:
        stage = self._evaluation
        if stage is None:
            return
        rows = max((len(inputs["labels"]) for inputs in batch.values()), default=0) * trainer.world_size
        stage.done = stage.done + rows if stage.total is None else min(stage.done + rows, stage.total)
        if not self._due(stage):
            return
        left = stage.left()
        self._bar(stage, f"{stage.done / max(stage.seconds(), 1e-9):.3g}/s", left, "")
        if left:
            self._line(f"{stage.name}: {stage.done} of {stage.total} rows, {_clock(left)} left")

    def _end_rows(self, found: Mapping[str, float]) -> None:
        stage = self._evaluation
        if stage is None:
            return
        if self._fit is not None:
            self._fit.paused += stage.seconds()
            if found:
                # beside bars as well, which only show the last one
                print(f"{_step(self._fit)}: {_numbers(found)}", flush=True)
        self._line(f"{stage.name}: {stage.done} rows in {_clock(stage.seconds())}")
        self._end(stage)
        self._evaluation = None

    # ------------------------------------------------------------------ bars and lines

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        for handler, stream in self._logs:
            handler.setStream(stream)
        self._logs = []
        self._bars = self._fit = self._evaluation = None

    def _begin(self, name: str, total: int | None, first: int = 0) -> _Stage | None:
        if not self._enabled:
            return None
        stage = _Stage(name, total, first, first, time.monotonic())
        if sys.stdout.isatty():
            if self._bars is None:
                self._bars = rich.Progress(
                    "{task.description}",
                    rich.BarColumn(bar_width=None),
                    rich.MofNCompleteColumn(),
                    "{task.fields[pace]}",
                    "{task.fields[left]}",
                    "{task.fields[numbers]}",
                    expand=True,
                    transient=True,
                    # rich's own one knows the output of the process's first message
                    console=Console(),
                    # drawn where a number changes
                    auto_refresh=False,
                )
                self._bars.start()
                # Lightning's messages above the bars, as the bars have it of what else is printed
                handlers = [each for each in logging.getLogger("lightning.pytorch").handlers if _on_terminal(each)]
                self._logs = [(each, each.stream) for each in handlers]
                for each in handlers:
                    each.setStream(sys.stderr)
            stage.task = self._bars.add_task(name, total=total, completed=first, pace="", left="", numbers="")
            self._bars.refresh()
        return stage

    def _end(self, stage: _Stage | None) -> None:
        if stage is not None and stage.task is not None and self._bars is not None:
            self._bars.remove_task(stage.task)
            if not self._bars.tasks:
                self._stop()

    def _due(self, stage: _Stage) -> bool:
        now = time.monotonic()
        every = _BAR_SECONDS if self._bars is not None else max(_LINE_SECONDS, stage.seconds() / 100)
        if now - stage.shown < every and stage.done != stage.total:
            return False
        stage.shown = now
        return True

    def _bar(self, stage: _Stage, pace: str, left: float | None, numbers: str) -> None:
        if self._bars is not None and stage.task is not None:
            shown = "" if left is None else _clock(left)
            self._bars.update(stage.task, completed=stage.done, pace=pace, left=shown, numbers=numbers, refresh=True)

    def _line(self, text: str) -> None:
        if self._enabled and self._bars is None:
            # at once, for whoever follows the file
            print(text, flush=True)


def _on_terminal(handler: logging.Handler) -> TypeGuard[logging.StreamHandler[Any]]:
    return isinstance(handler, logging.StreamHandler) and handler.stream.isatty()


def _step(stage: _Stage) -> str:
    return f"step {stage.done}" if stage.total is None else f"step {stage.done} of {stage.total}"


def _is_train_loss(name: str) -> bool:
    return name.startswith("train/") and name.endswith("loss")


def _numbers(values: Mapping[str, Any], between: str = ", ") -> str:
    return between.join(f"{name} {float(value):.4g}" for name, value in sorted(values.items()))


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _time_limit(trainer: pl.Trainer) -> float | None:
    """Seconds until ``trainer.max_time`` ends the run."""
    timer = next((one for one in trainer.callbacks if isinstance(one, Timer)), None)  # type: ignore[attr-defined]
    return None if timer is None else timer.time_remaining()


def _shortest(*seconds: float | None) -> float | None:
    return min((one for one in seconds if one is not None), default=None)
