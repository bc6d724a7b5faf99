"""What a student is to the rest of the package, whatever its family: a `Student`, and a `Pass` of one batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_distill.batch import IGNORE_INDEX, TaskBatch, TaskInputs
from lit_distill.students.adapters import Adapter, merged
from lit_distill.students.files import StudentRecord, save_tokenizer
from lit_distill.students.models import record_model, save_model
from lit_distill.students.tokens import Tokens

ProcessLogits = Callable[[Tensor, int, Tensor], Tensor]
"""``(scores (rows, vocabulary), step, rows (rows,)) -> scores``: changes the scores that the next token is chosen by.

``step`` counts the tokens generated before this one, ``rows`` are positions in the task's batch; with beams a row
appears once for each beam.
"""


Likelihood = Callable[[list[int], list[list[int]]], Tensor]
"""``(rows, their targets) -> log-likelihoods (targets,)``; of no rows it makes a forward all the same."""

CHOICES_AT_ONCE = 256
"""Targets of one scoring forward: bounds the memory, whatever the batch size and the number of choices."""


class Pass(ABC):
    """One batch through one model under teacher forcing.

    Making one costs nothing. The model runs once, over all tasks of the batch together, when something of it is first
    read; everything that is read comes from that one forward, with the same dropout masks.

    Only real tokens appear: a target's tokens are the positions whose label is not ``IGNORE_INDEX``, row after row,
    so that ``labels(task)[i]``, ``rows(task)[i]``, ``states(task)[i]`` and ``logits(task)[i]`` belong together.
    A task without rows takes part in the forward all the same (every rank runs it, every parameter has a gradient).

    A task that the batch does not hold at all raises a ``KeyError`` that names those it holds.
    """

    def __init__(self, student: "Student", batch: TaskBatch) -> None:
        self.student = student
        self.batch = batch
        self._logits: dict[str, Tensor] = {}

    def inputs(self, task: str) -> TaskInputs:
        """The task's rows.

        Raises:
            KeyError: the batch does not hold the task.
        """
        if task not in self.batch:
            raise KeyError(f"no task {task!r} in this batch, which holds {', '.join(self.batch)}")
        return self.batch[task]

    def labels(self, task: str) -> Tensor:
        """The target token ids, ``(tokens,)``."""
        labels = self.inputs(task)["labels"]
        return labels[labels != IGNORE_INDEX]

    def rows(self, task: str) -> Tensor:
        """The row of the task's batch that each target token belongs to, ``(tokens,)``."""
        return (self.inputs(task)["labels"] != IGNORE_INDEX).nonzero()[:, 0]

    @abstractmethod
    def states(self, task: str) -> Tensor:
        """What the output head reads at each target token, ``(tokens, d_model)``."""

    @abstractmethod
    def project(self, states: Tensor) -> Tensor:
        """The output head: states ``(n, d_model)`` to logits ``(n, vocabulary)``, so that a loss may go in chunks."""

    def logits(self, task: str) -> Tensor:
        """The logits that each target token is predicted with, ``(tokens, vocabulary)``; made at the first call."""
        if task not in self._logits:
            self._logits[task] = self._make_logits(task)
        return self._logits[task]

    def _make_logits(self, task: str) -> Tensor:
        return self.project(self.states(task))

    @abstractmethod
    def token_losses(self, task: str) -> Tensor:
        """The cross-entropy of each target token in nats, ``(tokens,)``, float32; keeps no logits."""

    def loss(self, task: str) -> Tensor:
        """The mean of `token_losses` (the paper's CE of Eq. 3 and 4); 0, with a gradient of 0, without a target."""
        losses = self.token_losses(task)
        return losses.sum() / max(len(losses), 1)

    @abstractmethod
    def hidden(self, task: str, layer: int) -> Tensor:
        """The decoder's hidden states at each target token, ``(tokens, d_model)``.

        Args:
            task: the task.
            layer: as in Hugging Face's ``decoder_hidden_states``: 0 is the embeddings, -1 the last.
        """

    @abstractmethod
    def encoder(self, task: str, layer: int = -1) -> Tensor:
        """The hidden states of each source token (of the prompt, where there is no encoder), ``(tokens, d_model)``."""

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
        """Write a target for each row, greedily or with beams; without gradient, in evaluation mode.

        Args:
            task: whose sources are read; those that this pass has encoded are not encoded again.
            rows: rows of the task's batch; all of them by default.
            max_new_tokens: tokens of a target at most, the end-of-sequence token included.
            num_beams: 1 is greedy.
            process_logits: changes the scores of the next token.

        Returns:
            For each row its token ids, which may end in padding; `Tokens.decode` makes text of them.
        """
        chosen = list(range(len(self.inputs(task)["labels"])) if rows is None else rows)
        if not chosen:
            return []
        numbers, process = torch.tensor(chosen, device=self.inputs(task)["labels"].device), None
        if process_logits is not None:

            def process(scores: Tensor, step: int, own: Tensor) -> Tensor:
                return process_logits(scores, step, numbers[own])

        return self._generate(task, chosen, max_new_tokens, num_beams, process)

    def _generate(
        self, task: str, rows: list[int], max_new_tokens: int, num_beams: int, process: ProcessLogits | None
    ) -> list[list[int]]:
        """By Hugging Face's ``generate``; ``process`` numbers the rows from 0."""
        ids, mask, first = self._prompts(task, rows)

        def processor(seen: Tensor, scores: Tensor) -> Tensor:
            # the beams of a row follow each other
            own = torch.arange(len(scores), device=scores.device) // num_beams
            return scores if process is None else process(scores, seen.shape[1] - first, own)

        found: Any = self.student.network.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
            logits_processor=[processor],
            # ranks generate different lengths; where a forward is a collective, all have to go on to the longest
            synced_gpus=self.student.sharded,
        )
        return cast(list[list[int]], found[:, first:].tolist())

    @abstractmethod
    def _prompts(self, task: str, rows: Sequence[int]) -> tuple[Tensor, Tensor, int]:
        """What ``generate`` reads: ids and mask ``(rows, length)``, and where the target begins in its answer."""

    @torch.no_grad()
    def score(self, task: str, choices: Sequence[tuple[str, ...]]) -> list[list[float]]:
        """The log-likelihood of each row's choices as whole targets, end-of-sequence token included, in nats.

        Args:
            task: whose sources are read; they are encoded once.
            choices: one tuple for each row of the task's batch, which may be empty.
        """
        flat = [(row, choice) for row, own in enumerate(choices) for choice in own]
        targets = self.student.tokens.targets([choice for _, choice in flat], max_length=10**9).ids
        passes = -(-len(flat) // CHOICES_AT_ONCE)
        if self.student.sharded and torch.distributed.is_initialized():
            # where a forward is a collective, every rank makes as many as the one with the most choices
            most = torch.tensor(passes, device=self.inputs(task)["labels"].device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            passes = int(most)
        if not passes:
            return [[] for _ in choices]
        likelihood, scores = self.likelihood(task), []
        for start in range(0, passes * CHOICES_AT_ONCE, CHOICES_AT_ONCE):
            part = slice(start, start + CHOICES_AT_ONCE)
            scores += likelihood([row for row, _ in flat[part]], targets[part]).tolist()
        each = iter(scores)
        return [[next(each) for _ in own] for own in choices]

    @abstractmethod
    def likelihood(self, task: str) -> Likelihood:
        """Encode a task's sources, to be scored with."""


class Student(nn.Module, ABC):
    """A Hugging Face model with its tokens. `lit_distill.students.load` makes one by name."""

    model: PreTrainedModel
    """The model itself, or PEFT's wrapper around it; the only thing with parameters."""
    tokens: Tokens
    sharded: bool = False
    """Whether the parameters are spread over ranks, so that each forward is a collective; its module sets it."""
    adapter: Adapter | None = None
    """The adapter that is trained in place of the weights, if there is one."""
    compiles: bool = False
    """Whether the forward that trains is compiled."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.tokens.tokenizer

    @abstractmethod
    def forward(self, batch: TaskBatch) -> Pass:
        """A pass of this batch; nothing runs before something of it is read."""

    @property
    def network(self) -> PreTrainedModel:
        """The Hugging Face model, also where an adapter is around it."""
        return cast(PreTrainedModel, self.model.get_base_model()) if isinstance(self.model, PeftModel) else self.model

    def save(self, folder: Path) -> None:
        """Save model and tokenizer in the Hugging Face format; an adapter alone or merged into the model."""
        if self.adapter is None:
            save_model(self.model, self.tokenizer, folder)
        elif self.adapter.export == "merged":
            save_model(merged(cast(PeftModel, self.model)), self.tokenizer, folder)
        else:
            self.model.save_pretrained(folder)
            save_tokenizer(self.tokenizer, folder)

    def record(self) -> StudentRecord:
        """What a checkpoint keeps beside the weights: configuration, tokenizer and adapter, in plain types."""
        record = record_model(self.network, self.tokenizer)
        return record if self.adapter is None else {**record, "adapter": self.adapter.plain()}

    def training_forward(self, module: nn.Module) -> Callable[..., Any]:
        """A part's forward, compiled once for all shapes where that was asked for and gradients are."""
        if not (self.compiles and torch.is_grad_enabled()):
            return module
        if "_compiled" not in self.__dict__:
            # not as an attribute of a module: what is compiled would be registered as a second model
            self.__dict__["_compiled"] = torch.compile(module, dynamic=True)
        return cast(Callable[..., Any], self.__dict__["_compiled"])

    def __getstate__(self) -> dict[str, Any]:
        # a copy compiles its own model
        state = super().__getstate__()  # type: ignore[no-untyped-call]  # of `nn.Module`
        return {name: value for name, value in state.items() if name != "_compiled"}
