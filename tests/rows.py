"""Rows with one teacher output, in short, and as JSON lines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_distill.tasks import Row, TeacherOutput


def make_row(
    id: str,
    input: str,
    label: str | None,
    choices: tuple[str, ...] | None = None,
    rationale: str | None = None,
    teacher_label: str | None = None,
    columns: Mapping[str, Any] | None = None,
    teacher: str | None = None,
) -> Row:
    """A row; without a rationale and a teacher's label it has no output."""
    has_output = rationale is not None or teacher_label is not None
    outputs = (TeacherOutput(rationale, teacher_label, teacher, columns=columns or {}),) if has_output else ()
    return Row(id, input, label, choices, outputs)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as `JSONLDataModule` and ``--demonstrations`` read them."""
    names = ("id", "input", "label", "choices", "rationale", "teacher_label")
    lines = ({name: value for name in names if (value := getattr(row, name)) is not None} for row in rows)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
