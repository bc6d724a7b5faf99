"""The student's answers, a split's gold answers, and the metrics that they give."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypedDict

import lightning.pytorch as pl
import numpy as np
import torch

from lit_distill.evaluation.metrics import (
    MetricName,
    bootstrap_interval,
    ends_in,
    judge,
    macro_f1,
    rouge_l,
    wilson_interval,
)

Split = Literal["train", "val", "test", "predict"]


@dataclass(frozen=True)
class AnswerKey:
    """The rows of a split for evaluation: position ``i`` is the row whose batch ``index`` is ``i``.

    Gold answers are the raw strings of the data, never decoded from token ids: neither truncation nor the tokenizer's
    normalisation can turn a wrong answer into a right one.
    """

    ids: Sequence[str]
    inputs: Sequence[str]
    labels: Sequence[str | None]  # gold labels
    rationales: Sequence[str | None]  # the teacher's rationales; `None` where it gave none or it did not parse
    metric: MetricName  # how an answer is judged
    label_set: tuple[str, ...] | None  # the closed label set that all rows share, if there is one
    choices: Sequence[tuple[str, ...]] | None  # each row's closed choices (its own, or the shared set), if any
    majority_label: str | None  # the most frequent training label: the majority-class baseline
    groups: Sequence[str | None] | None = None  # that rows are also evaluated by, if they have one
    max_source_length: int = 1024  # tokens that an input is cut to

    def __len__(self) -> int:
        return len(self.ids)


class VotePath(TypedDict):
    """One of a student's texts that vote on a row's answer."""

    task: str  # that the text was generated for
    text: str
    label: str | None  # parsed from it, if there is one
    rationale: str | None  # parsed from it, or from the text of the task that this one comes after
    log_probability: float  # of all tokens, those of the task before included, in nats
    tokens: int  # number of these, with end-of-sequence


@dataclass
class Answer:
    """A student's answer to one row."""

    index: int  # the row's position in its split
    prediction: str  # the label parsed from the generated text
    text: str
    rationale: str | None = None  # the generated rationale, if one was generated
    scored: str | None = None  # the most likely of the row's closed choices
    tokens: int = 0  # generated for the prediction, with end-of-sequence
    vote: str | None = None  # the label that won a vote, empty if there was none; `None` without a vote
    vote_tokens: int = 0  # generated for all paths
    paths: list[VotePath] | None = None  # of the vote, in predictions


@dataclass(frozen=True)
class Evaluation:
    """The result of one complete evaluation."""

    split: Split
    metrics: dict[str, float]  # name without the split -> value
    samples: list[Answer]  # answers of the first rows, with rationales
    key: AnswerKey
    answers: Sequence[Answer] = ()  # all answers, in the data's order

    def sample_rows(self) -> list[dict[str, Any]]:
        """The samples as rows of a table."""
        return [answer_row(answer, self.key) for answer in self.samples]

    def chance(self) -> tuple[str, float] | None:
        """`chance_level` of the evaluated rows."""
        return chance_level(self.key, (answer.index for answer in self.answers))


def _macro_f1_within(pairs: Sequence[tuple[str, str]], label_set: Sequence[str]) -> float:
    """Of a group's predictions and labels, over the labels of the set that are among either."""
    predictions, labels = zip(*pairs, strict=True)
    present = {text.strip() for text in (*predictions, *labels)}
    classes = [label for label in label_set if label.strip() in present]
    return macro_f1(predictions, labels, classes or label_set)(np.arange(len(pairs)))


def answer_row(answer: Answer, key: AnswerKey) -> dict[str, Any]:
    """An answer with its row: id, input, label, prediction, correct (``None`` without a label), rationale, tokens.

    Also the group, if the row has one; and with a vote vote, vote_correct, vote_tokens, and paths if they were kept.
    """
    label, judged = key.labels[answer.index], judge(key.metric)
    row: dict[str, Any] = {
        "id": key.ids[answer.index],
        "input": key.inputs[answer.index],
        "label": label,
        "prediction": answer.prediction,
        "correct": None if label is None else judged(answer.prediction, label),
        "rationale": answer.rationale,
        "tokens": answer.tokens,
    }
    if key.groups is not None and (group := key.groups[answer.index]) is not None:
        row["group"] = group
    if answer.vote is not None:
        row |= {"vote": answer.vote, "vote_correct": None if label is None else judged(answer.vote, label)}
        row |= {"vote_tokens": answer.vote_tokens} | ({} if answer.paths is None else {"paths": answer.paths})
    return row


def by_group(answers: Sequence[Answer], key: AnswerKey) -> dict[str, list[tuple[str, str]]]:
    """Predictions with their labels, of each group; without rows that have no group or no label."""
    found: dict[str, list[tuple[str, str]]] = {}
    if key.groups is None:
        return found
    for answer in answers:
        label, group = key.labels[answer.index], key.groups[answer.index]
        if group is not None and label is not None:
            found.setdefault(group, []).append((answer.prediction, label))
    return found


