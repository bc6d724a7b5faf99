"""Divergences between a student's and a teacher's distributions, without the logits of a whole batch."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_distill.students import Pass

CHUNK_BYTES = 64 * 2**20
"""Size of one chunk's logits: large enough for efficient matrix products."""

KEPT_BYTES = 512 * 2**20
"""Logits that are kept for the backward pass at most; chunks beyond are computed once more there."""


def divergence(value: Callable[[Tensor, Tensor], Tensor], student: Pass, teacher: Pass, tasks: Iterable[str]) -> Tensor:
    """The mean over the target tokens of some tasks of a function of both models' logits; 0 without any token.

    Both heads are applied to a chunk of states at a time. Where one has more rows than the vocabulary has entries, both
    are cut to the ids that they have in common.

    Args:
        value: ``(student's logits, teacher's logits) -> values (tokens,)``, of float32 logits ``(tokens, ids)``.
        student: the student's pass.
        teacher: the teacher's pass of the same batch.
        tasks: the tasks whose targets count.
    """
    tasks = list(tasks)
    ours = torch.cat([student.states(task) for task in tasks])
    theirs = torch.cat([teacher.states(task) for task in tasks])

    def of_chunk(own: Tensor, other: Tensor) -> Tensor:
        left, right = student.project(own), teacher.project(other)
        ids = min(left.shape[-1], right.shape[-1])
        return value(left[:, :ids].float(), right[:, :ids].float()).sum()

    row_bytes = 4 * student.project(ours[:1].detach()).shape[-1]
    size = max(1, CHUNK_BYTES // row_bytes)
    total = ours.new_zeros((), dtype=torch.float32)
    # a chunk without tokens has a gradient of 0 for every parameter
    for start in range(0, max(len(ours), 1), size):
        chunks = ours[start : start + size], theirs[start : start + size]
        # both sides' logits and their logarithms
        if 4 * (start + size) * row_bytes <= KEPT_BYTES or not torch.is_grad_enabled():
            total = total + of_chunk(*chunks)
        else:
            total = total + checkpoint(of_chunk, *chunks, use_reentrant=False)
    return total / max(len(ours), 1)
