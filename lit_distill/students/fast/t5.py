"""A T5's layers on packed tokens: several tasks' real tokens go through encoder and decoder once, and no padding does.

Every module of the Hugging Face model keeps its place, its weights and its name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import NewGELUActivation

from lit_distill.batch import TaskInputs, sources_of, sum_rows, targets_of
from lit_distill.students.fast.attention import CrossAttention, PrefixAttention, SelfAttention
from lit_distill.students.fast.casts import Casts, project
from lit_distill.students.fast.dropping import Dropping, drop
from lit_distill.students.fast.functions import add_dropped, dropout, log_probabilities, rms_norm
from lit_distill.students.fast.packing import Packing
from lit_distill.students.fast.support import has_hooks


@dataclass(frozen=True)
class Encoded:
    """Packed rows in the encoder."""

    hidden: list[Tensor]  # the embeddings and each layer's states, `(source tokens, d_model)`
    packing: Packing  # of the last layer's, some of whose tokens may have been dropped

    @property
    def states(self) -> Tensor:
        """What the decoder attends to."""
        return self.hidden[-1]


def _rate(module: nn.Dropout) -> float:
    return float(module.p) if module.training else 0.0


def norm(module: Any, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """T5's layer norm, ``(tokens, d_model)``; see `rms_norm`."""
    return rms_norm(x, module.weight, module.variance_epsilon, dtype)


def feed_forward(module: Any, x: Tensor, casts: Casts | None = None) -> Tensor:
    """The feed-forward network, gated or not, ``(tokens, d_model)``."""
    layers = (module.wi_0, module.wi_1) if hasattr(module, "wi_1") else (module.wi,)
    inner, *gate = project(layers, x, casts)
    inner = activate(module.act, inner)
    inner = dropout(inner * gate[0] if gate else inner, _rate(module.dropout))
    wanted = module.wo.weight.dtype
    if inner.dtype != wanted and wanted.is_floating_point and not torch.is_autocast_enabled(inner.device.type):
        # transformers keeps this one matrix in float32 where it loads the others in bfloat16
        inner = inner.to(wanted)
    return project((module.wo,), inner, casts)[0]


def into_head(model: Any, states: Tensor) -> Tensor:
    """What the output head reads of the decoder's states ``(tokens, d_model)``: a tied one reads them scaled."""
    # mT5 never scales
    scales = getattr(model.config, "scale_decoder_outputs", False)
    return states * model.config.d_model**-0.5 if scales else states


def activate(act: nn.Module, x: Tensor) -> Tensor:
    """The feed-forward network's activation function."""
    # `gelu_new` is this very function, written as eight operations
    return F.gelu(x, approximate="tanh") if isinstance(act, NewGELUActivation) else act(x)


def _block(
    block: Any, x: Tensor, own: SelfAttention | PrefixAttention, cross: CrossAttention | None, casts: Casts | None
) -> Tensor:
    def add(layer: Any, module: Any, part: Callable[[Any, Tensor, Casts | None], Tensor]) -> Tensor:
        # the sum of all layers stays in float32 under autocast, and what a layer reads of it is cast once
        dtype = None if casts is None else torch.get_autocast_dtype(x.device.type)
        return add_dropped(x, part(module, norm(layer.layer_norm, x, dtype), casts), _rate(layer.dropout))

    layers = block.layer
    x = add(layers[0], layers[0].SelfAttention, own)
    if cross is not None:
        x = add(layers[1], layers[1].EncDecAttention, cross)
    return add(layers[-1], layers[-1].DenseReluDense, feed_forward)


def _run(
    stack: Any, x: Tensor, own: SelfAttention | PrefixAttention, cross: CrossAttention | None, casts: Casts | None
) -> list[Tensor]:
    """As Hugging Face's ``hidden_states``: what enters each block, and what the stack gives."""
    *hidden, x = _layers(stack.block, dropout(x, _rate(stack.dropout)), own, cross, casts)
    return [*hidden, dropout(norm(stack.final_layer_norm, x), _rate(stack.dropout))]


def _layers(
    blocks: Any, x: Tensor, own: SelfAttention | PrefixAttention, cross: CrossAttention | None, casts: Casts | None
) -> list[Tensor]:
    """What enters each block, and what the last one gives."""
    hidden = [x]
    for block in blocks:
        if block.gradient_checkpointing and block.training and torch.is_grad_enabled():
            x = checkpoint(_block, block, x, own, cross, casts, use_reentrant=False)
        else:
            x = _block(block, x, own, cross, casts)
        hidden.append(x)
    return hidden


def dtype_of(x: Tensor) -> torch.dtype:
    """What a layer makes of it: autocast's dtype, or its own."""
    return torch.get_autocast_dtype(x.device.type) if _is_autocast(x) else x.dtype


def _is_autocast(x: Tensor) -> bool:
    # there is none on meta
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def encode(
    model: Any, tasks: Sequence[TaskInputs], casts: Casts | None = None, dropping: Dropping | None = None
) -> Encoded:
    """All rows of several tasks through the encoder, task after task; ``casts`` are used under autocast."""
    ids, packing = pack_sources(tasks)
    return _encode(model, model.encoder.embed_tokens(ids), packing, casts, dropping)