def worst_group(answers: Sequence[Answer], key: AnswerKey) -> tuple[str, float] | None:
    """The group with the lowest accuracy, and its accuracy; ``None`` without groups."""
    judged = judge(key.metric)
    found = {
        group: sum(judged(*pair) for pair in pairs) / len(pairs) for group, pairs in by_group(answers, key).items()
    }
    return min(found.items(), key=lambda item: item[1], default=None)


def chance_level(key: AnswerKey, rows: Iterable[int]) -> tuple[str, float] | None:
    """The best accuracy on ``rows`` of the key without reading the input, and how it is reached.

    A uniform guess among closed choices, or the majority class of train; ``None`` if neither exists.
    """
    labelled = [row for row in rows if key.labels[row] is not None]
    levels: list[tuple[str, float]] = []
    if labelled and key.choices and all(key.choices[row] for row in labelled):
        # a repeated choice is guessed more often
        hits = [key.choices[row].count(str(key.labels[row])) / len(key.choices[row]) for row in labelled]
        levels.append(("a uniform guess", sum(hits) / len(labelled)))
    if labelled and key.majority_label is not None:
        hits = [float(judge(key.metric)(key.majority_label, str(key.labels[row]))) for row in labelled]
        levels.append((f"always {key.majority_label!r}", sum(hits) / len(labelled)))
    return max(levels, key=lambda level: level[1], default=None)


def gather_answers(answers: Sequence[Answer], module: pl.LightningModule) -> list[Answer]:
    """All ranks' answers, each row once, in the data's order."""
    found = list(answers)
    if module.trainer.world_size > 1:
        # as bytes in a tensor, since not every strategy has object collectives
        content = json.dumps([asdict(answer) for answer in answers]).encode()
        sizes: Any = module.all_gather(torch.tensor([len(content)], device=module.device))
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8, device=module.device)
        padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(module.device)
        gathered: Any = module.all_gather(padded)
        parts = zip(gathered.cpu(), sizes.flatten().tolist(), strict=True)
        found = [Answer(**one) for part, size in parts for one in json.loads(part[:size].numpy().tobytes())]
    by_row = {answer.index: answer for answer in found}
    return [by_row[index] for index in sorted(by_row)]


def summarise(answers: Sequence[Answer], key: AnswerKey, *, rationales: bool, intervals: bool) -> dict[str, float]:
    """The metrics of an evaluation, of rationales too if asked for; accuracies are fractions in 0..1.

    Rows with groups give ``worst_group_accuracy``, and with a label set ``group_macro_f1``: the mean over groups of the
    macro-F1 within each, over the labels that the group has or was given.

    ``tokens`` is the mean number of tokens generated for an answer, ``vote_tokens`` that for a vote.

    ``intervals`` adds the ends of 95 % intervals as ``<name>_low`` and ``<name>_high``: Wilson's for accuracies, the
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
    accuracy("vote_accuracy", [judged(a.vote, label) for a, label in labelled if a.vote is not None])
    accuracy("scored_accuracy", [judged(a.scored, label) for a, label in labelled if a.scored is not None])
    if key.label_set is not None and labelled:
        of_rows = macro_f1([answer.prediction for answer, _ in labelled], [y for _, y in labelled], key.label_set)
        count = len(labelled)
        add("macro_f1", of_rows(np.arange(count)), lambda: bootstrap_interval(of_rows, count))
    if (worst := worst_group(answers, key)) is not None:
        metrics["worst_group_accuracy"] = worst[1]
        if key.label_set is not None:
            of_groups = [_macro_f1_within(pairs, key.label_set) for pairs in by_group(answers, key).values()]
            metrics["group_macro_f1"] = sum(of_groups) / len(of_groups)
    if rationales:
        written = [(a, a.rationale) for a in answers if a.rationale is not None]
        pairs = [(text, other) for a, text in written if (other := key.rationales[a.index]) is not None]
        scores = np.array([rouge_l(text, other) for text, other in pairs])
        if len(scores):
            count, mean = len(scores), float(scores.mean())
            add("rouge_l", mean, lambda: bootstrap_interval(lambda rows: float(scores[rows].mean()), count))
        accuracy("rationale_ends_in_prediction", [ends_in(text, a.prediction, key.metric) for a, text in written])
    if answers:
        metrics["tokens"] = sum(answer.tokens for answer in answers) / len(answers)
    if voted := [answer.vote_tokens for answer in answers if answer.vote is not None]:
        metrics["vote_tokens"] = sum(voted) / len(voted)
    return metrics
