"""Natural language inference: whether a hypothesis follows from a premise (e-SNLI, ANLI)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from lit_distill import checks
from lit_distill.data.base import RationaleDataModule
from lit_distill.data.sources import text_of
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.tasks import Row

LABELS = ("entailment", "neutral", "contradiction")
"""Labels by their number in the files."""

_ANLI_ROWS: dict[int, dict[Split, int]] = {
    1: {"train": 16_946, "val": 1000, "test": 1000},
    2: {"train": 45_460, "val": 1000, "test": 1000},
    3: {"train": 100_459, "val": 1200, "test": 1200},
}

SEPARATOR = "</s>"
"""Between premise and hypothesis; T5's end-of-sequence token."""


class _NLIDataModule(RationaleDataModule):
    """Common parts of both datasets."""

    label_set: tuple[str, ...] | None = LABELS

    def read_row(self, row: dict[str, Any]) -> Row:
        """Premise and hypothesis; the label by its number."""
        number = row["label"]
        if isinstance(number, bool) or not isinstance(number, int) or number not in range(len(LABELS)):
            raise UserError(f"'label' must be 0, 1 or 2, got {number!r}")
        text = f"{text_of(row, 'premise')}{SEPARATOR}{text_of(row, 'hypothesis')}"
        return Row(id=str(row.get("uid", "")), input=text, label=LABELS[number])

    def prompt_fields(self, row: Row) -> dict[str, str]:
        """Also ``premise`` and ``hypothesis``."""
        premise, _, hypothesis = row.input.partition(SEPARATOR)
        return super().prompt_fields(row) | {"premise": premise.strip(), "hypothesis": hypothesis.strip()}


class ESNLIDataModule(_NLIDataModule):
    """e-SNLI: premises are image captions."""

    name = "esnli"
    hub_name = "esnli/esnli"
    prompt: ClassVar[str] = "esnli"
    released_rows: Mapping[Split, int] = {"train": 549_367, "val": 9842, "test": 9824}

    def parse_teacher(self, text: str) -> tuple[str, str] | None:
        """The rationale, a newline, ``Answer: neutral``; the next ``Premise`` is invented.

        A text cut inside the label or the next ``Premise`` gives a label outside the label set, as in the reference
        code.
        """
        return _rationale_and_label(text, "Answer: ")


class ANLIDataModule(_NLIDataModule):
    """ANLI: premises from Wikipedia, adversarial hypotheses.

    Args:
        round: 1, 2 or 3, in ``anli1/``, ``anli2/`` or ``anli3/``.
        **kwargs: as in `RationaleDataModule`.
    """

    hub_name = "facebook/anli"
    prompt: ClassVar[str] = "anli"

    def __init__(self, round: Literal[1, 2, 3] = 1, **kwargs: Any) -> None:
        self.round = checks.check_choice("round", round, (1, 2, 3))
        self.name = f"anli{round}"
        self.released_rows = _ANLI_ROWS[round]
        super().__init__(**kwargs)
        self.save_hyperparameters({"round": round})

    def parse_teacher(self, text: str) -> tuple[str, str] | None:
        """``... So the answer is neutral.``, without the full stop; the next ``Premise`` is invented."""
        return _rationale_and_label(text, "So the answer is", stop=".")


def _rationale_and_label(text: str, mark: str, stop: str = "") -> tuple[str, str] | None:
    rationale, _, answer = text.partition("Premise")[0].partition(mark)
    rationale, label = rationale.strip(), answer.strip().removesuffix(stop).strip()
    return (rationale, label) if rationale and label else None
