"""What is not finite stops a run before it reaches weights, checkpoints, students or records."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lit_distill.errors import UserError
from lit_distill.modules import StepByStepModule
from lit_distill.objectives import Step
from lit_distill.records import RECORD
from tests.modules.batches import RowsData, random_rows
from tests.modules.running import make_trainer
from tests.runs import refusal, run, run_folders, small_toy

ROWS = random_rows(14, seed=41)


class Diverging(StepByStepModule):
    """One term of one micro-batch, or one parameter's gradient there, is not finite."""

    broken: tuple[str, int] = ("rationale", 5)
    value: float = float("nan")
    stage: str = "train"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.number = 0
        self.hurt = False
        if self.broken[0] == "gradient":
            parameter = list(self.student.model.parameters())[7]
            parameter.register_hook(lambda g: torch.full_like(g, self.value) if self.hurt else g)

    def loss_terms(self, step: Step) -> dict[str, Tensor]:
        terms = super().loss_terms(step)
        if self.training == (self.stage == "train"):
            self.hurt = self.number == self.broken[1]
            if self.hurt and self.broken[0] in terms:
                terms[self.broken[0]] = terms[self.broken[0]] * self.value
            self.number += 1
        return terms


def diverging(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> type[Diverging]:
    for name, value in settings.items():
        monkeypatch.setattr(Diverging, name, value)
    return Diverging


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch, value: float, clip: float | None
) -> None:
    module = diverging(monkeypatch, value=value)(student_folder, from_scratch=True)
    # seven micro-batches an epoch, four optimizer steps: micro-batch 5 is the second of the third step
    trainer = make_trainer(max_epochs=2, accumulate_grad_batches=2, gradient_clip_val=clip)
    with pytest.raises(UserError, match=r"^step 3: the rationale loss is not finite; .*: none yet$"):
        trainer.fit(module, datamodule=RowsData(ROWS, 2, module.tasks))
    assert trainer.global_step == 2
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_a_gradient_that_is_not_finite_is_named(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = diverging(monkeypatch, broken=("gradient", 2), value=float("inf"))(student_folder, from_scratch=True)
    with pytest.raises(UserError, match=r"step 3: the gradient is not finite"):
        make_trainer(max_epochs=1).fit(module, datamodule=RowsData(ROWS, 2, module.tasks))
    assert all(parameter.isfinite().all() for parameter in module.parameters())


class Skipping(Diverging):
    """As on a device that the host does not wait for."""

    _skips = True


@pytest.mark.parametrize("broken", [("rationale", 2), ("gradient", 2), ("gradient", 6)], ids=str)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_that_is_skipped_on_the_device_stops_the_run_one_step_later(
    student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: tuple[str, int], clip: float | None
) -> None:
    diverging(monkeypatch, broken=broken)
    weights = []
    for kind, steps in ((Skipping, 7), (StepByStepModule, broken[1])):
        torch.manual_seed(7)
        module = kind(student_folder, from_scratch=True, lr_schedule="constant")
        trainer = make_trainer(max_steps=steps, gradient_clip_val=clip)
        data = RowsData(ROWS, 2, module.tasks)
        if kind is Skipping:
            with pytest.raises(UserError, match=f"^step {broken[1] + 1}: the {broken[0]}.* is not finite"):
                trainer.fit(module, datamodule=data)
        else:
            trainer.fit(module, datamodule=data)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    # the steps before it, and nothing after
    assert weights[0].equal(weights[1])


def test_a_skipped_step_is_not_saved_unseen(
    student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *rest: object) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    diverging(monkeypatch, broken=("gradient", 2))
    module = Skipping(student_folder, from_scratch=True)
    with pytest.raises(UserError, match=r"^step 3: the gradient is not finite"):
        make_trainer(max_steps=7, callbacks=[Saving()]).fit(module, datamodule=RowsData(ROWS, 2, module.tasks))
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["1.ckpt", "2.ckpt"]


def test_weights_that_are_not_finite_are_not_saved(student_folder: Path, tmp_path: Path) -> None:
    module = StepByStepModule(student_folder, from_scratch=True)
    trainer = make_trainer(max_steps=1)
    trainer.fit(module, datamodule=RowsData(ROWS, 2, module.tasks))
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    with torch.no_grad():
        module.student.get_parameter("model.shared.weight")[3, 1] = float("nan")
    with pytest.raises(UserError, match=r"student\.model\.shared\.weight"):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()


# ------------------------------------------------------------------------------------------- the command line


def method(student: Path) -> list[str]:
    return [*small_toy(student, steps=6, every=2), "--model=tests.modules.test_finite.Diverging"]


def finite(path: Path) -> bool:
    state = torch.load(path, weights_only=True)["state_dict"]
    return all(bool(weight.isfinite().all()) for weight in state.values())


def test_a_run_that_diverges_says_where_and_keeps_what_was_good(
    here: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    diverging(monkeypatch, broken=("label", 2))
    line = refusal(capsys, "fit", method(student_folder))
    [folder] = run_folders()
    assert line.startswith("step 3: the label loss is not finite")
    assert str(folder / "checkpoints" / "last.ckpt") in line
    kept = list(folder.glob("checkpoints/*.ckpt"))
    assert kept
    assert all(map(finite, kept))
    assert not (folder / RECORD).exists()
    assert not (folder / "student").exists()


def test_a_learning_rate_that_is_far_too_high_stops_the_run(
    here: Path, student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(capsys, "fit", small_toy(student_folder, steps=60, every=20), "--model.learning_rate=1e36")
    assert "not finite" in line or "_loss is" in line
    [folder] = run_folders()
    # whatever checkpoint is named is there
    assert line.endswith("none yet") or Path(line.rpartition(": ")[2]).is_file()
    assert all(map(finite, folder.glob("checkpoints/*.ckpt")))
    assert not (folder / RECORD).exists()


def test_a_validation_loss_that_is_not_finite_chooses_nothing(
    here: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    diverging(monkeypatch, stage="val", broken=("rationale", 2))
    line = refusal(capsys, "fit", method(student_folder), "--trainer.num_sanity_val_steps=0")
    assert line.startswith("step 6: val/rationale_loss is nan")
    [folder] = run_folders()
    good = folder / "checkpoints" / "last.ckpt"
    assert good.exists()
    assert line.endswith(f"; the last good checkpoint: {good}")
    assert not list(folder.glob("checkpoints/best-step6.ckpt"))
    assert not (folder / RECORD).exists()


@pytest.mark.parametrize("command", ["fit", "test", "predict"])
def test_a_checkpoint_that_is_not_finite_is_refused(
    command: str, here: Path, student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", small_toy(student_folder, steps=1), "--test_after_fit=false")
    [path] = Path("runs").glob("*/*/checkpoints/last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["student.model.encoder.final_layer_norm.weight"][0] = float("inf")
    torch.save(checkpoint, "bad.ckpt")
    line = refusal(capsys, command, small_toy(student_folder, steps=2), "--ckpt_path=bad.ckpt")
    assert "bad.ckpt" in line
    assert "not finite" in line
    assert "encoder.final_layer_norm.weight" in line


class Scaled(pl.Callback):
    """Makes the trainer's precision look like one with a loss scaler, whose own business such gradients are."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.precision_plugin.scaler = object()  # type: ignore[attr-defined]


def test_a_loss_scaler_s_overflows_are_left_to_it(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = diverging(monkeypatch, broken=("gradient", 2), value=float("inf"))(student_folder, from_scratch=True)
    trainer = make_trainer(max_steps=3, callbacks=[Scaled()])
    trainer.fit(module, datamodule=RowsData(ROWS, 2, module.tasks))
    assert trainer.global_step == 3
