"""Whether a method's losses are right: one optimizer step of them, taken in ways that must not matter.

Each step is trained by the real trainer, with the module's own hooks, on the same few rows, up to the gradient that the
optimizer would get.
"""

import copy
import logging
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_distill.batch import TaskBatch, TaskInputs, target_tokens
from lit_distill.checking.rows import differ, number_of, padded, part, without_targets
from lit_distill.checking.step import Catch, Computing, GivenData, Measured, keep_all
from lit_distill.errors import UserError
from lit_distill.modules.base import DistillModule
from lit_distill.modules.training import Training
from lit_distill.objectives import Objective, build_objective
from lit_distill.students import Student
from lit_distill.teachers.frozen import FrozenModel

Precision = Literal["float64", "float32"]

TOLERANCE: Mapping[Precision, float] = {"float64": 1e-9, "float32": 1e-4}
"""Largest relative difference that is rounding. In float64 rounding is about 1e-14, and a wrong loss rarely below 1e-4;
in float32 it is about 1e-6, and more where a term is a small difference of large numbers."""

_SMALL = 1e-3
"""Terms below this are compared by their absolute difference: a divergence near 0 is the rounding of larger values."""

_TRIES = 8
"""Steps until an objective that prepares some of them alone has prepared one."""

_CHUNK_SIZES = (
    "lit_distill.objectives.chunks.CHUNK_BYTES",
    "lit_distill.students.fast.functions.CHUNK_BYTES", "lit_distill.students.fast.functions.KEPT_BYTES",
    "lit_distill.students.causal._CHUNK_BYTES",
)  # fmt: skip
"""The constants that bound chunks of logits."""


@dataclass(frozen=True)
class Finding:
    """One check's result."""

    check: str
    passed: bool | None  # `None`: not checked, or nothing that is right or wrong
    found: str
    difference: float | None = None  # relative


