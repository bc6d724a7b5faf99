"""What a student of a shape costs: parameters, and milliseconds to answer a batch."""

import statistics
import time
from typing import Any, cast

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lit_distill.batch import TaskBatch, targets_of
from lit_distill.searching.space import Shape, part_of
from lit_distill.shrinking.shrink import size_of, smaller_config
from lit_distill.students import Student, wrap
from lit_distill.students.mimetic import FromScratch, set_heads
from lit_distill.students.models import build_model
from lit_distill.students.tokens import end_tokens

TIMED = 5
"""Timed batches, of which the median counts; one before them does not."""


def config_of(whole: Student, shape: Shape) -> dict[str, Any]:
    """The content of a shape's ``config.json``."""
    return smaller_config(*part_of(whole, shape))


def parameters(whole: Student, shape: Shape) -> int:
    """The number of parameters, tied ones once; no weights are made."""
    return size_of(build_model(config_of(whole, shape), meta=True))["parameters"]


def random_student(whole: Student, shape: Shape, seed: int, *, from_scratch: FromScratch = True) -> Student:
    """A student of a shape with random weights, as a run with this ``from_scratch`` begins, in evaluation mode."""
    dtype = cast(Any, str(whole.network.dtype).removeprefix("torch."))
    with isolate_rng():
        torch.manual_seed(seed)
        model = build_model(config_of(whole, shape), dtype=dtype)
        if from_scratch == "mimetic":
            set_heads(model)
    return wrap(model, whole.tokens).eval().to(whole.device)


def milliseconds(student: Student, batch: TaskBatch, task: str) -> float:
    """The median time to answer a batch greedily, in as many tokens as its longest target has.

    No answer ends earlier, as random weights end theirs anywhere.
    """
    ends = sorted(end_tokens(student.network.generation_config))
    length = max(targets_of(batch[task]).ends)

    def without_end(logits: Tensor, step: int, rows: Tensor) -> Tensor:
        return logits.index_fill(1, torch.tensor(ends, device=logits.device), -torch.inf)

    seconds = []
    for _ in range(1 + TIMED):
        started = time.perf_counter()
        student({task: batch[task]}).generate(task, max_new_tokens=length, process_logits=without_end)
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds[1:])
