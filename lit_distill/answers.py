"""What evaluation needs of a dataset: the one object that crosses from data to modules beside the batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

MetricName = Literal["exact_match", "equation"]
"""How an answer is judged: by its exact string, or as an equation by its value."""

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
    read_label: Callable[[str, str], str]
    """``(task, generated text) -> label``: how an answer is read out of what the student wrote for a task."""
    read_rationale: Callable[[str, str], str]
    """``(task, generated text) -> rationale``, likewise."""
    majority_label: str | None
    """The most frequent label that is trained on, the answer of a student that learned nothing else."""

    def __len__(self) -> int:
        return len(self.ids)


class AnswerSource(Protocol):
    """What a module asks of the data module that it is trained or evaluated with."""

    def answer_key(self, split: Split) -> AnswerKey:
        """The answers of a split."""
        ...
