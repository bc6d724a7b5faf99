"""Quiet trainers, what a step's gradients were, and what they should have been, computed plainly."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import T5ForConditionalGeneration

from lit_distill.modules import DistillModule
from tests.modules.batches import Row

Gradients = dict[str, Tensor]


def make_trainer(**settings: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return pl.Trainer(**(quiet | settings))


class Steps(pl.Callback):
    """Records, for each optimizer step, the student before it and the gradients that it is made with."""

    def __init__(self) -> None:
        self.students: list[T5ForConditionalGeneration] = []
        self.gradients: list[Gradients] = []
        self.logged: list[dict[str, float]] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        assert isinstance(pl_module, DistillModule)
        self.gradients.append(gradients_of(pl_module.student.model))
        # through a detached copy: a deep copy of the student itself would carry its gradients along
        copied = deepcopy(pl_module.student.model)
        copied.zero_grad()
        self.students.append(copied.eval())

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: object) -> None:
        if len(self.logged) < trainer.global_step:
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def gradients_of(student: torch.nn.Module) -> Gradients:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in student.named_parameters()
    }


def plain_terms(student: T5ForConditionalGeneration, rows: Sequence[Row], tasks: Sequence[str]) -> dict[str, Tensor]:
    """Each task's token mean over the rows, by Hugging Face's own loss, one row at a time and so without padding."""
    terms = {}
    for task in tasks:
        total, tokens = torch.zeros(()), 0
        for row in rows:
            if task not in row:
                continue
            source, target = row[task]
            ids = torch.tensor([source])
            output = student(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([target]))
            total = total + output.loss * len(target)
            tokens += len(target)
        terms[task] = total / max(tokens, 1)
    return terms


def plain_gradients(
    student: T5ForConditionalGeneration, rows: Sequence[Row], weights: Mapping[str, float]
) -> Gradients:
    """The gradient of the paper's loss over these rows."""
    student.zero_grad()
    terms = plain_terms(student, rows, tuple(weights))
    loss = sum((weight * terms[task] for task, weight in weights.items()), torch.zeros(()))
    if loss.requires_grad:
        loss.backward()
    found = gradients_of(student)
    student.zero_grad()
    return found


def difference(found: Gradients, expected: Gradients) -> float:
    """Relative distance of two gradients, over all parameters."""
    assert found.keys() == expected.keys()
    distance = sum(float((found[name] - expected[name]).double().square().sum()) for name in found)
    size = sum(float(gradient.double().square().sum()) for gradient in expected.values())
    return float((distance / size) ** 0.5)


def check_same(module: Any, found: Tensor, expected: Tensor) -> None:
    """Check that a loss in float64 is another one, in value and gradient, and that it trains the student."""
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    gradients = []
    for each in (found, expected):
        module.zero_grad()
        each.backward()
        gradients.append(gradients_of(module.student.model))
    assert difference(*gradients) < 1e-9
    assert max(float(gradient.abs().max()) for gradient in gradients[1].values()) > 1e-6


def identical(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether two nested states are the same, tensors bit by bit."""
    return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and torch.equal(left, right)
    if isinstance(left, Mapping):
        return isinstance(right, Mapping) and identical(left, right)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)
