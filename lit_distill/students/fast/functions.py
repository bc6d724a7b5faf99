"""The student's elementwise functions and its attention, each with a backward pass that touches memory less often.

All of them are the plain functions' mathematics: with dropout off they give the same numbers up to rounding, and
dropout drops each element independently with the same probability. None can be differentiated twice.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lit_distill.students.fast.packing import AttentionPlan

_LANES = 1 << 16


def kept(like: Tensor, p: float) -> tuple[Tensor, float]:
    """Which elements dropout keeps, and what they are multiplied by.

    On the CPU one 64-bit draw of the global generator decides four elements, each by 16 bits: the probability is
    ``p`` rounded to 1/65536, and the factor is the inverse of what is really kept.

    Args:
        like: gives shape and device.
        p: probability that an element is dropped, in 0..1.

    Returns:
        Booleans of ``like``'s shape, and the factor.
    """
    if like.device.type != "cpu":
        return torch.empty(like.shape, dtype=torch.bool, device=like.device).bernoulli_(1 - p), 1 / (1 - p)
    dropped = round(p * _LANES)
    if dropped == _LANES:
        return torch.zeros(like.shape, dtype=torch.bool), 0.0
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    lanes = draws.view(torch.int16)[: like.numel()].view(like.shape)
    mask: Tensor = lanes >= dropped - _LANES // 2
    return mask, _LANES / (_LANES - dropped)


def apply(function: type[Function], *arguments: Any) -> Tensor:
    """A function's result, recorded for the backward pass."""
    result: Tensor = function.apply(*arguments)
    return result


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:  # noqa: ANN401 - autograd's own
        mask, ctx.factor = kept(x, p)
        ctx.save_for_backward(mask)
        return mask.to(x.dtype).mul_(ctx.factor).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (mask,) = ctx.saved_tensors
        return mask.to(grad.dtype).mul_(ctx.factor).mul_(grad), None


