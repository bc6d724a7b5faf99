"""Rewind a checkpoint to the last complete optimizer step, whenever it is written.

Lightning saves the position of its loops, which may be inside an accumulation window, but neither random states nor the
sampler's position. Here a checkpoint is rewound to the start of the open window (the weights have not moved since), and
a step's random state is a function of the run's seed, the step and the rank.
"""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch


def consumed_batches(trainer: pl.Trainer) -> int:
    """Micro-batches of this epoch up to the last complete optimizer step; 0 between two epochs."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    done = int(progress.current.processed)  # type: ignore[attr-defined]
    epoch = trainer.fit_loop.epoch_progress.current
    if epoch.started == epoch.completed and progress.is_last_batch:  # type: ignore[attr-defined]
        return 0
    if progress.is_last_batch and done == progress.current.ready:
        return done
    return done // trainer.accumulate_grad_batches * trainer.accumulate_grad_batches


def rewind(fit_loop_state: dict[str, Any], *, boundary: int, step: int, loader_states: list[dict[str, Any]]) -> None:
    """Set the loop's progress in a checkpoint back to the last complete optimizer step.

    Args:
        fit_loop_state: the checkpoint's ``loops`` -> ``fit_loop``, changed in place.
        boundary: micro-batches of this epoch up to that step.
        step: complete optimizer steps of the run.
        loader_states: the training loaders' states at the boundary.
    """
    batches, epochs = fit_loop_state["epoch_loop.batch_progress"], fit_loop_state["epoch_progress"]
    # between two epochs the loop still counts the last epoch's batches as the next one's
    between = epochs["current"]["started"] == epochs["current"]["completed"] and batches["is_last_batch"]
    if epochs["current"]["started"] == epochs["current"]["completed"] and batches["current"]["ready"] and not between:
        # training stopped inside this epoch, but Lightning counted it as complete
        for progress in (epochs["current"], epochs["total"]):
            progress["completed"] -= 1
    open_batches = 0 if between else batches["current"]["ready"] - boundary
    total = batches["total"]["ready"] - open_batches
    for progress, value in ((batches["current"], boundary), (batches["total"], total)):
        progress.update(ready=value, started=value, processed=value, completed=value)
    if open_batches or between:
        batches["is_last_batch"] = False
    # loggers count steps by this one; Lightning raises it only after the hooks that save
    fit_loop_state["epoch_loop.state_dict"]["_batches_that_stepped"] = step
    # a validation that was interrupted by the checkpoint is not resumed
    validation = fit_loop_state["epoch_loop.val_loop.batch_progress"]
    for progress in (validation["current"], validation["total"]):
        progress.update(dict.fromkeys(progress, 0))
    validation["is_last_batch"] = False
    # an epoch whose batches are all done but whose end is not: resumed from between its end's own hooks, Lightning
    # takes the next epoch for done as well
    for progress in (epochs["current"], epochs["total"]):
        progress["processed"] = progress["completed"]
    fit_loop_state["state_dict"].pop("combined_loader", None)
    if loader_states and not between:
        fit_loop_state["state_dict"]["combined_loader"] = loader_states


def seed_step(seed: int, step: int, rank: int, *, preparing: bool = False) -> None:
    """Seed every random generator for one optimizer step (for dropout above all), or for its `prepare`."""
    words = np.random.SeedSequence((seed, step, rank, 1) if preparing else (seed, step, rank)).generate_state(2)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]))
    random.seed(int(words[1]))
