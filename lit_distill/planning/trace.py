"""One optimizer step of a module, by the real trainer, whose memory is counted and which computes nothing."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from lit_distill.batch import TaskBatch
from lit_distill.modules.base import DistillModule
from lit_distill.modules.training import Training
from lit_distill.planning import heap
from lit_distill.planning.tracker import Part, Phase, Tracker
from lit_distill.planning.trainer import silent, take_steps
from lit_distill.students.fast import products
from lit_distill.students.seq2seq import PackedPass
from lit_distill.students.sharding import deferred

STATIC = ("weights", "gradients", "optimizer", "teacher")
"""Parts that do not grow with the batch; a teacher's activations are small beside its weights."""

TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64, "64": torch.float64}
"""Precisions in which the trainer converts the weights, and their dtypes."""


@dataclass(frozen=True)
class Traced:
    """What an optimizer step needs, after the first one."""

    peaks: Mapping[Phase, Mapping[Part, int]]  # bytes of each part where they are most in all
    flops: int  # operations of the matrix products and the attention of one micro-batch
    heap: int | None  # bytes by which the C library's heap grows; `None` where that cannot be told

    def grown(self, by: float) -> "Traced":
        """For a batch of so many times the tokens."""
        own = self.peaks["pass"]
        static = sum(size for part, size in own.items() if part in STATIC)
        peak = {part: size if part in STATIC else int(size * by) for part, size in own.items()}
        heap = None if self.heap is None else int(static + (self.heap - static) * by)
        return replace(self, peaks={**self.peaks, "pass": peak}, heap=heap)


def trace(
    module: DistillModule,
    data: Any,
    batch: TaskBatch,
    settings: Mapping[str, Any],
    *,
    sharded: bool = False,
    with_heap: bool = True,
) -> Traced:
    """The memory of an optimizer step over this micro-batch, taken twice if micro-batches are accumulated.

    Objectives do not prepare the step: what they sample is taken to be as long as the data's targets.

    Args:
        module: built within `deferred`; it has no weights afterwards either.
        data: its data module.
        batch: the micro-batch.
        settings: the trainer's, of the names `lit_distill.planning.trainer.SETTINGS`.
        sharded: take the ways of a student whose parameters are sharded.
        with_heap: also replay the heap of the CPU.
    """
    accumulate = min(settings["accumulate_grad_batches"], 2)
    tracker = Tracker(module.student.network.config.get_text_config().vocab_size)
    watch = _Watch(tracker)
    with ExitStack() as stack:
        stack.enter_context(silent())
        with deferred():
            module.teachers.load(module.student)
        for weighed in module.teachers.unweighed():
            weighed.similarities = [1.0] * len(weighed.settings.names)
        for group in module.teachers.groups.values():
            for model in group.models.values():
                tracker.give(model.student, "teacher")
        if module.student.adapter is not None and not sharded:
            # `deferred` gives an adapter its student's dtype, which only sharding needs
            for parameter in module.student.trained:
                parameter.data = parameter.data.float()
        _shape(module)
        if (dtype := TRUE.get(str(settings["precision"]))) is not None:
            module.to(dtype)
        tracker.give(module, "weights")
        # without weights nothing is timed: `auto` is its default
        stack.enter_context(patch.multiple(module, prepare=lambda window: None, choose_path=lambda *_: None))
        stack.enter_context(patch.object(products, "onednn_is_faster", lambda: False))
        if getattr(module.student, "path", "") == "compiled":
            # nothing can be compiled in this mode
            stack.enter_context(patch.object(module.student, "path", "packed"))
        if sharded:
            stack.enter_context(patch.object(Training, "sharded", True))
        stack.enter_context(tracker)
        take_steps(module, data, batch, {**settings, "accumulate_grad_batches": accumulate}, watch)
        packed = isinstance(module.student(batch), PackedPass)
    # in later steps the optimizer's states are there from the beginning
    states: Counter[Part] = Counter({"optimizer": tracker.living("optimizer")})
    peaks: dict[Phase, Mapping[Part, int]] = {
        "pass": tracker.peaks["pass"] + states,
        "update": tracker.peaks["update"],
    }
    return Traced(peaks, tracker.flops // accumulate, _heap(watch, keeps=packed) if with_heap else None)


def _shape(module: DistillModule) -> None:
    """Give the objectives' parameters their shapes, without weights."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if isinstance(parameter, UninitializedParameter):
                made: Any = UninitializedParameter
                part._parameters[name] = made(parameter.requires_grad, device="meta")
    for objective in module.objectives:
        objective.setup(module.student, module.teachers)


class _Watch(Callback):
    """Tells the tracker which tensors are gradients and the optimizer's states, and when the optimizer steps."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self.events: list[tuple[int, int]] = []  # the tracker's, of the whole step
        self.kept: set[int] = set()  # numbers of what stays for the next one

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # with those of objectives
        self._tracker.hold(pl_module.parameters(), "weights")
        for parameter in pl_module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._on_gradient)
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._on_step)

    def _on_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._tracker.hold([parameter.grad], "gradients")

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        self._tracker.phase = "update"

    def _on_step(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        states = (value for state in optimizer.state.values() for value in state.values())
        self._tracker.hold((value for value in states if isinstance(value, Tensor)), "optimizer")
        self.events = list(self._tracker.events)
        self.kept = self._tracker.numbers("weights", "optimizer", "teacher")


def _heap(watch: _Watch, *, keeps: bool) -> int | None:
    """How far the heap grows in two steps, the first of which makes the optimizer's states."""
    numbers = [number for number, size in watch.events if size]
    ended = {number for number, size in watch.events if not size}
    first = watch.events + [(number, 0) for number in numbers if number not in ended | watch.kept]
    again = len(watch.events)
    second = [(number + again, size) for number, size in watch.events if number not in watch.kept]
    return replay(first + second, keeps=keeps)


def replay(events: list[tuple[int, int]], *, keeps: bool) -> int | None:
    """As `lit_distill.planning.heap.grow`, in a process of its own; ``None`` where that is not possible."""
    given = json.dumps({"events": events, "keeps": keeps})
    command = [sys.executable, heap.__file__]
    ran = subprocess.run(command, input=given, capture_output=True, text=True, check=False)  # noqa: S603 - our own file
    return None if ran.returncode else int(ran.stdout)
