"""`Step`, the input of a loss, and `Objective`, an additional loss."""

import importlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from torch import Tensor, nn

from lit_distill.batch import TaskBatch, target_tokens
from lit_distill.checks import check_range
from lit_distill.errors import UserError
from lit_distill.students import Pass, Student
from lit_distill.teachers.models import Teachers


class Step:
    """A micro-batch with the student's forward pass over it and those of the teachers.

    Passes are lazy: a model runs at the first access, once, however many losses read its results.
    """

    def __init__(self, batch: TaskBatch, student: Student, teachers: Teachers) -> None:
        self.batch = batch
        self._student = student
        self._teachers = teachers
        self._passes: dict[str, Pass] = {}

    @cached_property
    def student(self) -> Pass:
        """The student's pass, with gradients."""
        made: Pass = self._student(move_data_to_device(self.batch, next(self._student.parameters()).device))
        return made

    def teacher(self, name: str) -> Pass:
        """The pass of one of the module's ``teachers``, without gradients and on the student's device.

        Raises:
            UserError: there is no teacher of that name.
        """
        if name not in self._passes:
            self._passes[name] = self._teachers.forward(name, self.batch, self._student)
        return self._passes[name]


class Objective(HyperparametersMixin, nn.Module):
    """An additional loss term. A subclass implements ``forward`` and is named in YAML by its import path.

    Its parameters, if any, train with the student and are saved in checkpoints, but not in the exported student.

    Args:
        name: of the term, as in ``train/<name>_loss``; by default the class's name in lower case.
        weight: factor of the term in the total loss.
        teacher: which of the module's ``teachers`` it uses.
        tasks: the tasks that it applies to; all by default.
    """

    def __init__(
        self,
        *,
        name: str | None = None,
        weight: float = 1.0,
        teacher: str | None = None,
        tasks: list[str] | None = None,
    ) -> None:
        super().__init__()
        # includes a subclass's arguments, from which a checkpoint rebuilds the objective
        self.save_hyperparameters()
        check_range("objectives: weight", weight, at_least=0)
        self.name = name or type(self).__name__.lower()
        self.weight = weight
        self.teacher = teacher
        self.tasks = tasks

    def forward(self, step: Step) -> Tensor:
        """The unweighted term, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} has no forward(step)")

    def about(self, batch: TaskBatch) -> list[str]:
        """The tasks of a batch that the objective applies to."""
        return [task for task in batch if self.tasks is None or task in self.tasks]

    def counts(self, batch: TaskBatch) -> int | None:
        """Number of items that the term is a mean over in this batch; by default the target tokens of its tasks.

        It makes the term exact over the whole optimizer step. ``None`` averages plainly over micro-batches and ranks.
        """
        return sum(target_tokens(batch[task]) for task in self.about(batch))

    def prepare(self, window: Sequence[Step]) -> None:
        """Change an optimizer step's batches in place, before their targets are counted.

        For example to replace targets by ``step.student.generate(...)``. Runs in evaluation mode without gradients;
        random numbers depend on the run's seed, the step and the rank alone.
        """

    def plain(self) -> dict[str, Any]:
        """Class and arguments in plain types, for `build_objective`."""
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": dict(self.hparams)}


def build_objective(plain: Mapping[str, Any]) -> Objective:
    """The objective that `Objective.plain` describes."""
    module, _, name = str(plain["class_path"]).rpartition(".")
    made: Objective = getattr(importlib.import_module(module), name)(**plain["init_args"])
    return made


def check_objectives(objectives: Sequence[Objective], tasks: Sequence[str], teachers: Teachers) -> None:
    """Raise a ``UserError`` if two terms share a name, or an objective's task or teacher does not exist."""
    taken = set(tasks)
    for objective in objectives:
        name = objective.name
        if name in taken:
            raise UserError(f"objectives: {name} is the name of two terms; give one of them another name")
        taken.add(name)
        if unknown := [task for task in objective.tasks or () if task not in tasks]:
            raise UserError(f"objectives: {name}: unknown task {unknown[0]!r}; there are {', '.join(tasks)}")
        if objective.teacher is not None:
            teachers.check(f"objectives: {name}", objective.teacher)
