"""Commonsense questions with five choices (CoS-E v1.11 of CommonsenseQA)."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from lit_distill.data.base import RationaleDataModule
from lit_distill.data.sources import text_of, texts_of
from lit_distill.evaluation.answers import Split
from lit_distill.tasks import Row

_LETTER = re.compile(r"\([a-z]\)")


class CQADataModule(RationaleDataModule):
    """CommonsenseQA: the label is the text of one of five choices; val is a tenth of train, test the released one."""

    name = "cqa"
    hub_name = "tau/commonsense_qa"
    prompt: ClassVar[str] = "cqa"
    splits: Mapping[Split, str] = {"train": "train", "test": "test"}
    released_rows: Mapping[Split, int] = {"train": 9741, "test": 1221}

    def read_row(self, row: dict[str, Any]) -> Row:
        """The question with lettered choices; the label is the answer's text."""
        choices = texts_of(row, "choices")
        lettered = "".join(f"\n({chr(ord('a') + i)}) {choice}" for i, choice in enumerate(choices))
        text = f"{text_of(row, 'question')}\nAnswer Choices:{lettered}"
        return Row(id=str(row.get("id", "")), input=text, label=text_of(row, "answer"), choices=choices)

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
        parts = _LETTER.split(answer, maxsplit=1)
        if len(parts) < 2:
            return None
        rationale, label = rationale.strip(), parts[1].strip().removesuffix(".").strip()
        return (rationale, label) if rationale and label else None
