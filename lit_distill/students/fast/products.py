"""Float32 matrix products on the CPU, by the faster of the two libraries that come with PyTorch.

PyTorch uses its BLAS, on x86 MKL, which may use less than a processor has: on an AMD EPYC with AVX-512 it reached
92 GFLOP/s on a core, oneDNN 205.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lit_distill.students.fast.support import has_hooks

WORTH = 0.8
"""oneDNN is used where it takes no more than this share of the BLAS's time, so that chance does not decide."""


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.t()`` of ``(rows, inputs)`` and ``(outputs, inputs)``, in any strides."""
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and onednn_is_faster():
        return _onednn(x, weight)
    return x @ weight.t()


def linear(module: Any, x: Tensor) -> Tensor:
    """``module(x)`` of ``(tokens, inputs)``; of a plain linear layer without a bias as `product`."""
    # the order is that of cost
    if (
        type(module) is not nn.Linear
        or x.device.type != "cpu"
        or not x.dtype == module.weight.dtype == torch.float32
        or module.bias is not None
        or torch.is_autocast_enabled("cpu")
        or has_hooks(module)
        or not onednn_is_faster()
    ):
        return cast(Tensor, module(x))
    return cast(Tensor, _Linear.apply(x, module.weight)) if torch.is_grad_enabled() else _onednn(x, module.weight)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return (
            _onednn(grad, weight.t()) if ctx.needs_input_grad[0] else None,
            _onednn(grad.t(), x.t()) if ctx.needs_input_grad[1] else None,
        )


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN is, on this machine and with its threads; measured once a process, in about 50 ms."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    x, weight = torch.zeros(512, 512), torch.zeros(1024, 512)

    def seconds(function: Callable[[Tensor, Tensor], Tensor]) -> float:
        started = time.perf_counter()
        function(x, weight)
        return time.perf_counter() - started

    # the first ones prepare
    times = [(seconds(_onednn), seconds(nn.functional.linear)) for _ in range(6)][1:]
    return min(ours for ours, _ in times) <= WORTH * min(plain for _, plain in times)
