"""Encoder-decoder students of the T5 family, and their two passes: on real tokens only, or Hugging Face's forward."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from lit_distill.batch import IGNORE_INDEX, TaskBatch, TaskInputs, filler, join, take, targets_of
from lit_distill.errors import UserError
from lit_distill.students.base import Likelihood, Pass, ProcessLogits, Student
from lit_distill.students.fast.greedy import greedy
from lit_distill.students.fast.head import token_losses
from lit_distill.students.fast.memory import keep_freed_memory
from lit_distill.students.fast.packed import Encoded, encode, encode_and_decode, log_likelihoods
from lit_distill.students.fast.support import fits, reason_against
from lit_distill.students.fast.t5 import into_head
from lit_distill.students.tokens import Tokens


class Seq2SeqStudent(Student):
    """A T5, mT5, ByT5 or another of their family.

    Args:
        model: ``T5ForConditionalGeneration`` or one of its like.
        tokens: its tokens.
        fast: run the layers on real tokens only where that is possible; else the run says once why it is not.
        compile: compile the model's forward for training, in place of the fast path.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tokens, *, fast: bool = True, compile: bool = False) -> None:
        super().__init__()
        self.model = model
        self.tokens = tokens
        self.fast = fast
        self.compiles = compile
        self._said: set[str] = set()
        config = self.network.config
        # in place of a pretrained model's own settings: the arguments alone say how it generates
        self.generation = GenerationConfig(
            pad_token_id=config.pad_token_id,
            eos_token_id=config.eos_token_id,
            decoder_start_token_id=config.decoder_start_token_id,
        )
        self.network.generation_config = copy.deepcopy(self.generation)

    def forward(self, batch: TaskBatch) -> "Seq2SeqPass":
        """A pass of this batch, on the fast path where student and batch allow it."""
        return (PackedPass if self._is_fast(batch) else PlainPass)(self, batch)

    def _is_fast(self, batch: TaskBatch) -> bool:
        if not self.fast:
            return False
        if self.model.device.type == "cpu" and not self._said:
            keep_freed_memory()
        if self.compiles and torch.is_grad_enabled():
            why: str | None = "in training, the forward is compiled instead"
        else:
            # a sharded parameter is whole only while its block's own forward runs
            why = "the parameters are sharded" if self.sharded else reason_against(self.network)
            if why is None and not fits(inputs for inputs in batch.values() if len(inputs["labels"])):
                why = "for a batch, it has padding before a source's end, or a row without a source"
        return why is None or self.say_off(why)

    def say_off(self, why: str) -> bool:
        """Say once that the fast path is off, and why."""
        if why not in self._said:
            rank_zero_info(f"fast: off, {why}")
            self._said.add(why)
        return False


class Seq2SeqPass(Pass):
    """What both passes have in common: the tasks that take part, and generation by Hugging Face's own."""

    def __init__(self, student: Seq2SeqStudent, batch: TaskBatch) -> None:
        super().__init__(student, batch)
        self.model: Any = student.network
        self.with_rows = {task: inputs for task, inputs in batch.items() if len(inputs["labels"])}
        ends = accumulate((len(inputs["labels"]) for inputs in batch.values()), initial=0)
        self.first_rows = dict(zip(batch, ends, strict=False))

    def project(self, states: Tensor) -> Tensor:
        """The output head, ``(n, vocabulary)``."""
        logits: Tensor = self.model.get_output_embeddings()(states)
        return logits

    def filler(self) -> TaskInputs:
        """A row that nobody reads."""
        return filler(self.model.config.pad_token_id, self.model.device)

    @torch.no_grad()
    def generate(
        self,
        task: str,
        *,
        rows: Sequence[int] | None = None,
        max_new_tokens: int,
        num_beams: int = 1,
        process_logits: ProcessLogits | None = None,
    ) -> list[list[int]]:
        """See `Pass.generate`."""
        inputs = self.inputs(task)
        chosen = list(range(len(inputs["labels"])) if rows is None else rows)
        if not chosen:
            return []
        processors = LogitsProcessorList()
        if process_logits is not None:
            processors.append(_Processor(_of_rows(process_logits, chosen, self.model.device), num_beams))
        taken = take(inputs, chosen)
        ids = self.model.generate(
            input_ids=taken["input_ids"],
            attention_mask=taken["attention_mask"],
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
            logits_processor=processors,
            # ranks generate different lengths; where a forward is a collective, all have to go on to the longest
            synced_gpus=self.student.sharded,
        )
        # without the start token
        return cast(list[list[int]], ids[:, 1:].tolist())


