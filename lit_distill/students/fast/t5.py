"""The student's layers on packed tokens: every module of the Hugging Face T5 keeps its place, its weights and names."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import NewGELUActivation
from transformers.models.t5.modeling_t5 import (
    T5Attention,
    T5Block,
    T5LayerNorm,
    T5Stack,
)

from lit_distill.students.fast.feed_forward import chunks_well, feed_forward_sublayer
from lit_distill.students.fast.functions import add_dropped, dropout, gated, rms_norm
from lit_distill.students.fast.looks import CrossLook, SelfLook
from lit_distill.students.fast.packing import AttentionPlan, Packing


def _rate(module: nn.Dropout) -> float:
    return float(module.p) if module.training else 0.0


def norm(module: T5LayerNorm, x: Tensor) -> Tensor:
    """T5's layer norm, ``(tokens, d_model)``."""
    return rms_norm(x, module.weight, module.variance_epsilon)


def feed_forward(module: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - T5's or mT5's
    """The feed-forward network, gated or not, ``(tokens, d_model)``."""
    rate = _rate(module.dropout)
    if hasattr(module, "wi_1"):
        inner = gated(_activate(module.act, module.wi_0(x)), module.wi_1(x), rate)
    else:
        inner = dropout(_activate(module.act, module.wi(x)), rate)
    wanted = module.wo.weight.dtype
    if inner.dtype != wanted and wanted.is_floating_point and not torch.is_autocast_enabled(inner.device.type):
        # transformers keeps this one matrix in float32 where it loads the others in bfloat16
        inner = inner.to(wanted)
    return cast(Tensor, module.wo(inner))


def into_head(model: Any, states: Tensor) -> Tensor:  # noqa: ANN401 - one of the T5 family, adapted or not
    """What the output head reads of the decoder's states ``(tokens, d_model)``: a tied one reads them scaled."""
    # mT5 never scales
    scales = getattr(model.config, "scale_decoder_outputs", False)
    return states * model.config.d_model**-0.5 if scales else states


def _activate(act: nn.Module, x: Tensor) -> Tensor:
    # `gelu_new` is this very function, written as eight operations
    return F.gelu(x, approximate="tanh") if isinstance(act, NewGELUActivation) else act(x)


def _block(block: T5Block, x: Tensor, own: SelfLook, cross: CrossLook | None) -> Tensor:
    layers: Any = block.layer
    layer = layers[0]
    x = add_dropped(x, own(layer.SelfAttention, norm(layer.layer_norm, x)), _rate(layer.dropout))
    if cross is not None:
        layer = layers[1]
        x = add_dropped(x, cross(layer.EncDecAttention, norm(layer.layer_norm, x)), _rate(layer.dropout))
    layer = layers[-1]
    if chunks_well(layer, x):
        return feed_forward_sublayer(layer, x)
    return add_dropped(x, feed_forward(layer.DenseReluDense, norm(layer.layer_norm, x)), _rate(layer.dropout))


def _run(stack: T5Stack, x: Tensor, own: SelfLook, cross: CrossLook | None) -> list[Tensor]:
    """As Hugging Face's ``hidden_states``: what enters each block, and what the stack gives."""
    blocks: Any = stack.block
    x = dropout(x, _rate(stack.dropout))
    hidden = []
    for block in blocks:
        hidden.append(x)
        if block.gradient_checkpointing and block.training and torch.is_grad_enabled():
            x = checkpoint(_block, block, x, own, cross, use_reentrant=False)
        else:
            x = _block(block, x, own, cross)
    return [*hidden, dropout(norm(stack.final_layer_norm, x), _rate(stack.dropout))]


def run_encoder(stack: T5Stack, embedded: Tensor, packing: Packing) -> list[Tensor]:
    """The encoder's hidden states of packed rows, each ``(tokens, d_model)``: embeddings, layers, the last normed.

    Args:
        stack: ``student.encoder``.
        embedded: input embeddings ``(tokens, d_model)``.
        packing: the rows.
    """
    plan = AttentionPlan(packing, packing, stack.config.num_heads)
    return _run(stack, embedded, SelfLook(plan, _holder(stack), _dtype(embedded)), None)


def run_decoder(stack: T5Stack, embedded: Tensor, packing: Packing, encoded: Tensor, sources: Packing) -> list[Tensor]:
    """The decoder's hidden states at all positions of packed targets, each ``(tokens, d_model)``.

    Args:
        stack: ``student.decoder``.
        embedded: embeddings of the decoder's inputs ``(tokens, d_model)``.
        packing: the targets.
        encoded: the encoder's states ``(source tokens, d_model)``.
        sources: the source of each target among them.
    """
    plan = AttentionPlan(packing, packing, stack.config.num_heads, causal=True)
    dtype = _dtype(embedded)
    return _run(
        stack, embedded, SelfLook(plan, _holder(stack), dtype), CrossLook(stack, packing, sources, encoded, dtype)
    )


def _holder(stack: T5Stack) -> T5Attention:
    blocks: Any = stack.block
    holder: T5Attention = blocks[0].layer[0].SelfAttention
    return holder


def _dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
