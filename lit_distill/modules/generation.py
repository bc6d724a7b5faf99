"""What a student says: answers, generated text, and the likelihood of closed choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput

from lit_distill.batch import IGNORE_INDEX, PADDING_ROW, TaskBatch, TaskInputs, take
from lit_distill.evaluation.answers import Answer, AnswerKey
from lit_distill.losses import sequence_log_likelihood
from lit_distill.students.fast.greedy import Shape, greedy
from lit_distill.students.fast.packed import log_likelihoods

if TYPE_CHECKING:
    from lit_distill.modules.base import DistillModule

_CHOICES_AT_ONCE = 256
"""Decoder rows of one scoring pass: bounds the logits, whatever the batch size and the number of choices."""


def answer_rows(module: DistillModule, batch: TaskBatch, key: AnswerKey, *, rationales: bool) -> list[Answer]:
    """What a student says of each row of an evaluation batch.

    Args:
        module: the module whose student answers.
        batch: an evaluation batch.
        key: the answers of its split.
        rationales: also generate the rationales, where they are a task of their own.

    Returns:
        An answer a row; rows that only pad a sampler are left out.
    """
    task = module.answer_task
    inputs = batch[task]
    index = inputs["index"].tolist()
    texts = generate_texts(module, task, inputs)
    found = [
        Answer(
            row, key.read_label(task, text), text, rationale=key.read_rationale(task, text) if task != "label" else None
        )
        for row, text in zip(index, texts, strict=True)
    ]
    if rationales and module.rationale_task not in (None, task):
        add_rationales(module, found, batch[module.rationale_task], key)
    if task == "label" and module.hparams["score_choices"] and key.choices is not None:
        choices = [key.choices[max(row, 0)] for row in index]
        for answer, choice in zip(found, score_choices(module, inputs, choices), strict=True):
            answer.scored = choice
    return [answer for answer in found if answer.index != PADDING_ROW]


def add_rationales(module: DistillModule, answers: Sequence[Answer], inputs: TaskInputs, key: AnswerKey) -> None:
    """Add what the student writes as the rationales of these rows to their answers.

    Args:
        module: the module whose student writes.
        answers: of these rows and of others.
        inputs: rows of the rationale task.
        key: the answers of their split.
    """
    task = cast(str, module.rationale_task)
    by_row = {answer.index: answer for answer in answers}
    for row, text in zip(inputs["index"].tolist(), generate_texts(module, task, inputs), strict=True):
        if row in by_row:
            by_row[row].rationale = key.read_rationale(task, text)


def generate_texts(
    module: DistillModule, task: str, inputs: TaskInputs, rows: Sequence[int] | None = None
) -> list[str]:
    """Generate a target for each row, greedily or with beams, and decode it.

    Args:
        module: the module whose student generates.
        task: what is generated; ``module.generation_settings`` says how long and with how many beams.
        inputs: the task's rows.
        rows: the rows to generate for; all of them if not given.
    """
    settings = module.generation_settings(task)
    chosen = list(range(len(inputs["input_ids"]))) if rows is None else list(rows)
    shape = _shape(module, task, inputs, chosen)
    if settings["num_beams"] == 1 and module.fast_path.decodes([inputs]):
        with torch.no_grad():
            encoded, wanted = module.fast_path.encoded(inputs, chosen)
        found = greedy(module.student, encoded, wanted, settings["max_new_tokens"], shape)
        return decode(module, found)
    taken = take(inputs, chosen)
    processors = LogitsProcessorList()
    if shape is not None:
        processors.append(_Shaped(shape, settings["num_beams"]))
    ids = module.student.generate(  # type: ignore[misc]  # its protocol of a generative model is too narrow
        input_ids=taken["input_ids"],
        attention_mask=taken["attention_mask"],
        max_new_tokens=settings["max_new_tokens"],
        num_beams=settings["num_beams"],
        do_sample=False,
        logits_processor=processors,
        # ranks generate different lengths; where a forward pass is a collective, all have to go on to the longest
        synced_gpus=module.sharded,
    )
    return decode(module, cast(Tensor, ids).tolist())


def _shape(module: DistillModule, task: str, inputs: TaskInputs, chosen: list[int]) -> Shape | None:
    """The module's `shape_scores` of these rows, where a subclass has one."""
    if not module.overrides("shape_scores"):
        return None
    index = inputs.get("index")
    device = inputs["input_ids"].device
    positions = torch.arange(len(inputs["input_ids"]), device=device) if index is None else index
    own = positions[torch.tensor(chosen, device=device)]
    return lambda scores, step, numbers: module.shape_scores(task, scores, step, own[numbers])