class PackedPass(Seq2SeqPass):
    """A pass on real tokens only: the tasks go through each layer together, without padding."""

    @cached_property
    def _forward(self) -> "_Forward":
        tasks = list(self.with_rows.values())
        if not any(any(targets_of(inputs).ends) for inputs in tasks):
            # one position that nobody reads, so that every parameter has a gradient
            tasks.append(self.filler())
        encoded, hidden, targets = encode_and_decode(self.model, tasks)
        places = dict.fromkeys(self.batch, slice(0, 0))
        for task, tokens, end in zip(
            self.with_rows, targets.task_tokens, accumulate(targets.task_tokens), strict=False
        ):
            places[task] = slice(end - tokens, end)
        return _Forward(encoded, hidden, targets.labels, places, deterministic=not self.model.training)

    def _own(self, task: str, packed: Tensor) -> Tensor:
        """What belongs to the task's target tokens, out of all positions'."""
        own = packed[self._forward.places[task]]
        inputs = self.inputs(task)
        if targets_of(inputs).whole:
            return own
        return own[self._forward.labels[self._forward.places[task]] != IGNORE_INDEX]

    @cached_property
    def _states(self) -> Tensor:
        return into_head(self.model, self._forward.hidden[-1])

    @cached_property
    def _losses(self) -> Tensor:
        return token_losses(self.model.lm_head, self._states, self._forward.labels)

    def states(self, task: str) -> Tensor:
        """See `Pass.states`."""
        self.inputs(task)
        return self._own(task, self._states)

    def token_losses(self, task: str) -> Tensor:
        """See `Pass.token_losses`; all tasks' are computed together."""
        self.inputs(task)
        return self._own(task, self._losses)

    def hidden(self, task: str, layer: int) -> Tensor:
        """See `Pass.hidden`."""
        self.inputs(task)
        return self._own(task, self._forward.hidden[layer])

    def encoder(self, task: str, layer: int = -1) -> Tensor:
        """See `Pass.encoder`."""
        rows, encoded = len(self.inputs(task)["labels"]), self._forward.encoded
        first = self.first_rows[task]
        start = sum(encoded.packing.lengths[:first])
        return encoded.hidden[layer][start : start + sum(encoded.packing.lengths[first : first + rows])]

    def _sources(self, task: str, rows: Sequence[int]) -> tuple[Encoded, list[int]]:
        """The encoded sources of these rows of a task, and the rows' numbers among them."""
        if "_forward" in self.__dict__ and self._forward.deterministic:
            return self._forward.encoded, [self.first_rows[task] + row for row in rows]
        return encode(self.model, [take(self.inputs(task), rows)]), list(range(len(rows)))

    @torch.no_grad()
    def generate(
        self,
        task: str,
        *,
        rows: Sequence[int] | None = None,
        max_new_tokens: int,
        num_beams: int = 1,
        process_logits: ProcessLogits | None = None,
    ) -> list[list[int]]:
        """See `Pass.generate`."""
        chosen = list(range(len(self.inputs(task)["labels"])) if rows is None else rows)
        greedily = chosen and num_beams == 1 and not self.model.training
        if greedily and self.model.generation_config != self.student.generation:
            greedily = self.student.say_off("for generation, which has settings of its own")
        if not greedily:
            return super().generate(
                task, rows=chosen, max_new_tokens=max_new_tokens, num_beams=num_beams, process_logits=process_logits
            )
        process = None if process_logits is None else _of_rows(process_logits, chosen, self.model.device)
        return greedy(self.model, *self._sources(task, chosen), max_new_tokens, process)

    def likelihood(self, task: str) -> Likelihood:
        """See `Seq2SeqPass.likelihood`."""
        encoded, numbers = self._sources(task, range(len(self.inputs(task)["labels"])))
        return lambda rows, targets: log_likelihoods(self.model, encoded, [numbers[row] for row in rows], targets)


