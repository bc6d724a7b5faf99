"""The datasets of the paper, as its reference code released them: CQA, SVAMP, e-SNLI and ANLI."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from lit_distill import checks
from lit_distill.data.base import RationaleDataModule
from lit_distill.equations import evaluate
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.evaluation.metrics import MetricName
from lit_distill.tasks import Row

NLI_LABELS = ("entailment", "neutral", "contradiction")
"""Labels by their number in the files."""

SEPARATOR = "</s>"
"""Between premise and hypothesis; T5's end-of-sequence token."""

_LETTER = re.compile(r"\([a-z]\)")


class CQADataModule(RationaleDataModule):
    """CommonsenseQA (CoS-E v1.11): the label is the text of one of five choices; val is a tenth of train."""

    name = "cqa"
    hub_name = "tau/commonsense_qa"
    prompt: ClassVar[str] = "cqa"
    splits: Mapping[Split, str] = {"train": "train", "test": "test"}
    released_rows: Mapping[Split, int] = {"train": 9741, "test": 1221}

    def read_row(self, row: dict[str, Any]) -> Row:
        """The question with lettered choices; the label is the answer's text."""
        choices = row["choices"]
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise UserError(f"'choices' must be a list of strings, got {choices!r}")
        lettered = "".join(f"\n({chr(ord('a') + i)}) {choice}" for i, choice in enumerate(choices))
        text = f"{_text(row, 'question')}\nAnswer Choices:{lettered}"
        return Row(str(row.get("id", "")), text, _text(row, "answer"), tuple(choices))

    def prompt_fields(self, row: Row) -> dict[str, str]:
        """Also ``letter``, that of the label; a question mark if it is none of the choices."""
        choices = row.choices or ()
        letter = chr(ord("a") + choices.index(row.label)) if row.label in choices else "?"
        return super().prompt_fields(row) | {"letter": letter}

    def parse_teacher(self, text: str) -> tuple[str, str] | None:
        """``... So the answer is (d) math problem.``: the text after the letter.

        The next ``Q:`` starts an invented question. ``either (a) x or (b) y`` parses to a label outside the choices, as
        in the reference code.
        """
        rationale, _, answer = text.partition("Q:")[0].partition("So the answer is")
        _, *label = _LETTER.split(answer, maxsplit=1)
        return _both(rationale, label[0].strip().removesuffix(".")) if label else None


class SVAMPDataModule(RationaleDataModule):
    """SVAMP, word problems: the label is an equation, compared by value; val is a tenth of train."""

    name = "svamp"
    hub_name = "ChilleD/SVAMP"
    prompt: ClassVar[str] = "svamp"
    splits: Mapping[Split, str] = {"train": "train", "test": "test"}
    released_rows: Mapping[Split, int] = {"train": 800, "test": 200}
    metric: MetricName = "equation"

    def read_row(self, row: dict[str, Any]) -> Row:
        """Body and question; the label is the equation, and the group SVAMP's own ``Type`` if the file has it."""
        group = _text(row, "Type") if row.get("Type") is not None else None
        return Row("", _text(row, "input"), _text(row, "label"), group=group)

    def parse_teacher(self, text: str) -> tuple[str, str] | None:
        """``... The answer is (84 / 2).``: from the first parenthesis after the mark to the last.

        Both parentheses belong to the equation, as in ``(19 - 6) + (18 - 15)``.
        """
        rationale, _, answer = text.partition("Q:")[0].partition("The answer is")
        equation = answer[answer.find("(") : answer.rfind(")") + 1] if "(" in answer else ""
        return _both(rationale, equation) if equation[1:-1].strip() else None

    def teacher_agrees(self, teacher_label: str, label: str) -> bool:
        """By value; several equations, as in ``(29/2) and (30/2)``, are worth what Python's ``and`` gives.

        So the reference has it. A student is not excused: its metric reads one equation.
        """
        for several in (teacher_label, teacher_label[1:-1]):  # as they are, or in parentheses together
            equations = several.split(" and ")
            values = [evaluate(equation) for equation in equations]
            if len(equations) > 1 and None not in values:
                # the first that is zero, else the last
                return super().teacher_agrees(equations[values.index(0) if 0 in values else -1], label)
        return super().teacher_agrees(teacher_label, label)


class _NLIDataModule(RationaleDataModule):
    """Whether a hypothesis follows from a premise."""

    label_set: tuple[str, ...] | None = NLI_LABELS

    def read_row(self, row: dict[str, Any]) -> Row:
        """Premise and hypothesis; the label by its number."""
        number = row["label"]
        if isinstance(number, bool) or not isinstance(number, int) or number not in range(len(NLI_LABELS)):
            raise UserError(f"'label' must be 0, 1 or 2, got {number!r}")
        text = f"{_text(row, 'premise')}{SEPARATOR}{_text(row, 'hypothesis')}"
        return Row(str(row.get("uid", "")), text, NLI_LABELS[number])

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
        rationale, _, label = text.partition("Premise")[0].partition("Answer: ")
        return _both(rationale, label)


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
        train, evaluated = {1: (16_946, 1000), 2: (45_460, 1000), 3: (100_459, 1200)}[round]
        self.released_rows = {"train": train, "val": evaluated, "test": evaluated}
        super().__init__(**kwargs)
        self.save_hyperparameters({"round": round})

    def parse_teacher(self, text: str) -> tuple[str, str] | None:
        """``... So the answer is neutral.``, without the full stop; the next ``Premise`` is invented."""
        rationale, _, label = text.partition("Premise")[0].partition("So the answer is")
        return _both(rationale, label.strip().removesuffix("."))


def _text(row: dict[str, Any], key: str) -> str:
    """The string under a key; the caller adds file and line to a ``KeyError`` or ``UserError``."""
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"{key!r} must be a string, got {value!r}")
    return value


def _both(rationale: str, label: str) -> tuple[str, str] | None:
    """What a teacher's text parses to; ``None`` if a part is empty."""
    rationale, label = rationale.strip(), label.strip()
    return (rationale, label) if rationale and label else None
