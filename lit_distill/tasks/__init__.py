"""What a student is trained on: rows with what teachers said about them, and the tasks made of them."""

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
    "read_rows",
    "tasks_from",
]
