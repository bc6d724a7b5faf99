"""Distillation of a teacher's distributions."""

import torch.nn.functional as F
from torch import Tensor

from lit_distill.objectives import Objective, Step, divergence


class KL(Objective):
    """Forward KL divergence, from the teacher's distribution to the student's, at each target token."""

    def forward(self, step: Step) -> Tensor:
        return divergence(kl, step.student, step.teacher(str(self.teacher)), self.about(step.batch))


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
