"""T5 students and their two passes: the fast path on real tokens only, and Hugging Face's own forward."""

import copy
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from lit_distill.batch import IGNORE_INDEX, TaskBatch, TaskInputs, filler, join, pad_targets, take, targets_of
from lit_distill.errors import UserError
from lit_distill.students.base import Likelihood, Pass, ProcessLogits, Student
from lit_distill.students.fast.greedy import greedy
from lit_distill.students.fast.head import token_losses
from lit_distill.students.fast.support import fits, keep_freed_memory, reason_against
from lit_distill.students.fast.t5 import Decoded, Encoded, encode, encode_and_decode, into_head, log_likelihoods
from lit_distill.students.tokens import Tokens


class Seq2SeqStudent(Student):
    """A T5 (v1.0, v1.1, Flan), ByT5 or mT5.

    Args:
        model: ``T5ForConditionalGeneration`` or ``MT5ForConditionalGeneration``.
        tokens: its tokens.
        fast: run on real tokens only where supported; otherwise the run says why, once.
        compile: compile the training forward, in place of the fast path.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tokens, *, fast: bool = True, compile: bool = False) -> None:
        super().__init__()
        self.model = model
        self.tokens = tokens
        self.fast = fast
        self.compiles = compile
        self._warned: set[str] = set()
        config = self.network.config
        # replaces the pretrained model's own settings: generation depends on our arguments alone
        self.generation = GenerationConfig(
            pad_token_id=config.pad_token_id,
            eos_token_id=config.eos_token_id,
            decoder_start_token_id=config.decoder_start_token_id,
        )
        self.network.generation_config = copy.deepcopy(self.generation)

    def forward(self, batch: TaskBatch) -> "Seq2SeqPass":
        """The lazy pass over a batch; on the fast path if student and batch allow it."""
        return (PackedPass if self._is_fast(batch) else PlainPass)(self, batch)

    def _is_fast(self, batch: TaskBatch) -> bool:
        if not self.fast:
            return False
        if self.model.device.type == "cpu":
            keep_freed_memory()
        if self.compiles and torch.is_grad_enabled():
            why: str | None = "in training, the forward is compiled instead"
        else:
            # a sharded parameter is complete only during its block's own forward
            why = "the parameters are sharded" if self.sharded else reason_against(self.network)
            if why is None and not fits(inputs for inputs in batch.values() if len(inputs["labels"])):
                why = "for a batch, it has padding before a source's end, or a row without a source"
        return why is None or self.say_off(why)

    def say_off(self, why: str) -> bool:
        """Log once why the fast path is off."""
        if why not in self._warned:
            rank_zero_info(f"fast: off, {why}")
            self._warned.add(why)
        return False


class Seq2SeqPass(Pass):
    """Common parts of both passes."""

    student: Seq2SeqStudent

    def __init__(self, student: Seq2SeqStudent, batch: TaskBatch) -> None:
        super().__init__(student, batch)
        self.model: Any = student.network
        self.with_rows = {task: inputs for task, inputs in batch.items() if len(inputs["labels"])}
        first_rows = accumulate((len(inputs["labels"]) for inputs in batch.values()), initial=0)
        self.first_rows = dict(zip(batch, first_rows, strict=False))

    def project(self, states: Tensor) -> Tensor:
        """The output head, ``(n, vocabulary)``."""
        logits: Tensor = self.model.get_output_embeddings()(states)
        return logits

    def _filler(self) -> TaskInputs:
        """A dummy row."""
        return filler(self.model.config.pad_token_id, self.model.device)

    def _prompts(self, task: str, rows: Sequence[int]) -> tuple[Tensor, Tensor, int]:
        chosen = take(self.inputs(task), rows)
        # the first token of an answer is the start token
        return chosen["input_ids"], chosen["attention_mask"], 1


class PackedPass(Seq2SeqPass):
    """The fast path: all tasks go through each layer together, without padding."""

    @cached_property
    def _forward(self) -> tuple[Encoded, Decoded]:
        self._deterministic = not self.model.training
        tasks = list(self.with_rows.values())
        if not any(any(targets_of(inputs).ends) for inputs in tasks):
            # one unused position, so that every parameter has a gradient
            tasks.append(self._filler())
        return encode_and_decode(self.model, tasks)

    @cached_property
    def _states(self) -> Tensor:
        return into_head(self.model, self._forward[1].hidden[-1])

    @cached_property
    def _losses(self) -> Tensor:
        return token_losses(self.model.lm_head, self._states, self._forward[1].labels)

    def _own(self, task: str, packed: Tensor) -> Tensor:
        """The task's part of all target tokens ``(tokens, ...)``."""
        decoded = self._forward[1]
        ends = dict(zip(self.with_rows, accumulate(decoded.task_tokens), strict=False))
        tokens = dict(zip(self.with_rows, decoded.task_tokens, strict=False))
        place = slice(ends.get(task, 0) - tokens.get(task, 0), ends.get(task, 0))
        if targets_of(self.inputs(task)).whole:
            return packed[place]
        return packed[place][decoded.labels[place] != IGNORE_INDEX]

    def states(self, task: str) -> Tensor:
        """See `Pass.states`."""
        self.inputs(task)
        return self._own(task, self._states)

    def token_losses(self, task: str) -> Tensor:
        """See `Pass.token_losses`; those of all tasks are computed together."""
        self.inputs(task)
        return self._own(task, self._losses)

    def hidden(self, task: str, layer: int) -> Tensor:
        """See `Pass.hidden`."""
        self.inputs(task)
        return self._own(task, self._forward[1].hidden[layer])

    def encoder(self, task: str, layer: int = -1) -> Tensor:
        """See `Pass.encoder`."""
        rows, first, encoded = len(self.inputs(task)["labels"]), self.first_rows[task], self._forward[0]
        start = sum(encoded.packing.lengths[:first])
        return encoded.hidden[layer][start : start + sum(encoded.packing.lengths[first : first + rows])]

    def _sources(self, task: str, rows: Sequence[int]) -> tuple[Encoded, list[int]]:
        """A task's encoded sources, and the numbers of these rows among them."""
        if "_forward" in self.__dict__ and self._deterministic:
            return self._forward[0], [self.first_rows[task] + row for row in rows]
        return encode(self.model, [take(self.inputs(task), rows)]), list(range(len(rows)))

    def _generate(
        self, task: str, rows: list[int], max_new_tokens: int, num_beams: int, process: ProcessLogits | None
    ) -> list[list[int]]:
        greedily = num_beams == 1 and not self.model.training
        if greedily and self.model.generation_config != self.student.generation:
            greedily = self.student.say_off("for generation, which has settings of its own")
        if not greedily:
            return super()._generate(task, rows, max_new_tokens, num_beams, process)
        return greedy(self.model, *self._sources(task, rows), max_new_tokens, process)

    def likelihood(self, task: str) -> Likelihood:
        """See `Pass.likelihood`."""
        encoded, numbers = self._sources(task, range(len(self.inputs(task)["labels"])))
        return lambda rows, targets: log_likelihoods(self.model, encoded, [numbers[row] for row in rows], targets)


