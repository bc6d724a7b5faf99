"""Teacher models: frozen models whose distributions and hidden states objectives use."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from lit_distill.batch import TaskBatch
from lit_distill.errors import UserError
from lit_distill.students import Pass, Student
from lit_distill.teachers.groups import Group, SequenceGroup, StoreGroup, WeighedGroup
from lit_distill.teachers.settings import Progress, TeacherModel
from lit_distill.teachers.store import Store, is_store

__all__ = ["Progress", "TeacherModel", "Teachers"]


class Teachers(nn.Module):
    """A module's teachers by name.

    Their parameters are in no checkpoint, optimizer or gradient reduction, and stay in evaluation mode; a checkpoint
    keeps where a sequence is, and computed weights. Copies of the module share the models. A pickle holds no models,
    and loads them again.
    """

    def __init__(self, models: Mapping[str, TeacherModel | Mapping[str, Any]] | None) -> None:
        super().__init__()
        self.groups: dict[str, Group] = {}
        # what checkpoints keep
        self.kept = nn.ModuleDict()
        for name, model in (models or {}).items():
            self._add(name, model if isinstance(model, TeacherModel) else TeacherModel(**model))

    def _add(self, name: str, settings: TeacherModel) -> None:
        try:
            settings.check()
        except UserError as error:
            raise UserError(f"teachers: {name}: {error}") from error
        weighed = isinstance(settings.weights, str)
        kind = SequenceGroup if settings.by is not None else WeighedGroup if weighed else Group
        if stores := [model for model in settings.names if is_store(model)]:
            own = {option: getattr(settings, option) for option in ("dtype", "device", "offload")}
            changed = [option for option, value in own.items() if value != getattr(TeacherModel, option)]
            if len(settings.names) > 1 or changed:
                what = f"{changed[0]} is" if changed else "a list is"
                raise UserError(f"teachers: {name}: {what} for models; {stores[0]} holds captured distributions")
            kind = StoreGroup
        self.groups[name] = kind(name, settings)
        if kind in (SequenceGroup, WeighedGroup):
            # PyTorch allows no dots, and not the names of a mapping's methods
            self.kept[f"teacher_{name.replace('.', '_')}"] = self.groups[name]

    def __deepcopy__(self, memo: object) -> "Teachers":
        copied = Teachers(self.models)
        copied.load_state_dict(self.state_dict())
        for name, group in copied.groups.items():
            group.models, group.sizes = self.groups[name].models, self.groups[name].sizes
        return copied

    @property
    def models(self) -> dict[str, TeacherModel]:
        """The settings of the teachers."""
        return {name: group.settings for name, group in self.groups.items()}

    def plain(self) -> dict[str, dict[str, Any]]:
        """The settings of the teachers, in plain types."""
        return {name: asdict(settings) for name, settings in self.models.items()}

    def check(self, who: str, name: str) -> None:
        """Check that a teacher exists; a name that is a path becomes one.

        Raises a ``UserError`` that begins with ``who``.
        """
        if name not in self.groups and Path(name).exists():
            self._add(name, TeacherModel(name))
        if name not in self.groups:
            there = f"there are {', '.join(self.groups)}" if self.groups else "there is none"
            raise UserError(f"{who}: unknown teacher {name!r}; {there} (model.teachers names them)")

    def only(self, who: str) -> str:
        """The name of the only teacher. Raises a ``UserError`` that begins with ``who``."""
        if len(self.groups) != 1:
            there = f"of {', '.join(self.groups)}" if self.groups else "in model.teachers"
            raise UserError(f"{who}: it needs a teacher; name one {there}")
        return next(iter(self.groups))

    def store(self, name: str) -> Store | None:
        """The captured distributions that a teacher is; ``None`` of models."""
        group = self.groups[name]
        return group.store if isinstance(group, StoreGroup) else None

    def loaded(self, name: str) -> list[Student]:
        """The models of a teacher that are in use, after `load`."""
        return [model.student for model in self.groups[name].models.values()]

    def single(self, who: str, name: str) -> Student:
        """The model of a teacher that is one model at a time, for its sizes and hidden states, after `load`.

        Raises a ``UserError`` that begins with ``who`` for an ensemble, or a sequence of models of different sizes.
        """
        return self.groups[name].single(who)

    def load(self, student: Student) -> None:
        """Load the teachers before the first step.

        Raises a ``UserError`` for a model that cannot be read or has another vocabulary.
        """
        for group in self.groups.values():
            group.load(student)

    def stage(self, name: str) -> int:
        """The position of a sequence's current model in its list; 0 for other teachers."""
        group = self.groups[name]
        return group.stage if isinstance(group, SequenceGroup) else 0

    def unweighed(self) -> list[WeighedGroup]:
        """The teachers whose weights are still to be computed."""
        found = [group for group in self.groups.values() if isinstance(group, WeighedGroup)]
        return [group for group in found if not group.similarities]

    def on_validation_end(self, metrics: Mapping[str, float]) -> None:
        """Receive a validation's metrics during ``fit``: a sequence may go on to its next model."""
        for group in self.groups.values():
            group.on_validation_end(metrics)

    def forward(self, name: str, batch: TaskBatch, student: Student, progress: Progress) -> Pass:
        """The pass of one teacher, without gradients and with results on the student's device."""
        self.check("teachers", name)
        self.load(student)
        return self.groups[name].forward(batch, student, progress)
