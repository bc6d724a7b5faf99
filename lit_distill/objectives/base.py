"""`Step`, what one micro-batch is to a loss, and `Objective`, a loss that a method adds to those of its tasks."""

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
    """One micro-batch with the student's pass of it and the teachers'.

    Nothing runs before something of a pass is read, and a model runs once, whoever reads what of it.
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
        """The pass of one of the module's ``teachers``, without gradients; its tensors are on the student's device.

        Raises:
            UserError: there is no teacher of that name.
        """
        if name not in self._passes:
            self._passes[name] = self._teachers.forward(name, self.batch, self._student)
        return self._passes[name]


class Objective(HyperparametersMixin, nn.Module):
    """A loss term of its own. A subclass writes ``forward``, and is named in YAML by its import path.

    Its parameters, if it has any, train with the student and are kept in checkpoints, not in the exported student.

    Args:
        name: of the term, as in ``train/<name>_loss``; by default the class's, in small letters.
        weight: factor of the term in the total loss.
        teacher: which of the module's ``teachers`` it asks.
        tasks: the tasks that it is about; all of the batch by default.
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
        # finds a subclass's own arguments too, by which a checkpoint builds the objective again
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
        """The tasks of a batch that the objective is about."""
        return [task for task in batch if self.tasks is None or task in self.tasks]

    def counts(self, batch: TaskBatch) -> int | None:
        """What the term is a mean over in this batch: by default the target tokens of its tasks.

        So it stays one over the whole optimizer step. ``None`` averages it plainly over micro-batches and ranks.
        """
        return sum(target_tokens(batch[task]) for task in self.about(batch))

    def prepare(self, window: Sequence[Step]) -> None:
        """Before an optimizer step's targets are counted: may change the steps' batches in place.

        To replace targets by what the student writes, say: ``step.student.generate(...)``. The student is in evaluation
        mode and has no gradients here; random numbers are drawn by the run's seed, the step and the rank.
        """

    def plain(self) -> dict[str, Any]:
        """Class and arguments in plain types; `build_objective` reads them back."""
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": dict(self.hparams)}


def build_objective(plain: Mapping[str, Any]) -> Objective:
    """The objective that `Objective.plain` describes."""
    module, _, name = str(plain["class_path"]).rpartition(".")
    made: Objective = getattr(importlib.import_module(module), name)(**plain["init_args"])
    return made


def check_objectives(objectives: Sequence[Objective], tasks: Sequence[str], teachers: Teachers) -> None:
    """See that terms have names of their own, and that objectives ask for tasks and teachers that are there.

    Raises:
        UserError: names the first that does not.
    """
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