class PlainPass(Seq2SeqPass):
    """A pass of the model's own forward on padded rows: what the fast path cannot serve."""

    @cached_property
    def _output(self) -> Seq2SeqLMOutput:
        rows = join(list(self.with_rows.values()) or [self.filler()])
        forward = self.student.training_forward(self.model)
        output: Seq2SeqLMOutput = forward(
            input_ids=rows["input_ids"],
            attention_mask=rows["attention_mask"],
            decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(rows["labels"]),
            use_cache=False,
            # which a compiled forward cannot collect
            output_hidden_states=forward is self.model,
        )
        return output

    def _own(self, task: str, padded: Tensor, real: Tensor) -> Tensor:
        """What belongs to a task's real positions, out of all rows' ``(rows, length, size)``."""
        first = self.first_rows[task]
        real = real[:, : padded.shape[1]]
        return padded[first : first + len(real), : real.shape[1]][real]

    def _targets(self, task: str, padded: Tensor) -> Tensor:
        return self._own(task, padded, self.inputs(task)["labels"] != IGNORE_INDEX)

    def states(self, task: str) -> Tensor:
        """See `Pass.states`."""
        return into_head(self.model, self.hidden(task, -1))

    def _make_logits(self, task: str) -> Tensor:
        return self._targets(task, self._output.logits)

    def token_losses(self, task: str) -> Tensor:
        """See `Pass.token_losses`."""
        return F.cross_entropy(self.logits(task).float(), self.labels(task), reduction="none")

    def hidden(self, task: str, layer: int) -> Tensor:
        """See `Pass.hidden`."""
        if (states := self._output.decoder_hidden_states) is None:
            raise UserError("compile: a compiled student gives no hidden states; leave it out for this loss")
        return self._targets(task, states[layer])

    def encoder(self, task: str, layer: int = -1) -> Tensor:
        """See `Pass.encoder`."""
        return self._own(task, self._output.encoder_hidden_states[layer], self.inputs(task)["attention_mask"] != 0)

    def likelihood(self, task: str) -> Likelihood:
        """See `Seq2SeqPass.likelihood`."""
        inputs = self.inputs(task)
        states = self.model.encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]

        def score(rows: list[int], targets: list[list[int]]) -> Tensor:
            # a pass for which this rank has no choices left takes part with a row that nobody reads
            chosen = torch.tensor(rows or [0], device=states.device)
            labels = pad_sequence(
                [torch.tensor(ids) for ids in targets or [[0]]], batch_first=True, padding_value=IGNORE_INDEX
            ).to(states.device)
            logits = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states[chosen]),
                attention_mask=inputs["attention_mask"][chosen],
                decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(labels),
                use_cache=False,
            ).logits
            losses = F.cross_entropy(
                logits.float().transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none"
            )
            return -losses.sum(dim=1)[: len(rows)]

        return score


@dataclass(frozen=True)
class _Forward:
    """What a packed pass has made."""

    encoded: Encoded
    hidden: list[Tensor]
    """The decoder's, each ``(target tokens of all tasks, d_model)``."""
    labels: Tensor
    """``(target tokens of all tasks,)``."""
    places: dict[str, slice]
    """Where each task's target tokens are."""
    deterministic: bool
    """Made in evaluation mode."""


def _of_rows(process: ProcessLogits, rows: Sequence[int], device: torch.device) -> ProcessLogits:
    """The same function for a part of the rows, numbered from 0."""
    numbers = torch.tensor(list(rows), device=device)
    return lambda scores, step, own: process(scores, step, numbers[own])


class _Processor(LogitsProcessor):
    """`ProcessLogits` as ``generate`` asks for it, which numbers the beams of a row one after another."""

    def __init__(self, process: ProcessLogits, num_beams: int) -> None:
        self._process, self._num_beams = process, num_beams

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.arange(len(scores), device=scores.device) // self._num_beams
        return self._process(scores, input_ids.shape[1] - 1, rows)
