"""A split's gold answers, which the data module gives to the method, and the student's answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lit_distill.evaluation.metrics import MetricName, judge

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
    choices: Sequence[tuple[str, ...]] | None
    """Each row's closed choices (its own, or the shared label set), if the dataset has them."""
    majority_label: str | None  # the most frequent training label: the majority-class baseline

    def __len__(self) -> int:
        return len(self.ids)


class AnswerSource(Protocol):
    """A data module that knows the answers of its splits."""

    def answer_key(self, split: Split) -> AnswerKey:
        """The answer key of a split."""
        ...


@dataclass
class Answer:
    """A student's answer to one row."""

    index: int  # the row's position in its split
    prediction: str  # the label parsed from the generated text
    text: str
    rationale: str | None = None  # the generated rationale, if one was generated
    scored: str | None = None  # the most likely of the row's closed choices


@dataclass(frozen=True)
class Evaluation:
    """The result of one complete evaluation."""

    split: str
    metrics: dict[str, float]  # name without the split -> value
    samples: list[Answer]  # answers of the first rows, with rationales
    key: AnswerKey
    answers: Sequence[Answer] = ()  # all answers, in the data's order

    def sample_rows(self) -> list[dict[str, Any]]:
        """The samples as rows of a table."""
        return [answer_row(answer, self.key) for answer in self.samples]


def answer_row(answer: Answer, key: AnswerKey) -> dict[str, Any]:
    """An answer with its row: id, input, label, prediction, correct (``None`` without a label), rationale."""
    label = key.labels[answer.index]
    return {
        "id": key.ids[answer.index],
        "input": key.inputs[answer.index],
        "label": label,
        "prediction": answer.prediction,
        "correct": None if label is None else judge(key.metric)(answer.prediction, label),
        "rationale": answer.rationale,
    }
