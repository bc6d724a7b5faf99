"""The terms' shares of the gradient are those of an independent computation, and measuring them changes nothing."""

from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lit_distill.callbacks import GradientShares
from lit_distill.errors import UserError
from lit_distill.modules import DistillModule, StepByStepModule
from lit_distill.objectives import Objective, Step
from tests.modules.batches import RowsData, random_rows
from tests.modules.running import Gradients, Steps, identical, make_trainer, plain_gradients
from tests.students import make_causal_folder
from tests.variants.kl import KL

# windows of 3, 3 and 2 micro-batches, the last of which has one row; the first micro-batch has no rationale
ROWS = random_rows(15, seed=1, without_rationale=(0, 1, 5))
TASKS = ("label", "rationale")


class Lines(Logger):
    """Keeps what is logged by step."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, dict[str, float]] = {}

    @property
    def name(self) -> str:
        return "lines"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        shares = {name: value for name, value in metrics.items() if "_grad_" in name and name != "train/grad_norm"}
        if shares:
            assert step not in self.found
            self.found[step] = shares


def train(module: DistillModule, *callbacks: pl.Callback, **settings: Any) -> dict[int, dict[str, float]]:
    lines = Lines()
    trainer = make_trainer(
        **({"max_epochs": 1, "accumulate_grad_batches": 3} | settings | {"logger": lines}),
        callbacks=list(callbacks),
        log_every_n_steps=1,
    )
    trainer.fit(module, datamodule=RowsData(ROWS, 2, module.tasks))
    return lines.found


def make(folder: Path, *objectives: Objective, **arguments: Any) -> StepByStepModule:
    torch.manual_seed(7)
    settings: dict[str, Any] = {"from_scratch": True, "learning_rate": 1e-2, "objectives": list(objectives)}
    return StepByStepModule(folder, **(settings | arguments))


def flat(gradients: Gradients) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).double()


def test_shares_are_those_of_each_terms_gradient(student_folder: Path) -> None:
    steps = Steps()
    found = train(make(student_folder, rationale_weight=0.3), GradientShares(1), steps)
    assert list(found) == [0, 1, 2]
    for step, student in enumerate(steps.students):
        rows = ROWS[6 * step : 6 * step + 6]
        label = flat(plain_gradients(student, rows, {"label": 1.0}))
        rationale = flat(plain_gradients(student, rows, {"rationale": 0.3}))
        share = float(label.norm() / (label.norm() + rationale.norm()))
        assert found[step] == pytest.approx({
            "train/label_grad_share": share,
            "train/rationale_grad_share": 1 - share,
            "train/label_grad_cosine": 1.0,
            "train/rationale_grad_cosine": float(torch.cosine_similarity(label, rationale, dim=0)),
        }, rel=1e-4)  # fmt: skip


def test_the_first_step_and_every_nth_are_measured(student_folder: Path) -> None:
    found = train(make(student_folder), GradientShares(2), accumulate_grad_batches=1, max_epochs=1)
    assert list(found) == [0, 2, 4, 6]


class Constant(Objective):
    """A term that nothing moves."""

    def forward(self, step: Step) -> Tensor:
        return torch.ones(())

    def counts(self, batch: Any) -> None:
        return None


def test_a_term_without_gradient_has_no_share_and_no_cosine(student_folder: Path) -> None:
    found = train(make(student_folder, Constant()), GradientShares(1))
    for values in found.values():
        assert values["train/constant_grad_share"] == 0
        assert "train/constant_grad_cosine" not in values
        assert values["train/label_grad_share"] + values["train/rationale_grad_share"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({}, {}),
        ({"activation_checkpointing": True}, {}),
        ({"fast": False}, {"accumulate_grad_batches": 1}),
        ({"adapter": {"r": 2, "dropout": 0.1}}, {"gradient_clip_val": 0.5}),
        ({"optimizer": "adafactor"}, {"precision": "bf16-mixed"}),
    ],
    ids=["fast path", "activation checkpointing", "plain", "adapter", "bf16"],
)
def test_measuring_changes_nothing(
    student_folder: Path, teacher_folder: Path, arguments: dict[str, Any], settings: dict[str, Any]
) -> None:
    ends = []
    for callbacks in ([GradientShares(1)], []):
        teachers = {"big": {"model": str(teacher_folder)}}
        module = make(student_folder, KL(teacher="big"), teachers=teachers, dropout=0.2, **arguments)
        found = train(module, *callbacks, **settings)
        assert bool(found) == bool(callbacks)
        ends.append(module.state_dict())
    assert identical(*ends)


def test_a_decoder_only_student(tmp_path: Path) -> None:
    ends = []
    for callbacks in ([GradientShares(1)], []):
        module = make(make_causal_folder(tmp_path / "llama"), activation_checkpointing=True)
        found = train(module, *callbacks)
        ends.append(module.state_dict())
        if callbacks:
            assert found[0]["train/label_grad_share"] + found[0]["train/rationale_grad_share"] == pytest.approx(1)
    assert identical(*ends)


class Scaler:
    """The scale of a loss in 16 bits."""

    def scale(self, loss: Tensor) -> Tensor:
        return loss * 2.0**16


def test_a_scaled_loss_has_the_same_shares(student_folder: Path) -> None:
    plain = train(make(student_folder), GradientShares(1), max_steps=1)

    class Scaled(GradientShares):
        def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
            with mock.patch.object(trainer.precision_plugin, "scaler", Scaler(), create=True):
                super().on_before_backward(trainer, pl_module, loss)

    found = train(make(student_folder), Scaled(1), max_steps=1)
    assert found[0] == pytest.approx(plain[0], rel=1e-6)


def test_sharded_parameters_are_refused_in_one_line(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistillModule, "sharded", True)
    with pytest.raises(UserError, match=r"^GradientShares: a sharded strategy has no whole gradient .*; use ddp"):
        train(make(student_folder), GradientShares())


@pytest.mark.parametrize("every", [0, -3])
def test_an_interval_below_1_is_refused(every: int) -> None:
    with pytest.raises(UserError, match=r"GradientShares: every_n_steps must be an integer >= 1, got"):
        GradientShares(every)
