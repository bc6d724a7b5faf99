"""The optimizer, the learning-rate schedule, and gradient clipping."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import Adafactor, get_scheduler

from lit_distill.errors import UserError
from lit_distill.modules import weighting

OptimizerName = Literal["adamw", "adafactor", "adafactor_scaled"]
ScheduleName = Literal["linear", "constant"]


def configure(module: pl.LightningModule) -> OptimizerLRScheduler:
    """An optimizer over the trainable parameters, and its schedule, stepped after every optimizer step."""
    # fused: one kernel over all parameters, several times the speed on CPU too; with fp16's loss scaling it would
    # unscale by itself, which Lightning's clipping does not allow
    device = module.trainer.strategy.root_device.type
    fused = module.trainer.precision != "16-mixed" and device in ("cpu", "cuda")
    built, scheduler = make_optimizer(module, module.hparams, module.trainer.estimated_stepping_batches, fused=fused)
    return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1}}


def make_optimizer(
    module: nn.Module, settings: Mapping[str, Any], steps: float, *, fused: bool
) -> tuple[Optimizer, LambdaLR]:
    """An optimizer over a module's trainable parameters by a method's ``settings``, and its schedule over ``steps``."""
    groups = parameter_groups(module, settings["weight_decay"])
    built: Optimizer
    if settings["optimizer"] != "adamw":
        # no relative steps with a given learning rate, as in the Hugging Face trainer
        scaled = settings["optimizer"] == "adafactor_scaled"
        built = Adafactor(groups, lr=settings["learning_rate"], scale_parameter=scaled, relative_step=False)
    else:
        built = AdamW(groups, lr=settings["learning_rate"], betas=(0.9, 0.999), eps=1e-8, fused=fused)
        if fused:
            # Lightning's flag for optimizers that unscale by themselves; unused without a scaler
            built._step_supports_amp_scaling = False
    # a run without end does not decay
    decays = settings["lr_schedule"] == "linear" and steps != float("inf")
    scheduler = get_scheduler(
        "linear" if decays else "constant_with_warmup",
        built,
        num_warmup_steps=settings["warmup_steps"],
        num_training_steps=int(steps) if decays else None,
    )
    return built, scheduler


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in groups: with weight decay, without (biases and norms), and trained weights of terms.

    Told apart by name, since sharding strategies flatten every parameter.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
        # they begin at 0, so that a rate relative to their size would hardly move them
        {"params": [], "weight_decay": 0.0, "lr": weighting.LEARNING_RATE, "scale_parameter": False},
    ]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            spared = "norm" in name or ".ln_" in name or name.endswith(".bias")
            groups[2 if name.startswith("weighting.") else int(spared)]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def clip_in_step(optimizer: Optimizer, max_norm: float, norm: Tensor) -> bool:
    """Leave clipping to the next step of a fused AdamW with float32 gradients; return whether it is one.

    Its kernel divides each gradient that it reads by ``grad_scale``, here the inverse of PyTorch's coefficient
    min(1, max_norm / (norm + 1e-6)). That saves a pass over all gradients.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    float32 = all(gradient.dtype == torch.float32 for gradient in gradients)
    if not _is_fused(optimizer) or not float32:
        return False
    optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0)  # type: ignore[attr-defined]
    return True


def skip_in_step(optimizer: Optimizer, skip: Tensor) -> bool:
    """Let the next step of a fused AdamW change nothing if ``skip`` is 1, and not 0; return whether it is one.

    Its kernel reads the flag on the device, so that the host need not wait for it.
    """
    if _is_fused(optimizer):
        optimizer.found_inf = skip  # type: ignore[attr-defined]
    return _is_fused(optimizer)


def _is_fused(optimizer: Optimizer) -> bool:
    return type(optimizer) is AdamW and bool(optimizer.defaults["fused"])


def check_numbers(settings: Iterable[Mapping[str, Any]]) -> None:
    """Raise a ``UserError`` if a setting of a checkpoint's optimizer or schedule that has to be a number is none."""
    wanted = "lr", "betas", "eps", "weight_decay", "base_lrs", "last_epoch"
    for name, value in ((name, group[name]) for group in settings for name in wanted if name in group):
        numbers = value if isinstance(value, list | tuple) and value else [value]
        if not all(isinstance(one, int | float | None) for one in numbers):
            raise UserError(f"ckpt_path: the checkpoint's optimizer has {name} {value!r}, which is no number")
