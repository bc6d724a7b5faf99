"""The output head and its loss at real target positions, in chunks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lit_distill.batch import IGNORE_INDEX
from lit_distill.students.fast.functions import apply

CHUNK_BYTES = 64 * 2**20
"""Size of one chunk's logits: large enough for efficient matrix products."""

KEPT_BYTES = 256 * 2**20
"""Probabilities kept for the backward pass at most; chunks beyond are computed once more there."""


class _TokenLosses(Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        safe = labels.clamp(min=0).unsqueeze(1)
        size = max(1, CHUNK_BYTES // (4 * len(weight)))
        losses, saved, budget = [], [], KEPT_BYTES
        for start in range(0, len(states), size):
            logs = torch.log_softmax(states[start : start + size] @ weight.t(), dim=-1, dtype=torch.float32)
            losses.append(logs.gather(1, safe[start : start + size]).squeeze(1).neg_())
            budget -= 4 * logs.numel()
            if ctx.needs_input_grad[0] and budget >= 0:
                saved.append(logs.exp_())
        ctx.size = size
        ctx.save_for_backward(states, weight, labels, *saved)
        return torch.cat(losses).masked_fill_(labels == IGNORE_INDEX, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        states, weight, labels, *saved = ctx.saved_tensors
        safe = labels.clamp(min=0)
        grad = grad.masked_fill(labels == IGNORE_INDEX, 0.0).to(states.dtype).unsqueeze(1)
        # a row of the logits' gradient is grad * (p - onehot): the factor goes to the narrow side of each product,
        # and the ones are rows of the weight that are added apart
        scaled = states * grad
        states_grad = weight.index_select(0, safe).neg_()
        weight_grad = None
        for number, start in enumerate(range(0, len(states), ctx.size)):
            part = slice(start, start + ctx.size)
            if number < len(saved):
                likely = saved[number]
            else:
                likely = torch.softmax(states[part] @ weight.t(), dim=-1, dtype=torch.float32)
            likely = likely.to(states.dtype)
            states_grad[part].addmm_(likely, weight)
            if not ctx.needs_input_grad[1]:
                continue
            if weight_grad is None:
                weight_grad = likely.t() @ scaled[part]
            else:
                weight_grad.addmm_(likely.t(), scaled[part])
        if weight_grad is not None:
            weight_grad.index_add_(0, safe, scaled, alpha=-1)
        return states_grad.mul_(grad), weight_grad, None


def token_losses(head: nn.Linear, states: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of states ``(targets, d_model)`` at each target in nats, ``(targets,)``, in float32.

    It is 0 where the label is ``IGNORE_INDEX``. Only one chunk of logits exists at a time.
    """
    weight = head.weight
    if torch.is_autocast_enabled(states.device.type):
        dtype = torch.get_autocast_dtype(states.device.type)
        states, weight = states.to(dtype), weight.to(dtype)
    with torch.autocast(states.device.type, enabled=False):
        return apply(_TokenLosses, states, weight, labels)
