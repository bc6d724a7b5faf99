"""The label-only baseline of a run: the same student, data, settings and number of steps, without rationales."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_distill.callbacks import ValidateEverySteps
from lit_distill.checkpoints import save_atomically
from lit_distill.data.base import RationaleDataModule
from lit_distill.modules.base import DistillModule
from lit_distill.modules.standard import StandardModule
from lit_distill.progress import Progress


def train_baseline(
    *,
    model_args: Mapping[str, Any],
    data_class: type[RationaleDataModule],
    data_args: Mapping[str, Any],
    trainer_args: Mapping[str, Any],
    every_n_steps: int | None,
    seed: int,
    folder: Path,
) -> dict[str, float]:
    """Train, select on val and test a ``StandardModule`` beside a run.

    Args:
        model_args: the run's method's arguments; those that ``StandardModule`` does not share are left out.
        data_class: the run's data module.
        data_args: its arguments; tasks and prefixes are replaced.
        trainer_args: the run's trainer arguments; logger, callbacks are replaced.
        every_n_steps: optimizer steps between validations.
        seed: the run's seed.
        folder: where its checkpoints go.

    Returns:
        The test metrics of its best checkpoint.
    """
    pl.seed_everything(seed, workers=True, verbose=False)
    shared = set(inspect.signature(DistillModule.__init__).parameters) - {"self"}
    module = StandardModule(**{name: value for name, value in model_args.items() if name in shared})
    data = data_class(**{**data_args, "tasks": module.active_tasks, "prefixes": module.prefixes})
    best = ModelCheckpoint(
        dirpath=folder / "checkpoints", monitor="val/accuracy", mode="max", save_on_train_epoch_end=False
    )
    bar = [] if trainer_args.get("enable_progress_bar") is False else [Progress()]
    settings = dict(trainer_args) | {
        "logger": False,
        "callbacks": [ValidateEverySteps(every_n_steps), best, *bar],
        "enable_model_summary": False,
        "enable_checkpointing": True,
    }
    trainer = pl.Trainer(**settings)
    save_atomically(trainer)
    trainer.fit(module, datamodule=data)
    results = trainer.test(
        module, datamodule=data, ckpt_path=best.best_model_path or None, verbose=False, weights_only=True
    )
    return {name: float(value) for name, value in results[0].items()}
