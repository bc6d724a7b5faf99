"""A student by name, whichever family it is of."""

import os
from typing import Any

from lit_distill.errors import UserError
from lit_distill.students.base import Student
from lit_distill.students.models import load_student, load_tokenizer, read_config
from lit_distill.students.seq2seq import Seq2SeqStudent
from lit_distill.students.tokens import Tokens


def load(
    name: str | os.PathLike[str],
    *,
    from_scratch: bool = False,
    dropout: float | None = None,
    fast: bool = True,
    compile: bool = False,
    activation_checkpointing: bool = False,
) -> Student:
    """A student by name, in training mode.

    Args:
        name: a hub name, a folder in the Hugging Face format, a folder with a configuration only (then
            ``from_scratch`` has to be set), or a checkpoint file of this framework.
        from_scratch: random weights from the configuration.
        dropout: dropout rate in place of the configuration's.
        fast: run a T5's layers on real tokens only, where that is possible.
        compile: compile the forward that trains, in place of the fast path.
        activation_checkpointing: recompute activations in the backward pass: less memory, a slower step.

    Raises:
        UserError: the student cannot be read, is of no family that is known, or its weights or tokenizer do not fit.
    """
    tokens = load_tokens(name)
    model: Any = load_student(name, from_scratch=from_scratch, dropout=dropout)
    if len(tokens.tokenizer) > model.config.vocab_size:
        raise UserError(
            f"student: the tokenizer of {os.fspath(name)!r} has {len(tokens.tokenizer)} tokens, its configuration's"
            f" vocab_size is {model.config.vocab_size}"
        )
    if activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Seq2SeqStudent(model, tokens, fast=fast, compile=compile)


def load_tokens(name: str | os.PathLike[str]) -> Tokens:
    """The tokens of a student: those of a hub name, a folder or a checkpoint file.

    Raises:
        UserError: there is no tokenizer, or none that can be used.
    """
    read_config(name)
    return Tokens(load_tokenizer(name))
