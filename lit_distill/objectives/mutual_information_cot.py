"""A link of each row's rationale prediction to its label prediction."""

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_distill.batch import IGNORE_INDEX, TaskBatch, on_host, targets_of
from lit_distill.errors import UserError
from lit_distill.objectives.base import Objective, Step
from lit_distill.objectives.chunks import chunk_size, wide
from lit_distill.students import Pass, Student
from lit_distill.teachers.models import Teachers


class MutualInformationCoT(Objective):
    r"""Cross-entropy of a row's rationale prediction to its label prediction, each the maximum over its target tokens.

    MI-CoT (arXiv 2403.03348) raises the mutual information of the two tasks of step-by-step by the cross-entropy

    .. math:: -\sum_c p_c \log q_c, \quad p_c = \frac{\max_t l_t(c)}{\sum_k \max_t l_t(k)}, \quad
        q_c = \frac{\max_t r_t(c)}{\sum_k \max_t r_t(k)}

    with :math:`l_t` and :math:`r_t` the student's distributions at a row's label and rationale tokens. As in the public
    code (xinchen9/cot_distillation_ACL2024 at 59ca033) no gradient flows into p; but its term is another:

    .. math:: -\sum_c \max_t l_t(c) \log \text{softmax}_c(\max_t r_t)

    It takes a softmax of probabilities, p does not sum to 1, and t runs over the padding after a target, too.
    ``published`` does just that, and so changes with the batch. For the padding, rows go through the student once more,
    with other dropout masks than the tasks' losses; in evaluation the term is then absent.

    The mean is over rationales of rows that have a label. The logits of some rows at a time are in memory.

    Args:
        tasks: that of p and that of q.
        published: the public code's term.
        **kwargs: as in `Objective`.
    """

    term = "mi_cot"

    def __init__(self, *, published: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.published = self.of_whole_batch = published

    def setup(self, student: Student, teachers: Teachers) -> None:
        who = f"objectives: {self.name}"
        if len(self.tasks or ()) != 2:
            raise UserError(f"{who}: it needs two tasks, as tasks: [label, rationale]; got {self.tasks}")
        if student.sharded:
            raise UserError(
                f"{who}: the head is applied to some rows at a time, which a sharded strategy does not allow; use ddp"
            )

    @property
    def prepares(self) -> bool:
        return self.published

    def prepare(self, window: Sequence[Step]) -> None:
        for step in window if self.published else ():
            for task in self.about(step.batch):
                inputs, pad = step.batch[task], step.student.student.tokenizer.pad_token_id
                labels = inputs["labels"].masked_fill(inputs["labels"] == IGNORE_INDEX, pad)
                step.batch[self.added(task)] = {**inputs, "labels": labels}

    def pairs(self, batch: TaskBatch) -> list[tuple[int, int]]:
        """Of each rationale whose row has a label too, the label's row in its task and the rationale's."""
        if self.published and not any(self.added(task) in batch for task in self.about(batch)):
            return []
        labels, rationales = (
            [(index, row) for row, (index, end) in enumerate(zip(indices, ends, strict=True)) if end]
            for inputs in (batch[task] for task in self.tasks or ())
            for indices, ends in [(on_host(inputs["index"]).tolist(), targets_of(inputs).ends)]
        )
        label_of = dict(reversed(labels))
        return [(label_of[index], row) for index, row in rationales if index in label_of]

    def counts(self, batch: TaskBatch) -> int:
        """Rationales of rows that have a label."""
        return len(self.pairs(batch))

    def forward(self, step: Step) -> Tensor:
        student, pairs = step.student, self.pairs(step.batch)
        if not pairs:
            return torch.zeros((), device=student.student.device)
        first, second = (self.added(task) if self.published else task for task in self.tasks or ())
        own = self.maxima(student, second, [row for _, row in pairs])
        with torch.no_grad():
            other = self.maxima(student, first, [row for row, _ in pairs])
        return F.cross_entropy(own, other if self.published else other.softmax(-1))

    def maxima(self, student: Pass, task: str, rows: Sequence[int]) -> Tensor:
        """The largest probability, or its logarithm, of each id over a row's tokens, ``(rows, vocabulary)``."""

        def of_rows(states: Tensor, lengths: list[int]) -> Tensor:
            logits = wide(student.project(states))
            values = logits.softmax(-1) if self.published else logits.log_softmax(-1)
            # 0 times the finite is 0
            return torch.stack([own.amax(0) for own in values.split(lengths)]).clamp(min=torch.finfo(values.dtype).min)

        numbers = (on_host(student.inputs(task)["labels"]) != IGNORE_INDEX).sum(1).tolist()
        parts = student.states(task).split(numbers)
        ends, size = list(accumulate(numbers[row] for row in rows)), chunk_size(student)
        found = []
        for _, places in groupby(range(len(rows)), key=lambda place: ends[place] // size):
            own = [parts[rows[place]] for place in places]
            chunk = torch.cat(own), [len(part) for part in own]
            found.append(checkpoint(of_rows, *chunk, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(cast(list[Tensor], found))