class _AddDropped(Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, p: float) -> Tensor:  # noqa: ANN401
        mask, ctx.factor = kept(x, p)
        ctx.save_for_backward(mask)
        ctx.dtype = x.dtype
        return torch.addcmul(residual, mask.to(x.dtype), x, value=ctx.factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        (mask,) = ctx.saved_tensors
        return grad, mask.to(ctx.dtype).mul_(ctx.factor).mul_(grad), None


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, p: float) -> Tensor:  # noqa: ANN401
        mask, ctx.factor = kept(a, p)
        ctx.save_for_backward(a, b, mask)
        return mask.to(a.dtype).mul_(ctx.factor).mul_(a).mul_(b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        a, b, mask = ctx.saved_tensors
        grad = mask.to(grad.dtype).mul_(ctx.factor).mul_(grad)
        return grad * b, grad.mul_(a), None


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout with probability ``p``; ``x`` itself for 0."""
    return apply(_Dropout, x, p) if p else x


def add_dropped(residual: Tensor, x: Tensor, p: float) -> Tensor:
    """``residual + dropout(x)``."""
    return apply(_AddDropped, residual, x, p) if p else residual + x


def gated(a: Tensor, b: Tensor, p: float) -> Tensor:
    """``dropout(a * b)``."""
    return apply(_Gated, a, b, p) if p else a * b


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """What T5's layer norm multiplies each row by, ``(tokens, 1)``, in float32 or finer."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def rms_norm_gradients(x: Tensor, weight: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of T5's layer norm for its input and its weight, in the type of ``scale``.

    Args:
        x: ``(tokens, d_model)``.
        weight: ``(d_model,)``.
        scale: `rms_scale` of ``x``.
        grad: of the normed rows, ``(tokens, d_model)``.
    """
    wide, grad, factors = x.to(scale.dtype), grad.to(scale.dtype), weight.to(scale.dtype)
    product = wide * grad
    # sums over tokens, and over a row, as matrix products: each reads its operand once
    weight_grad = (scale.t() @ product).squeeze_(0)
    along = (product @ factors).unsqueeze_(-1).mul_(scale.pow(3)).div_(-x.shape[-1])
    return (grad * factors).mul_(scale).addcmul_(wide, along), weight_grad


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ANN401
        scale = rms_scale(x, eps)
        ctx.save_for_backward(x, weight, scale)
        scaled: Tensor = (x * scale).to(weight.dtype).mul_(weight)
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        x, weight, scale = ctx.saved_tensors
        x_grad, weight_grad = rms_norm_gradients(x, weight, scale, grad)
        return x_grad.to(x.dtype), weight_grad.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    r"""T5's layer norm, :math:`w_i x_i / \sqrt{\text{mean}(x^2) + \epsilon}`, in float32.

    Args:
        x: ``(tokens, d_model)``.
        weight: ``(d_model,)``.
        eps: what keeps the root from 0.
    """
    return apply(_RMSNorm, x, weight, eps)


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        scores: list[Tensor],
        plan: AttentionPlan,
        p: float,
    ) -> Tensor:
        flat_q, flat_k, flat_v = plan.query_slots.spread(q), plan.key_slots.spread(k), plan.key_slots.spread(v)
        flat_out = torch.empty_like(flat_q)
        saved, factor = [], 1.0
        for group, added in zip(plan.groups, scores, strict=True):
            queries, keys, values = _part(group, plan, flat_q, flat_k, flat_v)
            weights = torch.baddbmm(added, queries, keys.transpose(1, 2))
            weights = torch.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
            mask = None
            dropped = weights
            if p:
                mask, factor = kept(weights, p)
                dropped = mask.to(weights.dtype).mul_(weights)
            out = _queries_of(group, plan, flat_out)
            torch.baddbmm(out, dropped, values, beta=0, alpha=factor, out=out)
            saved += [weights, mask] if mask is not None else [weights]
        ctx.plan, ctx.p, ctx.factor = plan, p, factor
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.save_for_backward(flat_q, flat_k, flat_v, flat_out, *saved)
        return plan.query_slots.gather(flat_out, plan.queries.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        flat_q, flat_k, flat_v, flat_out, *saved = ctx.saved_tensors
        plan: AttentionPlan = ctx.plan
        flat_grad = plan.query_slots.clear(plan.query_slots.spread(grad))
        # sum_j P_ij dP_ij of the softmax's backward pass, without its dropout: dO_i . O_i
        along = (flat_grad * flat_out).sum(-1, keepdim=True)
        grad_q, grad_k, grad_v = torch.empty_like(flat_q), torch.empty_like(flat_k), torch.empty_like(flat_v)
        bias_grad = None if ctx.bias_shape is None else flat_q.new_zeros(ctx.bias_shape)
        parts = iter(saved)
        for group in plan.groups:
            queries, keys, values = _part(group, plan, flat_q, flat_k, flat_v)
            weights = next(parts)
            dropped = next(parts).to(weights.dtype).mul_(weights) if ctx.p else weights
            out_grad = _queries_of(group, plan, flat_grad)
            into_q, into_k, into_v = _part(group, plan, grad_q, grad_k, grad_v)
            torch.baddbmm(into_v, dropped.transpose(1, 2), out_grad, beta=0, alpha=ctx.factor, out=into_v)
            scores_grad = torch.baddbmm(weights, out_grad, values.transpose(1, 2), beta=0, alpha=ctx.factor)
            scores_grad.mul_(dropped).addcmul_(weights, _queries_of(group, plan, along), value=-1.0)
            torch.bmm(scores_grad, keys, out=into_q)
            torch.bmm(scores_grad.transpose(1, 2), queries, out=into_k)
            if bias_grad is not None:
                rows = scores_grad.view(group.rows, plan.heads, group.queries, group.keys)
                bias_grad[:, :, : group.queries, : group.keys] += rows.sum(0, keepdim=True)
        return (
            plan.query_slots.gather(grad_q, plan.queries.tokens),
            plan.key_slots.gather(grad_k, plan.keys.tokens),
            plan.key_slots.gather(grad_v, plan.keys.tokens),
            bias_grad,
            None,
            None,
            None,
        )


def _queries_of(group: Any, plan: AttentionPlan, flat: Tensor) -> Tensor:  # noqa: ANN401
    batch = group.rows * plan.heads
    return flat[group.first_query : group.first_query + batch * group.queries].view(batch, group.queries, -1)


def _part(group: Any, plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    batch = group.rows * plan.heads
    of_keys = slice(group.first_key, group.first_key + batch * group.keys)
    return (
        _queries_of(group, plan, q),
        k[of_keys].view(batch, group.keys, -1),
        v[of_keys].view(batch, group.keys, -1),
    )


def score_offsets(plan: AttentionPlan, bias: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """What is added to each group's scores: the position bias, and -inf where a query must not look.

    Args:
        plan: who looks at whom.
        bias: relative position bias ``(1, heads, queries, keys)`` of the longest rows; ``None`` for none.
        dtype: of the scores.

    Returns:
        For each group ``(rows * heads, queries, keys)``.
    """
    offsets = []
    for group in plan.groups:
        shape = (group.rows, plan.heads, group.queries, group.keys)
        added = group.allowed.expand(shape)
        if bias is not None:
            added = added + bias.detach()[:, :, : group.queries, : group.keys]
        offsets.append(added.to(dtype).reshape(-1, group.queries, group.keys))
    return offsets


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, offsets: list[Tensor], plan: AttentionPlan, p: float
) -> Tensor:
    r"""T5's attention :math:`\text{dropout}(\text{softmax}(Q K^T + B)) V` (not scaled) of packed rows.

    Args:
        q: ``(query tokens, heads * d_kv)``.
        k: ``(key tokens, heads * d_kv)``.
        v: as ``k``.
        bias: the position bias, which is given its gradient here; ``None`` for none.
        offsets: `score_offsets` of that bias.
        plan: who looks at whom.
        p: dropout rate of the attention weights.

    Returns:
        ``(query tokens, heads * d_kv)``.
    """
    return apply(_Attention, q, k, v, bias, offsets, plan, p)
