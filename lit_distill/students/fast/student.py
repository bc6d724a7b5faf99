"""Losses of several tasks in one pass over a student: encoder, decoder and head see each real token once."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import T5ForConditionalGeneration

from lit_distill.batch import TaskInputs, sources_of, targets_of
from lit_distill.students.fast.head import token_losses
from lit_distill.students.fast.packing import Packing
from lit_distill.students.fast.support import listened_to
from lit_distill.students.fast.t5 import into_head, run_decoder, run_encoder


@dataclass(frozen=True)
class Encoded:
    """The encoder's states of packed rows."""

    states: Tensor
    """``(source tokens, d_model)``."""
    packing: Packing


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
    """Target tokens of each task, which lie behind each other."""


def pack_sources(tasks: Sequence[TaskInputs]) -> tuple[Tensor, Packing]:
    """The source ids of several tasks' rows, ``(source tokens,)``, task after task."""
    lengths = [sources_of(inputs).ends for inputs in tasks]
    ids = [
        inputs["input_ids"].flatten()[Packing(own, inputs["input_ids"].device).positions(inputs["input_ids"].shape[1])]
        for inputs, own in zip(tasks, lengths, strict=True)
    ]
    return torch.cat(ids), Packing([length for own in lengths for length in own], ids[0].device)


def pack_targets(
    student: T5ForConditionalGeneration, tasks: Sequence[TaskInputs], first_rows: Sequence[int] | None = None
) -> Targets:
    """The targets of several tasks' rows; a row without one is left out, but for the first where no row has one.

    Args:
        student: shifts the labels.
        tasks: the tasks' rows.
        first_rows: the source row of each task's first row; one task behind the other if not given.
    """
    inputs, labels, lengths, rows, tokens = [], [], [], [], []
    if first_rows is None:
        first_rows = list(accumulate((len(task["labels"]) for task in tasks), initial=0))[:-1]
    every = [targets_of(task).ends for task in tasks]
    if not any(map(any, every)):
        # one position that counts nothing, so that every parameter has a gradient
        every[0] = (1, *every[0][1:])
    for task, first, own in zip(tasks, first_rows, every, strict=True):
        positions = Packing(own, task["labels"].device).positions(task["labels"].shape[1])
        labels.append(task["labels"].flatten()[positions])
        inputs.append(student.prepare_decoder_input_ids_from_labels(task["labels"]).flatten()[positions])
        rows += [first + row for row, length in enumerate(own) if length]
        lengths += [length for length in own if length]
        tokens.append(sum(own))
    packing = Packing(lengths, labels[0].device)
    return Targets(torch.cat(inputs), torch.cat(labels), packing, tuple(rows), tuple(tokens))


def _embed(student: T5ForConditionalGeneration, sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    encoder, decoder = student.encoder.embed_tokens, student.decoder.embed_tokens
    # transformers' activation checkpointing listens to the embeddings too
    if encoder.weight is not decoder.weight or listened_to(encoder) or listened_to(decoder):
        return encoder(sources), decoder(targets)
    # one look-up: its gradient is as large as the vocabulary, and would be made and added twice
    both = F.embedding(torch.cat([sources, targets]), encoder.weight)
    source, target = both.split([len(sources), len(targets)])
    return source, target


def encode(student: T5ForConditionalGeneration, tasks: Sequence[TaskInputs]) -> Encoded:
    """All rows of several tasks through the encoder, task after task."""
    ids, packing = pack_sources(tasks)
    return _encode(student, student.encoder.embed_tokens(ids), packing)


def _encode(student: T5ForConditionalGeneration, embedded: Tensor, packing: Packing) -> Encoded:
    return Encoded(run_encoder(student.encoder, embedded, packing), packing)


def _losses(
    student: T5ForConditionalGeneration, encoded: Encoded, embedded: Tensor, targets: Targets
) -> tuple[Tensor, ...]:
    sources = encoded.packing.rows(targets.rows)
    states = run_decoder(student.decoder, embedded, targets.packing, encoded.states, sources)
    losses = token_losses(student.lm_head, into_head(student, states), targets.labels)
    split: tuple[Tensor, ...] = losses.split(targets.task_tokens)
    return split


def target_losses(student: T5ForConditionalGeneration, tasks: Sequence[TaskInputs]) -> tuple[Tensor, ...]:
    """The cross-entropy at each target position of several tasks under teacher forcing, in one pass.

    Args:
        student: the student.
        tasks: the tasks' rows, at least one.

    Returns:
        For each task ``(target tokens,)`` in nats, 0 where the label is ``IGNORE_INDEX``.
    """
    sources, packing = pack_sources(tasks)
    targets = pack_targets(student, tasks)
    source, target = _embed(student, sources, targets.inputs)
    return _losses(student, _encode(student, source, packing), target, targets)


def losses_of_encoded(
    student: T5ForConditionalGeneration, encoded: Encoded, tasks: Sequence[TaskInputs], first_rows: Sequence[int]
) -> tuple[Tensor, ...]:
    """As `target_losses`, from the encoder's states of their rows; `pack_targets` says what ``first_rows`` is."""
    targets = pack_targets(student, tasks, first_rows)
    embedded = cast(Tensor, student.decoder.embed_tokens(targets.inputs))
    return _losses(student, encoded, embedded, targets)


def log_likelihoods(
    student: T5ForConditionalGeneration, encoded: Encoded, rows: Sequence[int], targets: Sequence[Sequence[int]]
) -> Tensor:
    """The log-likelihood of each whole target given its source row, ``(targets,)`` in nats.

    Args:
        student: the student.
        encoded: the sources' states.
        rows: the source row of each target; a row may have several.
        targets: token ids, the end-of-sequence token included.
    """
    device = encoded.states.device
    start = student.config.decoder_start_token_id
    inputs = torch.tensor([token for ids in targets for token in (start, *ids[:-1])], device=device)
    labels = torch.tensor([token for ids in targets for token in ids], device=device)
    lengths = [len(ids) for ids in targets]
    packed = Targets(inputs, labels, Packing(lengths, device), tuple(rows), (len(labels),))
    (losses,) = _losses(student, encoded, cast(Tensor, student.decoder.embed_tokens(inputs)), packed)
    owner = torch.arange(len(targets), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    return -losses.new_zeros(len(targets)).index_add_(0, owner, losses)
