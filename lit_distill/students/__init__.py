"""Students: the models that are trained, and their forward pass over a batch."""

from lit_distill.students.base import Pass, ProcessLogits, Student
from lit_distill.students.files import StudentFiles, load_tokenizer, load_tokens, read_config
from lit_distill.students.loading import load, load_model, wrap
from lit_distill.students.tokens import Tokens

__all__ = [
    "Pass", "ProcessLogits", "Student", "StudentFiles", "Tokens", "load", "load_model", "load_tokenizer", "load_tokens",
    "read_config", "wrap",
]  # fmt: skip
