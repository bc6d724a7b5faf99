"""Rows with their teacher outputs, and the tasks that a student is trained on."""

from lit_distill.tasks.rows import Row, RowFilter, TeacherOutput, fingerprint, read_rows
from lit_distill.tasks.task import (
    LABEL,
    LABEL_RATIONALE,
    RATIONALE,
    RATIONALE_LABEL,
    Parsed,
    Task,
    answer_task,
    find_function,
    rationale_task,
    tasks_from,
)

__all__ = [
    "LABEL",
    "LABEL_RATIONALE",
    "RATIONALE",
    "RATIONALE_LABEL",
    "Parsed",
    "Row",
    "RowFilter",
    "Task",
    "TeacherOutput",
    "answer_task",
    "find_function",
    "fingerprint",
    "rationale_task",
    "read_rows",
    "tasks_from",
]
