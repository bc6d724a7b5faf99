"""T5 students and their two passes: the fast path on real tokens only, and Hugging Face's own forward."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput

from lit_distill.batch import IGNORE_INDEX, TaskBatch, TaskInputs, filler, join, take, targets_of
from lit_distill.checks import check_choice, check_fraction, check_int
from lit_distill.errors import UserError
from lit_distill.students.attention import Attention, Call, recording
from lit_distill.students.base import Pass, ProcessLogits, Stack, Stepper, Student
from lit_distill.students.fast import compiled
from lit_distill.students.fast.casts import Casts
from lit_distill.students.fast.dropping import Dropping
from lit_distill.students.fast.functions import token_losses
from lit_distill.students.fast.greedy import Decoder, greedy
from lit_distill.students.fast.support import fits, keep_freed_memory, reason_against
from lit_distill.students.fast.t5 import Encoded, encode, encode_and_decode, into_head, log_likelihoods
from lit_distill.students.tokens import Tokens

PathName = Literal["plain", "packed", "compiled"]
"""The ways to compute a pass, the most widely supported first; `PATHS` has their classes."""

Fast = bool | Literal["auto"] | PathName
"""The setting: a path, or true for ``packed`` and false for ``plain``."""

DEFAULT_PATH: PathName = "packed"
"""The path of ``auto`` where none is chosen by timing."""


def path_of(fast: Fast) -> PathName:
    """The path that the setting names, or the default."""
    named: dict[bool | str, PathName] = {True: "packed", False: "plain", "auto": DEFAULT_PATH}
    return named.get(fast, cast(PathName, fast))


class Seq2SeqStudent(Student):
    """A T5 (v1.0, v1.1, Flan), ByT5 or mT5.

    Passes are computed as ``fast`` says, in training mode on ``path`` and else on ``evaluation_path``; with ``auto`` a
    run changes them. Where a path does not support the student or a batch, the one before it in `PATHS` is taken, and
    the run says why.
    """

    attentions = ("encoder", "decoder", "cross")
    casts: Casts | None = None
    dropping: Dropping | None = None

    def __init__(self, model: PreTrainedModel, tokens: Tokens, *, fast: Fast = "auto") -> None:
        names = "pad_token_id", "eos_token_id", "decoder_start_token_id"
        special = GenerationConfig(**{name: getattr(model.config, name) for name in names})
        super().__init__(model, tokens, copy.deepcopy(special))
        self.generation = special
        check_choice("fast", fast, (True, False, "auto", *get_args(PathName)))
        self.path = self.evaluation_path = path_of(fast)
        self._warned: set[str] = set()

    def layers(self, stack: Stack) -> int:
        network: Any = self.network
        return len(getattr(network, stack).block)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """See `Student.final_norm`; dropout follows it."""
        stack: Any = self.network.decoder
        normed: Tensor = stack.dropout(stack.final_layer_norm(hidden))
        return normed

    def hold_weights(self, held: bool) -> None:
        """See `Student.hold_weights`: the passes in between share the casts of autocast."""
        self.casts = Casts() if held else None

    def _decoder_layers(self) -> tuple[nn.Module, str]:
        return cast(nn.Module, self.network.decoder), "block"

    @contextmanager
    def drop_tokens(self, after: int, share: float) -> Iterator[None]:
        """See `Student.drop_tokens`; passes in the context are packed."""
        check_int("drop_tokens: after", after, 1, self.layers("encoder"))
        check_fraction("drop_tokens: share", share)
        before, self.dropping = self.dropping, Dropping(after, share) if share < 1 else None
        try:
            yield
        finally:
            self.dropping = before

    def forward(self, batch: TaskBatch) -> "Seq2SeqPass":
        """The lazy pass over a batch."""
        if self.dropping is not None:
            return self._shorter(batch)
        return PATHS[self.paths(batch, self.path if self.training else self.evaluation_path)[-1]](self, batch)

    def _shorter(self, batch: TaskBatch) -> "PackedPass":
        if self.training:
            raise RuntimeError("tokens are dropped in evaluation mode alone")
        if (why := PackedPass.reason_against(self, batch)) is not None:
            raise UserError(f"drop_tokens: only the packed path drops tokens, which is off: {why}")
        return PackedPass(self, batch)

    def paths(self, batch: TaskBatch, last: PathName) -> list[PathName]:
        """The paths up to ``last`` that support student and batch; each needs what those before it need."""
        found: list[PathName] = []
        for name, kind in PATHS.items():
            if (why := kind.reason_against(self, batch)) is not None:
                self.say_off(why, "off" if len(found) < 2 else f"not {name}")
                break
            found.append(name)
            if name == last:
                break
        return found

    def say_off(self, why: str, state: str = "off") -> bool:
        """Log once why the fast path is off, or in which state it is."""
        if why not in self._warned:
            rank_zero_info(f"fast: {state}, {why}")
            self._warned.add(why)
        return False


class Seq2SeqPass(Pass):
    """Common parts of both passes."""

    student: Seq2SeqStudent

    def __init__(self, student: Seq2SeqStudent, batch: TaskBatch) -> None:
        super().__init__(student, batch)
        self.model: Any = student.network

    @classmethod
    def reason_against(cls, student: Seq2SeqStudent, batch: TaskBatch) -> str | None:
        """Why this path does not support a student or a batch that the one before it supports; ``None`` if it does."""
        return None

    def states(self, task: str, layer: int = -1) -> Tensor:
        return into_head(self.model, super().states(task, layer))

    def pairs(self, task: str, kind: Attention) -> Tensor:
        inputs = self.inputs(task)
        source, target = inputs["attention_mask"] != 0, inputs["labels"] != IGNORE_INDEX
        queries, keys = (source if kind == "encoder" else target), (target if kind == "decoder" else source)
        pairs = queries[:, :, None] & keys[:, None]
        return pairs.tril() if kind == "decoder" else pairs

    def _prompts(self, inputs: TaskInputs) -> tuple[Tensor, Tensor, int]:
        # the first token of an answer is the start token
        return inputs["input_ids"], inputs["attention_mask"], 1

    def _start(self, task: str) -> Tensor:
        """The decoder's first input of each row, ``(rows,)``."""
        ids = self.inputs(task)["input_ids"]
        return ids.new_full((len(ids),), self.model.config.decoder_start_token_id)


