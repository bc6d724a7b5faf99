"""The gated feed-forward sublayer of many tokens, in chunks, keeping half of what autograd would."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers.activations import NewGELUActivation
from transformers.models.t5.modeling_t5 import T5LayerFF

from lit_distill.students.fast.functions import apply, kept, rms_norm_gradients, rms_scale
from lit_distill.students.fast.support import has_hooks

CHUNK = 1024
"""Tokens that go through the sublayer together."""

WORTH = 4096
"""Tokens from which on it pays: what is computed again in the backward pass costs less than to keep and fetch it."""


def chunks_well(layer: T5LayerFF, x: Tensor) -> bool:
    """Whether this sublayer is what is written out here: T5 v1.1's, of many tokens, in float32 on a CPU.

    Its matrices are read, not called: nobody may listen to them.
    """
    inner = layer.DenseReluDense
    return (
        len(x) >= WORTH
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and hasattr(inner, "wi_1")
        and isinstance(inner.act, NewGELUActivation)
        and all(
            type(m) is nn.Linear and m.bias is None and not has_hooks(m) for m in (inner.wi_0, inner.wi_1, inner.wo)
        )
        and all(m.weight.dtype == torch.float32 for m in (inner.wi_0, inner.wi_1, inner.wo))
    )


class _FeedForward(Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        norm: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        eps: float,
        p_inner: float,
        p_out: float,
    ) -> Tensor:
        tokens = len(x)
        gates, ups = x.new_empty(tokens, len(gate)), x.new_empty(tokens, len(up))
        scale = rms_scale(x, eps)
        inner_mask = torch.empty(gates.shape, dtype=torch.bool) if p_inner else None
        out_mask = torch.empty(x.shape, dtype=torch.bool) if p_out else None
        inner_factor = out_factor = 1.0
        out = torch.empty_like(x)
        for start in range(0, tokens, CHUNK):
            part = slice(start, start + CHUNK)
            normed = (x[part] * scale[part]).mul_(norm)
            torch.mm(normed, gate.t(), out=gates[part])
            torch.mm(normed, up.t(), out=ups[part])
            inner = F.gelu(gates[part], approximate="tanh").mul_(ups[part])
            if inner_mask is not None:
                inner_mask[part], inner_factor = kept(inner, p_inner)
                inner.mul_(inner_mask[part].to(inner.dtype))
            result = inner @ down.t()
            if out_mask is not None:
                out_mask[part], out_factor = kept(result, p_out)
                result.mul_(out_mask[part].to(result.dtype))
            torch.add(x[part], result, alpha=inner_factor * out_factor, out=out[part])
        ctx.factors = inner_factor, out_factor
        ctx.masked = inner_mask is not None, out_mask is not None
        masks = [mask for mask in (inner_mask, out_mask) if mask is not None]
        ctx.save_for_backward(x, norm, gate, up, down, scale, gates, ups, *masks)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, norm, gate, up, down, scale, gates, ups, *masks = ctx.saved_tensors
        inner_mask = masks.pop(0) if ctx.masked[0] else None
        out_mask = masks.pop(0) if ctx.masked[1] else None
        factor = ctx.factors[0] * ctx.factors[1]
        x_grad = torch.empty_like(x)
        norm_grad = torch.zeros_like(norm)
        gate_grad, up_grad, down_grad = (torch.zeros_like(weight) for weight in (gate, up, down))
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            own, scaled, gated = x[part], scale[part], gates[part]
            result_grad = grad[part] * factor
            if out_mask is not None:
                result_grad.mul_(out_mask[part].to(grad.dtype))
            acted = F.gelu(gated, approximate="tanh")
            inner = acted * ups[part]
            inner_grad = result_grad @ down
            if inner_mask is not None:
                mask = inner_mask[part].to(grad.dtype)
                inner.mul_(mask)
                inner_grad.mul_(mask)
            down_grad.addmm_(result_grad.t(), inner)
            ups_grad = acted.mul_(inner_grad)
            gates_grad = torch.ops.aten.gelu_backward(inner_grad.mul_(ups[part]), gated, approximate="tanh")
            normed = (own * scaled).mul_(norm)
            gate_grad.addmm_(gates_grad.t(), normed)
            up_grad.addmm_(ups_grad.t(), normed)
            normed_grad = (gates_grad @ gate).addmm_(ups_grad, up)
            own_grad, weight_grad = rms_norm_gradients(own, norm, scaled, normed_grad)
            norm_grad += weight_grad
            torch.add(grad[part], own_grad, out=x_grad[part])
        return x_grad, norm_grad, gate_grad, up_grad, down_grad, None, None, None


def feed_forward_sublayer(layer: T5LayerFF, x: Tensor) -> Tensor:
    r"""T5's :math:`x + D(W_o \, D(\text{gelu}(W_0 \bar x) \odot W_1 \bar x))` of the normed :math:`\bar x`.

    D is dropout. Only what enters the activation and the product is kept for the backward pass.

    Args:
        layer: a sublayer that `chunks_well`.
        x: ``(tokens, d_model)``.
    """
    inner: Any = layer.DenseReluDense
    return apply(
        _FeedForward,
        x,
        layer.layer_norm.weight,
        inner.wi_0.weight,
        inner.wi_1.weight,
        inner.wo.weight,
        layer.layer_norm.variance_epsilon,
        float(inner.dropout.p) if inner.dropout.training else 0.0,
        float(layer.dropout.p) if layer.dropout.training else 0.0,
    )
