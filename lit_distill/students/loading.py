"""Load a student by name, of any family."""

import os
from collections.abc import Mapping
from typing import Any, get_args

from transformers import PreTrainedModel

from lit_distill.checks import check_choice
from lit_distill.errors import UserError
from lit_distill.students.adapters import Adapter, add_adapter, merged
from lit_distill.students.base import Student
from lit_distill.students.causal import CausalStudent
from lit_distill.students.delta import is_delta, read_delta, weights_hash
from lit_distill.students.files import CHECKPOINT_KEY, StudentFiles, check_weights, reading
from lit_distill.students.mimetic import FromScratch, attentions, set_heads
from lit_distill.students.models import Dtype, build_model, check_memory, pretrained
from lit_distill.students.seq2seq import Fast, Seq2SeqStudent
from lit_distill.students.tokens import Tokens


def load(
    name: str | os.PathLike[str] | StudentFiles,
    *,
    from_scratch: FromScratch = False,
    dropout: float | None = None,
    dtype: Dtype = "float32",
    adapter: Mapping[str, Any] | None = None,
    fast: Fast = "auto",
    activation_checkpointing: bool = False,
    meta: bool = False,
) -> Student:
    """Load a student, in training mode.

    Args:
        name: a hub name, a folder in the Hugging Face format (with a configuration only, if ``from_scratch``), or the
            folder of a run or a checkpoint file of this framework; or its files.
        from_scratch: random weights from the configuration; ``mimetic``: with heads that look for like words.
        dropout: dropout rate in place of the configured one.
        dtype: of the weights.
        adapter: settings of an `Adapter` to train. A checkpoint with the same adapter restores its weights; any other
            adapter of a checkpoint is first merged into the student.
        fast: how a T5 computes its passes where that is supported.
        activation_checkpointing: recompute activations in the backward pass: less memory, slower steps.
        meta: allocate no weights; `lit_distill.students.sharding` provides them.

    Raises:
        UserError: the student cannot be read, is of no known family, or its weights or tokenizer do not fit.
    """
    # before files are read, perhaps from the hub
    wanted = None if adapter is None else Adapter.of(adapter)
    files = name if isinstance(name, StudentFiles) else StudentFiles(name)
    tokens = files.tokens()
    model = load_model(files, from_scratch=from_scratch, dropout=dropout, dtype=dtype, adapter=adapter, meta=meta)
    if len(tokens.tokenizer) > model.config.vocab_size:
        raise UserError(
            f"student: the tokenizer of {files.name!r} has {len(tokens.tokenizer)} tokens, its configuration's"
            f" vocab_size is {model.config.vocab_size}"
        )
    if activation_checkpointing:
        # the second name is for older releases of transformers, deprecated in newer ones
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    student = wrap(model, tokens, fast=fast)
    student.adapter = wanted
    return student


def wrap(model: PreTrainedModel, tokens: Tokens, *, fast: Fast = "auto") -> Student:
    """A student of a model that is there."""
    return CausalStudent(model, tokens) if tokens.family == "causal" else Seq2SeqStudent(model, tokens, fast=fast)


def load_model(
    name: str | os.PathLike[str] | StudentFiles,
    *,
    from_scratch: FromScratch = False,
    dropout: float | None = None,
    dtype: Dtype = "float32",
    adapter: Mapping[str, Any] | None = None,
    meta: bool = False,
) -> Any:
    """A student's Hugging Face model, wrapped by PEFT with an adapter; arguments and errors as in `load`."""
    check_choice("dtype", dtype, get_args(Dtype))
    check_choice("from_scratch", from_scratch, (True, False, "mimetic"))
    files = name if isinstance(name, StudentFiles) else StudentFiles(name)
    config, wanted = files.config, None if adapter is None else Adapter.of(adapter)
    unbuilt = "student: the configuration makes no model in"
    with reading(unbuilt, files.name):
        model: Any = build_model(config, dropout=dropout, dtype=dtype, meta=True)
        check_memory(model)
    if from_scratch == "mimetic":
        attentions(model)
    if wanted is not None:
        # before gigabytes of weights are read; sharding needs a single dtype
        model = add_adapter(model, wanted, own_dtype=False)
    if meta:
        return model
    if from_scratch:
        with reading(unbuilt, files.name):
            model = build_model(config, dropout=dropout, dtype=dtype)
        if from_scratch == "mimetic":
            set_heads(model)
    elif is_delta(files.name):
        model = _from_delta(files, dropout, dtype)
    elif files.checkpoint is None:
        model = pretrained(files.name, config, dropout=dropout, dtype=dtype)
    else:
        model, kept = _from_checkpoint(files, files.checkpoint, dropout, dtype)
        if kept is not None and wanted is not None and kept.trained() == wanted.trained():
            return model
        model = model if kept is None else merged(model)
    return model if wanted is None else add_adapter(model, wanted)


def _from_delta(files: StudentFiles, dropout: float | None, dtype: Dtype) -> Any:
    """The model of a base and the difference to it."""
    delta = read_delta(files.name)
    weights = load_model(delta.base).state_dict()
    if (found := weights_hash(weights)) != delta.sha256:
        raise UserError(
            f"student: {files.name!r} is a delta to other weights than {delta.base!r} has"
            f" (sha256 {delta.sha256[:12]}, not {found[:12]})"
        )
    with reading("student: the delta does not fit the base and the configuration in", files.name):
        model: Any = build_model(files.config, weights, dropout=dropout, dtype=dtype)
        own = dict(model.named_parameters())
        # of a tied pair the base may have two
        changed = {name: weights[name] for name in own} | dict(delta.weights(weights))
        for name, weight in changed.items():
            own[name].data = weight.detach().to(own[name].dtype, copy=True)
    check_weights(own, f"student: {files.name!r}")
    return model


def _from_checkpoint(
    files: StudentFiles, checkpoint: Mapping[str, Any], dropout: float | None, dtype: Dtype
) -> tuple[Any, Adapter | None]:
    """The model of a checkpoint, and the adapter in it."""
    settings, prefix = checkpoint[CHECKPOINT_KEY].get("adapter"), "student.model."
    adapter = None if settings is None else Adapter.of(settings)
    # the student's part of the module's weights, under the model's own names
    weights = {
        name.removeprefix(prefix): value for name, value in checkpoint["state_dict"].items() if name.startswith(prefix)
    }
    check_weights(weights, f"student: {files.name!r}")
    with reading("student: the weights do not fit the configuration in", files.name):
        return build_model(files.config, weights, dropout=dropout, dtype=dtype, adapter=adapter), adapter
