"""A student by name, whichever family it is of."""

import os
from typing import Any

from lit_distill.errors import UserError
from lit_distill.shipped import shipped
from lit_distill.students.base import Student
from lit_distill.students.causal import CausalStudent
from lit_distill.students.files import (
    check_weights,
    family,
    is_checkpoint,
    load_tokenizer,
    read_checkpoint,
    read_config,
    reading,
    student_weights,
)
from lit_distill.students.models import build_model, configuration, pretrained
from lit_distill.students.seq2seq import Seq2SeqStudent
from lit_distill.students.tokens import CausalTokens, Tokens


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
    model: Any = load_model(name, from_scratch=from_scratch, dropout=dropout)
    if len(tokens.tokenizer) > model.config.vocab_size:
        raise UserError(
            f"student: the tokenizer of {os.fspath(name)!r} has {len(tokens.tokenizer)} tokens, its configuration's"
            f" vocab_size is {model.config.vocab_size}"
        )
    if activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if tokens.family == "causal":
        return CausalStudent(model, tokens, compile=compile)
    return Seq2SeqStudent(model, tokens, fast=fast, compile=compile)


def load_tokens(name: str | os.PathLike[str]) -> Tokens:
    """The tokens of a student: those of a hub name, a folder or a checkpoint file.

    Raises:
        UserError: there is no tokenizer, or none that can be used.
    """
    causal = family(read_config(name)) == "causal"
    return (CausalTokens if causal else Tokens)(load_tokenizer(name))


def load_model(name: str | os.PathLike[str], *, from_scratch: bool = False, dropout: float | None = None) -> Any:  # noqa: ANN401
    """A student's Hugging Face model, in float32 and in training mode; arguments and errors as of `load`."""
    name = shipped(os.fspath(name))
    config = read_config(name)
    with reading("student: the configuration makes no model in", name):
        configuration(config, dropout)
        if from_scratch:
            return build_model(config, dropout=dropout)
    if not is_checkpoint(name):
        return pretrained(name, config, dropout=dropout)
    weights = student_weights(read_checkpoint(name)["state_dict"])
    check_weights(weights, f"student: {name!r}")
    with reading("student: the weights do not fit the configuration in", name):
        return build_model(config, weights, dropout=dropout)
