"""Weights that change in training: each step's gradient is that of the loss with its own, and a run resumes exactly."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_distill.errors import UserError
from lit_distill.modules import StepByStepModule
from tests.modules.batches import RowsData, random_rows
from tests.modules.running import Steps, difference, identical, make_trainer, plain_gradients
from tests.modules.test_resume import BATCH, Shuffled, StopAt, Stopped, end_state

# windows of 3 and 2 micro-batches, twice: four steps
ROWS = random_rows(10, seed=6, without_rationale=(0, 1, 5))
STEPS = [ROWS[:6], ROWS[6:]] * 2
FALLING = {"tasks": {"rationale": {"final_weight": 0.3}}, "rationale_weight": 1.5}


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


@pytest.mark.parametrize("arguments", [FALLING], ids=["falling"])
@pytest.mark.parametrize("stop", [4, 6])
def test_stopped_and_resumed(student_folder: Path, tmp_path: Path, arguments: dict[str, Any], stop: int) -> None:
    unbroken, path = fit(student_folder, arguments), tmp_path / "stopped.ckpt"
    with pytest.raises(Stopped):
        fit(student_folder, arguments, None, StopAt("on_train_batch_end", stop, path))
    assert identical(fit(student_folder, arguments, path, seed=99), unbroken)
