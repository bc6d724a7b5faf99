"""Divergences on text that the student writes itself, sampled before an optimizer step is counted."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lit_distill.batch import IGNORE_INDEX, TaskBatch, TaskInputs, pad, pad_rows
from lit_distill.checks import check_choice, check_range
from lit_distill.errors import UserError
from lit_distill.objectives.base import Step
from lit_distill.objectives.chunks import per_token, rows_of_tasks
from lit_distill.objectives.distributions import (
    Divergence,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)
from lit_distill.students import Student
from lit_distill.students.base import ProcessLogits, Stepper
from lit_distill.teachers.models import Teachers

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"]

_DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jensen_shannon,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": total_variation,
}
_MIXTURES = {"jsd": "beta", "skew_kl": "alpha", "skew_reverse_kl": "alpha"}


def gumbel(logits: Tensor) -> Tensor:
    """Scores whose largest is at a sample of the logits' softmax, ``(rows, ids)``.

    Greedy decoding from them is sampling. The noise is float64: of float32 noise, whose largest values are some 17, ids
    rarer than 1 in 10 million would never be drawn.
    """
    return logits.double() - torch.empty_like(logits, dtype=torch.float64).exponential_().log()


class OwnText(Divergence):
    """A divergence on targets that the student samples, or on the data's where there are none, as in evaluation.

    A subclass implements `prepare`, which samples for some micro-batches. No cross-entropy is taken of samples. The
    mean is over all target tokens that the divergence is computed at, sampled or not, in the whole optimizer step.

    Args:
        max_new_tokens: maximum tokens of a sample; by default as many as the longest target of the task in its
            micro-batch.
        **kwargs: as in `Objective`.
    """

    def __init__(self, *, max_new_tokens: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_range("objectives: max_new_tokens", max_new_tokens, at_least=1, whole=True)
        self.max_new_tokens = max_new_tokens

    def setup(self, student: Student, teachers: Teachers) -> None:
        """Raises a ``UserError`` if the student's parameters are sharded."""
        if student.sharded:
            # ranks sample at different times, and each forward would wait for all of them
            raise UserError(
                f"objectives: {self.name}: a student whose parameters are sharded cannot sample; use one device or ddp"
            )
        models = [student, *teachers.loaded(str(self.teacher))]
        # ids that one of the models lacks stand for no token
        self._ids = min(model.network.config.get_text_config().vocab_size for model in models)

    def about(self, batch: TaskBatch) -> list[str]:
        """The tasks, each with its samples in place of the data where there are any."""
        return [own if (own := self.added(task)) in batch else task for task in super().about(batch)]

    def sample(self, step: Step, task: str) -> TaskInputs:
        """A task's rows with targets that the student samples, each up to its end-of-sequence."""
        inputs = step.batch[task]
        targets = step.student.generate(
            task,
            max_new_tokens=self.max_new_tokens or inputs["labels"].shape[1],
            process_logits=self.sampler(step, task),
        )
        return {**inputs, "labels": pad(targets, IGNORE_INDEX).to(inputs["labels"].device)}

    def prepare(self, window: Sequence[Step]) -> None:
        """Remove earlier samples, which are there if the data loader gives a batch again."""
        for step in window:
            for task in self.tasks or ():
                step.batch.pop(self.added(task), None)

    def sample_all(self, step: Step) -> None:
        """Add samples of all tasks to a batch."""
        for task in self.about(step.batch):
            step.batch[self.added(task)] = self.sample(step, task)

    def sampler(self, step: Step, task: str) -> ProcessLogits:
        """What turns greedy decoding of a task into sampling, see ``ProcessLogits``."""
        return lambda scores, position, rows: gumbel(scores[:, : self._ids])


