"""What every objective gets, `Step`, and what it is, `Objective`."""

import importlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lit_distill.batch import TaskBatch, target_tokens
from lit_distill.checks import check_range
from lit_distill.errors import UserError
from lit_distill.students import Pass, Student
from lit_distill.teachers.models import Progress, Teachers
from lit_distill.teachers.store import keys_of


class Step:
    """A micro-batch with the student's forward pass over it and those of the teachers.

    Passes are lazy: a model runs at the first access, once, however many losses read its results.
    """

    def __init__(self, batch: TaskBatch, student: Student, teachers: Teachers, progress: Progress) -> None:
        self.batch = batch
        self.progress = progress
        self._student = student
        self._teachers = teachers
        self._passes: dict[str, Pass] = {}

    @cached_property
    def student(self) -> Pass:
        """The student's pass, with gradients."""
        made: Pass = self._student(move_data_to_device(self.batch, self._student.device))
        return made

    def teacher(self, name: str) -> Pass:
        """The pass of one of the module's ``teachers``, without gradients and on the student's device.

        Raises a ``UserError`` if there is no teacher of that name.
        """
        if name not in self._passes:
            self._passes[name] = self._teachers.forward(name, self.batch, self._student, self.progress)
        return self._passes[name]

    def stage(self, name: str) -> int:
        """The position of the model in a sequence of teachers that gives the pass."""
        self.teacher(name)
        return self._teachers.stage(name)


