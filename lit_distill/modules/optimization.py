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
"""Attribute of an optimizer that holds the ``grad_scale`` set by `clip_within_step` until its next step."""


def learning_rate_factor(step: int, *, schedule: ScheduleName, warmup_steps: int, total_steps: float) -> float:
    """The learning rate at a step as a fraction of the peak, as in the Hugging Face trainer.

    With infinite ``total_steps`` there is no decay.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant" or total_steps == float("inf"):
        return 1.0
    return max(0.0, (total_steps - step) / max(1.0, total_steps - warmup_steps))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters in two groups: with weight decay, and without (biases and norms).

    Told apart by name, since sharding strategies flatten every parameter.
    """
    decaying: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (spared if "norm" in name or ".ln_" in name or name.endswith(".bias") else decaying).append(parameter)
    groups = ((decaying, weight_decay), (spared, 0.0))
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]


def clip_within_step(optimizer: Optimizer, max_norm: float, norm: Tensor) -> bool:
    """Leave gradient clipping to the next step of a fused AdamW, which reads each gradient anyway.

    Its kernel divides by ``grad_scale``, which saves the extra pass of ``torch.nn.utils.clip_grad_norm_``. Afterwards
    the gradients are the clipped ones, and the following step divides by nothing.

    Returns:
        Whether the optimizer supports it (fused, float32 gradients).
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if type(inner) is not AdamW or not inner.defaults["fused"]:
        return False
    gradients = (p.grad for group in inner.param_groups for p in group["params"] if p.grad is not None)
    if any(gradient.dtype != torch.float32 for gradient in gradients):
        return False
    if _DIVISOR not in vars(inner):
        # never removed: hooks cannot be removed while a step calls them
        inner.register_step_post_hook(lambda own, *rest: reset_clipping(own))
    # PyTorch's own coefficient, min(1, max_norm / (norm + 1e-6)), as a divisor
    divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0)
    setattr(inner, _DIVISOR, divisor)
    inner.grad_scale = divisor  # type: ignore[attr-defined]
    return True


def reset_clipping(optimizer: Optimizer) -> None:
    """Undo `clip_within_step` after its step, or where the step was interrupted."""
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    divisor = getattr(inner, _DIVISOR, None)
    if divisor is None:
        return
    setattr(inner, _DIVISOR, None)
    # a loss scaler sets its own with `found_inf`, and removes both
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
    """An optimizer over the trainable parameters, and its schedule, stepped after every optimizer step."""
    groups = parameter_groups(module, weight_decay)
    built: Optimizer
    if optimizer == "adafactor":
        # no relative steps with a given learning rate, as in the Hugging Face trainer
        built = Adafactor(groups, lr=learning_rate, scale_parameter=False, relative_step=False)
    else:
        # fused: one kernel over all parameters, several times the speed on CPU too; with fp16's loss scaling it would
        # unscale by itself, which Lightning's clipping does not allow
        device = module.trainer.strategy.root_device.type
        fused = module.trainer.precision != "16-mixed" and device in ("cpu", "cuda")
        built = AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=fused)
        if fused:
            # Lightning's flag for optimizers that unscale by themselves; unused without a scaler
            built._step_supports_amp_scaling = False
    scheduler = LambdaLR(
        built,
        lambda step: learning_rate_factor(step, schedule=schedule, warmup_steps=warmup_steps, total_steps=total_steps),
    )
    return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1}}


def check_optimizer_states(states: Sequence[Mapping[str, Any]], schedules: Sequence[Mapping[str, Any]]) -> None:
    """Raise a ``UserError`` if a setting of a checkpoint's optimizers and schedules is no number."""
    groups = [(group, ("lr", "betas", "eps", "weight_decay")) for state in states for group in state["param_groups"]]
    for group, names in [*groups, *((schedule, ("base_lrs", "last_epoch")) for schedule in schedules)]:
        for name in names:
            value = group.get(name)
            numbers = value if isinstance(value, tuple) or name == "base_lrs" else [value]
            if not isinstance(numbers, list | tuple) or not all(isinstance(one, int | float | None) for one in numbers):
                raise UserError(f"ckpt_path: the checkpoint's optimizer has {name} {value!r}, which is no number")
