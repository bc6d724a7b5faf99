"""Weights that change in training: each step's gradient is that of the loss with its own, and a run resumes exactly."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration

from lit_distill.batch import TaskBatch
from lit_distill.errors import UserError
from lit_distill.modules import DistillModule, StepByStepModule
from lit_distill.modules.optimization import parameter_groups
from lit_distill.objectives import MutualInformation, Objective, Step
from tests.modules.batches import Row, RowsData, random_rows
from tests.modules.running import (
    Gradients,
    Steps,
    difference,
    identical,
    make_trainer,
    plain_gradients,
    plain_terms,
)
from tests.modules.test_resume import BATCH, Shuffled, StopAt, Stopped, end_state

# windows of 3 and 2 micro-batches, twice: four steps
ROWS = random_rows(10, seed=6, without_rationale=(0, 1, 5))
STEPS = [ROWS[:6], ROWS[6:]] * 2
FALLING = {"tasks": {"rationale": {"final_weight": 0.3}}, "rationale_weight": 1.5}
TRAINED = {"weighting": "uncertainty"}


def make(folder: Path, **arguments: Any) -> StepByStepModule:
    torch.manual_seed(7)
    settings = {"from_scratch": True, "learning_rate": 1e-2, "max_label_length": 2, "num_samples": 0}
    return StepByStepModule(folder, **settings | arguments)


def train(module: StepByStepModule, **settings: Any) -> tuple[Steps, Any]:
    steps = Steps()
    trainer = make_trainer(**{"max_epochs": 2, "accumulate_grad_batches": 3, "callbacks": [steps]} | settings)
    trainer.fit(module, datamodule=RowsData(ROWS, 2, module.tasks))
    return steps, trainer


def test_a_weight_moves_to_its_last_value_by_the_last_step(student_folder: Path) -> None:
    steps, _ = train(make(student_folder, **FALLING))
    weights = [1.5, 1.1, 0.7, 0.3]
    for found, student, rows, weight in zip(steps.gradients, steps.students, STEPS, weights, strict=True):
        assert difference(found, plain_gradients(student, rows, {"label": 1.0, "rationale": weight})) < 1e-5
    assert [one["train/rationale_weight"] for one in steps.logged] == pytest.approx(weights)
    assert "train/label_weight" not in steps.logged[0]
    for logged, weight in zip(steps.logged, weights, strict=True):
        expected = logged["train/label_loss"] + weight * logged["train/rationale_loss"]
        assert logged["train/loss"] == pytest.approx(expected, rel=1e-6)


def test_a_validation_has_the_weight_of_the_step_after_it(student_folder: Path) -> None:
    module = make(student_folder, **FALLING)
    found: list[dict[str, float]] = []
    module.on_validation_end = lambda: found.append(  # type: ignore[method-assign]
        {name: float(value) for name, value in module.trainer.callback_metrics.items() if name.startswith("val/")}
    )
    _, trainer = train(module, limit_val_batches=1.0)
    for metrics, weight in zip(found, (0.7, 0.3), strict=True):
        expected = metrics["val/label_loss"] + weight * metrics["val/rationale_loss"]
        assert metrics["val/loss"] == pytest.approx(expected, rel=1e-6)
    # outside of a run it is the first
    trainer.validate(module, datamodule=RowsData(ROWS, 2, module.tasks), verbose=False)
    own = module.evaluation.metrics if module.evaluation else {}
    assert own["loss"] == pytest.approx(own["label_loss"] + 1.5 * own["rationale_loss"], rel=1e-6)


def test_the_last_value_is_exact_and_one_step_has_the_first(student_folder: Path) -> None:
    module = make(student_folder, tasks={"rationale": {"final_weight": 0.1}}, rationale_weight=0.7)
    assert [module.tasks["rationale"].weight_at(done) for done in (0.0, 1.0)] == [0.7, 0.1]
    steps, _ = train(make(student_folder, **FALLING), max_steps=1)
    assert steps.logged[0]["train/rationale_weight"] == pytest.approx(1.5)


def test_a_run_without_end_is_refused(student_folder: Path) -> None:
    with pytest.raises(UserError) as error:
        train(make(student_folder, **FALLING), max_epochs=-1)
    assert str(error.value) == "tasks: rationale: final_weight needs a run that ends; set trainer.max_steps"


def fit(folder: Path, arguments: dict[str, Any], resume: Path | None = None, *callbacks: Any, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    module = make(folder, dropout=0.1, **arguments)
    trainer = make_trainer(max_epochs=2, accumulate_grad_batches=3, callbacks=list(callbacks))
    data = Shuffled(ROWS, BATCH, module.tasks)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    return end_state(module, trainer)


@pytest.mark.parametrize("arguments", [FALLING, FALLING | TRAINED], ids=["falling", "trained"])
@pytest.mark.parametrize("stop", [4, 6])
def test_stopped_and_resumed(student_folder: Path, tmp_path: Path, arguments: dict[str, Any], stop: int) -> None:
    unbroken, path = fit(student_folder, arguments), tmp_path / "stopped.ckpt"
    with pytest.raises(Stopped):
        fit(student_folder, arguments, None, StopAt("on_train_batch_end", stop, path))
    assert identical(fit(student_folder, arguments, path, seed=99), unbroken)


# ---------------------------------------------------------------------- trained weights


class LogVariances(pl.Callback):
    """Keeps the log-variances and their gradient in each optimizer step."""

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, Tensor]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        assert isinstance(pl_module, DistillModule)
        assert pl_module.weighting is not None
        own = pl_module.weighting.log_variances
        assert own.grad is not None
        self.found.append((own.detach().clone(), own.grad.clone()))


def check_steps(
    found: Sequence[tuple[Tensor, Tensor]],
    gradients: Sequence[Gradients],
    students: Sequence[T5ForConditionalGeneration],
    rows: Sequence[Sequence[Row]],
    fixed: float,
) -> None:
    """The gradients of w (exp(-s) L + s / 2) over each step's rows, with L by Hugging Face's own loss."""
    for (values, gradient), moved, student, own in zip(found, gradients, students, rows, strict=True):
        weights = {"label": math.exp(-float(values[0])), "rationale": fixed * math.exp(-float(values[1]))}
        assert difference(moved, plain_gradients(student, own, weights)) < 1e-5
        losses = plain_terms(student, own, ("label", "rationale"))
        expected = [weight * -float(losses[task].detach()) for task, weight in weights.items()]
        expected = [expected[0] + 0.5, expected[1] + (fixed / 2 if expected[1] else 0.0)]
        assert gradient.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_with_trained_weights(student_folder: Path, accumulate: int) -> None:
    module, caught, steps = make(student_folder, rationale_weight=0.4, **TRAINED), LogVariances(), Steps()
    with torch.no_grad():
        module.weighting.log_variances.copy_(torch.tensor([0.3, -0.8]))  # type: ignore[union-attr]
    train(module, accumulate_grad_batches=accumulate, callbacks=[steps, caught])
    # with one micro-batch a step, the first step has no rationale, whose s / 2 is then absent too
    rows = [ROWS[i : i + 2] for i in range(0, 10, 2)] * 2 if accumulate == 1 else STEPS
    check_steps(caught.found, steps.gradients, steps.students, rows, 0.4)
    assert all((before[0] != after[0]).all() for before, after in zip(caught.found[1:], caught.found[2:], strict=False))
    for (values, _), logged in zip(caught.found, steps.logged, strict=True):
        assert logged["train/label_weight"] == pytest.approx(math.exp(-float(values[0])))
        assert logged["train/rationale_weight"] == pytest.approx(0.4 * math.exp(-float(values[1])))


class Constant(Objective):
    """A loss that no weight of the student changes."""

    def counts(self, batch: TaskBatch) -> None:
        return None

    def forward(self, step: Step) -> Tensor:
        return step.student.loss("label") * 0 + 5.0


def test_a_term_that_is_averaged_plainly(student_folder: Path) -> None:
    caught = LogVariances()
    train(make(student_folder, objectives=[Constant(weight=0.1)], **TRAINED), callbacks=[caught])
    for values, gradient in caught.found:
        # 0 where the weight is 1 / (2 L)
        assert float(gradient[2]) == pytest.approx(0.1 * (0.5 - 5 * math.exp(-float(values[2]))), rel=1e-5)


def test_log_variances_in_the_optimizer(student_folder: Path) -> None:
    module = make(student_folder, adapter={"r": 2, "dropout": 0.1}, **TRAINED)
    assert module.weighting is not None
    own = module.weighting.log_variances
    [group] = [group for group in parameter_groups(module, 0.1) if any(one is own for one in group["params"])]
    assert (group["weight_decay"], group["lr"], len(group["params"])) == (0.0, 0.01, 1)
    train(module, max_steps=1)
    assert own.detach().abs().min() > 0.009
    assert not [name for name in module.student.state_dict() if "log_variances" in name]


def test_checkpoints_of_trained_weights(student_folder: Path, tmp_path: Path) -> None:
    module, path = make(student_folder, **TRAINED), tmp_path / "end.ckpt"
    _, trainer = train(module)
    trainer.save_checkpoint(path)
    loaded = StepByStepModule.load_from_checkpoint(path)
    assert identical(loaded.state_dict(), module.state_dict())
    assert loaded.term_weights()["label"] == module.term_weights()["label"] != 1
    # answers need none of them; training does
    plain, data = make(student_folder), RowsData(ROWS, 2, module.tasks)
    make_trainer(limit_val_batches=1).validate(plain, data, ckpt_path=path, weights_only=True, verbose=False)
    with pytest.raises(UserError, match=r"weighting are others: it has weighting\.log_variances, which these have not"):
        make_trainer(max_epochs=3).fit(plain, data, ckpt_path=path, weights_only=True)


def test_validation_has_the_trained_weights(student_folder: Path) -> None:
    module = make(student_folder, **TRAINED)
    train(module, limit_val_batches=1.0)
    weights, own = module.term_weights(), module.evaluation.metrics if module.evaluation else {}
    expected = sum(
        float(torch.as_tensor(weights[task]).detach()) * own[f"{task}_loss"] for task in ("label", "rationale")
    )
    assert own["loss"] == pytest.approx(expected, rel=1e-6)


class Own(StepByStepModule):
    def total_loss(self, terms: dict[str, Tensor]) -> Tensor:
        return terms["label"]


def test_trained_weights_are_refused(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^weighting must be one of fixed, uncertainty, got 'kendall'"):
        make(student_folder, weighting="kendall")
    with pytest.raises(UserError, match=r"^weighting: Own weighs its terms itself \(total_loss\); use fixed"):
        Own(student_folder, from_scratch=True, weighting="uncertainty")
    teachers: Any = {"big": {"model": str(student_folder)}}
    with pytest.raises(UserError, match=r"^weighting: mi_alpha can be below 0, and its weight would grow without end"):
        make(student_folder, objectives=[MutualInformation()], teachers=teachers, **TRAINED)
    monkeypatch.setattr(StepByStepModule, "sharded", True)
    with pytest.raises(UserError, match=r"^weighting: under a sharded strategy no rank has the trained weights"):
        train(make(student_folder, **TRAINED))