class Objective(HyperparametersMixin, nn.Module):
    """An additional loss term. A subclass implements ``forward`` and is named in YAML by its import path.

    Its parameters, if any, train with the student and are saved in checkpoints, but not in the exported student.

    Args:
        name: of the term, as in ``train/<name>_loss``; by default the class's, such as ``kl``.
        weight: factor of the term in the total loss.
        teacher: which of the module's ``teachers`` it uses.
        tasks: the tasks that it applies to; by default all that the module trains on.

    Further tasks in a batch, which an objective's `prepare` has added under names of its own, are for that objective
    alone: no cross-entropy is taken of them.
    """

    term = ""
    """The name by default, instead of the class's in lower case."""
    reads_teacher = False
    """Whether it needs a teacher; without ``teacher`` it takes the module's only one."""
    from_store = False
    """Whether it can learn from captured distributions (`lit_distill.teachers.store`)."""
    zero_at_teacher = False
    """Whether the term is 0 for a student that equals its teacher."""
    of_whole_batch = False
    """Whether a row's term depends on the other rows of its micro-batch, as with negatives in the batch."""
    may_be_negative = False
    """Whether the term can be below 0."""
    exits: Sequence[int] = ()
    """Decoder layers after which an evaluation answers too, as if there were no further ones."""

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
        self.name = name or self.term or type(self).__name__.lower()
        self.weight = weight
        self.teacher = teacher
        self.tasks = tasks

    def setup(self, student: Student, teachers: Teachers) -> None:
        """Check the objective against the models, before the first step; called again in each stage.

        Parameters whose shape depends on the models are ``UninitializedParameter`` before, and get it here. Random
        numbers are the same on all ranks.
        """

    def check_data(self, data: Any) -> None:
        """Raise a ``UserError``, at the start of ``fit``, if a data module lacks what the objective needs."""

    def forward(self, step: Step) -> Tensor:
        """The unweighted term, a scalar."""
        raise NotImplementedError(f"{type(self).__name__} has no forward(step)")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """As PyTorch's; parameters that have no shape yet take the saved ones'."""
        for name, parameter in self.named_parameters():
            if isinstance(parameter, UninitializedParameter) and f"{prefix}{name}" in state_dict:
                parameter.materialize(state_dict[f"{prefix}{name}"].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def about(self, batch: TaskBatch) -> list[str]:
        """The tasks of a batch that the objective applies to."""
        return [task for task in batch if self.tasks is None or task in self.tasks]

    def added(self, task: str) -> str:
        """The name under which the objective adds rows of a task to a batch in `prepare`."""
        return f"{self.name}:{task}"

    def teacher_pass(self, step: Step) -> Pass:
        """The pass of the objective's teacher."""
        return step.teacher(str(self.teacher))

    def counts(self, batch: TaskBatch) -> int | None:
        """Number of items that the term is a mean over in this batch; by default the target tokens of its tasks.

        It makes the term exact over the whole optimizer step. ``None`` averages plainly over micro-batches and ranks.
        """
        return sum(target_tokens(batch[task]) for task in self.about(batch))

    @property
    def prepares(self) -> bool:
        """Whether `prepare` may change something."""
        return type(self).prepare is not Objective.prepare

    def prepare(self, window: Sequence[Step]) -> None:
        """Change an optimizer step's batches in place, before their targets are counted.

        For example to replace targets by ``step.student.generate(...)``. Runs as `DistillModule.prepare` does.
        """

    def on_validation_end(self, metrics: Mapping[str, float]) -> None:
        """Receive a validation's metrics during ``fit``, such as ``loss`` and ``accuracy``, equal on all ranks.

        What must survive a resumed run belongs in buffers.
        """

    def plain(self) -> dict[str, Any]:
        """Class and arguments in plain types, for `build_objective`."""
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": dict(self.hparams)}


def build_objective(plain: Mapping[str, Any]) -> Objective:
    """The objective that `Objective.plain` describes. Raises a ``UserError`` if the class is none."""
    module, _, name = str(plain["class_path"]).rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    # a checkpoint could name any function, with arguments for it
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise UserError(f"objectives: {plain['class_path']} is no Objective")
    return kind(**plain["init_args"])


def check_objectives(objectives: Sequence[Objective], tasks: Sequence[str], teachers: Teachers) -> None:
    """Settle which tasks and which teacher each objective has.

    Raises a ``UserError`` if two terms share a name, or an objective's task or teacher does not exist.
    """
    taken = set(tasks)
    for objective in objectives:
        name = objective.name
        if name in taken:
            raise UserError(f"objectives: {name} is the name of two terms; give one of them another name")
        taken.add(name)
        if unknown := [task for task in objective.tasks or () if task not in tasks]:
            raise UserError(f"objectives: {name}: unknown task {unknown[0]!r}; there are {', '.join(tasks)}")
        objective.tasks = list(objective.tasks or tasks)
        if objective.reads_teacher and objective.teacher is None:
            objective.teacher = teachers.only(f"objectives: {name}")
        if objective.teacher is not None:
            teachers.check(f"objectives: {name}", objective.teacher)
            _check_store(objective, teachers)


def _check_store(objective: Objective, teachers: Teachers) -> None:
    """Raise a ``UserError`` if an objective would learn something else from captured distributions."""
    if (store := teachers.store(str(objective.teacher))) is None:
        return
    who = f"objectives: {objective.name}: {store.folder} holds captured distributions"
    if not objective.from_store:
        raise UserError(
            f"{who}, from samples of which only forward KL is unbiased: use ForwardKL, or a teacher that is a model"
        )
    if (own := getattr(objective, "temperature", 1.0)) != (captured := store.header.temperature):
        raise UserError(
            f"{who} of temperature {captured:g}, not {own:g}: set temperature: {captured:g}, or capture with"
            f" --temperature {own:g}"
        )


def check_stored(objectives: Sequence[Objective], teachers: Teachers, data: Any) -> None:
    """Raise a ``UserError`` if captured distributions are of other weights, or lack training targets of the data."""
    named = {name for group in teachers.groups.values() for name in group.settings.names}
    for objective in objectives:
        store = None if objective.teacher is None else teachers.store(objective.teacher)
        if store is None:
            continue
        if store.header.teacher in named:
            store.check_revision()
        if hasattr(data, "token_rows"):
            rows = data.token_rows("train")
            store.check_targets({task: keys_of(rows.sequences(task)) for task in objective.tasks or ()})