class PlainPass(Seq2SeqPass):
    """Hugging Face's own forward on padded rows, for all that the fast path does not support."""

    @cached_property
    def _output(self) -> Seq2SeqLMOutput:
        rows = join(list(self.with_rows.values()) or [self._filler()])
        forward = self.student.training_forward(self.model)
        output: Seq2SeqLMOutput = forward(
            input_ids=rows["input_ids"],
            attention_mask=rows["attention_mask"],
            decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(rows["labels"]),
            use_cache=False,
            # a compiled forward cannot collect them
            output_hidden_states=forward is self.model,
        )
        return output

    def _own(self, task: str, padded: Tensor, real: Tensor) -> Tensor:
        """The task's real positions, out of ``(rows, length, size)``."""
        first, real = self.first_rows[task], real[:, : padded.shape[1]]
        return padded[first : first + len(real), : real.shape[1]][real]

    def _targets(self, task: str, padded: Tensor) -> Tensor:
        return self._own(task, padded, self.inputs(task)["labels"] != IGNORE_INDEX)

    def states(self, task: str) -> Tensor:
        """See `Pass.states`."""
        return into_head(self.model, self.hidden(task, -1))

    def _make_logits(self, task: str) -> Tensor:
        return self._targets(task, cast(Tensor, self._output.logits))

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
        if (states := self._output.encoder_hidden_states) is None:
            raise UserError("compile: a compiled student gives no hidden states; leave it out for this loss")
        return self._own(task, states[layer], self.inputs(task)["attention_mask"] != 0)

    def likelihood(self, task: str) -> Likelihood:
        """See `Pass.likelihood`."""
        inputs = self.inputs(task)
        states = self.model.encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]

        def score(rows: list[int], targets: list[list[int]]) -> Tensor:
            # without choices left, this rank runs a dummy row
            chosen = torch.tensor(rows or [0], device=states.device)
            labels = pad_targets(targets, 0, states.device)
            logits = self.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states[chosen]),
                attention_mask=inputs["attention_mask"][chosen],
                decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(labels),
                use_cache=False,
            ).logits
            losses = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
            return -losses.sum(dim=1)[: len(rows)]

        return score