class GKD(OwnText):
    """Generalised knowledge distillation: on the student's samples in a share of the micro-batches, else on the data.

    Agarwal et al. (arXiv 2306.13649) Algorithm 1, with samples at temperature 1. There each target counts equally, and
    the divergence is all that is minimised; here each token does, and the tasks' cross-entropy on the data is beside it
    unless their weight is 0.

    Args:
        share: the probability that a micro-batch's targets are sampled, lambda in the paper.
        divergence: ``jsd``, ``forward_kl``, ``reverse_kl``, ``skew_kl``, ``skew_reverse_kl`` or ``tvd``.
        mixture: ``beta`` of ``jsd`` (by default 0.5) or ``alpha`` of a skew divergence (0.1).
        **kwargs: as in `OwnText`.
    """

    term = "gkd"

    def __init__(
        self, *, share: float = 0.5, divergence: DivergenceName = "jsd", mixture: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_range("objectives: share", share, at_least=0, at_most=1)
        self._value = _DIVERGENCES[check_choice("objectives: divergence", divergence, _DIVERGENCES)]
        if mixture is not None:
            if divergence not in _MIXTURES:
                raise UserError(f"objectives: mixture is for {', '.join(_MIXTURES)}, not for {divergence}")
            # of a skew divergence, 1 leaves nothing of the student
            below = None if divergence == "jsd" else 1
            check_range("objectives: mixture", mixture, at_least=0, at_most=None if below else 1, below=below)
            self._value = partial(self._value, **{_MIXTURES[divergence]: mixture})
        self.share = share

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self._value(student, teacher)

    def prepare(self, window: Sequence[Step]) -> None:
        super().prepare(window)
        for step in window:
            if float(torch.rand(())) < self.share:
                self.sample_all(step)


Sample = tuple[int, list[int], list[int]]
"""The optimizer step of a sample, its source and its target."""


class DistiLLM(GKD):
    """Skew KL, on samples in a share of micro-batches that rises with the validation loss; samples are kept and reused.

    Ko et al. (arXiv 2402.03898) section 3.2 and Algorithm 1, as in their code: a micro-batch of that share has new
    samples with probability 1 - t/T at step t of T, else some of the kept ones; always new ones until ``capacity`` are
    kept. The share rises by ``share_step`` when the tasks' mean cross-entropy in a validation is ``tolerance`` above
    that at the last rise, or the lowest since. The code lacks the latter, as its student is finetuned before.

    All ranks keep the same samples, those of every rank, and so does a checkpoint: a resumed run is the same.

    Args:
        share: at the start.
        divergence: as in `GKD`.
        share_step: by how much the share rises.
        tolerance: how far the cross-entropy may rise, in nats.
        capacity: maximum samples of each task that are kept, the latest.
        **kwargs: as in `GKD`.
    """

    term = "distillm"

    def __init__(
        self,
        *,
        share: float = 0.0,
        divergence: DivergenceName = "skew_kl",
        share_step: float = 0.1,
        tolerance: float = 0.1,
        capacity: int = 1000,
        **kwargs: Any,
    ) -> None:
        super().__init__(share=share, divergence=divergence, **kwargs)
        check_range("objectives: share_step", share_step, at_least=0, at_most=1)
        check_range("objectives: tolerance", tolerance, at_least=0)
        check_range("objectives: capacity", capacity, at_least=1, whole=True)
        self.share_step, self.tolerance, self.capacity = share_step, tolerance, capacity
        self.lowest = math.inf
        self.prepared = 0  # the step that was prepared last
        self.validated: tuple[int, float] | None = None  # the step prepared at the last validation, and its loss
        self.samples: dict[str, list[Sample]] = {}

    def on_validation_end(self, metrics: Mapping[str, float]) -> None:
        losses = [metrics[f"{task}_loss"] for task in self.tasks or () if f"{task}_loss" in metrics]
        if losses:
            # counts from the next step on: a resumed run may prepare this one again, or validate again
            self.validated = self.prepared, sum(losses) / len(losses)

    def update_share(self, step: int) -> None:
        """Raise the share before a step, if the validation before it says so."""
        if self.validated is None or self.validated[0] >= step:
            return
        loss, self.validated = self.validated[1], None
        if loss >= self.lowest + self.tolerance:
            self.share, self.lowest = min(self.share + self.share_step, 1.0), loss
        else:
            self.lowest = min(loss, self.lowest)

    def prepare(self, window: Sequence[Step]) -> None:
        # not that of GKD, which samples
        OwnText.prepare(self, window)
        progress = window[0].progress
        self.update_share(progress.step)
        self.prepared = progress.step
        new_share, made = self.share * (1 - progress.step / progress.steps), []
        for task, samples in self.samples.items():
            # those of this very step are from before the run was resumed inside it, and are made again
            self.samples[task] = [sample for sample in samples if sample[0] < progress.step][-self.capacity :]
        for step in window:
            if (drawn := float(torch.rand(()))) >= self.share:
                continue
            for task in self.about(step.batch):
                kept = self.samples.get(task, [])
                if drawn >= new_share and len(kept) == self.capacity:
                    order = torch.randperm(len(kept))[: len(step.batch[task]["labels"])]
                    chosen = [kept[i] for i in order.tolist()]
                    padded = pad_rows([source for _, source, _ in chosen], [target for _, _, target in chosen])
                    inputs = move_data_to_device(padded, step.batch[task]["labels"].device)
                else:
                    inputs = self.sample(step, task)
                    made += [(task, sample) for sample in _samples(inputs, progress.step)]
                step.batch[self.added(task)] = inputs
        for task, sample in _of_all_ranks(made):
            self.samples.setdefault(task, []).append(sample)

    def get_extra_state(self) -> Tensor:
        """What a checkpoint holds beside weights: no buffer, as DDP would send it to all ranks in each forward."""
        state = json.dumps([self.share, self.lowest, self.prepared, self.validated, self.samples])
        return torch.frombuffer(bytearray(state.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        kept = json.loads(state.cpu().numpy().tobytes())
        self.share, self.lowest, self.prepared, self.validated, self.samples = kept


def _samples(inputs: TaskInputs, step: int) -> list[Sample]:
    sources = [ids[mask != 0] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    targets = [ids[ids != IGNORE_INDEX] for ids in inputs["labels"]]
    return [(step, source.tolist(), target.tolist()) for source, target in zip(sources, targets, strict=True)]


def _of_all_ranks(made: list[tuple[str, Sample]]) -> list[tuple[str, Sample]]:
    if not torch.distributed.is_initialized():
        return made
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, made)
    return [each for own in gathered for each in own]


def policy_gradient(
    kl: Tensor,
    student: Tensor,
    teacher: Tensor,
    rows: Tensor,
    *,
    teacher_share: float,
    clip: float | None = None,
    length_norm: bool = True,
) -> Tensor:
    r"""A loss of each sampled token whose gradient is that of the reverse KL of whole texts, ``(tokens,)``.

    MiniLLM (arXiv 2306.08543) Eq. 7: with :math:`y` sampled from :math:`\tilde p = \alpha p + (1 - \alpha) q`,

    .. math:: w_t KL(q_t \| p_t) - w_t R_{t+1}, \quad w_t = q(y_t) / \tilde p(y_t)

    where the gradient of the second :math:`w_t` is that of :math:`q(y_t)`, and :math:`R_{t+1}` is the mean of
    :math:`\log p(y_s) - \log q(y_s)` over all later tokens of the text (Eq. 6 divides by one less). It is clipped as in
    PPO. The public code also whitens and discounts the rewards, counts a token's own among them, and leaves the first
    :math:`w_t` out.

    Args:
        kl: the student's reverse KL at each token.
        student: log-probability of each token.
        teacher: the same of the teacher.
        rows: the text of each token, in order.
        teacher_share: :math:`\alpha`.
        clip: how far :math:`w_t` may be from 1 for a gradient that moves it further; ``None`` does not clip.
        length_norm: whether :math:`R_{t+1}` is a mean; else a sum.
    """
    own = student.detach()
    mixture = (
        own
        if teacher_share == 0
        else torch.logaddexp(own + math.log1p(-teacher_share), teacher + math.log(teacher_share))
    )
    sums = (teacher - own).double().cumsum(0)
    # of each text its last token
    last = torch.bincount(rows).cumsum(0)[rows] - 1
    later = sums[last] - sums
    if length_norm:
        later = later / (last - torch.arange(len(rows), device=rows.device)).clamp(min=1)
    later = later.to(student.dtype)
    ratio = (student - mixture).exp()
    gain = ratio * later
    if clip is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * later)
    return ratio.detach() * kl - gain


class MiniLLM(OwnText):
    """Reverse KL of whole texts by policy gradient, on samples from a mixture of teacher and student (MiniLLM).

    Gu et al. (arXiv 2306.08543) Algorithm 1, see `policy_gradient`; the paper's cross-entropy on further text is the
    tasks' own on the data. Each step has new samples, from its own weights (the public code takes 4 passes over 256).
    The mean is over all sampled tokens of the step. With dropout, the importance weights are those of the student with
    dropout, which has sampled without. The term itself is no distance; in evaluation it is the reverse KL at the
    data's targets.

    Args:
        teacher_share: the teacher's share of the mixture that is sampled from, alpha in the paper.
        clip: as in PPO, of the importance weights; null does not clip.
        length_norm: whether a token's reward is the mean over all later ones, else their sum.
        **kwargs: as in `OwnText`.
    """

    term = "minillm"
    may_be_negative = True

    def __init__(
        self, *, teacher_share: float = 0.2, clip: float | None = 0.2, length_norm: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_range("objectives: teacher_share", teacher_share, at_least=0, below=1)
        check_range("objectives: clip", clip, above=0)
        self._settings: dict[str, Any] = {"teacher_share": teacher_share, "clip": clip, "length_norm": length_norm}
        self.teacher_share = teacher_share

    def value(self, student: Tensor, teacher: Tensor) -> Tensor:
        return reverse_kl(student, teacher)

    def prepare(self, window: Sequence[Step]) -> None:
        super().prepare(window)
        for step in window:
            self.sample_all(step)

    def sampler(self, step: Step, task: str) -> ProcessLogits:
        if self.teacher_share == 0:
            return super().sampler(step, task)
        stepper: Stepper
        last = torch.zeros(len(step.batch[task]["labels"]), dtype=torch.long, device=step.student.student.device)

        def mixed(scores: Tensor, position: int, rows: Tensor) -> Tensor:
            nonlocal stepper
            if position == 0:
                stepper = self.teacher_pass(step).stepper(task)
            teacher = stepper(last if position else None)[rows]
            own, other = (logits[:, : self._ids].float().softmax(-1) for logits in (scores, teacher))
            noisy = gumbel(own.lerp(other, self.teacher_share).log())
            last[rows] = noisy.argmax(-1)
            return noisy

        return mixed

    def forward(self, step: Step) -> Tensor:
        tasks = self.about(step.batch)
        if not any(task.startswith(self.added("")) for task in tasks):
            return super().forward(step)
        student = step.student
        rows, _ = rows_of_tasks(student, tasks)
        labels = torch.cat([student.labels(task) for task in tasks])
        found = per_token(_parts, student, self.teacher_pass(step), tasks, labels)
        kl, own, other = found.unbind(-1)
        losses = policy_gradient(kl, own, other, rows, **self._settings)
        return losses.sum() / max(len(losses), 1)


def _parts(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The reverse KL and both log-probabilities of the label at each token, ``(tokens, 3)``."""
    own, other = (logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0] for logits in (student, teacher))
    return torch.stack([reverse_kl(student, teacher), own, other], -1)
