r"""Divergences between the teacher's distribution :math:`p` and the student's :math:`q` at each target token.

The functions take the logits of the student and of the teacher, ``(targets, vocabulary)``, and give ``(targets,)``, in
nats. An id of probability 0, such as one whose logit is minus infinity, adds what the limit adds: nothing where its
weight is 0, infinity where KL gives weight to what the other side excludes.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from lit_distill.batch import TaskBatch
from lit_distill.checks import check_range
from lit_distill.objectives.base import Objective, Step
from lit_distill.objectives.chunks import divergence, sum_of_logits
from lit_distill.students import Student
from lit_distill.teachers.models import Teachers
from lit_distill.teachers.store import SparseTargets, Store, StoredPass


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    r""":math:`T^2 KL(p_T \| q_T)`, of both softmaxes at temperature :math:`T`.

    Hinton et al. (arXiv 1503.02531) section 2: gradients of soft targets scale as :math:`1/T^2`, and the factor keeps
    the term's share in the total when :math:`T` changes. With :math:`T = 1` it is the word-level distillation of Kim
    and Rush (arXiv 1606.07947), less the teacher's entropy.
    """
    return temperature**2 * _kl(_logs(teacher, temperature), _logs(student, temperature))


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    r""":math:`KL(q \| p)`, which is infinite where the teacher excludes an id and the student does not."""
    return _kl(log_softmax(student, -1), log_softmax(teacher, -1))


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    r""":math:`\beta KL(p \| m) + (1 - \beta) KL(q \| m)` with :math:`m = \beta p + (1 - \beta) q`.

    GKD (arXiv 2306.13649) Eq. 1. At 0 and 1, where it vanishes, it is the forward and the reverse KL, the limits of its
    gradient over :math:`\beta` and :math:`1 - \beta` (section 2, after Huszár 2015). TRL and Liger have the same
    :math:`\beta`; ``lam`` of DistiLLM's code is :math:`1 - \beta`.
    """
    ours, theirs = log_softmax(student, -1), log_softmax(teacher, -1)
    if beta in (0, 1):
        return _kl(ours, theirs) if beta else _kl(theirs, ours)
    mixture = _mixture(theirs, ours, beta)
    return beta * _kl(theirs, mixture) + (1 - beta) * _kl(ours, mixture)


def skew_kl(student: Tensor, teacher: Tensor, alpha: float = 0.1) -> Tensor:
    r""":math:`KL(p \| \alpha p + (1 - \alpha) q)`: DistiLLM (arXiv 2402.03898) section 3.1."""
    return _skew(log_softmax(teacher, -1), log_softmax(student, -1), alpha)


def skew_reverse_kl(student: Tensor, teacher: Tensor, alpha: float = 0.1) -> Tensor:
    r""":math:`KL(q \| \alpha q + (1 - \alpha) p)`: DistiLLM (arXiv 2402.03898) section 3.1."""
    return _skew(log_softmax(student, -1), log_softmax(teacher, -1), alpha)


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    r""":math:`\frac{1}{2} \sum |p - q|`: f-distill (arXiv 2307.15190), at each word."""
    return (softmax(teacher, -1) - softmax(student, -1)).abs().sum(-1) / 2


def _logs(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities at a temperature, without a copy of the logits at 1."""
    return log_softmax(logits if temperature == 1 else logits / temperature, -1)


def _kl(left: Tensor, right: Tensor) -> Tensor:
    """KL from the left log-probabilities to the right ones."""
    weight = left.exp()
    # minus infinity has no difference to itself; masked, it has no gradient either
    return (weight * (left - right).masked_fill_(weight == 0, 0)).sum(-1)


def _skew(left: Tensor, right: Tensor, share: float) -> Tensor:
    """KL from the left distribution to its mixture with the right one, of which it is a share."""
    return _kl(left, _mixture(left, right, share) if share else right)


def _mixture(left: Tensor, right: Tensor, share: float) -> Tensor:
    """Log-probabilities of a mixture, of which the left distribution is a share."""
    mixture = torch.lerp(right.exp(), left.exp(), share)
    return mixture.clamp(min=torch.finfo(mixture.dtype).tiny).log()


