"""A teacher of one or more models: which of them are in use, and the pass that they give."""

import sys
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_distill.batch import TaskBatch
from lit_distill.errors import UserError
from lit_distill.students import Pass, Student
from lit_distill.teachers.ensemble import EnsemblePass
from lit_distill.teachers.frozen import FrozenModel, about
from lit_distill.teachers.settings import Progress, TeacherModel
from lit_distill.teachers.similarity import similarity
from lit_distill.teachers.store import Store, StoredPass

_WORST = sys.float_info.max
"""Before any value; a checkpoint holds finite numbers only."""


class Group(nn.Module):
    """A model, or an ensemble whose weights are given.

    Only models of a weight above 0 are in memory; one alone is no ensemble, whatever the others.
    """

    def __init__(self, name: str, settings: TeacherModel) -> None:
        super().__init__()
        self.name, self.settings = name, settings
        # by position in the list; a plain mapping, so that their parameters are not the group's
        self.models: dict[int, FrozenModel] = {}
        self.sizes: list[tuple[int, ...]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "models": {}, "sizes": []}

    def weights(self) -> list[float]:
        """The weight of each model."""
        given = self.settings.weights
        return [float(weight) for weight in given] if isinstance(given, list) else [1.0] * len(self.settings.names)

    def advance(self, progress: Progress) -> None:
        """Choose the models for this part of the training."""

    def on_validation_end(self, metrics: Mapping[str, float]) -> None:
        """Receive a validation's metrics during ``fit``."""

    def needed(self) -> list[int]:
        """The positions of the models in use."""
        return [number for number, weight in enumerate(self.weights()) if weight]

    def load(self, student: Student) -> None:
        """Load each model once, to see that it can be, one after another; keep those in use."""
        if self.sizes:
            return
        sizes: list[tuple[int, ...]] = []
        for number in range(len(self.settings.names)):
            model = self._load(number, student)
            sizes.append((model.student.width, model.student.layers("encoder"), model.student.layers("decoder")))
            if number in self.needed():
                self.models[number] = model
        self.sizes = sizes

    def _load(self, number: int, student: Student) -> FrozenModel:
        settings = self.settings
        with about(f"teachers: {self.name}"):
            model = FrozenModel(
                settings.names[number], student, dtype=settings.dtype, device=settings.device, offload=settings.offload
            )
        size = sum(parameter.numel() for parameter in model.student.parameters())
        rank_zero_info(f"Teacher {self.name}: {settings.names[number]}, {size / 1e6:.0f}M parameters, {settings.dtype}")
        return model

    def single(self, who: str) -> Student:
        """The only model in use. Raises a ``UserError`` if there are several, or some in a sequence of other sizes."""
        if len(self.needed()) > 1:
            raise UserError(f"{who}: teacher {self.name!r} is an ensemble, which has no hidden states; name one model")
        if len(set(self.sizes)) > 1:
            raise UserError(f"{who}: the models of teacher {self.name!r} have different numbers or widths of layers")
        return next(iter(self.models.values())).student

    def forward(self, batch: TaskBatch, student: Student, progress: Progress) -> Pass:
        """The pass over a batch, with results on the student's device."""
        self.advance(progress)
        weights, needed = self.weights(), self.needed()
        for number in self.models.keys() - set(needed):
            del self.models[number]
        for number in needed:
            if number not in self.models:
                self.models[number] = self._load(number, student)
        passes = [self.models[number].forward(batch, student.device) for number in needed]
        if len(passes) == 1:
            return cast(Pass, passes[0])
        widths = [self.models[number].student.width for number in needed]
        shares = [weights[number] / sum(weights) for number in needed]
        return cast(Pass, EnsemblePass(self.name, passes, widths, shares, self.settings.mean or "logits"))


