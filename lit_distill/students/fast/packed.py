"""Sources and targets of several tasks through a T5 at once: each real token once, and no padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_distill.batch import TaskInputs, sources_of, targets_of
from lit_distill.students.fast.head import token_losses
from lit_distill.students.fast.packing import Packing
from lit_distill.students.fast.support import has_hooks
from lit_distill.students.fast.t5 import into_head, run_decoder, run_encoder


@dataclass(frozen=True)
class Encoded:
    """Packed rows in the encoder."""

    hidden: list[Tensor]
    """The embeddings and each layer's states, ``(source tokens, d_model)``."""
    packing: Packing

    @property
    def states(self) -> Tensor:
        """What the decoder attends to."""
        return self.hidden[-1]


@dataclass(frozen=True)
class Targets:
    """Packed targets, and the source row that each belongs to."""

    inputs: Tensor
    """The decoder's input ids, ``(target tokens,)``: the start token, then the target without its last token."""
    labels: Tensor
    """``(target tokens,)``."""
    packing: Packing
    rows: tuple[int, ...]
    """The source row of each target."""
    task_tokens: tuple[int, ...]
    """Target tokens of each task, which follow each other."""


def pack_sources(tasks: Sequence[TaskInputs]) -> tuple[Tensor, Packing]:
    """The source ids of several tasks' rows, ``(source tokens,)``, task after task."""
    lengths = [sources_of(inputs).ends for inputs in tasks]
    ids = [
        inputs["input_ids"].flatten()[Packing(own, inputs["input_ids"].device).positions(inputs["input_ids"].shape[1])]
        for inputs, own in zip(tasks, lengths, strict=True)
    ]
    return torch.cat(ids), Packing([length for own in lengths for length in own], ids[0].device)


def pack_targets(model: Any, tasks: Sequence[TaskInputs]) -> Targets:  # noqa: ANN401 - a T5, adapted or not
    """The targets of several tasks' rows; a row without one is left out."""
    inputs, labels, lengths, rows, tokens, first = [], [], [], [], [], 0
    for task in tasks:
        own = targets_of(task).ends
        positions = Packing(own, task["labels"].device).positions(task["labels"].shape[1])
        labels.append(task["labels"].flatten()[positions])
        inputs.append(model.prepare_decoder_input_ids_from_labels(task["labels"]).flatten()[positions])
        rows += [first + row for row, length in enumerate(own) if length]
        lengths += [length for length in own if length]
        tokens.append(sum(own))
        first += len(own)
    packing = Packing(lengths, labels[0].device)
    return Targets(torch.cat(inputs), torch.cat(labels), packing, tuple(rows), tuple(tokens))


def embed(model: Any, sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Embeddings of packed source ids and of the decoder's packed inputs."""
    encoder, decoder = model.encoder.embed_tokens, model.decoder.embed_tokens
    # transformers' activation checkpointing has hooks on the embeddings
    if encoder.weight is not decoder.weight or has_hooks(encoder) or has_hooks(decoder):
        return encoder(sources), decoder(targets)
    # one look-up: its gradient is as large as the vocabulary, and would be made and added twice
    both = F.embedding(torch.cat([sources, targets]), encoder.weight)
    source, target = both.split([len(sources), len(targets)])
    return source, target


def encode(model: Any, tasks: Sequence[TaskInputs]) -> Encoded:  # noqa: ANN401
    """All rows of several tasks through the encoder, task after task."""
    ids, packing = pack_sources(tasks)
    return Encoded(run_encoder(model.encoder, model.encoder.embed_tokens(ids), packing), packing)


def encode_and_decode(
    model: Any,  # noqa: ANN401
    tasks: Sequence[TaskInputs],
    encoded: Encoded | None = None,
) -> tuple[Encoded, list[Tensor], Targets]:
    """The tasks' sources and targets through encoder and decoder.

    Args:
        model: the T5.
        tasks: their rows, with at least one source and one target.
        encoded: their sources, where `encode` has made them already.

    Returns:
        What the encoder made; the decoder's embeddings and each layer's states, ``(target tokens, d_model)``; and the
        targets that these belong to.
    """
    targets = pack_targets(model, tasks)
    if encoded is None:
        ids, packing = pack_sources(tasks)
        source, target = embed(model, ids, targets.inputs)
        encoded = Encoded(run_encoder(model.encoder, source, packing), packing)
    else:
        target = model.decoder.embed_tokens(targets.inputs)
    rows = encoded.packing.rows(targets.rows)
    return encoded, run_decoder(model.decoder, target, targets.packing, encoded.states, rows), targets


def log_likelihoods(
    model: Any,  # noqa: ANN401
    encoded: Encoded,
    rows: Sequence[int],
    targets: Sequence[Sequence[int]],
) -> Tensor:
    """The log-likelihood of each whole target given its source row, ``(targets,)`` in nats.

    Args:
        model: the T5.
        encoded: the sources.
        rows: the source row of each target; a row may have several.
        targets: token ids, the end-of-sequence token included.
    """
    device = encoded.states.device
    start = model.config.decoder_start_token_id
    inputs = torch.tensor([token for ids in targets for token in (start, *ids[:-1])], device=device)
    labels = torch.tensor([token for ids in targets for token in ids], device=device)
    packing, sources = Packing([len(ids) for ids in targets], device), encoded.packing.rows(rows)
    hidden = run_decoder(model.decoder, model.decoder.embed_tokens(inputs), packing, encoded.states, sources)
    losses = token_losses(model.lm_head, into_head(model, hidden[-1]), labels)
    owner = torch.arange(len(targets), device=device).repeat_interleave(torch.tensor(packing.lengths, device=device))
    return -losses.new_zeros(len(targets)).index_add_(0, owner, losses)