class _Shaped(LogitsProcessor):
    """`Shape` as ``generate`` asks for it, which numbers the beams of a row one after another."""

    def __init__(self, shape: Shape, num_beams: int) -> None:
        self._shape, self._num_beams = shape, num_beams

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.arange(len(scores), device=scores.device) // self._num_beams
        return self._shape(scores, input_ids.shape[1] - 1, rows)


def decode(module: DistillModule, ids: Sequence[Sequence[int]]) -> list[str]:
    """Token ids to text, whatever they are padded with."""
    pad = cast(int, module.student.config.pad_token_id)
    safe = [[token if token >= 0 else pad for token in row] for row in ids]
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
    passes = -(-len(flat) // _CHOICES_AT_ONCE)
    if module.sharded:
        # where a forward pass is a collective, every rank makes as many as the one with the most choices
        passes = int(module.gather(torch.tensor(passes, device=module.device)).max())
    if not passes:
        return [None] * len(choices)
    end = module.tokenizer.eos_token_id
    targets = [
        # as a target is trained on: a tokenizer that does not end it by itself is helped
        ids if ids and ids[-1] == end else [*ids, end]
        for ids in module.tokenizer([choice for _, choice in flat])["input_ids"]
    ]
    likelihoods = _fast_likelihoods if module.fast_path.applies([inputs]) else _plain_likelihoods
    scores = likelihoods(module, inputs, [row for row, _ in flat], targets, passes)
    best: dict[int, tuple[float, str]] = {}
    for (row, choice), score in zip(flat, scores, strict=True):
        if row not in best or score > best[row][0]:
            best[row] = (score, choice)
    return [best[row][1] if row in best else None for row in range(len(choices))]


def _fast_likelihoods(
    module: DistillModule, inputs: TaskInputs, rows: list[int], targets: list[list[int]], passes: int
) -> list[float]:
    encoded, numbers = module.fast_path.encoded(inputs, range(len(inputs["labels"])))
    scores: list[float] = []
    for start in range(0, passes * _CHOICES_AT_ONCE, _CHOICES_AT_ONCE):
        part = slice(start, start + _CHOICES_AT_ONCE)
        found = log_likelihoods(module.student, encoded, [numbers[row] for row in rows[part]], targets[part])
        scores += found.tolist()
    return scores


def _plain_likelihoods(
    module: DistillModule, inputs: TaskInputs, rows: list[int], targets: list[list[int]], passes: int
) -> list[float]:
    states = module.student.encoder(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
    ).last_hidden_state
    scores: list[float] = []
    for start in range(0, passes * _CHOICES_AT_ONCE, _CHOICES_AT_ONCE):
        part = slice(start, start + _CHOICES_AT_ONCE)
        # a pass for which this rank has no choices left takes part with a row that nobody reads
        chosen = torch.tensor(rows[part] or [0], device=states.device)
        labels = pad_sequence(
            [torch.tensor(ids) for ids in targets[part] or [[0]]], batch_first=True, padding_value=IGNORE_INDEX
        ).to(states.device)
        logits = module.student(
            encoder_outputs=BaseModelOutput(last_hidden_state=states[chosen]),
            attention_mask=inputs["attention_mask"][chosen],
            decoder_input_ids=module.student.prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        ).logits
        scores += sequence_log_likelihood(logits, labels).tolist()[: len(rows[part])]
    return scores
