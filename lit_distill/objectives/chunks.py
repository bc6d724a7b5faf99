"""Functions of both models' distributions, one chunk of target tokens at a time."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lit_distill.students import Pass

CHUNK_BYTES = 32 * 2**20  # of a chunk's logits in float32: small beside a step, large enough for efficient products


def divergence(
    value: Callable[[Tensor, Tensor], Tensor],
    student: Pass,
    teacher: Pass,
    tasks: Iterable[str],
    weight: Tensor | None = None,
) -> Tensor:
    """The mean of a function of both models' logits over the target tokens of some tasks; 0 without tokens.

    ``value`` maps the student's and the teacher's logits, ``(tokens, ids)`` in float32 or finer, to ``(tokens,)``. If
    one model has padded vocabulary entries, both are cut to the ids that they share. Chunks, ``weight`` and gradients
    are as in `sum_of_logits`; with a weight the mean is still one over all tokens.
    """
    tasks = list(tasks)
    ours, theirs = (torch.cat([each.states(task) for task in tasks]) for each in (student, teacher))
    return sum_of_logits(_with(teacher, value), student, ours, theirs, weight=weight) / max(len(ours), 1)


def per_token(
    value: Callable[..., Tensor], student: Pass, teacher: Pass, tasks: Iterable[str], *others: Tensor
) -> Tensor:
    """A function of both models' logits at each target token of some tasks, ``(tokens, ...)``.

    As `divergence`, for what is not a plain mean; ``value`` also gets the same tokens of ``others``. The logits are
    computed once more in the backward pass.
    """
    tasks = list(tasks)
    whole = [*(torch.cat([each.states(task) for task in tasks]) for each in (student, teacher)), *others]
    of_logits = _with(teacher, value)

    def of_chunk(own: Tensor, *rest: Tensor) -> Tensor:
        return of_logits(wide(student.project(own)), *rest)

    chunks = [[each[part] for each in whole] for part in _parts(student, len(whole[0]))]
    if not torch.is_grad_enabled() or student.student.sharded:
        return torch.cat([of_chunk(*chunk) for chunk in chunks])
    return torch.cat([checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks])


def rows_of_tasks(of: Pass, tasks: Iterable[str]) -> tuple[Tensor, int]:
    """The row of each target token of some tasks, whose rows are numbered on, ``(tokens,)``, and the number of rows."""
    rows, number = [], 0
    for task in tasks:
        rows.append(of.rows(task) + number)
        number += len(of.inputs(task)["labels"])
    return torch.cat(rows), number


def sum_of_logits(
    value: Callable[..., Tensor], student: Pass, states: Tensor, *others: Tensor, weight: Tensor | None = None
) -> Tensor:
    """The sum of a function of the student's logits over tokens, a scalar.

    The output head is applied to one chunk of states ``(tokens, d_model)`` at a time, and the chunk's gradient is
    computed at once, so that neither the logits of all tokens nor those of a chunk outlive it, and nothing is computed
    twice.

    Args:
        value: maps a chunk's logits ``(tokens, vocabulary)``, in float32 or finer, and the same tokens of each of the
            others, to ``(tokens,)``. Gradients flow into the logits alone: it may not have parameters of its own.
        student: whose output head is applied.
        states: the head's input at each token.
        *others: further values of each token, ``(tokens, ...)``.
        weight: factor of each token's value, ``(tokens,)``.
    """
    parameters = [each for each in student.student.network.get_output_embeddings().parameters() if each.requires_grad]
    parts = _parts(student, len(states))

    def sum_of(own: Tensor, part: slice) -> Tensor:
        found = value(wide(student.project(own)), *(other[part] for other in others))
        return (found if weight is None else found * weight[part]).sum()

    if student.student.sharded or not torch.is_grad_enabled() or not (states.requires_grad or parameters):
        return torch.stack([sum_of(states[part], part) for part in parts]).sum()
    total: Tensor = cast(Any, _Sum).apply(sum_of, parts, states, *parameters)
    return total


class _Sum(Function):
    """A sum over chunks, whose gradient is computed in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, sum_of: Callable[[Tensor, slice], Tensor], parts: list[slice], states: Tensor, *parameters: Tensor
    ) -> Tensor:
        totals, of_states = [], []
        sums: list[Tensor] = []
        for part in parts:
            with torch.enable_grad():
                own = states[part].detach().requires_grad_(ctx.needs_input_grad[2])
                total = sum_of(own, part)
            inputs = [*([own] if own.requires_grad else []), *parameters]
            found = list(torch.autograd.grad(total, inputs, materialize_grads=True))
            if own.requires_grad:
                of_states.append(found.pop(0))
            # gradients of many chunks are too many for the sums of bfloat16
            found = [wide(each) for each in found]
            sums = [sum_.add_(each) for sum_, each in zip(sums, found, strict=True)] if sums else found
            totals.append(total.detach())
        sums = [sum_.to(each.dtype) for sum_, each in zip(sums, parameters, strict=True)]
        ctx.save_for_backward(torch.cat(of_states) if of_states else None, *sums)
        return torch.stack(totals).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if each is None else (each * grad).to(each.dtype) for each in ctx.saved_tensors)


def _with(teacher: Pass, value: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of both models' logits as one of the student's and of the teacher's states."""

    def of_chunk(own: Tensor, states: Tensor, *others: Tensor) -> Tensor:
        with torch.no_grad():
            other = wide(teacher.project(states))
        ids = min(own.shape[-1], other.shape[-1])
        return value(own[:, :ids], other[:, :ids], *others)

    return of_chunk


def _parts(student: Pass, tokens: int) -> list[slice]:
    """The chunks; without tokens an empty one, in which every parameter has a gradient of 0."""
    if student.student.sharded:
        # the head may be a collective, which each rank must run as often
        return [slice(None)]
    size = chunk_size(student)
    return [slice(start, start + size) for start in range(0, max(tokens, 1), size)]


def chunk_size(student: Pass) -> int:
    """The number of tokens in a chunk."""
    ids: int = student.student.network.config.get_text_config().vocab_size
    return max(1, CHUNK_BYTES // (4 * ids))


def wide(values: Tensor) -> Tensor:
    """In float32, or as they are in float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
