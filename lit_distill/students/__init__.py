"""Students: models that learn to write targets, and one forward pass of a batch as losses and answers read it."""

from lit_distill.students.base import Pass, Student
from lit_distill.students.loading import load, load_tokens
from lit_distill.students.models import (
    CHECKPOINT_KEY,
    StudentRecord,
    build_student,
    check_weights,
    is_tied,
    load_student,
    load_tokenizer,
    read_config,
    record_student,
    restore_student,
    restore_tokenizer,
    save_student,
    student_weights,
    true_config,
    untie,
)
from lit_distill.students.tokens import Tokens

__all__ = [
    "CHECKPOINT_KEY",
    "Pass",
    "Student",
    "StudentRecord",
    "Tokens",
    "build_student",
    "check_weights",
    "is_tied",
    "load",
    "load_student",
    "load_tokenizer",
    "load_tokens",
    "read_config",
    "record_student",
    "restore_student",
    "restore_tokenizer",
    "save_student",
    "student_weights",
    "true_config",
    "untie",
]
