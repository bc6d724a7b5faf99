"""One optimizer step up to the gradient that the optimizer would get: what stands in for the trainer's usual parts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lit_distill.batch import TaskBatch


@dataclass(frozen=True)
class Measured:
    """One optimizer step."""

    terms: dict[str, float]
    gradients: dict[str, Tensor]  # of each trainable parameter that has one

    @property
    def is_finite(self) -> bool:
        """Whether the terms and the gradient are."""
        return all(map(math.isfinite, self.terms.values())) and all(
            bool(gradient.isfinite().all()) for gradient in self.gradients.values()
        )


class Catch(Callback):
    """Keeps the step's terms and gradient."""

    measured: Measured | None = None

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep what the optimizer would get."""
        terms = {name: float(term) for name, term in cast(Any, pl_module)._window_terms.items()}
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        self.measured = Measured(terms, gradients)


class _Batches(list[TaskBatch]):
    """A data loader: of a plain list, Lightning would take each batch for one."""


class GivenData(pl.LightningDataModule):
    """A data module with other training batches, and without others."""

    batch_size = None

    def __init__(self, data: Any, batches: Sequence[TaskBatch]) -> None:
        super().__init__()
        self._data, self._batches = data, _Batches(batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_data"], name)

    def train_dataloader(self) -> _Batches:
        """The given batches."""
        return self._batches


class Computing(TorchFunctionMode):
    """In float64 also where code asks for float32, and without dropout."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "__get__":
            # most calls: `dtype`, `device`, `shape`
            return func(*args)
        given = dict(kwargs or {})
        if func is F.dropout:
            return args[0]
        if "dropout_p" in given:
            given["dropout_p"] = 0.0
        if func is Tensor.backward:
            # a mode is off inside what it has intercepted, but custom functions compute here
            with self:
                engine: Any = torch.autograd.Variable._execution_engine
                engine.run_backward(
                    (args[0],), (torch.ones_like(args[0]),), bool(given.get("retain_graph")), False, (),
                    allow_unreachable=True, accumulate_grad=True,
                )  # fmt: skip
            return None
        if self._dtype == torch.float64:
            func = Tensor.double if func is Tensor.float else func
            args = [self._dtype if value is torch.float32 else value for value in args]
            given = {name: self._dtype if value is torch.float32 else value for name, value in given.items()}
        return func(*args, **given)


def keep_all(like: Tensor, p: float) -> tuple[Tensor, float]:
    """As `dropout_mask`."""
    return torch.ones(like.shape, dtype=torch.bool), 1.0
