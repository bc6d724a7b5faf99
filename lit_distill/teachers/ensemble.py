"""Several models as one teacher."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_distill.errors import UserError
from lit_distill.students.base import Stepper
from lit_distill.teachers.frozen import FrozenPass
from lit_distill.teachers.settings import Mean


class EnsemblePass:
    """The part of a `Pass` that several models have in common: one distribution at each target token.

    It is the weighted mean of their logits, or the logarithm of that of their probabilities. Their states are put side
    by side and taken apart by `project`, so that losses see an ensemble chunk by chunk, as they do one model.

    Args:
        name: the teacher's, for errors.
        passes: of the models, with results on one device.
        widths: of the models' states.
        weights: of the models, which add up to 1.
        mean: of what.
    """

    def __init__(
        self, name: str, passes: Sequence[FrozenPass], widths: Sequence[int], weights: Sequence[float], mean: Mean
    ) -> None:
        self.batch = passes[0].batch
        self._name, self._passes, self._widths, self._weights, self._mean = name, passes, list(widths), weights, mean

    def states(self, task: str) -> Tensor:
        """The models' states side by side, ``(tokens, sum of their d_model)``."""
        return torch.cat([each.states(task) for each in self._passes], dim=-1)

    def project(self, states: Tensor) -> Tensor:
        parts = states.split(self._widths, dim=-1)
        return self._average([each.project(part) for each, part in zip(self._passes, parts, strict=True)])

    def logits(self, task: str) -> Tensor:
        return self.project(self.states(task))

    def stepper(self, task: str) -> Stepper:
        steps = [each.stepper(task) for each in self._passes]
        return lambda ids: self._average([step(ids) for step in steps])

    def _average(self, logits: Sequence[Tensor]) -> Tensor:
        """The mean of the models' logits, each ``(n, vocabulary)``, in float32."""
        # some heads are padded
        ids = min(own.shape[-1] for own in logits)
        shared = torch.stack([own[:, :ids].float() for own in logits])
        weights = shared.new_tensor(self._weights).view(-1, 1, 1)
        if self._mean == "logits":
            return (weights * shared).sum(0)
        return (weights.log() + shared.log_softmax(-1)).logsumexp(0)

    def __getattr__(self, name: str) -> Any:
        if name in ("inputs", "labels", "rows"):
            return getattr(self._passes[0], name)
        if name.startswith("_"):
            raise AttributeError(name)
        raise UserError(f"teachers: {self._name}: an ensemble gives distributions alone, no {name}; use one model")
