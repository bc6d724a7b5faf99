"""The answers of a split: the gold ones, which cross from data to modules beside the batch, and a student's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lit_distill.evaluation.metrics import MetricName, judge

Split = Literal["train", "val", "test", "predict"]


@dataclass(frozen=True)
class AnswerKey:
    """The rows of one split as evaluation sees them: position ``i`` is the row whose batch ``index`` is ``i``.

    Gold answers are the raw strings of the data, never decoded from token ids, so that truncation and the tokenizer's
    normalisation cannot make a wrong answer right.
    """

    ids: Sequence[str]
    """The rows' identifiers."""
    inputs: Sequence[str]
    """The rows' inputs as text, without a prefix."""
    labels: Sequence[str | None]
    """Gold answers; ``None`` where the data has none."""
    rationales: Sequence[str | None]
    """The teacher's rationales; ``None`` where there is none or it did not parse."""
    metric: MetricName
    """How an answer is judged."""
    label_set: tuple[str, ...] | None
    """The closed label set that all rows share, if there is one."""
    choices: Sequence[tuple[str, ...]] | None
    """The closed choices of each row (a row's own, or the shared label set), if the dataset has them."""
    majority_label: str | None
    """The most frequent label that is trained on, the answer of a student that learned nothing else."""

    def __len__(self) -> int:
        return len(self.ids)


class AnswerSource(Protocol):
    """What a module asks of the data module that it is trained or evaluated with."""

    def answer_key(self, split: Split) -> AnswerKey:
        """The answers of a split."""
        ...


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
