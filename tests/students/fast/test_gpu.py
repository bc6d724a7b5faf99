"""What only a GPU shows: the compiled graph there, its replays, and that no step waits for the device."""

from typing import Any

import pytest
import torch

from lit_distill.batch import TaskBatch, remember_rows
from lit_distill.students.seq2seq import CompiledPass
from tests.students.fast.examples import (
    TASKS,
    VARIANTS,
    as_student,
    check_gradients,
    gradients,
    make_student,
    make_task,
    plain_losses,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # compiling imports parts of torch that warn of other parts
    pytest.mark.filterwarnings("ignore"),
]


def sent(tasks: Any) -> TaskBatch:
    host: TaskBatch = {str(number): task for number, task in enumerate(tasks)}
    moved: Any = {task: {name: own.cuda() for name, own in inputs.items()} for task, inputs in host.items()}  # type: ignore[attr-defined]
    remember_rows(host, moved)
    return moved  # type: ignore[no-any-return]


def losses(model: Any, batch: TaskBatch) -> list[torch.Tensor]:
    student = as_student(model, fast="compiled")
    student.losses_only = True
    own = student(batch)
    assert isinstance(own, CompiledPass), student._warned
    return [own.loss(task) for task in batch]


@pytest.mark.parametrize("kind", ["one layer", "original"])
def test_losses_and_gradients_of_every_replay(kind: str) -> None:
    model: Any = make_student(1, **VARIANTS[kind])
    model.cuda()
    sizes: list[Any] = [TASKS, [make_task([70, 3], [40, 7])], TASKS[:1]]
    # each is recorded, then replayed twice
    for tasks in sizes * 4:
        batch = sent(tasks)
        found = gradients(model, losses(model, batch))
        check_gradients(found, gradients(model, plain_losses(model, list(batch.values()))), 1e-3)


def test_accumulated_gradients_are_not_overwritten() -> None:
    model: Any = make_student(1, **VARIANTS["one layer"])
    model.cuda()
    batches = [sent(TASKS), sent([make_task([11, 3], [4, 7]), make_task([5], [6])])] * 3
    for batch in batches:
        torch.stack(losses(model, batch)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for batch in batches:
        torch.stack(plain_losses(model, list(batch.values()))).sum().backward()
    check_gradients(found, {name: p.grad for name, p in model.named_parameters()}, 1e-3)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_step_waits_for_nothing(precision: torch.dtype) -> None:
    model: Any = make_student(1, **VARIANTS["one layer"], dropout_rate=0.1)
    model.cuda()
    batch = sent(TASKS)
    for number in range(6):
        # the first ones compile and record
        torch.cuda.set_sync_debug_mode("error" if number == 5 else "default")
        try:
            with torch.autocast("cuda", precision, enabled=precision != torch.float32):
                total = torch.stack(losses(model, batch)).sum()
            total.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        model.zero_grad()
    assert bool(total.isfinite())