def stored_kl(student: Tensor, targets: SparseTargets, vocabulary: int, temperature: float = 1.0) -> Tensor:
    r"""An unbiased sample of `forward_kl`: :math:`T^2 (-\sum_j t_j \log q_{T,j} - H(p_T))`.

    The expectation of the captured targets :math:`t` is :math:`p_T`. They are over the first ``vocabulary`` ids;
    further logits are padding. Values may be negative. Without the entropy :math:`H`, which no gradient depends on, it
    is the loss of Anshumann et al. (arXiv 2503.16870).
    """
    logs = _logs(student[:, :vocabulary], temperature).gather(1, targets.ids)
    return temperature**2 * (-(targets.probabilities * logs).sum(-1) - targets.entropy)


class Divergence(Objective):
    """A divergence of the teacher's and the student's distributions, the mean over target tokens.

    A subclass implements ``value``. Both models have one tokenizer; where one's output head is padded, only the ids
    that both have count.
    """

    reads_teacher = True
    zero_at_teacher = True

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The divergence at each target, ``(targets,)``, of both models' logits ``(targets, vocabulary)``."""
        raise NotImplementedError(f"{type(self).__name__} has no value(student, teacher)")

    def forward(self, step: Step) -> Tensor:
        return divergence(self.value, step.student, self.teacher_pass(step), self.about(step.batch))


class ForwardKL(Divergence):
    """KL divergence from the teacher's distribution to the student's (`forward_kl`).

    Args:
        temperature: of both softmaxes.
        **kwargs: as in `Objective`.
    """

    term = "kl"
    from_store = True
    _store: Store | None = None

    def __init__(self, *, temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_range("objectives: temperature", temperature, above=0)
        self.temperature = temperature

    def setup(self, student: Student, teachers: Teachers) -> None:
        self._store = teachers.store(str(self.teacher))

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        return forward_kl(student, teacher, self.temperature)

    def counts(self, batch: TaskBatch) -> int | None:
        """The target tokens; in evaluation those of which distributions are stored, if the teacher is a store."""
        if self._store is None or self.training:
            return super().counts(batch)
        return sum(self._store.known(batch[task]) for task in self.about(batch))

    def forward(self, step: Step) -> Tensor:
        if self._store is None:
            return super().forward(step)
        student, stored = step.student, cast(StoredPass, self.teacher_pass(step))
        states = torch.cat([student.states(task) for task in self.about(step.batch)])
        targets = [torch.cat(parts) for parts in zip(*map(stored.targets, self.about(step.batch)), strict=True)]

        def value(logits: Tensor, *chunk: Tensor) -> Tensor:
            return stored_kl(logits, SparseTargets(*chunk), vocabulary, self.temperature)

        vocabulary = self._store.header.vocabulary
        total = sum_of_logits(value, student, states, *targets)
        return total / max(self.counts(step.batch) or 0, 1)


class ReverseKL(Divergence):
    """KL divergence from the student's distribution to the teacher's (`reverse_kl`)."""

    term = "reverse_kl"

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        return reverse_kl(student, teacher)


class JensenShannon(Divergence):
    """Generalised Jensen-Shannon divergence (`jensen_shannon`).

    Args:
        beta: the teacher's share of the mixture; 0 is forward and 1 reverse KL.
        **kwargs: as in `Objective`.
    """

    term = "jsd"

    def __init__(self, *, beta: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_range("objectives: beta", beta, at_least=0, at_most=1)
        self.beta = beta

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        return jensen_shannon(student, teacher, self.beta)


class SkewKL(Divergence):
    """KL divergence from the teacher's distribution to a mixture of both (`skew_kl`).

    Args:
        alpha: the teacher's share of the mixture.
        **kwargs: as in `Objective`.
    """

    term = "skew_kl"

    def __init__(self, *, alpha: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_range("objectives: alpha", alpha, at_least=0, below=1)
        self.alpha = alpha

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        return skew_kl(student, teacher, self.alpha)


class SkewReverseKL(SkewKL):
    """KL divergence from the student's distribution to a mixture of both (`skew_reverse_kl`).

    Args:
        alpha: the student's share of the mixture.
        **kwargs: as in `Objective`.
    """

    term = "skew_reverse_kl"

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        return skew_reverse_kl(student, teacher, self.alpha)


class TotalVariation(Divergence):
    """Total variation distance of both distributions (`total_variation`)."""

    term = "tvd"

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        return total_variation(student, teacher)
