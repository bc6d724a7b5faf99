"""Shared weights: students that are parts of a super-student, trained and validated as such."""

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_distill.batch import TaskBatch
from lit_distill.errors import UserError
from lit_distill.modules import DistillModule
from lit_distill.modules.optimization import make_optimizer
from lit_distill.searching.space import Shape, part_of
from lit_distill.shrinking.shrink import shrink, smaller_weights
from lit_distill.students import Student, wrap


class SuperStudent:
    """A module whose student is to share its weights with all smaller ones.

    Raises a ``UserError`` for a module that trains more than the student, or changes batches by what the student says.
    """

    def __init__(self, module: DistillModule) -> None:
        self.module, self.whole = module, module.student
        self._objectives = list(module.objectives)
        if self.whole.adapter is not None:
            raise UserError("adapter: a super-student has none: all of its weights are shared")
        for objective in self._objectives:
            if objective.prepares or next(objective.parameters(), None) is not None:
                why = "changes batches" if objective.prepares else "has weights of its own, for one width"
                raise UserError(f"objectives: {objective.name} {why}; ranking by shared weights is without it")
        if module.weighting is not None:
            raise UserError("weighting: a super-student needs fixed weights of the terms")

    @contextmanager
    def part(self, shape: Shape) -> Iterator[Student]:
        """The module's student and objectives are those of a shape, with copies of the weights."""
        structure, keep = part_of(self.whole, shape)
        small = wrap(shrink(structure, keep), self.whole.tokens).to(self.whole.device).train(self.module.training)
        objectives = copy.deepcopy(self._objectives)
        self.module.student, self.module.objectives = small, nn.ModuleList(objectives)  # type: ignore[assignment]
        try:
            for objective in objectives:
                objective.setup(small, self.module.teachers)
            yield small
        finally:
            self.module.student, self.module.objectives = self.whole, nn.ModuleList(self._objectives)  # type: ignore[assignment]

    def loss(self, shape: Shape, batch: TaskBatch, shares: Mapping[str, float] | None = None) -> Tensor:
        """The module's loss of a part, each term times its share; its gradient is that of the shared weights."""
        structure, keep = part_of(self.whole, shape)
        shared = smaller_weights(structure, keep, structure.network.state_dict(keep_vars=True))
        with self.part(shape) as small:
            # one of each tied pair
            own = {f"module.student.model.{name}": shared[name] for name, _ in small.network.named_parameters()}
            loss: Tensor = functional_call(_Loss(self.module), own, (batch, shares or {}))
        return loss

    def _shares(self, window: Sequence[TaskBatch]) -> list[dict[str, float]]:
        """Of each micro-batch, the share of each term in its mean over the whole step, as in ``fit``."""
        counts = [self.module.term_counts(batch) for batch in window]
        names = set().union(*counts)
        totals = {name: max(1, sum(int(of_batch.get(name, 0)) for of_batch in counts)) for name in names}
        return [
            {name: int(of_batch.get(name, 0)) / totals[name] for name in names} | {"": 1 / len(window)}
            for of_batch in counts
        ]

    def train(
        self,
        steps: int,
        windows: Iterator[Sequence[TaskBatch]],
        shapes: Sequence[Shape],
        seed: int,
        *,
        clip: float | None,
        autocast: Callable[[], AbstractContextManager[object]],
        advance: Callable[[int, str], None],
    ) -> None:
        """Train the shared weights by the module's losses and optimizer, as a SuperLM (AutoDistil, arXiv 2201.12507).

        Each step takes the mean gradient of three parts (the sandwich rule): the first two shapes, which are the
        largest and the smallest, and one drawn of the others.

        Args:
            steps: optimizer steps.
            windows: the micro-batches of each step.
            shapes: the largest, the smallest, then those to draw from.
            seed: of the draws.
            clip: maximum norm of the gradient.
            autocast: the context of a forward.
            advance: called after each step with 1 and what to show.
        """
        draw = random.Random(seed)  # noqa: S311 - no secret
        self.module.train()
        device = self.whole.device.type
        optimizer, scheduler = make_optimizer(self.whole, self.module.hparams, steps, fused=device in ("cpu", "cuda"))
        for step in range(steps):
            window, total = next(windows), 0.0
            optimizer.zero_grad()
            for shape in (*shapes[:2], draw.choice(shapes[2:])):
                for batch, shares in zip(window, self._shares(window), strict=True):
                    with autocast():
                        loss = self.loss(shape, batch, shares) / 3
                    loss.backward()
                    total += float(loss.detach())
            if not math.isfinite(total):
                raise UserError(f"shared_steps: step {step}: the loss is not finite; lower model.learning_rate")
            if clip:
                nn.utils.clip_grad_norm_(self.whole.parameters(), clip)
            optimizer.step()
            scheduler.step()
            advance(1, f"loss {total:.3f}")

    @torch.no_grad()
    def validation_loss(self, shape: Shape, batches: Iterable[TaskBatch]) -> float:
        """The loss of a part over whole batches, each term as a mean over all that it counts."""
        module, sums = self.module.eval(), dict[str, list[Tensor | float]]()
        with self.part(shape):
            for batch in batches:
                counts = module.term_counts(batch)
                for name, term in module.loss_terms(module.step(batch)).items():
                    number = counts.get(name, 1)
                    total, seen = sums.get(name, [0.0, 0])
                    # a term over nothing may be NaN
                    sums[name] = [total + term * number if number else total, seen + number]
            means = {name: torch.as_tensor(total) / max(seen, 1) for name, (total, seen) in sums.items()}
            return float(module.total_loss(means))


class _Loss(nn.Module):
    """A module's loss as a forward, for `functional_call`."""

    def __init__(self, module: DistillModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: TaskBatch, shares: Mapping[str, float]) -> Tensor:
        terms = self.module.loss_terms(self.module.step(batch))
        if shares:
            # a term over nothing may be NaN; one that is no mean over what it counts is a mean over micro-batches
            share = {name: shares.get(name, shares[""]) for name in terms}
            terms = {
                name: term * share[name] if share[name] else torch.zeros_like(term) for name, term in terms.items()
            }
        return self.module.total_loss(terms)
