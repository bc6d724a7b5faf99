"""Float32 matrix products on the CPU, by the faster of the two libraries that come with PyTorch.

PyTorch uses its BLAS, on x86 MKL, which does without AVX-512 on AMD's processors. Since Zen 5 their AVX-512 units are
twice as wide: on a core MKL reached 92 GFLOP/s, oneDNN 205. On Zen 4 they reach 80 to 95 and 90 to 107, and on small
matrices MKL is faster.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lit_distill.students.fast.support import has_hooks

CPU_INFO = Path("/proc/cpuinfo")
"""What Linux says of the processor; other systems have no such file, and use the BLAS."""


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
    """Whether oneDNN is: on AMD's processors since Zen 5, family 26.

    The kind of processor decides, and no measurement: the two libraries round differently, and a seed gives the same
    run however busy the machine is.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not CPU_INFO.is_file():
        return False
    info = CPU_INFO.read_text()
    family = re.search(r"^cpu family\s*:\s*(\d+)$", info, re.MULTILINE)
    return "AuthenticAMD" in info and family is not None and int(family[1]) >= 26
