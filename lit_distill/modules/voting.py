"""Several texts of a student vote on the answer to each row: self-consistency at inference."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lit_distill.annotation.record import vote
from lit_distill.checks import check_choice, check_int, check_range
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import AnswerKey, VotePath
from lit_distill.objectives import Step
from lit_distill.tasks import Task

if TYPE_CHECKING:
    from lit_distill.modules.evaluating import Evaluating

PATHS_AT_ONCE = 256
"""Maximum paths that are generated together, to bound the memory; each row of a batch has at least one."""

By = Literal["majority", "likelihood"]


@dataclass(frozen=True)
class Vote:
    """Which texts of a student, its paths, vote on a row's answer, and how (Wang et al., arXiv 2203.11171).

    A path whose text has no label does not vote. Labels are counted together that the data's metric takes for the same
    answer; of equally many votes the first path's count.

    A sample depends on the weights, the run's seed (that of training, for a checkpoint), the task's name, the row's
    position in its split and the sample's number: neither on the batches and devices, nor on what ran before.

    Args:
        samples: sampled paths of each task for each row; with 0 each task has its greedy text as one path.
        temperature: what the scores are divided by before the softmax that is sampled from.
        tasks: whose texts vote, by name; by default the answer task's.
        by: ``majority`` counts paths; ``likelihood`` sums up each path's likelihood, normalised by its length: the
            exponential of the mean log-probability of its tokens, at temperature 1 ("weighted sum, normalized" in
            Table 1 of the paper).
    """

    samples: int = 0
    temperature: float = 0.7
    tasks: list[str] | None = None
    by: By = "majority"

    def check(self, tasks: Mapping[str, Task], num_beams: int) -> None:
        """Raise a ``UserError`` for settings without a meaning for a module's tasks."""
        check_int("vote: samples", self.samples, 0, 10_000)
        # null would pass as not set
        check_range("vote: temperature", self.temperature or 0, above=0)
        check_choice("vote: by", self.by, get_args(By))
        if self.tasks is not None and (not self.tasks or len(set(self.tasks)) < len(self.tasks)):
            raise UserError(f"vote: tasks must be different names, got {self.tasks}")
        labels = [name for name, task in tasks.items() if task.gives_label]
        if not labels:
            raise UserError(f"vote: no label is parsed from texts of {', '.join(tasks)}; leave it out")
        for name in self.tasks or ():
            check_choice("vote: tasks (of those with a label)", name, labels)
        if not self.samples and len(self.tasks or ()) < 2:
            raise UserError("vote: one greedy text is no vote; give samples of at least 1, or several tasks")
        if num_beams > 1:
            raise UserError(f"vote: its paths are sampled or greedy; num_beams must be 1, got {num_beams}")

    def winner(self, paths: Sequence[VotePath], agree: Callable[[str, str], bool]) -> str:
        """The label that wins; empty if no path has one."""
        weights = [1.0] * len(paths)
        if self.by == "likelihood":
            weights = [math.exp(path["log_probability"] / path["tokens"]) for path in paths]
        return vote([path["label"] for path in paths], agree, weights)[0] or ""


class Sampler:
    """A ``ProcessLogits`` that makes greedy decoding draw each token, and keeps its log-probability.

    Args:
        shape: number of paths, and of tokens at most.
        numbers: one in [0, 1) for each path and token: the token is where the cumulative distribution exceeds it.
            Without them the most likely token is taken.
        temperature: see `Vote`.
        device: of the scores.
    """

    def __init__(
        self, shape: tuple[int, int], numbers: Tensor | None, temperature: float, device: torch.device
    ) -> None:
        self._numbers, self._temperature = None if numbers is None else numbers.to(device), temperature
        self._logs = torch.zeros(shape, dtype=torch.float64, device=device)

    def __call__(self, scores: Tensor, step: int, rows: Tensor) -> Tensor:
        # float64: float32 sums would lose the rare tokens
        logs = scores.double().log_softmax(-1)
        if self._numbers is None:
            ids = scores.argmax(-1, keepdim=True)
        else:
            sums = (logs / self._temperature).softmax(-1).cumsum(-1)
            below = self._numbers[rows, step, None] * sums[:, -1:]
            ids = torch.searchsorted(sums, below, right=True).clamp(max=scores.shape[-1] - 1)
        self._logs[rows, step] = logs.gather(-1, ids)[:, 0]
        return torch.full_like(scores, -torch.inf).scatter(-1, ids, 0.0)

    def log_probabilities(self, ids: Sequence[Sequence[int]]) -> list[float]:
        """Of each path's tokens together."""
        return [math.fsum(logs[: len(own)]) for logs, own in zip(self._logs.tolist(), ids, strict=True)]


def vote_paths(module: "Evaluating", step: Step, key: AnswerKey, settings: Vote) -> list[list[VotePath]]:
    """The paths of each row of an evaluation batch: of one task after another, its samples in order."""
    found: list[list[VotePath]] = [[] for _ in step.batch[module.answer_task]["labels"]]
    at_once, number = max(PATHS_AT_ONCE // max(len(found), 1), 1), max(settings.samples, 1)
    for task in settings.tasks or [module.answer_task]:
        for first in range(0, number, at_once):
            samples = range(first, min(first + at_once, number))
            rows = [row for row in range(len(found)) for _ in samples]
            paths = _paths(module, step, key, settings, module.tasks[task], rows, [*samples] * len(found))
            for row, path in zip(rows, paths, strict=True):
                found[row].append(path)
    return found


def _paths(
    module: "Evaluating",
    step: Step,
    key: AnswerKey,
    settings: Vote,
    task: Task,
    rows: list[int],
    samples: list[int],
) -> list[VotePath]:
    """A task's paths: of these rows, with these numbers."""
    index = step.batch[task.name]["index"].tolist()

    def sampler(name: str) -> Sampler:
        length, numbers = module.generation_settings(name)["max_new_tokens"], None
        if settings.samples:
            # a row that pads has the samples of the first
            of_paths = ([max(index[row], 0), sample] for row, sample in zip(rows, samples, strict=True))
            keys = ([module.sampling_seed, *of_path, *name.encode()] for of_path in of_paths)
            drawn = [np.random.default_rng(one).random(length) for one in keys]
            numbers = torch.from_numpy(np.array(drawn).reshape(-1, length))
        return Sampler((len(rows), length), numbers, settings.temperature, module.device)

    last = sampler(task.name)
    # without a task before, it has no tokens
    first = last if task.after is None else sampler(task.after)
    own, before, written = module.follow(step, task.name, key, rows, first)
    ids = module.generate_ids(own, task.name, rows if own is step else None, last)
    texts = module.student.tokens.decode(ids)
    parsed = [task.read(text) for text in texts]
    # that of a task that comes after another is the other's
    rationales = [one.rationale for one in (parsed if task.after is None else written)]
    logs = zip(first.log_probabilities(before), last.log_probabilities(ids), strict=True)
    return [
        VotePath(
            task=task.name,
            text=texts[path],
            label=parsed[path].label or None,
            rationale=rationales[path],
            log_probability=sum(of_path),
            tokens=len(before[path]) + len(ids[path]),
        )
        for path, of_path in enumerate(logs)
    ]
