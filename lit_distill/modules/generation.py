"""What a student says: answers, generated text, and the likelihood of closed choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from lit_distill.answers import AnswerKey
from lit_distill.batch import IGNORE_INDEX, PADDING_ROW, TaskBatch, TaskInputs
from lit_distill.losses import sequence_log_likelihood
from lit_distill.modules.evaluation import Answer

if TYPE_CHECKING:
    from lit_distill.modules.base import DistillModule

_CHOICES_AT_ONCE = 256
"""Decoder rows of one scoring pass: bounds the logits, whatever the batch size and the number of choices."""


def answer_rows(module: DistillModule, batch: TaskBatch, key: AnswerKey, *, every_rationale: bool) -> list[Answer]:
    """What a student says of each row of an evaluation batch.

    Args:
        module: the module whose student answers.
        batch: an evaluation batch.
        key: the answers of its split.
        every_rationale: generate every row's rationale, not only the first ``num_samples`` rows'.

    Returns:
        An answer a row; rows that only pad a sampler are left out.
    """
    task = module.answer_task
    inputs = batch[task]
    index = inputs["index"].tolist()
    texts = generate_texts(module, inputs, module.generation_settings(task))
    found = [
        Answer(
            row, key.read_label(task, text), text, rationale=key.read_rationale(task, text) if task != "label" else None
        )
        for row, text in zip(index, texts, strict=True)
    ]
    if module.rationale_task is not None and module.rationale_task != task:
        _add_rationales(module, found, batch[module.rationale_task], key, every=every_rationale)
    if task == "label" and module.hparams["score_choices"] and key.choices is not None:
        choices = [key.choices[max(row, 0)] for row in index]
        for answer, choice in zip(found, score_choices(module, inputs, choices), strict=True):
            answer.scored = choice
    return [answer for answer in found if answer.index != PADDING_ROW]


def _add_rationales(
    module: DistillModule, found: list[Answer], inputs: TaskInputs, key: AnswerKey, *, every: bool
) -> None:
    wanted = [i for i, answer in enumerate(found) if every or 0 <= answer.index < module.hparams["num_samples"]]
    # under a sharded strategy every rank has to generate as often, if only for a row that nobody asked for
    rows = wanted or ([0] if module.sharded else [])
    if not rows:
        return
    chosen = torch.tensor(rows, device=inputs["input_ids"].device)
    subset: TaskInputs = {
        "input_ids": inputs["input_ids"][chosen],
        "attention_mask": inputs["attention_mask"][chosen],
        "labels": inputs["labels"][chosen],
    }
    task = cast(str, module.rationale_task)
    texts = generate_texts(module, subset, module.generation_settings(task))
    for row, text in zip(wanted, texts, strict=False):
        found[row].rationale = key.read_rationale(task, text)


def generate_texts(module: DistillModule, inputs: TaskInputs, settings: Mapping[str, int]) -> list[str]:
    """Generate a target for each row, greedily or with beams, and decode it.

    Args:
        module: the module whose student generates.
        inputs: a task's rows.
        settings: ``max_new_tokens`` and ``num_beams``; one beam is greedy.
    """
    ids = module.student.generate(  # type: ignore[misc]  # its protocol of a generative model is too narrow
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=settings["max_new_tokens"],
        num_beams=settings["num_beams"],
        do_sample=False,
        # ranks generate different lengths; where a forward pass is a collective, all have to go on to the longest
        synced_gpus=module.sharded,
    )
    return decode(module, cast(Tensor, ids))


def decode(module: DistillModule, ids: Tensor) -> list[str]:
    """Token ids ``(batch, length)`` to text, whatever they are padded with."""
    pad = cast(int, module.student.config.pad_token_id)
    safe = ids.masked_fill(ids < 0, pad)
    return [
        text.strip()
        for text in module.tokenizer.batch_decode(safe, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    ]


def score_choices(module: DistillModule, inputs: TaskInputs, choices: Sequence[tuple[str, ...]]) -> list[str | None]:
    """Each row's likeliest choice: the one with the highest log-likelihood of its whole target, end token included.

    The inputs are encoded once, whatever the number of choices.

    Args:
        module: the module whose student scores.
        inputs: a task's rows, ``(batch, source_len)``.
        choices: the closed choices of each row; a row without any gets ``None``.
    """
    flat = [(row, choice) for row, own in enumerate(choices) for choice in own]
    if not flat:
        return [None] * len(choices)
    end = module.tokenizer.eos_token_id
    targets = [
        # as a target is trained on: a tokenizer that does not end it by itself is helped
        ids if ids and ids[-1] == end else [*ids, end]
        for ids in module.tokenizer([choice for _, choice in flat])["input_ids"]
    ]
    states = module.student.encoder(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
    ).last_hidden_state
    scores: list[float] = []
    for start in range(0, len(flat), _CHOICES_AT_ONCE):
        part = slice(start, start + _CHOICES_AT_ONCE)
        rows = torch.tensor([row for row, _ in flat[part]], device=states.device)
        labels = pad_sequence(
            [torch.tensor(ids) for ids in targets[part]], batch_first=True, padding_value=IGNORE_INDEX
        ).to(states.device)
        logits = module.student(
            encoder_outputs=BaseModelOutput(last_hidden_state=states[rows]),
            attention_mask=inputs["attention_mask"][rows],
            decoder_input_ids=module.student.prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        ).logits
        scores += sequence_log_likelihood(logits, labels).tolist()
    best: dict[int, tuple[float, str]] = {}
    for (row, choice), score in zip(flat, scores, strict=True):
        if row not in best or score > best[row][0]:
            best[row] = (score, choice)
    return [best[row][1] if row in best else None for row in range(len(choices))]
