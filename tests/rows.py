"""Rows with one teacher output, in short."""

from collections.abc import Mapping
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
