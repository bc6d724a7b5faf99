"""Activation checkpointing, bfloat16 and frozen parts: what the layers are run with beside plain float32."""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import T5ForConditionalGeneration

from lit_distill.students.fast.greedy import greedy
from lit_distill.students.fast.t5 import encode, log_likelihoods
from tests.students.fast.examples import (
    TASKS,
    VARIANTS,
    Gradients,
    check_gradients,
    checkpointed,
    compare,
    fast_losses,
    gradients,
    make_student,
    plain_losses,
    target_losses,
)

# ------------------------------------------------------------------------------------------------ checkpointing


@pytest.mark.parametrize("kind", ["v1.1", "original"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_checkpointing_changes_nothing(kind: str, rate: float) -> None:
    student = make_student(1, **VARIANTS[kind] | {"dropout_rate": rate})
    torch.manual_seed(9)
    losses = fast_losses(student, TASKS)
    expected = gradients(student, losses)
    checkpointed(student)
    torch.manual_seed(9)
    again = fast_losses(student, TASKS)
    assert torch.equal(torch.stack(again), torch.stack(losses))
    check_gradients(gradients(student, again), expected, 1e-6)
    if not rate:
        compare(student, TASKS)


def test_checkpointing_keeps_less() -> None:
    def dropout_mask(student: T5ForConditionalGeneration) -> int:
        elements = 0

        def record(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal elements
            elements += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            target_losses(student, TASKS)
        return elements

    student = make_student(1, num_layers=6, num_decoder_layers=6, vocab_size=60)
    before = dropout_mask(student)
    checkpointed(student)
    assert dropout_mask(student) < before / 2


def test_each_layer_runs_twice_with_checkpointing() -> None:
    student = make_student(1)
    calls = 0

    def count(*rest: object) -> None:
        nonlocal calls
        calls += 1

    handle = student.get_submodule("encoder.block.1.layer.0.SelfAttention.q").register_forward_hook(count)
    checkpointed(student)
    torch.stack(fast_losses(student, TASKS)).sum().backward()
    assert calls == 2
    # nothing to recompute for
    student.eval()
    fast_losses(student, TASKS)
    with torch.no_grad():
        fast_losses(student.train(), TASKS)
    handle.remove()
    assert calls == 4


# ------------------------------------------------------------------------------------------------ bfloat16


def whole(student: T5ForConditionalGeneration) -> T5ForConditionalGeneration:
    nn.Module.to(student, torch.bfloat16)
    return student


def all_but_one(student: T5ForConditionalGeneration) -> T5ForConditionalGeneration:
    """As transformers loads it: this matrix stays in float32."""
    whole(student)
    for module in student.modules():
        if hasattr(module, "wo"):
            module.wo.to(torch.float32)
    return student


def distance(found: Gradients, expected: Gradients) -> float:
    squares = [
        (ours.float() - right).square().sum()
        for ours, right in zip(found.values(), expected.values(), strict=True)
        if ours is not None and right is not None
    ]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.parametrize("kind", ["v1.1", "original"])
@pytest.mark.parametrize("convert", [None, whole, all_but_one])
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_bfloat16(
    kind: str, convert: Callable[[T5ForConditionalGeneration], T5ForConditionalGeneration] | None, rate: float
) -> None:
    exact = make_student(1, **VARIANTS[kind])
    student = deepcopy(exact)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
    if convert is not None:
        student = convert(student)
    with torch.autocast("cpu", torch.bfloat16) if convert is None else nullcontext():
        losses = fast_losses(student, TASKS)
        plain = plain_losses(student, TASKS)
    found = gradients(student, losses)
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in found.values())
    assert [loss.dtype for loss in losses] == [torch.float32] * 2
    if rate:
        return
    # 8 bits through four layers: a percent of the loss, and no further from float32's than twice the plain model
    right = plain_losses(exact, TASKS)
    for ours, theirs, true in zip(losses, plain, right, strict=True):
        assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=0.01)
        assert float(ours.detach()) == pytest.approx(float(true.detach()), rel=0.01)
    expected, theirs_found = gradients(exact, right), gradients(student, plain)
    ours_off, theirs_off = (distance(gradient, expected) for gradient in (found, theirs_found))
    assert ours_off < 2 * theirs_off


@pytest.mark.parametrize("convert", [None, whole, all_but_one])
def test_bfloat16_answers(
    convert: Callable[[T5ForConditionalGeneration], T5ForConditionalGeneration] | None,
) -> None:
    student = make_student(4).eval()
    if convert is not None:
        student = convert(student)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if convert is None else nullcontext():
        encoded = encode(student, TASKS)
        found = greedy(student, encoded, [2, 0, 6], 20)
        likelihoods = log_likelihoods(student, encoded, [0, 0], [[4, 1], [5, 6, 1]])
    assert all(1 <= len(row) <= 20 for row in found)
    assert bool(torch.isfinite(likelihoods).all())


def test_checkpointing_in_bfloat16() -> None:
    student = make_student(1)
    checkpointed(student)
    with torch.autocast("cpu", torch.bfloat16):
        losses = fast_losses(student, TASKS)
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients(student, losses).values())


# ------------------------------------------------------------------------------------------------ frozen parts

FROZEN = {
    "the encoder": ["encoder"],
    "the decoder": ["decoder"],
    "the head": ["lm_head"],
    "the embeddings": ["shared", "encoder.embed_tokens", "decoder.embed_tokens"],
    "all but the head": ["shared", "encoder", "decoder"],
    "all but the encoder": ["decoder", "lm_head"],
    "position biases": [f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias" for stack in (
        "encoder", "decoder")],
    "norms of the first blocks": [f"{stack}.block.0.layer.{i}.layer_norm" for stack in (
        "encoder", "decoder") for i in (0, 1)],
    "some projections": [f"encoder.block.1.layer.0.SelfAttention.{name}" for name in "qv"],
}  # fmt: skip


@pytest.mark.parametrize("parts", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("kind", ["v1.1", "original"])
def test_frozen_parts(parts: list[str], kind: str) -> None:
    student = make_student(1, **VARIANTS[kind])
    if kind == "original" and "shared" in parts and len(parts) == 3 and "encoder" in parts:
        pytest.skip("a tied head is frozen with the embeddings, and nothing is left")
    for part in parts:
        student.get_submodule(part).requires_grad_(False)
    compare(student, TASKS)


def test_one_gate_that_is_frozen() -> None:
    student = make_student(1)
    for name, parameter in student.named_parameters():
        if "wi_0" in name:
            parameter.requires_grad_(False)
    compare(student, TASKS)


def test_untied_input_embeddings() -> None:
    # the two stacks' look-ups have weights of their own
    student = make_student(1)
    student.decoder.embed_tokens = deepcopy(student.decoder.embed_tokens)
    assert student.encoder.embed_tokens.weight is not student.decoder.embed_tokens.weight
    with torch.no_grad():
        student.decoder.embed_tokens.weight.add_(0.1)
    compare(student, TASKS)
