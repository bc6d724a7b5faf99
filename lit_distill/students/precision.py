"""What bfloat16 gives on a CPU: the student's own matrix products, timed in both precisions when a run starts."""

import time

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import nn

from lit_distill.students.base import Student
from lit_distill.students.fast.products import product
from lit_distill.students.seq2seq import Seq2SeqStudent

WORTH = 1.2
"""A precision is called faster from this ratio on; timings vary."""

SMALLEST = 10_000_000
"""Elements of all matrices; a smaller student's step is not made of its products."""

SHAPES = 3
"""Shapes of matrices that are timed, those with the most elements in all."""

OPERATIONS = 0.2e9
"""Floating-point operations of a timed product: a millisecond or two."""

ROUNDS = 3
"""The best of so many counts, after one that prepares."""


@rank_zero_only
def report_precision(student: Student, precision: str) -> None:
    """Say in one line where a run on a CPU would multiply faster in another precision; takes about 50 ms."""
    if student.device.type != "cpu" or (gain := bfloat16_gain(student)) is None:
        return
    narrow = precision.startswith("bf16") or next(student.parameters()).dtype == torch.bfloat16
    if precision == "32-true" and not narrow and gain >= WORTH:
        rank_zero_info(
            f"precision: the student's matrix products are {gain:.1f} times as fast here in bfloat16; try"
            " --trainer.precision bf16-mixed"
        )
    elif narrow and gain * WORTH <= 1:
        rank_zero_warn(
            f"precision: the student's matrix products are {1 / gain:.1f} times as fast here in float32; try"
            " --trainer.precision 32-true"
        )


def bfloat16_gain(student: Student) -> float | None:
    """The time of the student's matrix products in float32 over that in bfloat16; ``None`` for a small student.

    Draws no random numbers.
    """
    counts: dict[torch.Size, int] = {}
    for module in student.modules():
        if isinstance(module, nn.Linear) and module.weight.dim() == 2:
            counts[module.weight.shape] = counts.get(module.weight.shape, 0) + 1
    largest = sorted(counts, key=lambda shape: counts[shape] * shape.numel(), reverse=True)[:SHAPES]
    if sum(count * shape.numel() for shape, count in counts.items()) < SMALLEST:
        return None
    totals = dict.fromkeys((torch.float32, torch.bfloat16), 0.0)
    fast = isinstance(student, Seq2SeqStudent)
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        for shape in largest:
            outputs, inputs = shape
            # part of a vocabulary is as good as all of it
            outputs = min(outputs, 4096)
            rows = max(16, min(1024, int(OPERATIONS / (2 * inputs * outputs))))
            for dtype in totals:
                x, weight = torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
                seconds = []
                for _ in range(1 + ROUNDS):
                    started = time.perf_counter()
                    _ = product(x, weight) if fast else F.linear(x, weight)
                    seconds.append(time.perf_counter() - started)
                totals[dtype] += min(seconds[1:]) / (rows * outputs * inputs) * counts[shape] * shape.numel()
    return totals[torch.float32] / totals[torch.bfloat16]