class PlainPass(Seq2SeqPass):
    """Hugging Face's own forward on padded rows, for all that the fast path does not support."""

    @cached_property
    def _forward(self) -> tuple[Seq2SeqLMOutput, list[Call]]:
        rows = join(self._with_rows())
        with recording() as calls:
            output: Seq2SeqLMOutput = self.model(
                input_ids=rows["input_ids"],
                attention_mask=rows["attention_mask"],
                decoder_input_ids=self.model.prepare_decoder_input_ids_from_labels(rows["labels"]),
                use_cache=False,
                output_hidden_states=True,
            )
        return output, calls

    def _call(self, layer: int, kind: Attention) -> Call:
        _, calls = self._forward
        if not calls:
            return super()._call(layer, kind)
        first = self.student.layers("encoder")
        # each layer of the decoder attends to itself, then to the encoder
        places = {"encoder": layer - 1, "decoder": first + 2 * layer - 2, "cross": first + 2 * layer - 1}
        return calls[places[kind]]

    def _targets(self, task: str, padded: Any) -> Tensor:
        return self._own(task, padded, self.inputs(task)["labels"] != IGNORE_INDEX)

    def _make_logits(self, task: str) -> Tensor:
        return self._targets(task, self._forward[0].logits)

    def hidden(self, task: str, layer: int) -> Tensor:
        return self._targets(task, cast(Any, self._forward[0].decoder_hidden_states)[layer])

    def encoder(self, task: str, layer: int = -1) -> Tensor:
        real = self.inputs(task)["attention_mask"] != 0
        return self._own(task, cast(Any, self._forward[0].encoder_hidden_states)[layer], real)

    def stepper(self, task: str) -> Stepper:
        mask = self.inputs(task)["attention_mask"]
        encoded = self.model.get_encoder()(input_ids=self.inputs(task)["input_ids"], attention_mask=mask)
        cache: Any = None

        def step(ids: Tensor | None) -> Tensor:
            nonlocal cache
            output = self.model(
                encoder_outputs=encoded,
                attention_mask=mask,
                decoder_input_ids=(self._start(task) if ids is None else ids)[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            return cast(Tensor, output.logits[:, -1])

        return step


class PackedPass(Seq2SeqPass):
    """The fast path: all tasks go through each layer together, without padding."""

    def __init__(self, student: Seq2SeqStudent, batch: TaskBatch) -> None:
        super().__init__(student, batch)
        if student.device.type == "cpu":
            keep_freed_memory()

    @classmethod
    def reason_against(cls, student: Seq2SeqStudent, batch: TaskBatch) -> str | None:
        if student.sharded:
            # a sharded parameter is complete only during its block's own forward
            return "the parameters are sharded"
        if student.records_attention:
            return "an objective reads attention scores"
        if (why := reason_against(student.network)) is not None:
            return why
        if not fits(inputs for inputs in batch.values() if len(inputs["labels"])):
            return "for a batch, it has padding before a source's end, or a row without a source"
        return None

    def _with_target(self) -> list[TaskInputs]:
        """The tasks that have rows, of which at least one has a target."""
        tasks = self._with_rows()
        if not any(any(targets_of(inputs).ends) for inputs in tasks):
            # one unused position, so that every parameter has a gradient
            tasks.append(filler(self.student.device))
        return tasks

    @cached_property
    def _casts(self) -> Casts:
        return self.student.casts or Casts()  # of this pass alone, if weights may change after it

    @cached_property
    def _forward(self) -> tuple[Encoded, list[Tensor]]:
        self._deterministic = not self.model.training
        encoded, hidden, self._labels = encode_and_decode(
            self.model, self._with_target(), self._casts, self.student.dropping
        )
        return encoded, hidden

    @cached_property
    def _losses(self) -> Tensor:
        _, hidden = self._forward
        return token_losses(self.model.lm_head, into_head(self.model, hidden[-1]), self._labels, self._casts)

    @cached_property
    def _places(self) -> dict[str, slice]:
        """Where each task's targets are, holes in them included, among those of all tasks."""
        places, first = {}, 0
        for task, inputs in self.batch.items():
            places[task] = slice(first, first + sum(targets_of(inputs).ends))
            first = places[task].stop
        return places

    def _targets(self, task: str, packed: Tensor) -> Tensor:
        """The task's part of all target tokens ``(tokens, ...)``."""
        inputs = self.inputs(task)
        own = packed[self._places[task]]
        if targets_of(inputs).whole:
            return own
        return own[self._labels[self._places[task]] != IGNORE_INDEX]

    def token_losses(self, task: str) -> Tensor:
        """See `Pass.token_losses`; those of all tasks are computed together, without storing logits."""
        return self._targets(task, self._losses)

    def hidden(self, task: str, layer: int) -> Tensor:
        _, hidden = self._forward
        return self._targets(task, hidden[layer])

    def encoder(self, task: str, layer: int = -1) -> Tensor:
        rows, encoded = self._own_rows(task), self._forward[0]
        start = sum(encoded.packing.lengths[: rows.start])
        return encoded.hidden[layer][start : start + sum(encoded.packing.lengths[rows])]

    def _sources(self, task: str, rows: list[int]) -> tuple[Encoded, list[int]]:
        """Encoded sources, and the numbers of a task's rows among them."""
        if "_forward" in self.__dict__ and self._deterministic:
            return self._forward[0], [self._first_rows[task] + row for row in rows]
        distinct = sorted(set(rows))
        encoded = encode(self.model, [take(self.inputs(task), distinct)], self._casts, self.student.dropping)
        return encoded, [distinct.index(row) for row in rows]

    def _generate(
        self, task: str, rows: list[int], max_new_tokens: int, num_beams: int, process: ProcessLogits | None
    ) -> list[list[int]]:
        greedily = num_beams == 1 and not self.model.training
        if greedily and self.model.generation_config != self.student.generation:
            greedily = self.student.say_off("for generation, which has settings of its own")
        if not greedily and self.student.dropping is not None:
            raise UserError("drop_tokens: texts are generated greedily, with the student's own settings")
        if not greedily:
            return super()._generate(task, rows, max_new_tokens, num_beams, process)
        return greedy(self.model, *self._sources(task, rows), max_new_tokens, process)

    def stepper(self, task: str) -> Stepper:
        start = self._start(task)
        decoder = Decoder(self.model.decoder, *self._sources(task, list(range(len(start)))))

        def step(ids: Tensor | None) -> Tensor:
            states = decoder.step(start if ids is None else ids)
            return self.project(into_head(self.model, states))

        return step

    def _likelihoods(self, task: str, rows: list[int], targets: Sequence[Sequence[int]]) -> Tensor:
        return log_likelihoods(self.model, *self._sources(task, rows), targets, self._casts)


class CompiledPass(PackedPass):
    """The fast path as one compiled graph over all tasks: fewer kernels, for GPUs above all."""

    @classmethod
    def reason_against(cls, student: Seq2SeqStudent, batch: TaskBatch) -> str | None:
        return compiled.reason_against(student.network, [inputs for inputs in batch.values() if len(inputs["labels"])])

    @cached_property
    def _forward(self) -> tuple[Encoded, list[Tensor]]:
        self._deterministic = not self.model.training
        self._has_states = not (self.student.losses_only and self.model.training and torch.is_grad_enabled())
        encoded, hidden, self._labels, self._own_losses = compiled.run(
            self.model, self._with_target(), states=self._has_states
        )
        return encoded, hidden

    @cached_property
    def _losses(self) -> Tensor:
        _ = self._forward
        return self._own_losses

    def hidden(self, task: str, layer: int) -> Tensor:
        self._check_states()
        return super().hidden(task, layer)

    def encoder(self, task: str, layer: int = -1) -> Tensor:
        self._check_states()
        return super().encoder(task, layer)

    def _check_states(self) -> None:
        _ = self._forward
        if not self._has_states:
            raise RuntimeError("the compiled pass has losses alone: set Student.losses_only to False before the pass")


PATHS: dict[PathName, type[Seq2SeqPass]] = {"plain": PlainPass, "packed": PackedPass, "compiled": CompiledPass}
"""Each path's passes, the most widely supported first."""
