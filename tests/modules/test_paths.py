"""A run with ``fast: auto`` chooses how its student is computed, once, and trains as one that was told to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_distill.errors import UserError
from lit_distill.modules import StepByStepModule, choosing
from lit_distill.students import timing
from lit_distill.students.timing import Choice
from tests.modules.batches import RowsData, random_rows
from tests.modules.running import identical, make_trainer

# the test's loader reads its rows in order, and a position is enough for it
pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")

ROWS = random_rows(12, seed=3, without_rationale=(2,))


def fit(folder: Path, fast: Any = "auto", resume: Path | None = None, **settings: Any) -> tuple[Any, Any]:
    torch.manual_seed(7)
    module = StepByStepModule(folder, from_scratch=True, fast=fast, dropout=0.2, lr_schedule="constant")
    trainer = make_trainer(**{"max_steps": 4, "max_epochs": -1, "log_every_n_steps": 1} | settings)
    torch.manual_seed(8)
    data = RowsData(ROWS, 3, module.tasks)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    return module, trainer


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """The choices that are made, in order; what is put here is chosen next."""
    left: list[Choice] = []
    monkeypatch.setattr(choosing, "choose", lambda *_: left.pop(0))
    return left


def test_training_is_that_of_the_path(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # both paths are timed, and the default is never left
    monkeypatch.setattr(timing, "TOO_SHORT", 0.0)
    monkeypatch.setattr(timing, "MARGIN", 0.0)
    auto, _ = fit(student_folder)
    assert auto.chosen_paths["training"].seconds.keys() == {"packed", "plain"}
    told, _ = fit(student_folder, "packed")
    assert told.chosen_paths == {}
    assert identical(auto.state_dict(), told.state_dict())


def test_plain_is_taken_and_kept_by_a_resumed_run(
    student_folder: Path, tmp_path: Path, chosen: list[Choice], caplog: pytest.LogCaptureFixture
) -> None:
    choice = Choice("plain", 2, {"packed": 0.25, "plain": 0.125}, {"packed": 0.5, "plain": 0.5})
    chosen.append(choice)
    whole, _ = fit(student_folder)
    assert chosen == []
    assert identical(whole.state_dict(), fit(student_folder, "plain")[0].state_dict())
    caplog.clear()
    caplog.set_level("INFO")

    chosen.append(choice)
    _, trainer = fit(student_folder, max_steps=2, logger=CSVLogger(tmp_path / "logs", version="first"))
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    logger = CSVLogger(tmp_path / "logs", version="second")
    # nothing is chosen anew
    resumed, _ = fit(student_folder, resume=tmp_path / "stopped.ckpt", logger=logger)
    assert resumed.chosen_paths == {"training": choice}
    assert identical(resumed.state_dict(), whole.state_dict())
    told = "plain (a step of 2 rows: packed 250 ms, plain 125 ms)"
    assert [one.message for one in caplog.records if "fast" in one.message] == [f"fast: training on {told}"] * 2
    assert logger.experiment.hparams["fast_training"] == told


@pytest.mark.parametrize("fast", [True, False, "packed", "plain"])
def test_a_checkpoint_that_was_told_its_path(
    student_folder: Path, tmp_path: Path, chosen: list[Choice], fast: Any
) -> None:
    _, trainer = fit(student_folder, fast, max_steps=2)
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, _ = fit(student_folder, resume=tmp_path / "stopped.ckpt")
    assert resumed.student.path == ("packed" if fast in (True, "packed") else "plain")
    assert resumed.student.evaluation_path == "packed"


def test_another_run_of_the_same_module_chooses_again(student_folder: Path, chosen: list[Choice]) -> None:
    chosen += [Choice("plain"), Choice("packed")]
    module, _ = fit(student_folder)
    assert module.student.path == "plain"
    make_trainer(max_steps=1).fit(module, datamodule=RowsData(ROWS, 3, module.tasks))
    assert module.student.path == "packed"


def test_a_loaded_module_evaluates_on_the_default(student_folder: Path, tmp_path: Path, chosen: list[Choice]) -> None:
    chosen.append(Choice("plain"))
    _, trainer = fit(student_folder, limit_val_batches=0)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module: Any = StepByStepModule.load_from_checkpoint(tmp_path / "a.ckpt").eval()
    assert (module.student.path, module.student.evaluation_path) == ("packed", "packed")
    make_trainer(limit_val_batches=1).validate(module, datamodule=RowsData(ROWS, 3, module.tasks), verbose=False)
    assert module.chosen_paths == {}


def test_an_accelerator_times_evaluation_too(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch, chosen: list[Choice]
) -> None:
    chosen.append(Choice("plain"))
    module: Any = StepByStepModule(student_folder, from_scratch=True)
    monkeypatch.setattr(StepByStepModule, "device", torch.device("cuda"))
    module.trainer = make_trainer()
    batch = next(iter(RowsData(ROWS, 3, module.tasks).val_dataloader()))
    module.on_validation_batch_start(batch, 0)
    module.on_test_batch_start(batch, 1)
    assert (module.student.path, module.student.evaluation_path) == ("packed", "plain")


def test_an_unknown_path_of_a_checkpoint_is_refused(student_folder: Path, tmp_path: Path, chosen: list[Choice]) -> None:
    chosen.append(Choice("plain"))
    _, trainer = fit(student_folder, max_steps=2)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    saved["lit_distill_paths"]["training"]["path"] = "warp"
    torch.save(saved, tmp_path / "saved.ckpt")
    with pytest.raises(UserError, match=r"ckpt_path: path.*warp"):
        fit(student_folder, resume=tmp_path / "saved.ckpt")
