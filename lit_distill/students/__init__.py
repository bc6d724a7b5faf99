"""Students: the models that are trained, and their forward pass over a batch."""

from lit_distill.students.base import Pass, ProcessLogits, Student
from lit_distill.students.files import (
    CHECKPOINT_KEY,
    StudentRecord,
    check_weights,
    family,
    load_tokenizer,
    read_checkpoint,
    read_config,
    restore_tokenizer,
    student_weights,
)
from lit_distill.students.loading import load, load_model, load_tokens
from lit_distill.students.models import build_model, is_tied, record_model, save_model, true_config, untie
from lit_distill.students.tokens import Encoded, Tokens

__all__ = [
    "CHECKPOINT_KEY",
    "Encoded",
    "Pass",
    "ProcessLogits",
    "Student",
    "StudentRecord",
    "Tokens",
    "build_model",
    "check_weights",
    "family",
    "is_tied",
    "load",
    "load_model",
    "load_tokenizer",
    "load_tokens",
    "read_checkpoint",
    "read_config",
    "record_model",
    "restore_tokenizer",
    "save_model",
    "student_weights",
    "true_config",
    "untie",
]
