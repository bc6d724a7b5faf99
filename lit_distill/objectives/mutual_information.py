r"""A lower bound of the mutual information between the student's and the teacher's representations of a text."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from lit_distill.batch import TaskBatch, mean_rows, with_target
from lit_distill.checks import check_int, check_range
from lit_distill.objectives.base import Step
from lit_distill.objectives.hidden import LayerPairs, shape
from lit_distill.objectives.layers import Layers
from lit_distill.students import Pass
from lit_distill.students.base import Stack


def interpolated_bound(scores: Tensor, log_baseline: Tensor, alpha: float) -> Tensor:
    r"""Each row's share of the lower bound :math:`I_\alpha` of the mutual information of x and y in nats, ``(rows,)``.

    Poole et al. (arXiv 1905.06922) Eq. 12, for any critic f and any baseline :math:`q > 0`:

    .. math::
        I \geq 1 + E_{p(x, y)} \log \frac{e^{f(x_1, y)}}{\alpha m(y; x_{1:K}) + (1 - \alpha) q(y)}
        - E_{p(x) p(y)} \frac{e^{f(x_1, y)}}{\alpha m(y; x_{1:K}) + (1 - \alpha) q(y)},
        \quad m(y; x_{1:K}) = \frac{1}{K} \sum_k e^{f(x_k, y)}

    With :math:`\alpha = 1` it is InfoNCE, at most :math:`\log K`, of little variance. Smaller ones reach
    :math:`\log (K / \alpha)`, with more variance; 0 is the bound of Nguyen, Wainwright and Jordan with a baseline
    (TUBA), which nothing limits. As in the authors' code the K samples of x leave one of the rows out in turn: another
    than y's own in the first expectation, y's own in the second, so K is the number of rows less one.

    ``scores[i, j]`` is :math:`f(x_j, y_i)`, ``log_baseline[i]`` is :math:`\log q(y_i)`. Fewer than two rows give 0.
    """
    number = len(scores)
    if number < 2:
        return scores.sum(1) * 0 + log_baseline * 0
    mean = _log_mean_without(scores) + (math.log(alpha) if alpha else -math.inf)
    baseline = log_baseline[:, None] + (math.log(1 - alpha) if alpha < 1 else -math.inf)
    denominators = torch.logaddexp(mean, baseline)
    own = denominators.diagonal()
    joint = scores.diagonal() - (denominators.sum(1) - own) / (number - 1)
    return 1 + joint - torch.exp(_log_mean_without(scores).diagonal() - own)


def _log_mean_without(scores: Tensor) -> Tensor:
    """The logarithm of the mean of ``e^scores[i, k]`` over all ``k`` but ``j``, ``(rows, rows)``."""
    largest = F.one_hot(scores.argmax(1), len(scores)).bool()
    whole = scores.logsumexp(1, keepdim=True)
    rest = scores.masked_fill(largest, -math.inf).logsumexp(1, keepdim=True)
    # subtracting the largest could cancel; any other is at most half of the whole
    share = (scores - whole).masked_fill(largest, -1.0)
    return torch.where(largest, rest, whole + torch.log(-torch.expm1(share))) - math.log(len(scores) - 1)


class MutualInformation(LayerPairs):
    r"""Minus the lower bound :math:`I_\alpha` of the mutual information of mapped layers, summed over the layers.

    MI-:math:`\alpha` of Distiller (arXiv 2109.11105), on the bound of Poole et al. (`interpolated_bound`). x is the
    student's and y the teacher's state of a row's tokens, averaged over them; the other rows of the same task and
    micro-batch are the samples to tell it from, and the term is the mean over rows with a target. The critic is
    separable, :math:`f(x, y) = (U \hat x) \cdot (V \hat y) / \sqrt{d}` of normalised states, :math:`\log q(y)` is
    linear in :math:`\hat y` and begins as 0; both are those of each pair of layers. Poole et al. use networks instead.

    Args:
        alpha: from 0, the bound with most variance and least bias, to 1, InfoNCE.
        stack: ``encoder``: states of source tokens; ``decoder``: of target tokens (see `HiddenStates`).
        layers: ``uniform``, ``last``, or pairs of student and teacher layer, counted from 1 (see `map_layers`).
        size: d, the dimensions that the critic compares.
        **kwargs: as in `Objective`.
    """

    term = "mi_alpha"
    of_whole_batch = True
    may_be_negative = True

    def __init__(
        self,
        *,
        alpha: float = 0.9,
        stack: Stack = "encoder",
        layers: Layers = "uniform",
        size: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(stack=stack, **kwargs)
        check_range(f"objectives: {self.name}: alpha", alpha, at_least=0, at_most=1)
        self.alpha = alpha
        self.layers = layers
        self.size = check_int(f"objectives: {self.name}: size", size, 1)
        self.student_map = UninitializedParameter()  # U of each pair of layers
        self.teacher_map = UninitializedParameter()  # V
        self.baseline = UninitializedParameter()  # of log q(y)

    def make(self, width: int, teacher_width: int) -> None:
        number = len(self.pairs)
        if shape(self, "student_map", (number, self.size, width)):
            nn.init.normal_(self.student_map, std=width**-0.5)
        if shape(self, "teacher_map", (number, self.size, teacher_width)):
            nn.init.normal_(self.teacher_map, std=teacher_width**-0.5)
        if shape(self, "baseline", (number, teacher_width + 1)):
            nn.init.zeros_(self.baseline)

    def counts(self, batch: TaskBatch) -> int:
        """Rows with a target."""
        return sum(int(with_target(batch[task]).sum()) for task in self.about(batch))

    def forward(self, step: Step) -> Tensor:
        student, teacher = step.student, self.teacher_pass(step)
        bounds = []
        for task in self.about(step.batch):
            for number, (own, other) in enumerate(self.pairs):
                ours = F.linear(self._states(student, step, task, own), self.student_map[number])
                states = self._states(teacher, step, task, other)
                theirs = F.linear(states, self.teacher_map[number])
                scores = (theirs @ ours.T).float() / self.size**0.5
                baseline = F.linear(F.pad(states, (0, 1), value=1.0), self.baseline[number : number + 1])[:, 0]
                bounds.append(interpolated_bound(scores, baseline.float(), self.alpha))
        return -torch.cat(bounds).sum() / max(self.counts(step.batch), 1)

    def _states(self, side: Pass, step: Step, task: str, layer: int) -> Tensor:
        """The normalised mean state of each row with a target, ``(rows, d_model)``."""
        inputs = step.student.inputs(task)
        if self.stack == "decoder":
            states, rows = side.hidden(task, layer), step.student.rows(task)
        else:
            states, rows = side.encoder(task, layer), inputs["attention_mask"].nonzero()[:, 0]
        means = mean_rows(states.float(), rows, len(inputs["labels"]))[with_target(inputs)]
        return F.layer_norm(means, means.shape[-1:]).to(self.student_map.dtype)
