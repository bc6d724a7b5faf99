"""Tiny students of every kind, ragged tasks, and what the plain Hugging Face model makes of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration

from lit_distill.batch import IGNORE_INDEX, TaskInputs
from lit_distill.students import Tokens
from lit_distill.students.models import build_model
from lit_distill.students.seq2seq import PackedPass, PlainPass, Seq2SeqStudent
from tests.modules.batches import pad
from tests.students import CONFIG, make_tokenizer

VOCABULARY = 60

BASE: dict[str, Any] = CONFIG | {"vocab_size": VOCABULARY}

VARIANTS: dict[str, dict[str, Any]] = {
    "v1.1": {},
    "original": {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "gated and tied": {"tie_word_embeddings": True},
    "gated silu": {"feed_forward_proj": "gated-silu"},
    "wide heads": {"d_kv": 12, "num_heads": 3},
    "one layer": {"num_layers": 1, "num_decoder_layers": 1},
    "deep encoder": {"num_layers": 3, "num_decoder_layers": 1},
    "deep decoder": {"num_layers": 1, "num_decoder_layers": 3},
    "near distances": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12},
}

WEIGHTS = (1.0, 0.7, 0.3)
"""What the tasks' losses are multiplied by before they are summed."""

Gradients = dict[str, Tensor | None]


def make_student(seed: int = 0, **changes: Any) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    student: Any = build_model(BASE | changes)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            # norms are made of ones: each its own, so that one in another's place is seen
            if "layer_norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    found: T5ForConditionalGeneration = student.train()
    return found


def checkpointed(student: T5ForConditionalGeneration) -> T5ForConditionalGeneration:
    # older releases of transformers know only the second name, which newer ones deprecate
    enable: Any = getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return student


def make_task(
    sources: Sequence[int],
    targets: Sequence[int],
    *,
    seed: int = 0,
    holes: float = 0.0,
    extra: int = 0,
) -> TaskInputs:
    """Rows of these lengths.

    Args:
        sources: tokens of each source.
        targets: tokens of each target; 0 for none.
        seed: of the ids.
        holes: share of the targets' tokens, but each last one, that do not count.
        extra: columns of padding beyond the longest row.
    """
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()

    rows = [ids(length) for length in sources]
    wanted = [ids(length) for length in targets]
    for target in wanted:
        left_out = torch.rand(len(target), generator=generator) < holes
        for position in range(len(target) - 1):
            if left_out[position]:
                target[position] = IGNORE_INDEX
    inputs: TaskInputs = {
        "input_ids": pad(rows, 0, extra),
        "attention_mask": pad([[1] * len(row) for row in rows], 0, extra),
        # where no row has a target there still is a column, as the collator makes it
        "labels": pad(wanted, IGNORE_INDEX, extra or int(not any(targets))),
    }
    return inputs


TASKS = (
    make_task([7, 1, 12, 5], [3, 1, 4, 2], seed=1),
    make_task([9, 3, 14], [8, 2, 11], seed=2, holes=0.3),
)


def plain_losses(model: Callable[..., Any], tasks: Sequence[TaskInputs]) -> list[Tensor]:
    """Each task's mean loss as Hugging Face computes it; 0 without a target."""
    return [
        model(input_ids=task["input_ids"], attention_mask=task["attention_mask"], labels=task["labels"]).loss
        if bool((task["labels"] != IGNORE_INDEX).any())
        else torch.zeros(())
        for task in tasks
    ]


def packed(model: Any, tasks: Sequence[TaskInputs]) -> PackedPass:
    """A pass on the fast path of tasks named 0, 1, ..., whether or not the student would choose it."""
    return PackedPass(as_student(model), {str(number): task for number, task in enumerate(tasks)})


def plain(model: Any, tasks: Sequence[TaskInputs]) -> PlainPass:
    """The same of the model's own forward."""
    return PlainPass(as_student(model), {str(number): task for number, task in enumerate(tasks)})


def as_student(model: Any, **settings: Any) -> Seq2SeqStudent:
    return Seq2SeqStudent(model, Tokens(make_tokenizer()), **settings)


def target_losses(model: Any, tasks: Sequence[TaskInputs]) -> list[Tensor]:
    own = packed(model, tasks)
    return [own.token_losses(task) for task in own.batch]


def fast_losses(model: Any, tasks: Sequence[TaskInputs]) -> list[Tensor]:
    own = packed(model, tasks)
    return [own.loss(task) for task in own.batch]


def gradients(model: nn.Module, losses: Sequence[Tensor]) -> Gradients:
    """Of the weighted sum of these losses."""
    model.zero_grad()
    torch.stack([weight * loss for weight, loss in zip(WEIGHTS, losses, strict=False)]).sum().backward()
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def check_gradients(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], bound: float) -> None:
    """Every parameter's gradient within ``bound`` of its own norm.

    A gradient that is zero but for rounding (of a query that has one key to look at) is measured by all of them.
    """
    assert found.keys() == expected.keys()
    whole = sum(float(g.double().square().sum()) for g in expected.values() if g is not None) ** 0.5
    assert whole > 0
    for name, right in expected.items():
        ours = found[name]
        if ours is None or right is None:
            assert ours is None, f"{name} has a gradient"
            assert right is None, f"{name} has no gradient"
            continue
        assert bool(torch.isfinite(ours).all()), name
        distance = float((ours.double() - right.double()).norm())
        assert distance <= bound * float(right.double().norm()) + 0.03 * bound * whole, name


def compare(student: Any, tasks: Sequence[TaskInputs], bound: float = 1e-5) -> None:
    """Losses and gradients of the fast path are those of the plain model."""
    ours, plain = fast_losses(student, tasks), plain_losses(student, tasks)
    torch.testing.assert_close([loss.detach() for loss in ours], [loss.detach() for loss in plain], rtol=bound, atol=0)
    check_gradients(gradients(student, ours), gradients(student, plain), bound)


def check_with_gradients(found: Tensor, expected: Tensor, inputs: Sequence[Tensor]) -> None:
    """Two results of the same inputs are alike, and what flows back to these."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    towards = torch.randn_like(found)
    flows = [torch.autograd.grad(result, inputs, towards) for result in (found, expected)]
    torch.testing.assert_close(*flows, rtol=1e-4, atol=1e-5)
