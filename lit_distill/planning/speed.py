"""How long an optimizer step takes here, by a few real ones."""

import statistics
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LambdaCallback

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
    ends: list[float] = []

    def look(trainer: pl.Trainer, *rest: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    with silent():
        own, clock = {**settings, "accumulate_grad_batches": 1}, LambdaCallback(on_train_batch_end=look)
        take_steps(module, data, batch, own, clock, steps=STEPS, accelerator=accelerator)
    return statistics.median(after - before for before, after in pairwise(ends[1:]))
