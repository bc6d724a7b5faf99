"""A match of the student's attention with the teacher's."""

from typing import Any

from torch import Tensor

from lit_distill.batch import TaskBatch, mean_rows, with_target
from lit_distill.checks import check_choice
from lit_distill.errors import UserError
from lit_distill.objectives.base import Objective, Step
from lit_distill.objectives.layers import Layers, map_layers
from lit_distill.students import Student
from lit_distill.students.attention import Attention
from lit_distill.teachers.models import Teachers


class AttentionScores(Objective):
    r"""Mean squared distance of attention scores before the softmax, :math:`\sum_m MSE(A^S_m, A^T_{g(m)})`.

    TinyBERT (arXiv 1909.10351) Eq. 7: each head's unnormalised matrix :math:`A` of mapped layers, summed over the
    layers. :math:`A` is what the softmax is taken of (Eq. 1), which in T5 includes the relative position bias and in
    others the rotation. As in the paper each text has its own mean over pairs and heads, and the term is the mean over
    rows with a target; unlike in the authors' code, padding and masked pairs do not count.

    Both models run Hugging Face's own forward, without the fast path.

    Args:
        layers: ``uniform``, ``last``, or pairs of student and teacher layer, counted from 1 (-1 is the last).
        kinds: which attention to match: ``encoder`` and ``decoder`` (self-attention), ``cross``; by default all that
            the models have, summed.
        per_head: head by head, which needs equal numbers; else the mean over heads is matched.
        **kwargs: as in `Objective`.
    """

    term = "attention"
    reads_teacher = True
    zero_at_teacher = True

    def __init__(
        self,
        *,
        layers: Layers = "uniform",
        kinds: list[Attention] | None = None,
        per_head: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.layers = layers
        self.kinds = kinds
        self.per_head = per_head
        self._maps: dict[Attention, list[tuple[int, int]]] = {}

    def setup(self, student: Student, teachers: Teachers) -> None:
        who, name = f"objectives: {self.name}", str(self.teacher)
        models = student, teachers.single(who, name)
        if (number := len(teachers.models[name].names)) != 1:
            # the next of a sequence would not record it
            raise UserError(f"{who}: teacher {name!r} is {number} models; name one whose attention to read")
        if student.attentions != models[1].attentions:
            raise UserError(
                f"{who}: of the student and teacher {name!r} one has an encoder, the other none, so that they attend to"
                " different tokens; take a teacher of the student's family"
            )
        for model in models:
            model.record_attention(who)
        heads = [model.heads for model in models]
        if self.per_head and heads[0] != heads[1]:
            raise UserError(
                f"{who}: the student's attention has {heads[0]} heads, the teacher's {heads[1]};"
                " per_head: false matches the mean over heads"
            )
        for kind in self.kinds or student.attentions:
            check_choice(f"{who}: kinds", kind, student.attentions)
            depths = (model.layers("encoder" if kind == "encoder" else "decoder") for model in models)
            self._maps[kind] = map_layers(who, self.layers, *depths, first=1)

    def counts(self, batch: TaskBatch) -> int:
        """Rows with a target."""
        return sum(int(with_target(batch[task]).sum()) for task in self.about(batch))

    def forward(self, step: Step) -> Tensor:
        student, teacher = step.student, self.teacher_pass(step)
        terms = []
        for task in self.about(step.batch):
            counted = with_target(student.inputs(task))
            for kind, layers in self._maps.items():
                rows = student.pairs(task, kind).nonzero()[:, 0]
                for layer in layers:
                    ours, theirs = (
                        self._heads(each.attention(task, number, kind))
                        for each, number in zip((student, teacher), layer, strict=True)
                    )
                    distances = mean_rows((ours - theirs).square().mean(1), rows, len(counted))
                    terms.append((distances * counted).sum())
        return sum(terms[1:], terms[0]) / max(self.counts(step.batch), 1)

    def _heads(self, scores: Tensor) -> Tensor:
        return scores.float() if self.per_head else scores.float().mean(1, keepdim=True)
