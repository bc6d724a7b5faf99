"""A fixed text in place of what a student would write: an objective that prepares its targets."""

from collections.abc import Sequence

from torch import Tensor

from lit_distill.batch import IGNORE_INDEX
from lit_distill.objectives import Objective, Step
from tests.modules.batches import Row, pad


class FixedText(Objective):
    """The cross-entropy of a text that only depends on the input."""

    def prepare(self, window: Sequence[Step]) -> None:
        for step in window:
            rows = step.batch["rationale"]
            sources = [ids[ids != 0].tolist() for ids in rows["input_ids"]]
            rows["labels"] = pad([fixed_text(source) for source in sources], IGNORE_INDEX)

    def forward(self, step: Step) -> Tensor:
        return step.student.loss("rationale")


def fixed_text(source: list[int]) -> list[int]:
    """One to five words and the end: other lengths than those of the data."""
    return [17 + sum(source) % 7] * (1 + sum(source) % 5) + [1]


def with_fixed_text(rows: Sequence[Row]) -> list[Row]:
    """What the data would be with these texts as rationales."""
    prepared = [dict(row) for row in rows]
    for row in prepared:
        if "rationale" in row:
            row["rationale"] = (row["rationale"][0], fixed_text(row["rationale"][0]))
    return prepared
