"""Agreement of the answers to a row under different rationales."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.batch import IGNORE_INDEX, PADDING_ROW, TaskBatch, TaskInputs, on_host
from lit_distill.errors import UserError
from lit_distill.objectives.base import Objective, Step
from lit_distill.objectives.chunks import sum_of_logits
from lit_distill.objectives.distributions import forward_kl, reverse_kl


class AnswerConsistency(Objective):
    r"""Symmetric KL of the student's answers under two rationales, :math:`\frac{1}{2} (KL(p \| q) + KL(q \| p))`.

    MCC-KD (arXiv 2310.14747), as its public code (homzer/MCC-KD) has it, with p and q at the same token of a row's
    answer after either rationale, and gradients into both; the code also adds 7e-5 to each probability. There the
    rationale is the decoder's own text before the answer, here a task's input has it (``input: "{input}\n{rationale}"``
    with ``select: sample`` and ``draws: 2``).

    Pairs are rows of a task with the same ``index`` and target, next to each other: of k rationales k - 1 pairs. A row
    without a second rationale, or with another target under it, has none. The mean is over the target tokens of all
    pairs; in evaluation, which has each row once, the term is absent.
    """

    term = "answer_consistency"

    def check_data(self, data: Any) -> None:
        if not hasattr(data, "token_rows") or getattr(data, "streaming", False):
            return
        rows, tasks = data.token_rows("train"), self.tasks or []
        if all(rows.most_targets(task) < 2 for task in tasks):
            raise UserError(
                f"objectives: {self.name}: no row of train has two rationales for {' or '.join(tasks)}; ask for several"
                " (annotate --num_samples 5), and give the task select: sample and draws: 2"
            )

    def counts(self, batch: TaskBatch) -> int:
        """Target tokens of the pairs."""
        return sum(int(_firsts(batch[task]).sum()) for task in self.about(batch))

    def forward(self, step: Step) -> Tensor:
        student, sides = step.student, []
        for task in self.about(step.batch):
            firsts, states = _firsts(inputs := step.batch[task]), student.states(task)
            real = on_host(inputs["labels"]) != IGNORE_INDEX
            # the second row of a pair follows the first, with the same real positions
            for side in (firsts, firsts.roll(1, 0)):
                sides.append(states[side[real].to(states.device)])
        left, right = torch.cat(sides[::2]), torch.cat(sides[1::2])
        return sum_of_logits(symmetric_kl, student, torch.stack([left, right], 1)) / max(len(left), 1)


def symmetric_kl(logits: Tensor) -> Tensor:
    """Half of both KL of two distributions, from logits ``(tokens, 2, ids)`` to ``(tokens,)``."""
    left, right = logits.unbind(1)
    return (forward_kl(left, right) + reverse_kl(left, right)) / 2


def _firsts(inputs: TaskInputs) -> Tensor:
    """The real target positions of rows whose pair is the next row, ``(batch, target_len)`` on the host."""
    index, labels = on_host(inputs["index"]), on_host(inputs["labels"])
    pairs = (index[:-1] == index[1:]) & (index[1:] != PADDING_ROW) & (labels[:-1] == labels[1:]).all(1)
    return F.pad(pairs, (0, 1))[:, None] & (labels != IGNORE_INDEX)
