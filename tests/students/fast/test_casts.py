"""Autocast: each weight is cast once a step, and gradients are no further from float32's than the plain model's."""

from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_distill.batch import TaskInputs
from lit_distill.students.fast.casts import Casts, project
from lit_distill.students.fast.functions import add_dropped, dropout, dropout_mask, masked, rms_norm
from tests.students.fast.examples import (
    TASKS,
    VARIANTS,
    Gradients,
    as_student,
    check_gradients,
    checkpointed,
    fast_losses,
    gradients,
    make_student,
    plain_losses,
)

NARROW = torch.bfloat16


class CountCasts(TorchDispatchMode):
    """Counts how many elements are cast from float32 to bfloat16, by shape of the source."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.casts: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        source = {"aten::copy_": 1, "aten::_to_copy": 0}.get(func._schema.name)
        if source is not None and args[source].dtype == torch.float32 and out.dtype == NARROW:
            self.casts[tuple(args[source].shape)] += 1
        return out


def odd(**changes: Any) -> Any:
    """A student whose weights have shapes that no activation has."""
    return make_student(1, d_ff=37, **changes)


def weight_casts(counted: Counter[tuple[int, ...]], model: nn.Module) -> tuple[int, int]:
    """Casts of matrices' shapes but the look-up tables', and how many such matrices there are."""
    matrices = [m.weight for m in model.modules() if type(m) is nn.Linear]
    shapes = {tuple(weight.shape) for weight in matrices}
    return sum(count for shape, count in counted.items() if shape in shapes), len(matrices)


def step(student: Any, task_lists: Sequence[Sequence[TaskInputs]]) -> Counter[tuple[int, ...]]:
    counter = CountCasts()
    with counter:
        for tasks in task_lists:
            with torch.autocast("cpu", NARROW, cache_enabled=False):
                own = student({str(number): task for number, task in enumerate(tasks)})
                loss = torch.stack([own.loss(task) for task in own.batch]).sum()
            loss.backward()
    return counter.casts


@pytest.mark.parametrize("checkpoints", [False, True])
def test_weights_are_cast_once_an_optimizer_step(checkpoints: bool) -> None:
    model = odd()
    student = as_student(checkpointed(model) if checkpoints else model)
    student.hold_weights(True)
    casts, matrices = weight_casts(step(student, [TASKS, TASKS]), model)
    assert casts == matrices
    # nothing has changed yet
    assert weight_casts(step(student, [TASKS]), model)[0] == 0
    student.hold_weights(False)
    # by itself, each pass casts anew: weights may change in ways that nothing tells
    assert weight_casts(step(student, [TASKS, TASKS]), model)[0] == 2 * matrices
    student.hold_weights(True)
    assert weight_casts(step(student, [TASKS]), model)[0] == matrices


def test_changed_weights_are_cast_anew() -> None:
    model = odd()
    student = as_student(model)
    student.hold_weights(True)
    step(student, [TASKS])
    with torch.no_grad():
        model.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(2)
    assert weight_casts(step(student, [TASKS]), model)[0] == 1
    # a copy has weights of its own
    other = deepcopy(student)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    with torch.autocast("cpu", NARROW):
        loss = other({"label": TASKS[0]}).loss("label")
    assert float(loss.detach()) == pytest.approx(torch.tensor(60.0).log().item(), rel=1e-3)


def test_casts_made_while_evaluating_can_be_trained_with() -> None:
    student = as_student(make_student(1).eval())
    student.hold_weights(True)
    with torch.inference_mode(), torch.autocast("cpu", NARROW):
        expected = student({"label": TASKS[0]}).loss("label")
    with torch.autocast("cpu", NARROW):
        loss = student({"label": TASKS[0]}).loss("label")
    loss.backward()
    assert torch.equal(loss.detach(), expected)


def test_activations_are_cast_once() -> None:
    model = make_student(1, num_layers=2, num_decoder_layers=2)
    counted = step(as_student(model), [TASKS])
    sources = sum(int(task["attention_mask"].sum()) for task in TASKS)
    # a layer reads the sum of all layers twice, each backward pass casts the gradient of what it added, and the
    # states that the decoder attends to are cast once
    assert counted[(sources, model.config.d_model)] <= 2 * 2 * 2 + 1


def autocast_gradients(model: Any, losses: Any) -> Gradients:
    with torch.autocast("cpu", NARROW):
        found = losses(model, TASKS)
    return gradients(model, found)


def distances(found: Gradients, expected: Gradients) -> dict[str, float]:
    return {
        name: float((found[name].double() - right.double()).norm())  # type: ignore[union-attr]
        for name, right in expected.items()
        if right is not None
    }


@pytest.mark.parametrize("kind", ["v1.1", "gated and tied"])
def test_no_further_from_float32_than_the_plain_model(kind: str) -> None:
    squares: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for seed in range(5):
        model = make_student(seed, **VARIANTS[kind])
        expected = gradients(model, plain_losses(model, TASKS))
        for losses, own in zip((fast_losses, plain_losses), squares, strict=True):
            for name, off in distances(autocast_gradients(model, losses), expected).items():
                own[name] += off**2  # type: ignore[assignment]  # a counter of any numbers
    ours, theirs = squares
    for name, off in ours.items():
        # of the largest ones, as chance has more to say in a single one
        assert off <= 2 * theirs[name] + 0.02 * theirs.total(), name
    assert ours.total() <= 1.2 * theirs.total()


def test_micro_batches_add_up_in_float32() -> None:
    model = make_student(1)
    student = as_student(model)
    apart = []
    for task in TASKS:
        model.zero_grad()
        step(student, [[task]])
        apart.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    student.hold_weights(True)
    step(student, [[task] for task in TASKS])
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, apart[0][name] + apart[1][name]), name


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_checkpointing_changes_nothing(rate: float) -> None:
    model = make_student(1, dropout_rate=rate)
    torch.manual_seed(3)
    expected = autocast_gradients(model, fast_losses)
    torch.manual_seed(3)
    check_gradients(autocast_gradients(checkpointed(model), fast_losses), expected, 1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("targets", [["q", "v"], ["q", "k", "v", "o", "wi_0", "wi_1", "wo"], ["wi_1"]])
def test_lora(targets: list[str]) -> None:
    model: Any = get_peft_model(make_student(1), LoraConfig(r=4, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    expected = gradients(model, plain_losses(model, TASKS))
    ours_off = distances(autocast_gradients(model, fast_losses), expected)
    theirs_off = distances(autocast_gradients(model, plain_losses), expected)
    assert ours_off.keys() == theirs_off.keys() != set()
    assert sum(off**2 for off in ours_off.values()) < 1.3 * sum(off**2 for off in theirs_off.values())


def test_layers_together_are_the_layers_by_themselves() -> None:
    layers = [nn.Linear(12, 5, bias=False), nn.Linear(12, 3), nn.Linear(12, 7, bias=False)]
    layers[2].weight.requires_grad_(False)
    x = torch.randn(9, 12, dtype=NARROW, requires_grad=True)
    with torch.autocast("cpu", NARROW):
        found = project(layers, x, Casts())
        expected = [layer(x) for layer in layers]
    weights = [torch.randn_like(y) for y in expected]
    wanted = [x, layers[0].weight, layers[1].weight]
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right)
    for ours, right in zip(
        torch.autograd.grad(found, wanted, weights), torch.autograd.grad(expected, wanted, weights), strict=True
    ):
        assert ours.dtype == right.dtype
        torch.testing.assert_close(ours, right, rtol=0.01, atol=0.02)


# ------------------------------------------------------------------------------------------------ dropout in 16 bits


@pytest.mark.parametrize("p", [1e-6, 1 / 65536, 0.1, 0.5, 0.9, 1 - 1 / 65536, 1.0])
def test_both_masks_of_a_seed_drop_the_same(p: float) -> None:
    x = torch.randn(70_001)
    torch.manual_seed(4)
    wide, factor = dropout_mask(x, p)
    torch.manual_seed(4)
    narrow, same = dropout_mask(x.to(NARROW), p)
    assert factor == same
    dropped = masked(x.to(NARROW), narrow)
    assert torch.equal(dropped, x.to(NARROW) * wide)
    assert dropped.dtype == NARROW


@pytest.mark.parametrize("residual_dtype", [torch.float32, NARROW])
def test_functions_in_16_bits(residual_dtype: torch.dtype) -> None:
    """With the masks of float32, whose functions are tested by themselves."""
    a = torch.randn(40, 24).to(NARROW)
    residual, weight = torch.randn(40, 24).to(residual_dtype), torch.randn(24)
    cases: list[tuple[Any, tuple[Tensor, ...]]] = [
        (lambda a: dropout(a, 0.3), (a,)),
        (lambda residual, a: add_dropped(residual, a, 0.3), (residual, a)),
        (lambda a, weight: rms_norm(a, weight, 1e-6, NARROW), (a, weight)),
    ]
    for function, inputs in cases:
        results = []
        for dtype in (None, torch.float32):
            own = [x.to(dtype or x.dtype).requires_grad_() for x in inputs]
            torch.manual_seed(5)
            out = function(*own)
            torch.manual_seed(6)
            grads = torch.autograd.grad(out, own, torch.randn(out.shape).to(NARROW).to(out.dtype))
            assert [grad.dtype for grad in grads] == [x.dtype for x in own]
            results.append([out, *grads])
        for ours, right in zip(*results, strict=True):
            torch.testing.assert_close(ours.float(), right.float(), rtol=0.02, atol=0.02)
