"""The optimizer and the learning-rate schedule."""

from collections.abc import Callable
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import Adafactor

OptimizerName = Literal["adamw", "adafactor"]
ScheduleName = Literal["linear", "constant"]


def learning_rate_factor(step: int, *, schedule: ScheduleName, warmup_steps: int, total_steps: float) -> float:
    """The share of the highest learning rate at a step: a linear rise, then linear to 0 at the last step or constant.

    The Hugging Face trainer's ``linear`` and ``constant_with_warmup``.

    Args:
        step: optimizer steps done.
        schedule: what follows the warm-up.
        warmup_steps: steps of the rise.
        total_steps: the run's steps; infinite where nothing bounds them, and nothing decays then.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant" or total_steps == float("inf"):
        return 1.0
    return max(0.0, (total_steps - step) / max(1.0, total_steps - warmup_steps))


def _is_spared(name: str) -> bool:
    return "norm" in name or name.endswith(".bias")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups: weights, which decay, and biases and norms, which do not.

    They are told apart by name: a sharded strategy makes every parameter one-dimensional.
    """
    trainable = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": [p for name, p in trainable if not _is_spared(name)], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if _is_spared(name)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def configure(
    module: pl.LightningModule,
    *,
    optimizer: OptimizerName,
    learning_rate: float,
    weight_decay: float,
    schedule: ScheduleName,
    warmup_steps: int,
    total_steps: Callable[[], float],
) -> OptimizerLRScheduler:
    """An optimizer over the module's trainable parameters, stepped with its schedule after every optimizer step."""
    groups = parameter_groups(module, weight_decay)
    built: Optimizer
    if optimizer == "adafactor":
        # a given learning rate excludes Adafactor's own relative steps, as in the Hugging Face trainer
        built = Adafactor(groups, lr=learning_rate, scale_parameter=False, relative_step=False)
    else:
        # fused: one kernel over all parameters, several times the speed on CPU too; with fp16's loss scaling it would
        # unscale by itself, which Lightning's clipping does not allow
        device = module.trainer.strategy.root_device.type
        fused = module.trainer.precision != "16-mixed" and device in ("cpu", "cuda")
        built = AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=fused)
        if fused:
            # what tells Lightning that the optimizer unscales by itself; without a scaler nobody else reads it
            built._step_supports_amp_scaling = False
    total = total_steps()
    scheduler = LambdaLR(
        built,
        lambda step: learning_rate_factor(step, schedule=schedule, warmup_steps=warmup_steps, total_steps=total),
    )
    return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1}}
