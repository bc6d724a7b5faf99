"""Weights in the dtype of autocast: each is cast once, and layers that read the same input multiply it once."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from lit_distill.students.fast.products import linear


class _Cast(Function):
    """The identity on a copy: each part of its gradient goes on to what was copied, in the dtype of that."""

    @staticmethod
    def forward(ctx: Any, copy: Tensor, *sources: Tensor) -> Tensor:
        ctx.dtypes, ctx.rows = [source.dtype for source in sources], [len(source) for source in sources]
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = zip(grad.split(ctx.rows), ctx.dtypes, ctx.needs_input_grad[1:], strict=True)
        return None, *(part.to(dtype) if needed else None for part, dtype, needed in parts)


def cast_of(copy: Tensor, *sources: Tensor) -> Tensor:
    """A copy of sources ``(n, ...)`` below each other, through which their gradients go.

    Where several products share one copy, their gradients are added in the dtype of the source, as under autocast.
    """
    return cast(Tensor, cast(Any, _Cast).apply(copy, *sources))


class Casts:
    """Weights in the dtype of autocast, cast at their first use; for as long as no weight changes."""

    def __init__(self) -> None:
        self._copies: dict[tuple[int, ...], tuple[Sequence[Tensor], list[int], Tensor]] = {}

    def __deepcopy__(self, memo: Any) -> "Casts":
        # a copied student has other weights
        return Casts()

    def of(self, *weights: Tensor) -> Tensor:
        """Weights ``(n, size)`` below each other, through which their gradients go."""
        return cast_of(self.copy(*weights), *weights)

    def copy(self, *weights: Tensor) -> Tensor:
        """Weights ``(n, size)`` below each other, without gradients."""
        dtype, key = torch.get_autocast_dtype(weights[0].device.type), tuple(map(id, weights))
        versions = [0 if weight.is_inference() else weight._version for weight in weights]
        # the weights are kept, too: an id is that of one tensor only while that lives
        _, before, copy = self._copies.get(key, (weights, [], weights[0]))
        if before != versions or copy.dtype != dtype:
            # also a copy that is made while evaluating can be trained with
            with torch.inference_mode(False), torch.no_grad():
                copy = weights[0].new_empty(sum(map(len, weights)), weights[0].shape[1], dtype=dtype)
                for part, weight in zip(copy.split([len(weight) for weight in weights]), weights, strict=True):
                    part.copy_(weight)
            self._copies[key] = weights, versions, copy
        return copy


class Shared:
    """A tensor that many products read: under autocast they share one copy."""

    def __init__(self, x: Tensor) -> None:
        self._x = x

    def read(self, casts: Casts | None) -> Tensor:
        """The tensor, or with ``casts`` its copy, with its gradient."""
        return self._x if casts is None else cast_of(self._copy, self._x)

    @cached_property
    def _copy(self) -> Tensor:
        return self._x.detach().to(torch.get_autocast_dtype(self._x.device.type))


def is_plain(module: nn.Module) -> bool:
    """Whether a layer is nothing but a matrix product with its weight."""
    return type(module) is nn.Linear and module.bias is None


def project(modules: Sequence[Any], x: Tensor, casts: Casts | None) -> list[Tensor]:
    """What layers make of the same input ``(tokens, size)``; with ``casts`` the plain ones in one product."""
    together = [module.weight for module in modules if casts is not None and is_plain(module)]
    if casts is None or not together:
        return [linear(module, x) for module in modules]
    whole = F.linear(x, casts.of(*together))
    parts = iter([whole] if len(together) == 1 else whole.split([len(weight) for weight in together], dim=1))
    return [next(parts) if is_plain(module) else module(x) for module in modules]
