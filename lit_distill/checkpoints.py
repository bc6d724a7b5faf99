"""Atomic checkpoints, stopping on signals, and the history of resumed runs."""

import errno
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lit_distill.errors import UserError
from lit_distill.files import atomic_write
from lit_distill.interrupts import Interrupted, on_signals


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint IO with atomic writes: to a file beside the target, then renamed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        folder = Path(path).parent
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".*.ckpt.*.tmp"):
            # left by a killed run; the next may save under another name
            stale.unlink(missing_ok=True)
        try:
            with atomic_write(path, "wb") as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:
            # what torch makes of a write that failed
            if "inline_container" not in str(error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def save_atomically(trainer: pl.Trainer) -> None:
    """Make a trainer use `AtomicCheckpointIO`, unless its strategy has its own checkpoint IO."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def last_good_checkpoint(trainer: pl.Trainer) -> str:
    """The checkpoint to resume from, for a message."""
    good = "none yet"
    for one in trainer.checkpoint_callbacks:
        if not isinstance(one, ModelCheckpoint):
            continue
        # with one process, the last complete step is saved on the exception
        saves = one.save_on_exception and trainer.world_size == 1
        if saves and one._last_global_step_saved != trainer.global_step:
            good = str(Path(str(one.dirpath)) / f"{one.filename}{one.FILE_EXTENSION}")
        elif one.best_model_path and Path(one.best_model_path).exists():
            good = one.best_model_path
    return f"the last good checkpoint: {good}"


class BestCheckpoint(ModelCheckpoint):
    """The best checkpoints by a metric; a resumed run in a new folder still knows the earlier best.

    A replaced checkpoint is deleted only after ``last.ckpt`` knows its successor, so that a run killed in between can
    resume with either.
    """

    first_step: int = 0  # checkpoints of earlier optimizer steps are none of the best
    _replaced: tuple[str, ...] = ()

    def _should_skip_saving_checkpoint(self, trainer: pl.Trainer) -> bool:
        return trainer.global_step < self.first_step or super()._should_skip_saving_checkpoint(trainer)

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self._replaced = (*self._replaced, filepath)

    def _remove_replaced(self, trainer: pl.Trainer) -> None:
        for path in self._replaced:
            trainer.strategy.remove_checkpoint(path)
        self._replaced = ()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        # all checkpoints of the last validation are written
        self._remove_replaced(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._remove_replaced(trainer)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"replaced": list(self._replaced)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning's forgets the earlier best if the folder has moved
        def found(path: str) -> str:
            moved = Path(str(self.dirpath)) / Path(path).name
            return str(moved) if not Path(path).exists() and moved.is_file() else path

        self._replaced = tuple(map(found, state_dict.get("replaced", ())))
        known = {found(path): score for path, score in state_dict["best_k_models"].items()}
        if state_dict["dirpath"] == self.dirpath or all(Path(path).exists() for path in known):
            paths = {name: found(state_dict[name]) for name in ("best_model_path", "kth_best_model_path")}
            super().load_state_dict({**state_dict, **paths, "best_k_models": known, "dirpath": self.dirpath})
        else:
            rank_zero_warn("The earlier best checkpoints are gone; the best is chosen from here on.")


class LastCheckpoint(ModelCheckpoint):
    """Writes ``last.ckpt`` after every validation, at the end of training, and when a run is interrupted.

    With several processes nothing is saved after an exception, since saving would wait for all of them.

    Args:
        dirpath: folder; by default ``checkpoints`` in the run's.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self._training = False
        self._open_step = -1
        super().__init__(
            dirpath=dirpath,
            filename="last",
            save_on_train_epoch_end=False,
            save_on_exception=True,
            enable_version_counter=False,
        )

    @property
    def path(self) -> Path:
        return Path(self.format_checkpoint_name({}))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # an earlier run's folder may differ
        pass

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._training = True
        # the state to resume from is saved already
        self._last_global_step_saved = trainer.global_step

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        # until the trainer has counted the step, weights may be partly updated
        self._open_step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # if no validation followed the last step
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_checkpoint(trainer, str(self.path))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if not self._training or trainer.state.fn != TrainerFn.FITTING or not self._should_save_on_exception(trainer):
            return
        together = trainer.world_size == 1 or isinstance(exception, Interrupted)
        # a user's fault is found before the weights move
        stepping = self._open_step == trainer.global_step and not isinstance(exception, UserError)
        if together and not stepping:
            self._save_checkpoint(trainer, str(self.path))


class StopAtSignals(Callback):
    """SIGINT (Ctrl-C) and SIGTERM stop ``fit`` between two batches, on all ranks at the same one, so that it can save.

    An exception inside an optimizer step or a checkpoint would leave it incomplete. A validation batch is interrupted
    at once with one process. Must be the first callback.
    """

    def __init__(self) -> None:
        self._number = 0
        self._in_validation_batch = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._number = 0
        # in place of Lightning's own for SIGTERM, which it restores at the end
        on_signals(lambda number: self._note(number, trainer))

    def _note(self, number: int, trainer: pl.Trainer) -> None:
        if self._number:
            return
        self._number = number
        # not `print`, which the signal may have interrupted
        os.write(2, b"\nStopping at the end of this batch.\n" if trainer.is_global_zero else b"")
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(number)
        if self._in_validation_batch and trainer.world_size == 1:
            raise Interrupted(number)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        number = self._number
        if trainer.world_size > 1:
            asked = torch.tensor(float(number), device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(asked, reduce_op="max"))
        if number:
            raise Interrupted(number)

    on_validation_start = on_train_end = on_train_batch_start  # type: ignore[assignment]  # any arguments

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._in_validation_batch = True
            self.on_train_batch_start(trainer)

    def on_validation_batch_end(self, *args: Any) -> None:
        # a checkpoint may follow
        self._in_validation_batch = False

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # training is saved
        if self._number:
            raise Interrupted(self._number)


class RunHistory(Callback):
    """The earlier parts of a resumed run, saved in checkpoints, and the lock on the run's folder.

    Args:
        folder: finds the run's folder.
    """

    def __init__(self, folder: Callable[[pl.Trainer], Path]) -> None:
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        """Start of the first part, in UTC."""
        self._folder = folder
        self._before = 0.0
        self._began = time.monotonic()
        self._known: dict[str, Any] = {}  # of the run, from its start on
        self._lock: FileLock | None = None

    @property
    def seconds(self) -> float:
        """Run time: this part, and the earlier ones up to the checkpoints that were resumed."""
        return self._before + time.monotonic() - self._began

    @staticmethod
    def of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """The history saved in a checkpoint; empty if there is none."""
        states = checkpoint.get("callbacks", {})
        return next((dict(state) for name, state in states.items() if name.startswith(RunHistory.__name__)), {})

    def state_dict(self) -> dict[str, Any]:
        return {"started": self.started, "seconds": self.seconds} | self._known

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # the test that ends a run loads the best checkpoint, which is earlier
        if not self._known:
            self.started, self._before = state_dict["started"], state_dict["seconds"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._known = {"versions": [logger.version for logger in trainer.loggers]}
        # on every rank, as finding the folder is a collective
        self.lock(self._folder(trainer))

    @rank_zero_only
    def lock(self, folder: Path) -> None:
        """Lock a folder until `release`. Raises a ``UserError`` if another process has it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._lock or FileLock(folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"{folder}: another process is running it") from error

    def release(self) -> None:
        """Unlock the folder."""
        if self._lock is not None:
            self._lock.release(force=True)
