"""Whether a student is one that the fast path knows; whatever else it is runs through its own forward."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import (
    T5Attention,
    T5Block,
    T5DenseActDense,
    T5DenseGatedActDense,
    T5LayerCrossAttention,
    T5LayerFF,
    T5LayerNorm,
    T5LayerSelfAttention,
    T5Stack,
)

from lit_distill.batch import TaskInputs, sources_of

_WALKED = (
    T5Stack,
    T5Block,
    T5LayerSelfAttention,
    T5LayerCrossAttention,
    T5LayerFF,
    T5Attention,
    T5DenseActDense,
    T5DenseGatedActDense,
    T5LayerNorm,
    nn.Dropout,
    nn.ModuleList,
)
"""Modules whose own forward is not called: they must be just these classes."""

_PROJECTIONS = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")
"""Linear layers, called as they are: LoRA's and quantised ones are fine."""

_CALLED = (*_PROJECTIONS, "act", "relative_attention_bias", "embed_tokens")
"""Modules that may be of any class, but for what `reason_against` asks of embeddings."""

_NEUTRAL = {
    "_from_model_config", "bos_token_id", "cache_implementation", "decoder_start_token_id", "do_sample",
    "early_stopping", "eos_token_id", "length_penalty", "max_length", "max_new_tokens", "num_beams",
    "output_attentions", "output_hidden_states", "pad_token_id", "return_dict_in_generate", "temperature", "top_k",
    "top_p", "transformers_version", "use_cache",
}  # fmt: skip
"""Generation settings that leave greedy decoding as it is, or that it sets itself."""


def reason_against(student: Any) -> str | None:  # noqa: ANN401 - a T5, or whatever stands in its place
    """Why a student cannot take the fast path; ``None`` where it can."""
    base: Any = student
    if hasattr(student, "get_base_model"):
        # PEFT's wrapper
        base = student.get_base_model()
        if getattr(getattr(student, "active_peft_config", None), "is_prompt_learning", False):
            return "the student learns prompts"
    if type(base) is not T5ForConditionalGeneration:
        return f"the student is a {type(base).__name__}, not a T5ForConditionalGeneration"
    if torch.nn.modules.module._has_any_global_hook():
        return "every module has hooks"
    if (heard := _heard(student)) is not None:
        return f"{heard or 'the student'} has hooks"
    if type(base.lm_head) is not nn.Linear or base.lm_head.bias is not None:
        return "the head is more than a matrix"
    if base.dtype not in (torch.float32, torch.bfloat16):
        return f"the student's weights are {base.dtype}"
    return _reason_in_stack(base.encoder, "the encoder") or _reason_in_stack(base.decoder, "the decoder")


def _reason_in_stack(stack: Any, name: str) -> str | None:  # noqa: ANN401 - whatever stands there
    if type(stack) is not T5Stack:
        return f"{name} is a {type(stack).__name__}"
    table = stack.embed_tokens
    if type(table) is not nn.Embedding:
        return f"the embedding of {name} is a {type(table).__name__}"
    if table.padding_idx is not None or table.max_norm is not None or table.scale_grad_by_freq or table.sparse:
        return f"the embedding of {name} is more than a table"
    for path, module in _own_modules(stack):
        if path.rpartition(".")[2] not in _CALLED and type(module) not in _WALKED:
            return f"{path} of {name} is a {type(module).__name__}"
        # older releases of transformers have no such attribute
        if isinstance(module, T5Attention) and getattr(module, "scaling", 1.0) != 1.0:
            return f"{path} of {name} scales its scores"
        if isinstance(module, T5Block) and module.gradient_checkpointing and not _recomputes_closures(module):
            return f"the activations of {name} are checkpointed with another setting than use_reentrant=False"
    return None


def _own_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """T5's own modules with their paths; not what others have put inside its linear layers."""
    yield path, module
    if path.rpartition(".")[2] not in (*_PROJECTIONS, "act"):
        for name, child in module.named_children():
            yield from _own_modules(child, f"{path}.{name}" if path else name)


def _recomputes_closures(block: T5Block) -> bool:
    """Whether checkpointing finds the gradients of what a function reads beside its arguments."""
    recompute: object = block._gradient_checkpointing_func
    return isinstance(recompute, partial) and recompute.keywords.get("use_reentrant") is False


def _heard(student: nn.Module) -> str | None:
    """The path of a module that somebody listens to, though its forward may not be called, or on packed rows."""
    for path, module in student.named_modules():
        # transformers' activation checkpointing listens to the embeddings
        if listened_to(module) and path.rpartition(".")[2] not in ("shared", "embed_tokens"):
            return str(path)
    return None


def listened_to(module: nn.Module) -> bool:
    """Whether something happens around a module's forward, or in its place."""
    # transformers' own hooks, which a call that returns hidden states leaves behind, do nothing outside such a call
    forward = [
        each for each in module._forward_hooks.values() if each.__module__ != "transformers.utils.output_capturing"
    ]
    hooks = forward, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in vars(module)


def fits(tasks: Sequence[TaskInputs]) -> bool:
    """Whether these rows are padded on the right alone, and none of them is without a source."""
    for inputs in tasks:
        shape = inputs["input_ids"].shape
        if shape != inputs["attention_mask"].shape or len(inputs["labels"]) != shape[0]:
            return False
        sources = sources_of(inputs)
        if min(sources.ends, default=1) == 0 or not sources.whole:
            return False
    return True


def reason_against_decoding(student: T5ForConditionalGeneration) -> str | None:
    """What the student's generation settings ask for beyond plain greedy decoding; ``None`` where it is nothing."""
    asked = sorted(set(student.generation_config.to_diff_dict()) - _NEUTRAL)
    if asked:
        return f"the generation settings have {', '.join(asked)}"
    return None if start_token(student) is not None else "the generation settings have no start token"


def decodes_plainly(student: T5ForConditionalGeneration) -> bool:
    """Whether the student's generation settings ask for nothing beyond plain greedy decoding."""
    return reason_against_decoding(student) is None


def start_token(student: T5ForConditionalGeneration) -> int | None:
    """The token that ``generate`` begins with, the same for all rows."""
    settings = student.generation_config
    start = settings.bos_token_id if settings.decoder_start_token_id is None else settings.decoder_start_token_id
    return start if isinstance(start, int) else None
