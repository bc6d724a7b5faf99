"""How long an optimizer step takes here, by a few real ones."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lit_distill.batch import TaskBatch
from lit_distill.modules.base import DistillModule
from lit_distill.planning.trainer import silent, take_steps

STEPS = 5
"""Optimizer steps, of which the first two do not count: the second is the first with the optimizer's states."""


def measure_step(
    module: DistillModule, data: Any, batch: TaskBatch, settings: Mapping[str, Any], accelerator: str
) -> float:
    """Median seconds of an optimizer step over this micro-batch, not accumulated.

    Args:
        module: with its weights, which are trained.
        data: its data module.
        batch: the micro-batch.
        settings: the trainer's, of the names `lit_distill.planning.trainer.SETTINGS`.
        accelerator: the trainer's, too.
    """
    clock = _Clock()
    with silent():
        own = {**settings, "accumulate_grad_batches": 1}
        take_steps(module, data, batch, own, clock, steps=STEPS, accelerator=accelerator)
    return statistics.median(after - before for before, after in zip(clock.ends[1:], clock.ends[2:], strict=False))


class _Clock(Callback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