class Checker:
    """Checks of one module on the rows of one batch.

    The module's weights are cast to the precision, so it must not be trained afterwards. Steps are taken without
    dropout, whatever its rate.

    Args:
        module: any method.
        data: its data module, set up for ``fit``.
        batch: some rows of train.
        precision: ``float64`` tells rounding from a wrong loss best; ``float32`` is what is trained in.
    """

    def __init__(self, module: DistillModule, data: Any, batch: TaskBatch, precision: Precision = "float64") -> None:
        self.module, self.data, self.batch, self.precision = module, data, batch, precision
        self.allowed = TOLERANCE[precision]
        self._dtype = getattr(torch, precision)
        self._unchanged = False  # whether an objective prepares steps, and none of those tried
        module.teachers.load(module.student)
        for group in module.teachers.unweighed():
            # alike on all ranks, whatever their rows
            group.similarities = [1.0] * len(group.settings.names)
        for objective in module.objectives:
            objective.setup(module.student, module.teachers)
        for each in (module, *self._teachers):
            each.to(self._dtype)

    @property
    def _models(self) -> list[FrozenModel]:
        return [model for group in self.module.teachers.groups.values() for model in group.models.values()]

    @property
    def _teachers(self) -> list[Student]:
        return [model.student for model in self._models]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return number_of(self.batch)

    def measure(
        self,
        batches: Sequence[TaskBatch],
        *,
        accumulate: int | None = None,
        only: Collection[str] | None = None,
        prepare: bool = False,
        seed: int = 0,
        **trainer: Any,
    ) -> Measured:
        """The terms and the gradient of one optimizer step over these micro-batches.

        ``accumulate`` is the trainer's ``accumulate_grad_batches``; ``only`` leaves out the other terms' gradients;
        with ``prepare`` objectives change the batches before, in place.
        """
        module, caught = self.module, Catch()
        settings: dict[str, Any] = {
            "accelerator": "cpu", "devices": 1, "precision": "64-true" if self.precision == "float64" else "32-true",
            "max_steps": 1, "accumulate_grad_batches": accumulate or len(batches), "logger": False,
            "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
            "num_sanity_val_steps": 0, "limit_val_batches": 0, "callbacks": [caught],
        }  # fmt: skip
        total = module.total_loss

        def restricted(terms: dict[str, Tensor]) -> Tensor:
            if not terms:
                raise UserError(f"{type(module).__name__}: loss_terms gives no terms, so there is nothing to check")
            # not without the others, as every parameter must have a gradient
            return total({name: term if only is None or name in only else 0 * term for name, term in terms.items()})

        overridden: dict[str, Any] = {
            "total_loss": restricted,
            # does not change the weights, and has no state
            "configure_optimizers": lambda: torch.optim.SGD(module.parameters(), lr=0.0),
            # all steps are computed alike
            "choose_path": lambda stage, batch: None,
        }
        if not prepare:
            overridden["prepare"] = lambda window: None
        torch.manual_seed(seed)
        with ExitStack() as stack:
            # what a trainer says at its start and end, as there are many
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(max(logging.INFO, logging.root.manager.disable))
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            stack.enter_context(patch.multiple(module, create=True, **overridden))
            stack.enter_context(Computing(self._dtype))
            for name in ("functions", "attention"):
                stack.enter_context(patch(f"lit_distill.students.fast.{name}.dropout_mask", keep_all))
            stack.enter_context(patch("lit_distill.students.fast.support.DTYPES", {self._dtype}))
            try:
                pl.Trainer(**settings | trainer).fit(module, datamodule=GivenData(self.data, batches))
            except UserError:
                # the module itself stops at a loss that is not finite
                if caught.measured is None or caught.measured.is_finite:
                    raise
        module.zero_grad()
        assert caught.measured is not None  # noqa: S101 - for the type checker
        return caught.measured

    @cached_property
    def reference(self) -> Measured:
        """The step over all rows as one micro-batch, which objectives prepare here, and not again."""
        teachers, module = self._teachers, self.module
        prepares = type(module).prepare is not Training.prepare
        prepares = prepares or any(objective.prepares for objective in module.objectives)
        before = [_sums(teacher) for teacher in teachers]
        for teacher in teachers:
            # so that a gradient into it would be seen
            teacher.requires_grad_(True)
        for seed in range(_TRIES if prepares else 1):
            # in place, where an objective prepares it
            batch = {task: cast(TaskInputs, dict(inputs)) for task, inputs in self.batch.items()}
            found = self.measure([batch], prepare=True, seed=seed)
            self._unchanged = prepares and not differ(batch, self.batch)
            if not self._unchanged:
                break
        self.batch = batch
        weights = [parameter for teacher in teachers for parameter in teacher.parameters()]
        own = {id(parameter) for parameter in module.parameters()}
        faults = {
            "a gradient flows into the teacher": any(weight.grad is not None for weight in weights),
            "the teacher's weights changed": [_sums(teacher) for teacher in teachers] != before,
            "the teacher is in training mode": any(teacher.training for teacher in teachers),
            "the optimizer has the teacher's weights": any(id(weight) in own for weight in weights),
        }
        self._of_teachers = _finding("teacher", faults, "no gradient, unchanged")
        for teacher in teachers:
            teacher.requires_grad_(False)
            teacher.zero_grad()
        return found

    def run(self) -> Iterator[Finding]:
        """All checks in this process, one after the other."""
        if not self.reference.is_finite:
            yield _finite("finite", self.reference)
            return
        if self._unchanged:
            yield Finding("prepare", None, f"changed nothing in {_TRIES} steps")
        yield self._compared("more padding", self.measure([padded(self.batch)]))
        with self._small_chunks():
            yield self._compared("smaller chunks of logits", self.measure([self.batch]))
        backwards = part(self.batch, range(self.rows - 1, -1, -1))
        yield self._compared("rows in another order", self.measure([backwards]))
        half, uneven, whole = self.rows // 2, self.uneven, self.rows
        for check, first, accumulate in (
            (f"micro-batches of {half} and {whole - half} rows", half, 2),
            (f"micro-batches of {uneven} and {whole - uneven} rows", uneven, 2),
            ("the same, as a short last step of 4", uneven, 4),
        ):
            found = self.measure(self.parts(first), accumulate=accumulate, only=self.exact)
            yield from self.split(check, found)
        if self._teachers:
            yield self._of_teachers
            yield from self._student_is_teacher()
        yield _finite("no targets", self.measure([without_targets(self.batch)]))
        yield self._masked()
        for name in self.reference.terms:
            yield self._weight(name)

    # ------------------------------------------------------------------ the same step

    @property
    def inexact(self) -> dict[str, str]:
        """Terms that depend on how rows are split into micro-batches, and why."""
        counts = self.module.term_counts(self.batch)
        reasons = {name: "plain mean over micro-batches" for name in self.reference.terms if name not in counts}
        whole = [objective.name for objective in self.module.objectives if objective.of_whole_batch]
        return reasons | dict.fromkeys(whole, "depends on its micro-batch")

    @property
    def exact(self) -> list[str]:
        """The other terms."""
        return [name for name in self.reference.terms if name not in self.inexact]

    @property
    def uneven(self) -> int:
        """Rows of the larger of two uneven parts."""
        return self.rows // 2 + (self.rows > 2)

    def parts(self, first: int) -> list[TaskBatch]:
        """The batch as two micro-batches, of which the first has so many rows."""
        return [part(self.batch, range(first)), part(self.batch, range(first, self.rows))]

    def split(self, check: str, found: Measured) -> Iterator[Finding]:
        """Whether a step over several micro-batches, ``only`` the exact terms, is that over one."""
        if self.exact:
            yield self._compared(check, found, only=self.exact)
        for name, reason in self.inexact.items():
            yield Finding(check, None, f"{name}: {reason}", _difference(found.terms[name], self.reference.terms[name]))

    @cached_property
    def _exact_reference(self) -> Measured:
        return self.measure([self.batch], only=self.exact) if self.inexact else self.reference

    def _compared(self, check: str, found: Measured, only: Sequence[str] | None = None) -> Finding:
        """Whether a step's terms, by default all, and its gradient are those of the reference."""
        reference = self.reference if only is None else self._exact_reference
        names = reference.terms if only is None else only
        differences = {name: _difference(found.terms[name], reference.terms[name]) for name in names}
        differences["gradient"] = _distance(found.gradients, reference.gradients)
        # a difference that is no number comes first
        worst = max(differences, key=lambda name: (not math.isfinite(differences[name]), differences[name]))
        wrong = [name for name, value in differences.items() if not value <= self.allowed]
        told = f"{', '.join(wrong)} changed" if wrong else f"most: {worst}"
        return Finding(check, not wrong, told, differences[worst])

    @contextmanager
    def _small_chunks(self) -> Iterator[None]:
        # a few chunks: with each one a gradient as large as the output head is added
        tokens = max(1, sum(target_tokens(inputs) for inputs in self.batch.values()) // 5)
        size = 4 * tokens * self.module.student.network.config.get_text_config().vocab_size
        with ExitStack() as stack:
            for name in _CHUNK_SIZES:
                stack.enter_context(patch(name, 0 if name.endswith("KEPT_BYTES") else size))
            yield

    # ------------------------------------------------------------------ hard inputs

    def _student_is_teacher(self) -> Iterator[Finding]:
        """Whether divergences are 0 where every teacher is the student itself."""
        check, module = "student = teacher", self.module
        # built again, as parameters of their own have shapes of the real teacher, which other objectives need
        built: dict[str, Objective] = {}
        for each in module.objectives:
            # a teacher whose distributions were captured has no model
            if each.zero_at_teacher and (each.teacher is None or module.teachers.loaded(each.teacher)):
                built[each.name] = build_objective(each.plain())
                built[each.name].tasks, built[each.name].teacher = each.tasks, each.teacher
        if not built:
            return
        twin = copy.deepcopy(module.student).eval().requires_grad_(False)
        with patch.dict(module._modules, {"objectives": nn.ModuleList(built.values())}), ExitStack() as stack:
            for model in self._models:
                stack.enter_context(patch.object(model, "student", twin))
            found = self.measure([self.batch], only=built)
        if not found.is_finite:
            yield _finite(check, found)
            return
        worst = max(built, key=lambda name: abs(found.terms[name]))
        value = found.terms[worst]
        yield Finding(check, abs(value) <= self.allowed, f"{worst} is {value:.1e}", abs(value))

    def _masked(self) -> Finding:
        """Finite with an entry of the vocabulary excluded by a logit of minus infinity, on both sides."""
        if not all(group.models for group in self.module.teachers.groups.values()):
            return Finding("a logit of -inf", None, "a teacher's distributions were captured")
        used = {int(token) for inputs in self.batch.values() for token in inputs["labels"].unique()}
        entry = max(set(range(len(self.module.tokenizer))) - used)

        def mask(head: nn.Module, given: Any, logits: Tensor) -> Tensor:
            excluded = torch.arange(logits.shape[-1], device=logits.device) == entry
            return logits.masked_fill(excluded, -math.inf)

        heads = [each.network.get_output_embeddings() for each in (self.module.student, *self._teachers)]
        handles = [cast(nn.Module, head).register_forward_hook(mask) for head in heads]
        try:
            return _finite("a logit of -inf", self.measure([self.batch]))
        finally:
            for handle in handles:
                handle.remove()

    # ------------------------------------------------------------------ weights

    def _weight(self, name: str) -> Finding:
        """Whether a term alone moves the student, and its objective's own parameters, in proportion to its weight."""
        check, module = f"weight of {name} alone", self.module
        found_at = ((i, each) for i, each in enumerate(module.objectives) if each.name == name)
        number, objective = next(found_at, (-1, None))
        if module.term_counts(self.batch).get(name) == 0:
            return Finding(check, None, "nothing to count in these rows")
        with self._weighing(name, 1.0):
            alone, found = self._factor(name), self.measure([self.batch], only=[name])
        with self._weighing(name, 2.0):
            twice = self._factor(name)
        moved = {key: gradient for key, gradient in found.gradients.items() if gradient.any()}
        student, of_all = (_student_norm(each) for each in (found, self.reference))
        trained = [key for key, one in module.named_parameters() if one.requires_grad]
        still = [key for key in trained if key.startswith(f"objectives.{number}.") and key not in moved]
        # a thousandth of what is allowed is rounding for sure
        moves = student > 1e-3 * self.allowed * of_all
        is_zero = abs(self.reference.terms[name]) <= self.allowed
        if not moves and is_zero and objective is not None and objective.zero_at_teacher:
            return Finding(check, None, "no gradient: the student is its teacher")
        weighed = objective is not None or name in module.tasks
        faults = {
            f"{name} does not move the student": not moves,
            "the weight does nothing": weighed and (not math.isclose(twice, 2 * alone) or alone == 0),
            f"no gradient in {', '.join(still)}": bool(still),
        }
        return _finding(check, faults, f"gradient {student:.2g}")

    def _factor(self, name: str) -> float:
        """By how much a term counts in the total."""
        terms = {each: torch.tensor(float(each == name)) for each in self.reference.terms}
        return float(self.module.total_loss(terms).detach())

    def _weighing(self, name: str, weight: float) -> AbstractContextManager[Any]:
        """With another weight of a term, where it has one."""
        for objective in self.module.objectives:
            if objective.name == name:
                return patch.object(objective, "weight", weight)
        tasks = self.module.tasks
        return patch.dict(tasks, {name: replace(tasks[name], weight=weight)} if name in tasks else {})


def _finding(check: str, faults: Mapping[str, bool], fine: str) -> Finding:
    """Which of the faults are there; ``fine`` is said without any."""
    wrong = [fault for fault, is_there in faults.items() if is_there]
    return Finding(check, not wrong, "; ".join(wrong) or fine)


def _finite(check: str, found: Measured) -> Finding:
    values = [f"{name} is {value}" for name, value in found.terms.items() if not math.isfinite(value)]
    told = "finite" if found.is_finite else ", ".join(values) or "the gradient is not finite"
    return Finding(check, found.is_finite, told)


def _sums(model: nn.Module) -> list[tuple[float, int]]:
    """What tells changed weights."""
    return [(float(parameter.detach().sum()), parameter._version) for parameter in model.parameters()]


def _student_norm(found: Measured) -> Tensor:
    return torch.nn.utils.get_total_norm([one for name, one in found.gradients.items() if name.startswith("student.")])


def _difference(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), _SMALL)


def _distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Relative distance of two gradients; a parameter without one has 0."""
    nothing = torch.zeros(())
    pairs = [(found.get(name, nothing), expected.get(name, nothing)) for name in found.keys() | expected.keys()]
    square = sum(float((own - other).square().sum()) for own, other in pairs)
    size = sum(float(other.square().sum()) for _, other in pairs)
    return math.sqrt(square / (size or 1.0))
