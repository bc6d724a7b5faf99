"""Load a student by name, of any family."""

import os
from collections.abc import Mapping
from typing import Any, get_args

from lit_distill.checks import check_choice
from lit_distill.errors import UserError
from lit_distill.shipped import shipped
from lit_distill.students.adapters import Adapter, add_adapter, merged
from lit_distill.students.base import Student
from lit_distill.students.causal import CausalStudent
from lit_distill.students.files import (
    CHECKPOINT_KEY,
    check_weights,
    family,
    is_checkpoint,
    load_tokenizer,
    read_checkpoint,
    read_config,
    reading,
    student_weights,
)
from lit_distill.students.models import Dtype, build_model, check_memory, pretrained
from lit_distill.students.seq2seq import Seq2SeqStudent
from lit_distill.students.tokens import CausalTokens, Tokens


def load(
    name: str | os.PathLike[str],
    *,
    from_scratch: bool = False,
    dropout: float | None = None,
    dtype: Dtype = "float32",
    adapter: Mapping[str, Any] | None = None,
    fast: bool = True,
    compile: bool = False,
    activation_checkpointing: bool = False,
    meta: bool = False,
) -> Student:
    """Load a student, in training mode.

    Args:
        name: a hub name, a folder in the Hugging Face format (with a configuration only, if ``from_scratch``), or a
            checkpoint file of this framework.
        from_scratch: random weights from the configuration.
        dropout: dropout rate in place of the configured one.
        dtype: of the weights.
        adapter: settings of an `Adapter` to train. A checkpoint with the same adapter restores its weights; any other
            adapter of a checkpoint is first merged into the student.
        fast: run a T5 on real tokens only, where supported.
        compile: compile the training forward, in place of the fast path.
        activation_checkpointing: recompute activations in the backward pass: less memory, slower steps.
        meta: allocate no weights; `lit_distill.students.sharding` provides them.

    Raises:
        UserError: the student cannot be read, is of no known family, or its weights or tokenizer do not fit.
    """
    wanted = None if adapter is None else Adapter.of(adapter)
    tokens = load_tokens(name)
    model = load_model(name, from_scratch=from_scratch, dropout=dropout, dtype=dtype, adapter=adapter, meta=meta)
    if len(tokens.tokenizer) > model.config.vocab_size:
        raise UserError(
            f"student: the tokenizer of {os.fspath(name)!r} has {len(tokens.tokenizer)} tokens, its configuration's"
            f" vocab_size is {model.config.vocab_size}"
        )
    if activation_checkpointing:
        # the second name is for older releases of transformers, deprecated in newer ones
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if tokens.family == "causal":
        student: Student = CausalStudent(model, tokens, compile=compile)
    else:
        student = Seq2SeqStudent(model, tokens, fast=fast, compile=compile)
    student.adapter = wanted
    return student


def load_tokens(name: str | os.PathLike[str]) -> Tokens:
    """A student's `Tokens`, from the hub, a folder or a checkpoint file. Raises a ``UserError`` without a tokenizer."""
    kind, tokenizer = family(read_config(name)), load_tokenizer(name)
    if kind == "causal":
        # a chat template is code, and can fail
        with reading("tokenizer: cannot write a prompt with the one of", os.fspath(name)):
            return CausalTokens(tokenizer)
    if tokenizer.pad_token_id is None:
        raise UserError(f"tokenizer: the one of {os.fspath(name)!r} has no padding token")
    return Tokens(tokenizer)


def load_model(
    name: str | os.PathLike[str],
    *,
    from_scratch: bool = False,
    dropout: float | None = None,
    dtype: Dtype = "float32",
    adapter: Mapping[str, Any] | None = None,
    meta: bool = False,
) -> Any:
    """A student's Hugging Face model, wrapped by PEFT with an adapter; arguments and errors as in `load`."""
    check_choice("dtype", dtype, get_args(Dtype))
    name = shipped(os.fspath(name))
    config = read_config(name)
    wanted = None if adapter is None else Adapter.of(adapter)
    with reading("student: the configuration makes no model in", name):
        model: Any = build_model(config, dropout=dropout, dtype=dtype, meta=True)
        check_memory(model)
    if wanted is not None:
        # before gigabytes of weights are read; sharding needs a single dtype
        model = add_adapter(model, wanted, own_dtype=False)
    if meta:
        return model
    if from_scratch:
        return build_model(config, dropout=dropout, dtype=dtype, adapter=wanted)
    if is_checkpoint(name):
        checkpoint = read_checkpoint(name)
        kept = checkpoint[CHECKPOINT_KEY].get("adapter")
        kept = None if kept is None else Adapter.of(kept)
        weights = student_weights(checkpoint["state_dict"])
        check_weights(weights, f"student: {name!r}")
        with reading("student: the weights do not fit the configuration in", name):
            model = build_model(config, weights, dropout=dropout, dtype=dtype, adapter=kept)
        if kept is not None:
            if kept.same(wanted):
                return model
            model = merged(model)
    else:
        model = pretrained(name, config, dropout=dropout, dtype=dtype)
    return model if wanted is None else add_adapter(model, wanted)
