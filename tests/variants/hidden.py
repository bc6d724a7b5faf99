"""A match of hidden states with a teacher of another width."""

from typing import Any

import torch
from torch import Tensor, nn

from lit_distill.objectives import Objective, Step


class HiddenMatch(Objective):
    """Mean squared distance of the decoder's last states to the teacher's, after a map that is learned."""

    def __init__(self, *, student_width: int, teacher_width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.widen = nn.Linear(student_width, teacher_width, bias=False)

    def forward(self, step: Step) -> Tensor:
        teacher, tasks = step.teacher(str(self.teacher)), self.about(step.batch)
        ours, theirs = (torch.cat([each.hidden(task, -1) for task in tasks]) for each in (step.student, teacher))
        distances: Tensor = (self.widen(ours) - theirs).square().mean(-1)
        return distances.sum() / max(len(ours), 1)
