"""The metrics of a split, from its answers."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from lit_distill.evaluation.answers import Answer, AnswerKey
from lit_distill.evaluation.metrics import bootstrap_interval, ends_in, judge, macro_f1, rouge_l, wilson_interval


def gather_answers(answers: Sequence[Answer], gather: Callable[[Tensor], Tensor], device: torch.device) -> list[Answer]:
    """All ranks' answers, each row once, in the data's order.

    They are sent as bytes in a tensor, since not every strategy has object collectives.

    Args:
        answers: of this rank.
        gather: stacks a tensor of the same shape from every rank.
        device: for the tensors that are gathered.
    """
    content = json.dumps([asdict(answer) for answer in answers]).encode()
    sizes = gather(torch.tensor([len(content)], device=device)).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
    by_row: dict[int, Answer] = {}
    for size, row in zip(sizes, gather(padded).reshape(len(sizes), -1).cpu(), strict=True):
        by_row |= {each["index"]: Answer(**each) for each in json.loads(row[:size].numpy().tobytes())}
    return [by_row[index] for index in sorted(by_row)]


def summarise(answers: Sequence[Answer], key: AnswerKey, *, rationales: bool, intervals: bool) -> dict[str, float]:
    """The metrics of an evaluation; accuracies are fractions in 0..1.

    Args:
        answers: one for each row.
        key: of the split.
        rationales: also score the generated rationales.
        intervals: add the ends of 95 % intervals as ``<name>_low`` and ``<name>_high``: Wilson's for accuracies, the
            percentile bootstrap over rows otherwise.
    """
    metrics: dict[str, float] = {}
    judged = judge(key.metric)
    labelled = [(answer, label) for answer in answers if (label := key.labels[answer.index]) is not None]

    def add(name: str, value: float, interval: Callable[[], tuple[float, float]]) -> None:
        metrics[name] = value
        if intervals:
            metrics[f"{name}_low"], metrics[f"{name}_high"] = interval()

    def accuracy(name: str, outcomes: Sequence[bool]) -> None:
        if outcomes:
            count = len(outcomes)
            add(name, sum(outcomes) / count, lambda: wilson_interval(sum(outcomes), count))

    accuracy("accuracy", [judged(answer.prediction, label) for answer, label in labelled])
    accuracy("scored_accuracy", [judged(a.scored, label) for a, label in labelled if a.scored is not None])
    if key.label_set is not None and labelled:
        of_rows = macro_f1([answer.prediction for answer, _ in labelled], [y for _, y in labelled], key.label_set)
        count = len(labelled)
        add("macro_f1", of_rows(np.arange(count)), lambda: bootstrap_interval(of_rows, count))
    if rationales:
        written = [(a, a.rationale) for a in answers if a.rationale is not None]
        pairs = [(text, other) for a, text in written if (other := key.rationales[a.index]) is not None]
        scores = np.array([rouge_l(text, other) for text, other in pairs])
        if len(scores):
            count, mean = len(scores), float(scores.mean())
            add("rouge_l", mean, lambda: bootstrap_interval(lambda rows: float(scores[rows].mean()), count))
        accuracy("rationale_ends_in_prediction", [ends_in(text, a.prediction, key.metric) for a, text in written])
    return metrics
