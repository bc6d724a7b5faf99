"""The interface of every student: `Student`, and `Pass`, its forward pass over a batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_distill.batch import IGNORE_INDEX, TaskBatch, TaskInputs, filler, pad_targets, sum_rows, take
from lit_distill.errors import UserError
from lit_distill.students.adapters import Adapter, merged
from lit_distill.students.attention import Attention, Call, enable, reason_against
from lit_distill.students.files import StudentRecord
from lit_distill.students.models import record_model, save_model
from lit_distill.students.tokens import Tokens, end_tokens, save_tokenizer, until

ProcessLogits = Callable[[Tensor, int, Tensor], Tensor]
"""``(scores (rows, vocabulary), step, rows (rows,)) -> scores``: changes the scores of the next token.

``step`` is the number of tokens generated so far, ``rows`` are positions among the generated rows, repeated for each
beam.
"""

Stepper = Callable[[Tensor | None], Tensor]
"""The last token of each row, ``(rows,)``, to the logits of the next, ``(rows, vocabulary)``; ``None`` at first."""

Stack = Literal["encoder", "decoder"]

CHOICES_AT_ONCE = 256
"""Maximum targets of one scoring forward, to bound the memory."""


class Pass(ABC):
    """The forward pass of a model over a batch, with teacher forcing.

    Lazy: the model runs at the first access, once, over all tasks of the batch together, so that every result has the
    same dropout masks.

    Results contain real tokens only: the positions whose label is not ``IGNORE_INDEX``, row by row, so that
    ``labels(task)[i]``, ``rows(task)[i]``, ``states(task)[i]`` and ``logits(task)[i]`` belong together. A task without
    rows takes part in the forward too, so that every rank runs it and every parameter has a gradient.

    A task that the batch does not have raises a ``KeyError``.
    """

    def __init__(self, student: "Student", batch: TaskBatch) -> None:
        self.student = student
        self.batch = batch
        self._logits: dict[str, Tensor] = {}
        numbers = [len(inputs["labels"]) for inputs in batch.values()]
        self._first_rows = dict(zip(batch, accumulate(numbers, initial=0), strict=False))

    def inputs(self, task: str) -> TaskInputs:
        """The task's rows."""
        if task not in self.batch:
            raise KeyError(f"no task {task!r} in this batch, which holds {', '.join(self.batch)}")
        return self.batch[task]

    def _own_rows(self, task: str) -> slice:
        """The task's rows among those of all tasks."""
        number, first = len(self.inputs(task)["labels"]), self._first_rows[task]
        return slice(first, first + number)

    def labels(self, task: str) -> Tensor:
        """The target token ids, ``(tokens,)``."""
        labels = self.inputs(task)["labels"]
        return labels[labels != IGNORE_INDEX]

    def rows(self, task: str) -> Tensor:
        """The row of each target token in the task's batch, ``(tokens,)``."""
        return (self.inputs(task)["labels"] != IGNORE_INDEX).nonzero()[:, 0]

    @abstractmethod
    def hidden(self, task: str, layer: int) -> Tensor:
        """The decoder's hidden states at each target token, ``(tokens, d_model)``.

        ``layer`` is as in Hugging Face's ``decoder_hidden_states``: 0 is the embeddings, -1 the last.
        """

    @abstractmethod
    def encoder(self, task: str, layer: int = -1) -> Tensor:
        """Hidden states of each source token (of the prompt, without an encoder), ``(tokens, d_model)``."""

    @abstractmethod
    def pairs(self, task: str, kind: Attention) -> Tensor:
        """Which queries attend to which keys, ``(rows, query_len, key_len)``; without padding.

        Without an encoder there is ``"decoder"`` alone, of prompt and target together.
        """

    def attention(self, task: str, layer: int, kind: Attention) -> Tensor:
        """A layer's attention scores at each of the `pairs`, ``(pairs, heads)``, in the order of ``pairs.nonzero()``.

        Scores are what the softmax is taken of: scaled products of queries and keys, with T5's position bias, without
        the mask. ``layer`` counts from 1. Needs `Student.record_attention` before the pass.
        """
        pairs = self.pairs(task, kind)
        scores = self._call(layer, kind).scores(self._own_rows(task)).permute(0, 2, 3, 1)
        queries, keys = (min(sizes) for sizes in zip(scores.shape[1:3], pairs.shape[1:], strict=True))
        return scores[:, :queries, :keys][pairs[:, :queries, :keys]]

    def _call(self, layer: int, kind: Attention) -> Call:
        """The attention of a layer over the padded rows of all tasks."""
        raise RuntimeError("attention is not recorded: call Student.record_attention before the pass")

    def states(self, task: str, layer: int = -1) -> Tensor:
        """The input of the output head at each target token, ``(tokens, d_model)``.

        With ``layer`` it is that of a decoder which ends after this layer: its states after the final norm.
        """
        hidden = self.hidden(task, layer)
        # the last layer's have gone through it
        return hidden if layer in (-1, self.student.layers("decoder")) else self.student.final_norm(hidden)

    def project(self, states: Tensor) -> Tensor:
        """The output head: states ``(n, d_model)`` to logits ``(n, vocabulary)``, for losses in chunks."""
        logits: Tensor = self.student.network.get_output_embeddings()(states)
        return logits

    def logits(self, task: str) -> Tensor:
        """The logits at each target token, ``(tokens, vocabulary)``; computed at the first call."""
        if task not in self._logits:
            self._logits[task] = self._make_logits(task)
        return self._logits[task]

    def _make_logits(self, task: str) -> Tensor:
        return self.project(self.states(task))

    def token_losses(self, task: str) -> Tensor:
        """Cross-entropy of each target token in nats, ``(tokens,)``, float32."""
        return F.cross_entropy(self.logits(task).float(), self.labels(task), reduction="none")

    def loss(self, task: str) -> Tensor:
        """Mean of `token_losses` (CE in Eq. 3 and 4 of the paper); without targets 0, with a gradient of 0."""
        losses = self.token_losses(task)
        return losses.sum() / max(len(losses), 1)

    def _with_rows(self) -> list[TaskInputs]:
        """The tasks that have rows; without any a dummy row, which nobody reads."""
        return [inputs for inputs in self.batch.values() if len(inputs["labels"])] or [filler(self.student.device)]

    def _own(self, task: str, padded: Tensor, real: Tensor) -> Tensor:
        """The task's real positions, out of ``(rows of all tasks, length, size)``."""
        width = min(padded.shape[1], real.shape[1])
        return padded[self._own_rows(task), :width][real[:, :width]]

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
        """Generate a target for each row, greedily or with beams, without gradients and in evaluation mode.

        Args:
            task: whose sources to use; already encoded ones are not encoded again.
            rows: rows of the task's batch, also several times; all by default.
            max_new_tokens: maximum tokens of a target, including end-of-sequence.
            num_beams: 1 is greedy.
            process_logits: changes the scores of the next token.

        Returns:
            The token ids of each row up to end-of-sequence, for `Tokens.decode`.
        """
        chosen = list(range(len(self.inputs(task)["labels"])) if rows is None else rows)
        if not chosen:
            return []
        ends = end_tokens(self.student.network.generation_config)
        return [until(ends, ids) for ids in self._generate(task, chosen, max_new_tokens, num_beams, process_logits)]

    def _generate(
        self, task: str, rows: list[int], max_new_tokens: int, num_beams: int, process: ProcessLogits | None
    ) -> list[list[int]]:
        """Hugging Face's ``generate``."""
        ids, mask, first = self._prompts(take(self.inputs(task), rows))

        def processor(seen: Tensor, scores: Tensor) -> Tensor:
            # beams of a row are consecutive
            own = torch.arange(len(scores), device=scores.device) // num_beams
            return scores if process is None else process(scores, seen.shape[1] - first, own)

        found: Any = self.student.network.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=min(max_new_tokens, max(self.student.most_positions - first, 1)),
            num_beams=num_beams,
            do_sample=False,
            logits_processor=[processor],
            # where a forward is a collective, all ranks must generate to the longest length
            synced_gpus=self.student.sharded,
        )
        return cast(list[list[int]], found[:, first:].tolist())

    @abstractmethod
    def _prompts(self, inputs: TaskInputs) -> tuple[Tensor, Tensor, int]:
        """The input of ``generate``: ids and mask ``(rows, length)``, and where the target begins in its output."""

    @abstractmethod
    def stepper(self, task: str) -> Stepper:
        """The model one target token at a time, from a cache, for all rows of a task: to decode beside another model.

        Call it without gradients, in evaluation mode, and not where parameters are sharded.
        """

    @torch.no_grad()
    def score(self, task: str, choices: Sequence[tuple[str, ...]]) -> list[list[float]]:
        """Log-likelihood of each row's choices as whole targets, including end-of-sequence, in nats.

        ``choices`` has a tuple for each row of the task's batch, which may be empty.
        """
        rows = [row for row, own in enumerate(choices) for _ in own]
        targets = self.student.tokens.targets([choice for own in choices for choice in own], max_length=10**9).ids
        passes = -(-len(rows) // CHOICES_AT_ONCE)
        if self.student.sharded and torch.distributed.is_initialized():
            # where a forward is a collective, all ranks must run equally many
            most = torch.tensor(passes, device=self.student.device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            passes = int(most)
        scores: list[float] = []
        for start in range(0, passes * CHOICES_AT_ONCE, CHOICES_AT_ONCE):
            part = slice(start, start + CHOICES_AT_ONCE)
            scores += self._likelihoods(task, rows[part], targets[part]).tolist()
        each = iter(scores)
        return [[next(each) for _ in own] for own in choices]

    def _likelihoods(self, task: str, rows: list[int], targets: list[list[int]]) -> Tensor:
        """Log-likelihood of each row's target, ``(rows,)``; without rows a dummy row goes through the model."""
        inputs = take(self.inputs(task), rows or [0])
        inputs["labels"] = pad_targets(targets, self.student.device)
        scored = type(self)(self.student, {task: inputs})
        return -sum_rows(scored.token_losses(task), scored.rows(task), len(inputs["labels"]))[: len(rows)]


class Student(nn.Module, ABC):
    """A Hugging Face model, or PEFT's wrapper around it, with its tokens; `lit_distill.students.load` makes one.

    ``special`` tokens replace the model's generation settings, so that generation depends on our arguments alone.
    """

    attentions: tuple[Attention, ...]  # the kinds that it has
    records_attention: bool = False  # whether passes give attention scores
    losses_only: bool = False  # whether nothing but `Pass.token_losses` is read of a pass in training
    sharded: bool = False  # whether parameters are sharded over ranks, so that each forward is a collective
    adapter: Adapter | None = None  # the adapter that is trained, if any
    most_positions: int = 2**30  # maximum tokens of a prompt with its target; T5's relative positions have none

    def __init__(self, model: PreTrainedModel, tokens: Tokens, special: GenerationConfig) -> None:
        super().__init__()
        self.model = model
        self.tokens = tokens
        self.network.generation_config = special

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.tokens.tokenizer

    @property
    def network(self) -> PreTrainedModel:
        """The Hugging Face model without PEFT's wrapper."""
        return cast(PreTrainedModel, self.model.get_base_model()) if isinstance(self.model, PeftModel) else self.model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @property
    def width(self) -> int:
        """Size of a hidden state, ``d_model``."""
        width: int = self.network.config.get_text_config().hidden_size
        return width

    def record_attention(self, who: str) -> None:
        """Let passes give `Pass.attention`. Raises a ``UserError`` that begins with ``who`` if the model cannot."""
        if (why := reason_against(self.network)) is not None:
            raise UserError(f"{who}: no attention scores: {why}")
        enable(self.network)
        self.records_attention = True

    @property
    def heads(self) -> int:
        """Number of heads of each layer's attention."""
        heads: int = self.network.config.get_text_config().num_attention_heads
        return heads

    @abstractmethod
    def layers(self, stack: Stack) -> int:
        """Number of layers of the encoder or decoder; without an encoder both are the same stack."""

    @abstractmethod
    def forward(self, batch: TaskBatch) -> Pass:
        """The lazy pass over a batch."""

    @abstractmethod
    def final_norm(self, hidden: Tensor) -> Tensor:
        """The decoder's norm after its last layer, applied to states ``(tokens, d_model)``."""

    @abstractmethod
    def _decoder_layers(self) -> tuple[nn.Module, str]:
        """The module that runs the decoder's layers, and the name of their list in it."""

    def hold_weights(self, held: bool) -> None:
        """No weight changes from a call with ``True`` to one with ``False``: what is computed from them may be kept."""

    @contextmanager
    def exit_at(self, layer: int) -> Iterator[None]:
        """In the context the decoder ends after this layer; the final norm and the output head stay."""
        stack, name = self._decoder_layers()
        layers: Any = getattr(stack, name)
        setattr(stack, name, layers[:layer])
        try:
            yield
        finally:
            setattr(stack, name, layers)

    @contextmanager
    def drop_tokens(self, after: int, share: float) -> Iterator[None]:
        """In the context each row keeps this share of its source tokens after a layer of the encoder, from 1.

        Those that receive the most attention stay, see `lit_distill.students.fast.dropping`. In evaluation mode, for
        scores and greedy decoding; raises a ``UserError`` where a student cannot.
        """
        if share < 1:
            raise UserError("drop_tokens: a decoder-only student has no encoder whose tokens could be dropped")
        yield

    def save(self, folder: Path) -> None:
        """Save model (with the adapter merged, or the adapter alone) and tokenizer in the Hugging Face format."""
        if self.adapter is None:
            save_model(self.model, self.tokenizer, folder)
        elif self.adapter.export == "merged":
            save_model(merged(cast(PeftModel, self.model)), self.tokenizer, folder)
        else:
            self.model.save_pretrained(folder)
            save_tokenizer(self.tokenizer, folder)

    def record(self) -> StudentRecord:
        """Configuration, tokenizer and adapter in plain types, for checkpoints."""
        record = record_model(self.network, self.tokenizer)
        return record if self.adapter is None else {**record, "adapter": asdict(self.adapter)}
