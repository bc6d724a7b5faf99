"""One side of the benchmark of objectives: `lit_distill fit`, one optimizer step each time when told to."""

import os
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from measure import MemoryProbe
from quiet import quiet
from workers import Turn

# what the command imports later is no part of what training takes
from lit_distill.cli import main
from lit_distill.commands import finish, train

__all__ = ["TakeTurns", "finish", "fit", "train"]

_state: dict[str, Any] = {}


class TakeTurns(pl.Callback):
    """Waits for its turn before each optimizer step, reading its batches included, and says how long it took."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ready for the first step, whose batches may be there already."""
        self._steps = 0
        self._begin()

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: object) -> None:
        """After the optimizer's step."""
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        seconds, cpu = time.perf_counter() - self._started, time.process_time() - self._cpu
        _state["turn"].answer({"seconds": seconds, "cpu": cpu, "memory": _state["probe"].read()})
        self._begin()

    def _begin(self) -> None:
        _state["turn"].wait()
        self._started, self._cpu = time.perf_counter(), time.process_time()


def fit(turn: Turn, arguments: Sequence[str], folder: str, threads: int | None) -> None:
    """Train with these arguments in a folder, until nobody asks for another step."""
    os.chdir(folder)
    with quiet(threads):
        _state.update(turn=turn, probe=MemoryProbe("cpu"))
        main(["fit", *arguments, "--trainer.callbacks+=objective_side.TakeTurns"])
