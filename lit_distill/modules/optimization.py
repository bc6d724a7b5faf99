"""The optimizer and the learning-rate schedule."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import Adafactor

from lit_distill.errors import UserError

OptimizerName = Literal["adamw", "adafactor"]
ScheduleName = Literal["linear", "constant"]

_DIVISOR = "_lit_distill_divisor"
"""Attribute of an optimizer: the ``grad_scale`` that `clip_within_step` gave it, none after its step."""


def learning_rate_factor(step: int, *, schedule: ScheduleName, warmup_steps: int, total_steps: float) -> float:
    """The share of the highest learning rate at a step: the Hugging Face trainer's linear and constant_with_warmup.

    Where nothing bounds a run, so that ``total_steps`` is infinite, nothing decays.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant" or total_steps == float("inf"):
        return 1.0
    return max(0.0, (total_steps - step) / max(1.0, total_steps - warmup_steps))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups: weights, which decay, and biases and norms, which do not.

    They are told apart by name: a sharded strategy makes every parameter one-dimensional.
    """
    decaying: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (spared if "norm" in name or ".ln_" in name or name.endswith(".bias") else decaying).append(parameter)
    groups = ((decaying, weight_decay), (spared, 0.0))
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def clip_within_step(optimizer: Optimizer, max_norm: float, norm: Tensor) -> bool:
    """Leave clipping by the gradient's norm to the coming step of a fused AdamW, which reads each gradient anyway.

    The kernel divides by ``grad_scale`` as it goes, where ``torch.nn.utils.clip_grad_norm_`` passes over all gradients
    once more. Afterwards the gradients are the clipped ones, and the next step divides by nothing.

    Returns:
        Whether the optimizer can; it takes the divisor as float32, and gradients of other types are left alone.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if type(inner) is not AdamW or not inner.defaults["fused"]:
        return False
    gradients = (p.grad for group in inner.param_groups for p in group["params"] if p.grad is not None)
    if any(gradient.dtype != torch.float32 for gradient in gradients):
        return False
    if _DIVISOR not in vars(inner):
        # never removed: a step iterates over its hooks while it calls them
        inner.register_step_post_hook(lambda own, *rest: reset_clipping(own))
    # PyTorch's own coefficient, min(1, max_norm / (norm + 1e-6)), as a divisor
    divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0)
    setattr(inner, _DIVISOR, divisor)
    inner.grad_scale = divisor  # type: ignore[attr-defined]
    return True


def reset_clipping(optimizer: Optimizer) -> None:
    """Forget what `clip_within_step` has left to a step that is over, or that never came to its end."""
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    divisor = getattr(inner, _DIVISOR, None)
    if divisor is None:
        return
    setattr(inner, _DIVISOR, None)
    # a loss scaler puts its own in place, beside `found_inf`, and removes both by itself
    if getattr(inner, "grad_scale", None) is divisor and not hasattr(inner, "found_inf"):
        del inner.grad_scale


def configure(
    module: pl.LightningModule,
    *,
    optimizer: OptimizerName,
    learning_rate: float,
    weight_decay: float,
    schedule: ScheduleName,
    warmup_steps: int,
    total_steps: float,
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
    scheduler = LambdaLR(
        built,
        lambda step: learning_rate_factor(step, schedule=schedule, warmup_steps=warmup_steps, total_steps=total_steps),
    )
    return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1}}


def check_optimizer_states(states: Sequence[Mapping[str, Any]], schedules: Sequence[Mapping[str, Any]]) -> None:
    """See that a checkpoint's optimizers and schedules hold numbers, before torch stumbles in the first step.

    Raises:
        UserError: a setting that is a number, or holds some, does not.
    """
    groups = [(group, ("lr", "betas", "eps", "weight_decay")) for state in states for group in state["param_groups"]]
    for group, names in [*groups, *((schedule, ("base_lrs", "last_epoch")) for schedule in schedules)]:
        for name in names:
            value = group.get(name)
            numbers = value if isinstance(value, tuple) or name == "base_lrs" else [value]
            if not isinstance(numbers, list | tuple) or not all(isinstance(one, int | float | None) for one in numbers):
                raise UserError(f"ckpt_path: the checkpoint's optimizer has {name} {value!r}, which is no number")
