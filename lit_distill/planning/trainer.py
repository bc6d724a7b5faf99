"""A trainer that takes a few steps over one batch, and says nothing."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lit_distill.batch import TaskBatch
from lit_distill.checking.step import GivenData
from lit_distill.modules.base import DistillModule

SETTINGS = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
"""Arguments of a run's trainer that its memory and its time depend on."""


@contextmanager
def silent() -> Iterator[None]:
    """Without what a trainer says at its start and end."""
    before = logging.root.manager.disable
    logging.disable(max(logging.WARNING, before))
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def take_steps(
    module: DistillModule,
    data: Any,
    batch: TaskBatch,
    settings: Mapping[str, Any],
    callback: Callback,
    *,
    steps: int = 1,
    accelerator: str = "cpu",
) -> None:
    """So many optimizer steps, each over this micro-batch as often as ``settings`` accumulate."""
    trainer = pl.Trainer(
        **settings, accelerator=accelerator, devices=1, max_steps=steps, max_epochs=-1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0, callbacks=[callback],
    )  # fmt: skip
    trainer.fit(module, datamodule=GivenData(data, [batch] * steps * settings["accumulate_grad_batches"]))
