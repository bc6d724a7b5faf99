"""Whether a student is one that the fast path knows; whatever else it is runs through its own forward."""

from collections.abc import Iterator, Sequence
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

from lit_distill.batch import TaskInputs, lengths_of

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
"""Modules whose own forward is not called: they must be just these classes, and nobody may listen to them."""

_PROJECTIONS = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")
"""Linear layers, called as they are: LoRA's and quantised ones are fine."""

_READ = ("k", "v", "act", "relative_attention_bias")
"""Modules that are sometimes not called: their weights are read, or the function that they are is known."""

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
    if listened_to(base) or listened_to(student):
        return "the student has hooks"
    if type(base.lm_head) is not nn.Linear or base.lm_head.bias is not None or listened_to(base.lm_head):
        return "the head is more than a matrix"
    if base.dtype not in (torch.float32, torch.bfloat16):
        return f"the student's weights are {base.dtype}"
    return _reason_in_stack(base.encoder, "the encoder") or _reason_in_stack(base.decoder, "the decoder")


def _reason_in_stack(stack: nn.Module, name: str) -> str | None:
    if type(stack) is not T5Stack:
        return f"{name} is a {type(stack).__name__}"
    if type(stack.embed_tokens) is not nn.Embedding:
        return f"the embedding of {name} is a {type(stack.embed_tokens).__name__}"
    for path, module in _own_modules(stack):
        own = path.rpartition(".")[2]
        if own not in (*_PROJECTIONS, *_READ, "embed_tokens") and type(module) not in _WALKED:
            return f"{path} of {name} is a {type(module).__name__}"
        # transformers' activation checkpointing listens to the embeddings
        if own not in (*(set(_PROJECTIONS) - set(_READ)), "embed_tokens") and listened_to(module):
            return f"{f'{path} of ' if path else ''}{name} has hooks"
    return None


def _own_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """T5's own modules with their paths; not what others have put inside its linear layers."""
    yield path, module
    if path.rpartition(".")[2] not in (*_PROJECTIONS, "act"):
        for name, child in module.named_children():
            yield from _own_modules(child, f"{path}.{name}" if path else name)


def listened_to(module: nn.Module) -> bool:
    """Whether something happens around a module's forward, or in its place."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in vars(module)


def fits(tasks: Sequence[TaskInputs]) -> bool:
    """Whether these rows are padded on the right alone, and none of them is without a source."""
    for inputs in tasks:
        sources, _ = lengths_of(inputs)
        if not sources or min(sources) == 0:
            return False
        # whoever wrote the lengths down has padded on the right
        written = "source_lengths" in inputs and "target_lengths" in inputs
        if not written and int((inputs["attention_mask"] != 0).sum()) != sum(sources):
            return False
    return True


def decodes_plainly(student: T5ForConditionalGeneration) -> bool:
    """Whether the student's generation settings ask for nothing beyond plain greedy decoding."""
    return set(student.generation_config.to_diff_dict()) <= _NEUTRAL