def _encode(model: Any, embedded: Tensor, packing: Packing, casts: Casts | None, dropping: Dropping | None) -> Encoded:
    stack, dtype, casts = model.encoder, dtype_of(embedded), _used(casts, embedded)
    attend = SelfAttention(stack, packing, dtype, causal=False)
    if dropping is None:
        return Encoded(_run(stack, embedded, attend, None, casts), packing)
    *before, x = _layers(stack.block[: dropping.after], embedded, attend, None, casts)
    last = stack.block[dropping.after - 1].layer[0]
    received = attend.received(last.SelfAttention, norm(last.layer_norm, before[-1]), casts)
    tokens, packing, positions = drop(received, packing, dropping.share)
    attend = SelfAttention(stack, packing, dtype, causal=False, positions=positions)
    *after, x = _layers(stack.block[dropping.after :], x.index_select(0, tokens), attend, None, casts)
    return Encoded([*before, *after, norm(stack.final_layer_norm, x)], packing)


def _decode(
    model: Any,
    embedded: Tensor,
    targets: Packing,
    encoded: Encoded,
    rows: Sequence[int],
    casts: Casts | None,
    attend: PrefixAttention | None = None,
) -> list[Tensor]:
    own = attend or SelfAttention(model.decoder, targets, dtype_of(embedded), causal=True)
    cross = CrossAttention(model.decoder, targets, encoded.packing.rows(rows), encoded.states, dtype_of(embedded))
    return _run(model.decoder, embedded, own, cross, _used(casts, embedded))


def _used(casts: Casts | None, x: Tensor) -> Casts | None:
    return (casts or Casts()) if _is_autocast(x) else None


def encode_and_decode(
    model: Any, tasks: Sequence[TaskInputs], casts: Casts | None = None, dropping: Dropping | None = None
) -> tuple[Encoded, list[Tensor], Tensor]:
    """Several tasks' sources and targets, of which there is at least one, under teacher forcing, task after task.

    Every row of the tasks is encoded; a row without a target is not decoded. ``casts`` are used under autocast.

    Returns:
        The sources; the decoder's embeddings and each layer's states, ``(target tokens, d_model)``; and the labels.
    """
    ids, packing = pack_sources(tasks)
    inputs, labels, targets, rows = pack_targets(model, tasks)
    encoder, decoder = model.encoder.embed_tokens, model.decoder.embed_tokens
    # transformers' activation checkpointing has hooks on the embeddings
    if encoder.weight is not decoder.weight or has_hooks(encoder) or has_hooks(decoder):
        source, target = encoder(ids), decoder(inputs)
    else:
        # one look-up: its gradient is as large as the vocabulary, and would be made and added twice
        source, target = F.embedding(torch.cat([ids, inputs]), encoder.weight).split([len(ids), len(inputs)])
    encoded = _encode(model, source, packing, casts, dropping)
    return encoded, _decode(model, target, targets, encoded, rows, casts), labels


def log_likelihoods(
    model: Any, encoded: Encoded, rows: Sequence[int], targets: Sequence[Sequence[int]], casts: Casts | None = None
) -> Tensor:
    """The log-likelihood of each whole target given its source row, of which it may be one of several, in nats.

    What the targets of a source row begin with alike goes through the decoder and its output head once.
    """
    device = encoded.states.device
    # the decoder's inputs of each source row: what comes before some token of a target, and its number in the row
    prefixes: dict[int, dict[tuple[int, ...], int]] = {row: {} for row in rows}
    for row, ids in zip(rows, targets, strict=True):
        for end in range(len(ids)):
            prefixes[row].setdefault(tuple(ids[:end]), len(prefixes[row]))
    packing = Packing([len(own) for own in prefixes.values()], device)
    first = dict(zip(prefixes, packing.starts, strict=True))
    paths = [
        [first[row] + prefixes[row][tuple(ids[:end])] for end in range(len(ids))]
        for row, ids in zip(rows, targets, strict=True)
    ]
    start = model.config.decoder_start_token_id
    inputs = torch.tensor([prefix[-1] if prefix else start for own in prefixes.values() for prefix in own])
    embedded = model.decoder.embed_tokens(inputs.to(device, non_blocking=True))
    attend = PrefixAttention(model.decoder, paths, packing, dtype_of(embedded))
    hidden = _decode(model, embedded, packing, encoded, list(prefixes), casts, attend)
    places = torch.tensor([place for path in paths for place in path])
    labels = torch.tensor([token for ids in targets for token in ids])
    found = log_probabilities(model.lm_head, into_head(model, hidden[-1]), places, labels, casts)
    owner = torch.arange(len(targets)).repeat_interleave(torch.tensor([len(ids) for ids in targets]))
    return sum_rows(found, owner.to(device, non_blocking=True), len(targets))


def pack_sources(tasks: Sequence[TaskInputs]) -> tuple[Tensor, Packing]:
    """The source ids of several tasks' rows, ``(source tokens,)``, task after task."""
    lengths = [sources_of(task).ends for task in tasks]
    ids = torch.cat([_packed(task["input_ids"], own) for task, own in zip(tasks, lengths, strict=True)])
    return ids, Packing([length for own in lengths for length in own], ids.device)


def pack_targets(model: Any, tasks: Sequence[TaskInputs]) -> tuple[Tensor, Tensor, Packing, list[int]]:
    """The targets of several tasks' rows; a row without one is left out.

    Returns:
        The decoder's input ids, labels, where the rows are among them, and the source row of each.
    """
    inputs, labels = [], []
    lengths: list[int] = []
    for task in tasks:
        own = targets_of(task).ends
        labels.append(_packed(task["labels"], own))
        inputs.append(_packed(model.prepare_decoder_input_ids_from_labels(task["labels"]), own))
        lengths += own
    rows = [row for row, length in enumerate(lengths) if length]
    packing = Packing([lengths[row] for row in rows], labels[0].device)
    return torch.cat(inputs), torch.cat(labels), packing, rows


def _packed(padded: Tensor, lengths: Sequence[int]) -> Tensor:
    return padded.flatten()[Packing(lengths, padded.device).positions(padded.shape[1])]