class WeighedGroup(Group):
    """An ensemble weighted by how similar each model is to the data, or the nearest model alone.

    DistillWeighted and DistillNearest of Borup et al. (arXiv 2304.12314), whose task similarity between a source
    model's features and the labels of the target task is here `linear_cka` at the target tokens. Their weights are its
    powers, here the first; their loss, the weighted sum of the divergences from each model, has with forward KL the
    gradient of that from the weighted mean of probabilities.
    """

    def __init__(self, name: str, settings: TeacherModel) -> None:
        super().__init__(name, settings)
        self.similarities: list[float] = []

    def weights(self) -> list[float]:
        if self.settings.weights == "nearest":
            # the first until they are known
            best = self.similarities.index(max(self.similarities)) if self.similarities else 0
            return [float(number == best) for number in range(len(self.settings.names))]
        return self.similarities or [1.0] * len(self.settings.names)

    def get_extra_state(self) -> Tensor:
        """The similarities, so that a resumed run goes on with the same."""
        return torch.tensor(self.similarities, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.similarities = state.tolist()

    def compare(self, batches: Iterable[TaskBatch], student: Student) -> list[float]:
        """The similarity of each model to the targets in batches of train."""
        found = [
            similarity(self.models.get(number) or self._load(number, student), batches, student.device)
            for number in range(len(self.settings.names))
        ]
        if not any(found):
            raise UserError(f"teachers: {self.name}: weights: no model's states vary with the targets of train")
        return found

    def forward(self, batch: TaskBatch, student: Student, progress: Progress) -> Pass:
        if not self.similarities:
            raise UserError(
                f"teachers: {self.name}: fit computes weights: {self.settings.weights}; give a checkpoint of it"
            )
        return super().forward(batch, student, progress)


class SequenceGroup(Group):
    """One model after another: by steps, by epochs, or at plateaus of a validation metric."""

    def __init__(self, name: str, settings: TeacherModel) -> None:
        super().__init__(name, settings)
        self.stage = 0
        self._best = _WORST
        self._since = 0  # validations since the best value
        self._step = 0  # the step of the last pass in training
        self._validated: list[float] = []  # that step at the last validation, and its value, until they are counted

    def weights(self) -> list[float]:
        return [float(number == self.stage) for number in range(len(self.settings.names))]

    def get_extra_state(self) -> Tensor:
        """Where the sequence is, so that a resumed run goes on from there."""
        return torch.tensor([self.stage, self._best, self._since, self._step, *self._validated], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        stage, self._best, since, step, *self._validated = state.tolist()
        self.stage, self._since, self._step = int(stage), int(since), int(step)

    def advance(self, progress: Progress) -> None:
        if not progress.steps:
            # outside of training the stage stays
            return
        if self.settings.at is not None:
            done = progress.step if self.settings.by == "step" else progress.epoch
            self._begin(bisect_right(self.settings.at, done))
        elif self._validated and self._validated[0] < progress.step:
            self._count(self._validated[1])
            self._validated = []
        self._step = progress.step

    def on_validation_end(self, metrics: Mapping[str, float]) -> None:
        value = metrics.get(self.settings.monitor or "loss")
        if self.settings.by == "plateau" and value is not None:
            # counts from the next step on: a resumed run may begin this one, or validate, once more
            self._validated = [self._step, -value if self.settings.monitor == "accuracy" else value]

    def _count(self, value: float) -> None:
        """Count a validation, and go on if it is the last of a plateau."""
        if value < self._best:
            self._best, self._since = value, 0
            return
        self._since += 1
        if self._since >= (self.settings.patience or 3) and self.stage < len(self.settings.names) - 1:
            self._begin(self.stage + 1)

    def _begin(self, stage: int) -> None:
        if stage != self.stage:
            self.stage, self._best, self._since = stage, _WORST, 0
            rank_zero_info(f"Teacher {self.name}: {self.settings.names[stage]} from here on")


class StoreGroup(Group):
    """Captured distributions, with no model."""

    def __init__(self, name: str, settings: TeacherModel) -> None:
        super().__init__(name, settings)
        self.store = Store(settings.names[0])
        self._fits = False

    def load(self, student: Student) -> None:
        if not self._fits:
            self.store.check_student(student)
            self.store.check_rows()
        self._fits = True

    def single(self, who: str) -> Student:
        raise UserError(f"{who}: teacher {self.name!r} holds distributions alone, no hidden states; name a model")

    def forward(self, batch: TaskBatch, student: Student, progress: Progress) -> Pass:
        # what training changes is in no store, and val may not have been captured
        return cast(Pass, StoredPass(self.store, batch, whole=student.training))
