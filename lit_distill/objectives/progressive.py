"""Teachers from weak to strong."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lit_distill.batch import sum_rows
from lit_distill.checks import check_range
from lit_distill.errors import UserError
from lit_distill.objectives.base import Step
from lit_distill.objectives.chunks import divergence, per_token
from lit_distill.objectives.distributions import ForwardKL
from lit_distill.students import Pass, Student
from lit_distill.teachers.models import Teachers


class Progressive(ForwardKL):
    """Forward KL from a sequence of teachers, and from the student as it was when the current one began.

    PROD (arXiv 2209.13335): teachers from weak to strong, then the data that the last has right and the student wrong;
    from the second stage on, a KL to the student's own last stage keeps it from forgetting. Here the last model of the
    sequence, for which the strongest is named once more, teaches such rows only; the others count as 0 in the mean. A
    model has a row right if each token of the row's target in the first task is its most likely one, given those before
    it; the row's targets in other tasks go with it. PROD chooses rows once before that stage, by their rank in
    retrieval, and trains on no others; here each step chooses by the student as it is, and all rows keep the tasks'
    cross-entropy. PROD's weights are 0.1 for cross-entropy, 0.9 for the KL, and 1 for the own last stage, with T = 4.

    The earlier student is kept with the objective: in memory, and in checkpoints, as many numbers as are trained.

    Args:
        own_weight: of the KL to the student's own last stage, relative to the one to the teacher.
        temperature: of the softmaxes.
        **kwargs: as in `Objective`.
    """

    term = "progressive"
    from_store = False

    def __init__(self, *, own_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_range("objectives: own_weight", own_weight, at_least=0)
        self.own_weight = own_weight
        self.earlier = UninitializedParameter(requires_grad=False)
        self._stage = 0  # at whose beginning the earlier student was kept
        self._copies: list[Student] = []  # in a list, as its parameters are not the objective's

    def get_extra_state(self) -> Tensor:
        """The stage at whose beginning the earlier student was kept."""
        return torch.tensor(self._stage)

    def set_extra_state(self, state: Tensor) -> None:
        self._stage = int(state)

    def setup(self, student: Student, teachers: Teachers) -> None:
        who = f"objectives: {self.name}"
        if teachers.models[str(self.teacher)].by is None:
            raise UserError(
                f"{who}: teacher {self.teacher!r} must be a sequence, weak to strong: several models, and by: step,"
                " epoch or plateau"
            )
        if student.sharded:
            raise UserError(f"{who}: it keeps a copy of the student, which strategies that shard it do not allow")
        self._last = len(teachers.models[str(self.teacher)].names) - 1
        trained = student.trained
        if isinstance(self.earlier, UninitializedParameter):
            self.earlier.materialize((sum(map(Tensor.numel, trained)),), dtype=trained[0].dtype)
            nn.init.zeros_(self.earlier)

    def forward(self, step: Step) -> Tensor:
        student, teacher, tasks = step.student, self.teacher_pass(step), self.about(step.batch)
        stage = step.stage(str(self.teacher))
        if self.training and stage != self._stage:
            with torch.no_grad():
                self.earlier.copy_(parameters_to_vector(student.student.trained))
            self._stage = stage
        chosen = self.chosen(step, student, teacher) if stage == self._last else None
        total = divergence(self.value, student, teacher, tasks, chosen)
        if self._stage and self.own_weight:
            before = self._earlier(student.student)(student.batch)
            total = total + self.own_weight * divergence(self.value, student, before, tasks, chosen)
        return total

    def _earlier(self, student: Student) -> Student:
        """The student as it was, in evaluation mode; it shares what is not trained."""
        if not self._copies:
            shared: dict[int, Any] = {id(one): one for one in student.parameters() if not one.requires_grad}
            self._copies = [copy.deepcopy(student, shared).eval()]
        own = [self._copies[0].get_parameter(name) for name, one in student.named_parameters() if one.requires_grad]
        # each is a view of its part, wherever that has been moved to
        vector_to_parameters(self.earlier, own)
        for one in own:
            one.grad = None
            one.requires_grad_(False)
        return self._copies[0]

    def chosen(self, step: Step, student: Pass, teacher: Pass) -> Tensor:
        """1 for each token of a row that the teacher has right and the student wrong, else 0, ``(tokens,)``."""
        tasks = self.about(step.batch)
        batch, first = student.batch, tasks[0]

        def missed(own: Tensor, other: Tensor, labels: Tensor) -> Tensor:
            return torch.stack([own.argmax(-1) != labels, other.argmax(-1) != labels], 1).float()

        with torch.no_grad():
            tokens = per_token(missed, student, teacher, [first], student.labels(first))
        ours, theirs = sum_rows(tokens, student.rows(first), len(batch[first]["labels"])).unbind(1)
        rows = batch[first]["index"][(ours > 0) & (theirs == 0)]
        return torch.cat([torch.isin(batch[task]["index"][student.rows(task)], rows) for task in tasks]).float()
