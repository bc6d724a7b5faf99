"""From the answers of an evaluation to its metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_distill.answers import AnswerKey
from lit_distill.metrics import (
    bootstrap_interval,
    ends_in,
    judge,
    macro_f1,
    macro_f1_interval,
    rouge_l,
    wilson_interval,
)

if TYPE_CHECKING:
    from lit_distill.modules.base import DistillModule


@dataclass
class Answer:
    """What the student said of one row."""

    index: int
    """The row's position in its split."""
    prediction: str
    """The label read out of the generated text."""
    text: str
    """The generated text."""
    rationale: str | None = None
    """The generated rationale, where one was asked for."""
    scored: str | None = None
    """The likeliest of the row's closed choices."""


@dataclass(frozen=True)
class Evaluation:
    """One complete evaluation."""

    split: str
    metrics: dict[str, float]
    """Name without the split -> value."""
    samples: list[Answer]
    """The first rows' answers, with rationales."""
    key: AnswerKey
    answers: Sequence[Answer] = ()
    """All rows' answers, in the data's order."""

    def sample_rows(self) -> list[dict[str, Any]]:
        """The samples as rows of a table."""
        return [answer_row(answer, self.key) for answer in self.samples]


def answer_row(answer: Answer, key: AnswerKey) -> dict[str, Any]:
    """One answer beside its row: id, input, label, prediction, correct (``None`` without a label), rationale."""
    label = key.labels[answer.index]
    return {
        "id": key.ids[answer.index],
        "input": key.inputs[answer.index],
        "label": label,
        "prediction": answer.prediction,
        "correct": None if label is None else judge(key.metric)(answer.prediction, label),
        "rationale": answer.rationale,
    }


def gather_answers(module: DistillModule, answers: Sequence[Answer]) -> list[Answer]:
    """All ranks' answers, each row once, in the data's order.

    They travel as bytes in a tensor, which every strategy can gather, also those without object collectives.
    """
    own = json.dumps([asdict(answer) for answer in answers]).encode()
    sizes = all_ranks(module, torch.tensor([len(own)], device=module.device)).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=module.device)
    padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(module.device)
    gathered = all_ranks(module, padded).reshape(len(sizes), -1).cpu()
    by_row: dict[int, Answer] = {}
    for size, row in zip(sizes, gathered, strict=True):
        for content in json.loads(row[:size].numpy().tobytes()):
            by_row[content["index"]] = Answer(**content)
    return [by_row[index] for index in sorted(by_row)]


def all_ranks(module: DistillModule, tensor: Tensor) -> Tensor:
    """A tensor of the same shape from every rank, stacked."""
    gathered = module.all_gather(tensor)
    assert isinstance(gathered, Tensor)  # noqa: S101 - for the type checker: a tensor gives a tensor
    return gathered


def summarise(answers: Sequence[Answer], key: AnswerKey, *, rationales: bool, intervals: bool) -> dict[str, float]:
    """The metrics of an evaluation; accuracies are fractions in 0..1.

    Args:
        answers: one for each row that was evaluated.
        key: the split's answers.
        rationales: also score the generated rationales.
        intervals: also the ends of 95 % intervals, ``<name>_low`` and ``<name>_high``: Wilson's for accuracies,
            the percentile bootstrap over rows otherwise.
    """
    metrics: dict[str, float] = {}
    judged = judge(key.metric)
    labelled = [(answer, label) for answer in answers if (label := key.labels[answer.index]) is not None]

    def accuracy(name: str, outcomes: Sequence[bool]) -> None:
        if not outcomes:
            return
        metrics[name] = sum(outcomes) / len(outcomes)
        if intervals:
            low, high = wilson_interval(sum(outcomes), len(outcomes))
            metrics.update({f"{name}_low": low, f"{name}_high": high})

    def other(name: str, value: float, interval: Callable[[], tuple[float, float]]) -> None:
        metrics[name] = value
        if intervals:
            low, high = interval()
            metrics.update({f"{name}_low": low, f"{name}_high": high})

    accuracy("accuracy", [judged(answer.prediction, label) for answer, label in labelled])
    accuracy("scored_accuracy", [judged(a.scored, label) for a, label in labelled if a.scored is not None])
    if key.label_set is not None and labelled:
        label_set = key.label_set
        predictions = [answer.prediction for answer, _ in labelled]
        labels = [label for _, label in labelled]
        other(
            "macro_f1",
            macro_f1(predictions, labels, label_set),
            lambda: macro_f1_interval(predictions, labels, label_set),
        )
    if rationales:
        written = [(a, a.rationale) for a in answers if a.rationale is not None]
        scores = [rouge_l(text, reference) for a, text in written if (reference := key.rationales[a.index]) is not None]
        if scores:
            other("rouge_l", sum(scores) / len(scores), lambda: bootstrap_interval(scores))
        accuracy("rationale_ends_in_prediction", [ends_in(text, a.prediction, key.metric) for a, text in written])
    return metrics
