"""Rows with their teacher outputs, and reading them from JSON lines."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_distill.errors import UserError
from lit_distill.reading import parse_json

_TEXTS = ("id", "input", "label", "rationale", "teacher_label")


# one for all outputs: there may be millions
_NO_COLUMNS: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True)
class TeacherOutput:
    """One of a teacher's outputs for a row."""

    text: str | None  # the rationale, program, or other text; `None` where the output did not parse
    label: str | None = None  # the teacher's answer; `None` where it gave none, or the output did not parse
    teacher: str | None = None  # the teacher's name, if known
    kind: str = "rationale"  # what the text is, such as `rationale` or `program`
    columns: Mapping[str, Any] = field(default_factory=lambda: _NO_COLUMNS, hash=False)
    """Further columns, for filters and templates."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a dataset."""

    id: str  # unique in its split
    input: str  # the student's input, without a prefix
    label: str | None  # the gold label, or the one to train on
    choices: tuple[str, ...] | None = None  # the row's own closed choices
    outputs: tuple[TeacherOutput, ...] = ()

    @property
    def rationale(self) -> str | None:
        """The text of the first output."""
        return self.outputs[0].text if self.outputs else None

    @property
    def teacher_label(self) -> str | None:
        """The label of the first output."""
        return self.outputs[0].label if self.outputs else None

    @property
    def columns(self) -> Mapping[str, Any]:
        """The columns of the first output."""
        return self.outputs[0].columns if self.outputs else {}


RowFilter = Callable[[Row], bool]
"""Whether to train on a teacher output, given the row with this output alone."""


def fingerprint(rows: Iterable[Row], *, rationales: bool = False) -> str:
    """A hash of rows in their order: ids, inputs, labels, and with ``rationales`` the teachers' texts."""
    found = hashlib.sha256()
    for row in rows:
        texts = [output.text for output in row.outputs] or [None]
        values = [row.id, row.input, row.label, *(texts if rationales else [])]
        found.update(json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return found.hexdigest()[:16]


def read_rows(path: str | Path) -> list[Row]:
    """Read JSON lines of ``id``, ``input``, and optionally ``label``, ``choices``, ``rationale`` and ``teacher_label``.

    Raises:
        UserError: a line is invalid; names the file and the line.
    """
    with Path(path).open("rb") as file:
        return [_row_of(line, f"{path}:{number}") for number, line in enumerate(file, start=1) if line.strip()]


def _row_of(line: bytes, where: str) -> Row:
    try:
        found = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{where}: not a JSON object but {type(found).__name__}")
    if missing := {"id", "input"} - found.keys():
        raise UserError(f"{where}: missing {', '.join(sorted(missing))}; there are {', '.join(sorted(found))}")
    texts = {key: found.get(key) for key in _TEXTS}
    required = ("id", "input")
    wrong = [key for key, value in texts.items() if not isinstance(value, str | (str if key in required else None))]
    if wrong:
        raise UserError(f"{where}: {', '.join(wrong)} must be a string")
    choices = found.get("choices")
    if choices is not None and not (isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)):
        raise UserError(f"{where}: choices must be a list of strings")
    text, label = texts["rationale"], texts["teacher_label"]
    outputs = () if text is None and label is None else (TeacherOutput(text, label),)
    chosen = None if choices is None else tuple(choices)
    return Row(str(texts["id"]), str(texts["input"]), texts["label"], chosen, outputs)
