"""Which path computes a student's passes fastest: a few steps of each are timed on a batch."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch._dynamo.exc import TorchDynamoException

from lit_distill.batch import TaskBatch, take
from lit_distill.students.fast import compiled
from lit_distill.students.seq2seq import DEFAULT_PATH, PATHS, PathName, Seq2SeqPass, Seq2SeqStudent

ROUNDS = 4
"""Steps of each path that count."""

WARM_UP = 3
"""Steps of each path before these: the first compiles, the next ones record CUDA graphs. On a CPU there is one."""

PART = 8
"""On a CPU one in so many of a batch's rows is used, but at least two."""

BUDGET = 3.0
"""On a CPU no step is begun after the time of so many whole steps: 1.5 % of 200."""

MARGIN = 0.9
"""On a CPU, where timings vary, a path replaces the default if it takes at most this share of its time."""

TOO_SHORT = 0.05
"""Seconds of work; on a CPU shorter steps are not compared: they vary by more than the paths differ, and what each call
costs beside its rows is larger in a part than in the batch."""


EVALUATED_TOKENS = 8
"""Generated tokens of a timed evaluation."""


Stage = Literal["training", "evaluation"]


@dataclass(frozen=True)
class Choice:
    """The path that is taken, and the timings that it was chosen by, if any."""

    path: PathName
    rows: int = 0  # of a timed step
    seconds: dict[PathName, float] = field(default_factory=dict)  # the median of each path's steps
    first: dict[PathName, float] = field(default_factory=dict)  # each path's first step

    def __str__(self) -> str:
        told = [f"{name} {_duration(own)}" for name, own in self.seconds.items()]
        # loading takes the time of a few steps, compiling that of many
        slow = {name: own for name, own in self.first.items() if own > 20 * self.seconds[name]}
        told += [f"{name}'s first {_duration(own)}" for name, own in slow.items()]
        return self.path + (f" (a step of {self.rows} rows: {', '.join(told)})" if told else "")


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def training_step(found: Seq2SeqPass) -> None:
    """A forward and a backward pass of all tasks' losses; the gradients are thrown away."""
    loss = torch.stack([found.loss(task) for task in found.batch]).sum()
    if trained := found.student.trained:
        # neither changes `grad` nor calls its hooks, such as those of DDP
        torch.autograd.grad(loss, trained, allow_unused=True)


@torch.no_grad()
def evaluation_step(found: Seq2SeqPass) -> None:
    """All tasks' losses, and the beginning of the first task's answers."""
    for task in found.batch:
        found.loss(task)
    found.generate(next(iter(found.batch)), max_new_tokens=EVALUATED_TOKENS)


def choose(student: Seq2SeqStudent, batch: TaskBatch, stage: Stage) -> Choice:
    """Time a step of ``stage`` on each path that supports student and batch, and choose the fastest.

    Random states stay as they are. On a CPU this costs about `BUDGET` steps. Only training on a GPU is worth minutes of
    compiling. A path for which the memory is too small, or that cannot be compiled, is left out.
    """
    device, rows = student.device.type, _rows(batch)
    on_cpu, step = device == "cpu", training_step if stage == "training" else evaluation_step
    names = student.paths(batch, "compiled" if (device, stage) == ("cuda", "training") else DEFAULT_PATH)
    if len(names) == 1:
        return Choice(DEFAULT_PATH)
    if on_cpu:
        batch = _part(batch, max(2, -(-rows // PART)))
    # at least half of a step's time grows with its rows
    growth = (1 + rows / max(_rows(batch), 1)) / 2
    # the first of all steps is the slowest, which shall not speak for another path than the default
    names.sort(key=lambda name: name == DEFAULT_PATH, reverse=True)
    seconds: dict[PathName, list[float]] = {name: [] for name in names}
    work: list[float] = []  # of the default's steps, whatever else the machine does
    started = time.perf_counter()

    def is_short() -> bool:
        return on_cpu and min(work, default=TOO_SHORT) < TOO_SHORT

    def is_enough() -> bool:
        spent, least = time.perf_counter() - started, min(seconds.get(DEFAULT_PATH, ()), default=0.0)
        return is_short() or (on_cpu and all(seconds.values()) and spent > BUDGET * growth * least)

    warm_up = 1 if on_cpu else WARM_UP
    with isolate_rng():
        for name in names * (warm_up + ROUNDS):
            if name not in seconds or is_enough():
                continue
            try:
                wall, own = _time(step, PATHS[name](student, batch))
                seconds[name].append(wall)
                work += [own] if name == DEFAULT_PATH else []
            except (torch.OutOfMemoryError, TorchDynamoException) as error:
                student.say_off(" ".join(str(error).split())[:200], f"not {name}")
                del seconds[name]
    if is_short():
        return Choice(DEFAULT_PATH)
    first = {name: own[0] for name, own in seconds.items() if own}
    medians = {name: statistics.median(own[warm_up:] or own) for name, own in seconds.items() if own}
    best = min(medians, key=lambda name: medians[name], default=DEFAULT_PATH)
    if on_cpu and medians[best] > MARGIN * medians[DEFAULT_PATH]:
        best = DEFAULT_PATH
    if "compiled" in names and best != "compiled":
        compiled.free()
    if device == "cuda":
        torch.cuda.empty_cache()
        # the record's peak is that of the run itself
        torch.cuda.reset_peak_memory_stats()
    return Choice(best, _rows(batch), medians, first)


def _time(step: Callable[[Seq2SeqPass], object], found: Seq2SeqPass) -> tuple[float, float]:
    """Seconds of a step, and of this thread's work in it."""
    synchronize = torch.get_device_module(found.student.device).synchronize
    synchronize()
    started, worked = time.perf_counter(), time.thread_time()
    step(found)
    synchronize()
    return time.perf_counter() - started, time.thread_time() - worked


def _rows(batch: TaskBatch) -> int:
    return max(len(inputs["labels"]) for inputs in batch.values())


def _part(batch: TaskBatch, rows: int) -> TaskBatch:
    """So many rows, and as large a part of each task's: evenly from its first to its last, padded as they were."""
    share, found = min(rows / max(_rows(batch), 1), 1.0), {}
    for task, inputs in batch.items():
        number = math.ceil(share * len(inputs["labels"]))
        found[task] = take(inputs, [i * len(inputs["labels"]) // number for i in range(number)])
    return found
