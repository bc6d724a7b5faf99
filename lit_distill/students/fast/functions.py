"""Functions of a T5, each with a backward pass that touches memory less often.

They are the plain functions' mathematics: with dropout off they give the same numbers up to rounding, and dropout drops
each element independently with the same probability. None can be differentiated twice.
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise, starmap, zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lit_distill.batch import IGNORE_INDEX
from lit_distill.students.fast.casts import Casts
from lit_distill.students.fast.products import product

CHUNK_BYTES = 64 * 2**20
"""Size of one chunk's logits: large enough for efficient matrix products."""

KEPT_BYTES = 256 * 2**20
"""Probabilities kept for the backward pass at most; chunks beyond are computed once more there."""

_LANES = 1 << 16


def dropout_mask(like: Tensor, p: float) -> tuple[Tensor, float]:
    """The dropout mask, for `masked`, and the scaling factor of what is not dropped.

    On the CPU one 64-bit draw of the global generator decides four elements by 16 bits each: ``p`` is rounded to
    1/65536, and the factor uses the rounded rate. There the mask of elements of 16 bits is theirs, all ones or all
    zeros: a processor makes and applies it several times faster than booleans. Any other is of booleans.
    """
    if like.device.type != "cpu":
        return torch.empty(like.shape, dtype=torch.bool, device=like.device).bernoulli_(1 - p), 1 / (1 - p)
    dropped = round(p * _LANES)
    if dropped == _LANES:
        return torch.zeros(like.shape, dtype=torch.bool), 0.0
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    lanes = draws.view(torch.int16)[: like.numel()].view(like.shape)
    first, factor = dropped - _LANES // 2, _LANES / (_LANES - dropped)
    if like.element_size() != 2 or not dropped:
        return lanes >= first, factor
    return lanes.clamp_(first - 1, first).sub_(first - 1).neg_(), factor


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` with 0 where a `dropout_mask` drops."""
    if mask.dtype == torch.int16:
        return x.view(torch.int16).bitwise_and(mask).view(x.dtype)
    return mask.to(x.dtype).mul_(x)


def apply(function: type[Function], *arguments: Any) -> Tensor:
    """A function's result, recorded for the backward pass."""
    result: Tensor = function.apply(*arguments)
    return result


class _AddDropped(Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor | None, x: Tensor, p: float) -> Tensor:
        mask, ctx.factor = dropout_mask(x, p)
        ctx.save_for_backward(mask)
        ctx.dtype, ctx.adds = x.dtype, residual is not None
        if residual is None:
            return masked(x, mask).mul_(ctx.factor)
        if mask.dtype == torch.bool:
            return torch.addcmul(residual, mask.to(x.dtype), x, value=ctx.factor)
        return torch.add(residual, masked(x, mask), alpha=ctx.factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (mask,) = ctx.saved_tensors
        return grad if ctx.adds else None, masked((grad * ctx.factor).to(ctx.dtype), mask), None


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout with probability ``p``; ``x`` itself for 0."""
    return apply(_AddDropped, None, x, p) if p else x


def add_dropped(residual: Tensor, x: Tensor, p: float) -> Tensor:
    """``residual + dropout(x)``."""
    return apply(_AddDropped, residual, x, p) if p else residual + x


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        # what each row is multiplied by, in float32 or finer
        wide = torch.promote_types(x.dtype, torch.float32)
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(weight.dtype).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        wide, grad, factors = x.to(scale.dtype), grad.to(scale.dtype), weight.to(scale.dtype)
        product = wide * grad
        # sums over tokens, and over a row, as matrix products: each reads its operand once
        weight_grad = (scale.t() @ product).squeeze_(0)
        along = (product @ factors).unsqueeze_(-1).mul_(scale.pow(3)).div_(-x.shape[-1])
        x_grad = (grad * factors).mul_(scale).addcmul_(wide, along)
        return x_grad.to(x.dtype), weight_grad.to(weight.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    r"""T5's layer norm, :math:`w_i x_i / \sqrt{\text{mean}(x^2) + \epsilon}`, of ``(tokens, d_model)`` in float32.

    The result has ``dtype``, by default that of the weight.
    """
    return apply(_RMSNorm, x, weight, eps, dtype or weight.dtype)


def _less_one(likely: Tensor, labels: Tensor) -> Tensor:
    # before it is rounded to 16 bits: of a label that is almost sure little is left
    return likely.scatter_add_(1, labels, likely.new_full(labels.shape, -1))


class _TokenLosses(Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, copy: Tensor, labels: Tensor) -> Tensor:
        # products are of the copy, in the dtype of the states; all else has that of the weight
        ctx.dtype, weight = weight.dtype, copy
        safe = labels.clamp(min=0).unsqueeze(1)
        # equally many in each chunk: one of few rows reads the whole weight, too
        chunks = -(-len(states) * 4 * len(weight) // CHUNK_BYTES)
        ctx.size = size = max(1, -(-len(states) // max(1, chunks)))
        rows = KEPT_BYTES // (states.element_size() * len(weight)) // size * size if ctx.needs_input_grad[0] else 0
        losses, saved = states.new_empty(len(states), dtype=torch.float32), []
        if rows and states.dtype != torch.float32:
            # all that is kept side by side: the products of several chunks would be cast to be added
            saved.append(states.new_empty(min(rows, len(states)), len(weight)))
        for part in _parts(0, len(states), size):
            logs = torch.log_softmax(product(states[part], weight), dim=-1, dtype=torch.float32)
            losses[part] = logs.gather(1, safe[part]).squeeze(1).neg_()
            if part.start >= rows:
                continue
            over = _less_one(logs.exp_(), safe[part])
            if states.dtype == torch.float32:
                saved.append(over)
            else:
                saved[0][part] = over
        ctx.save_for_backward(states, weight, labels, *saved)
        return losses.masked_fill_(labels == IGNORE_INDEX, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        states, weight, labels, *saved = ctx.saved_tensors
        safe = labels.clamp(min=0).unsqueeze(1)
        grad = grad.masked_fill(labels == IGNORE_INDEX, 0.0).to(ctx.dtype).unsqueeze(1)
        # a row of the logits' gradient is grad * (p - onehot): the factor goes to the narrow side of each product
        scaled = (states * grad).to(states.dtype)
        states_grad, weight_grad = torch.empty_like(states, dtype=ctx.dtype), None
        ends = list(accumulate(map(len, saved), initial=0))
        parts = [*starmap(slice, pairwise(ends)), *_parts(ends[-1], len(states), ctx.size)]
        for part, over in zip_longest(parts, saved):
            if over is None:
                likely = torch.softmax(product(states[part], weight), dim=-1, dtype=torch.float32)
                over = _less_one(likely, safe[part]).to(states.dtype)
            states_grad[part] = product(over, weight.t())
            if ctx.needs_input_grad[1]:
                own = product(over.t(), scaled[part].t())
                weight_grad = own.to(ctx.dtype) if weight_grad is None else weight_grad.add_(own)
        return states_grad.mul_(grad).to(states.dtype), weight_grad, None, None


def _parts(start: int, end: int, size: int) -> Iterator[slice]:
    return (slice(at, min(at + size, end)) for at in range(start, end, size))


def token_losses(head: nn.Linear, states: Tensor, labels: Tensor, casts: Casts | None = None) -> Tensor:
    """The cross-entropy of states ``(targets, d_model)`` at each target in nats, ``(targets,)``, in float32.

    It is 0 where the label is ``IGNORE_INDEX``. Only one chunk of logits exists at a time.
    """
    copy = head.weight.detach()
    if torch.is_autocast_enabled(states.device.type):
        states = states.to(torch.get_autocast_dtype(states.device.type))
        copy = (casts or Casts()).copy(head.weight)
    with torch.autocast(states.device.type, enabled=False):
        return apply(_TokenLosses, states, head.weight, copy, labels)


def log_probabilities(
    head: nn.Linear, states: Tensor, places: Tensor, labels: Tensor, casts: Casts | None = None
) -> Tensor:
    """Those of labels in nats, each given the one of the states ``(tokens, d_model)`` at its place, in float32.

    ``places`` and ``labels``, ``(labels,)``, are on the host. Only one chunk of logits exists at a time; for inference.
    """
    device, weight = states.device, head.weight
    if torch.is_autocast_enabled(device.type):
        states, weight = states.to(torch.get_autocast_dtype(device.type)), (casts or Casts()).copy(weight)
    found = torch.empty(len(labels), dtype=torch.float32, device=device)
    size = max(1, CHUNK_BYTES // (4 * len(weight)))
    for start in range(0, len(states), size):
        logs = torch.log_softmax(product(states[start : start + size], weight), dim=-1, dtype=torch.float32)
        own = ((places >= start) & (places < start + size)).nonzero().squeeze(1)
        place, label = (places[own] - start).to(device), labels[own].to(device)
        found[own.to(device)] = logs[place, label]
    return found
