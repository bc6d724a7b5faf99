"""A module's use of the fast path: whether it applies, and the encoder's states that one evaluation batch shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import T5ForConditionalGeneration

from lit_distill.batch import IGNORE_INDEX, TaskBatch, TaskInputs, filler, take, targets_of
from lit_distill.students.fast.head import token_losses
from lit_distill.students.fast.memory import keep_freed_memory
from lit_distill.students.fast.packed import Encoded, encode, encode_and_decode
from lit_distill.students.fast.support import fits, reason_against, reason_against_decoding
from lit_distill.students.fast.t5 import into_head

if TYPE_CHECKING:
    from lit_distill.modules.base import DistillModule


def target_losses(
    student: T5ForConditionalGeneration, tasks: Sequence[TaskInputs], encoded: Encoded | None = None
) -> tuple[Tensor, ...]:
    """The cross-entropy at each target position of several tasks, in one pass; ``encoded`` are all of the sources."""
    count = len(tasks)
    if not any(any(targets_of(inputs).ends) for inputs in tasks):
        # one position that nobody reads, so that every parameter has a gradient
        tasks, encoded = [*tasks, filler(cast(int, student.config.pad_token_id), student.device)], None
    _, hidden, targets = encode_and_decode(student, tasks, encoded)
    losses = token_losses(student.lm_head, into_head(student, hidden[-1]), targets.labels)
    return losses.split(targets.task_tokens)[:count]


class FastPath:
    """Where a module enters `lit_distill.students.fast`.

    Args:
        module: whose student it is.
        wanted: whether it is switched on.
    """

    def __init__(self, module: DistillModule, *, wanted: bool) -> None:
        self._module = module
        self._wanted = wanted
        self._told: set[str] = set()
        self._shared: tuple[Encoded, dict[int, int]] | None = None

    def prepare(self, device: torch.device) -> None:
        """Before a stage of the trainer on this device."""
        if self._wanted and device.type == "cpu":
            keep_freed_memory()

    def applies(self, tasks: Sequence[TaskInputs]) -> bool:
        """Whether these rows go through the fast path; each reason against it is told once."""
        if not self._wanted:
            return False
        if self._module.hparams["compile"] and torch.is_grad_enabled():
            return self._off("off in training, compile stands in its place")
        # a sharded parameter is whole only while its block's own forward runs
        reason = "the parameters are sharded" if self._module.sharded else reason_against(self._module.student)
        if reason is not None:
            return self._off(f"off, {reason}")
        if not fits(tasks):
            return self._off("off for a batch, it has padding before a source's end, or a row without a source")
        return True

    def applies_to_losses(self, tasks: Sequence[TaskInputs]) -> bool:
        """Whether these rows' losses come from the fast path, which makes no logits that a method could change."""
        if self._wanted and self._module.overrides("task_logits"):
            return self._off(f"off for losses, {type(self._module).__name__} has a task_logits of its own")
        return self.applies(tasks)

    def decodes(self, tasks: Sequence[TaskInputs]) -> bool:
        """Whether targets of these rows are decoded here, greedily."""
        if self._module.student.training or not self.applies(tasks):
            return False
        reason = reason_against_decoding(self._module.student)
        return reason is None or self._off(f"off for generation, {reason}")

    def _off(self, why: str) -> bool:
        if why not in self._told:
            rank_zero_info(f"fast: {why}")
            self._told.add(why)
        return False

    def losses(self, tasks: Sequence[TaskInputs]) -> list[Tensor]:
        """Each task's mean cross-entropy over its target tokens, all in one pass; 0 without any."""
        student = self._module.student
        encoded, first = self._shared or (None, {})
        ours = [inputs for inputs in tasks if id(inputs) in first]
        # a task that an evaluation leaves out is a row that counts nothing, which nobody has encoded
        if [id(inputs) for inputs in ours] != list(first):
            ours = []
        others = [inputs for inputs in tasks if all(inputs is not one for one in ours)]
        found: dict[int, Tensor] = {}
        if encoded is not None and ours:
            losses = target_losses(student, ours, encoded)
            found |= {id(inputs): own for inputs, own in zip(ours, losses, strict=True)}
        if others:
            losses = target_losses(student, others)
            found |= {id(inputs): own for inputs, own in zip(others, losses, strict=True)}
        return [found[id(inputs)].sum() / (inputs["labels"] != IGNORE_INDEX).sum().clamp(min=1) for inputs in tasks]

    def encoded(self, inputs: TaskInputs, rows: Sequence[int]) -> tuple[Encoded, list[int]]:
        """The encoder's states of these rows of a task, and the rows' numbers among them."""
        if self._shared is not None and id(inputs) in self._shared[1]:
            first = self._shared[1][id(inputs)]
            return self._shared[0], [first + row for row in rows]
        if len(rows) < len(inputs["labels"]):
            inputs = take(inputs, rows)
            rows = range(len(rows))
        return encode(self._module.student, [inputs]), list(rows)

    @contextmanager
    def sharing(self, batch: TaskBatch) -> Iterator[None]:
        """Within it, losses and answers of this evaluation batch use one pass over the encoder.

        Not where a method computes them in its own way: that may change the batch, or the student, in between.
        """
        tasks = [batch[task] for task in self._module.active_tasks if task in batch]
        own = self._module.overrides("loss_terms", "task_losses", "task_loss", "task_logits", "term_counts", "answers")
        if own or torch.is_grad_enabled() or not tasks or not self.applies(tasks):
            yield
            return
        first, rows = {}, 0
        for inputs in tasks:
            first[id(inputs)] = rows
            rows += len(inputs["labels"])
        self._shared = encode(self._module.student, tasks), first
        try:
            yield
        finally:
            self._shared = None
