"""SIGINT and SIGTERM at every place of a run: saved, said, the exit code of a shell, and resumed bit by bit."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lit_distill.cli import main
from tests.modules.running import identical
from tests.runs import at_work_in, flat, metric_rows, run, run_folders, small_model, small_trainer, toy_data

STEPS = 6


class Send(pl.Callback):
    """Send this process a signal, in a hook, the so-manieth time that it is called."""

    def __init__(self, hook: str, number: int, times: int = 1, at: int = 1) -> None:
        self.number, self.times, self.left = number, times, at
        setattr(self, hook, self.send)

    def send(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


pytestmark = pytest.mark.usefixtures("here")


def arguments(student: Path, *more: str) -> list[str]:
    # a step is 2, 3, 5, 6, 8 and 9 micro-batches into the run; validation after steps 2, 4 and 6
    model = [*small_model(student), "--model.dropout=0.2", "--model.learning_rate=0.01"]
    trainer = [*small_trainer(STEPS, 2), "--trainer.accumulate_grad_batches=2"]
    best = ["--checkpoint.monitor=val/loss", "--checkpoint.mode=min", "--checkpoint.dirpath=kept/checkpoints"]
    return [*model, *toy_data(10, 4), *trainer, *best, *more]


def send(hook: str, number: int, at: int = 1, times: int = 1) -> list[str]:
    given = {"hook": hook, "number": int(number), "at": at, "times": times}
    settings = [f"--trainer.callbacks.{name}={value}" for name, value in given.items()]
    return ["--trainer.callbacks=tests.test_interrupts.Send", *settings]


def stopped(capfd: pytest.CaptureFixture[str], *given: object) -> tuple[int, list[str]]:
    """The exit code of a command that a signal stops, and what it says at its end."""
    capfd.readouterr()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as ended:
        main(flat(given))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert isinstance(ended.value.code, int)
    return ended.value.code, said.splitlines()[-3:]


def checkpoints(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.name: torch.load(path, weights_only=True) for path in (folder / "checkpoints").glob("*.ckpt")}


def assert_same_run(first: Path, second: Path) -> None:
    """The same checkpoints, by name, weights, moments and schedule."""
    ours, theirs = checkpoints(first), checkpoints(second)
    assert ours.keys() == theirs.keys()
    for name, checkpoint in ours.items():
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            assert identical({key: checkpoint[key]}, {key: theirs[name][key]}), f"{name} {key}"


@pytest.fixture(scope="module")
def unbroken(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch, at_work_in(tmp_path_factory.mktemp("unbroken"), patch) as folder:
        run("fit", arguments(student_folder, "--test_after_fit=false"))
        return folder / "kept"


def logged(name: str) -> dict[str, str]:
    """Step -> value over all runs here; a step is in one of them only."""
    found: dict[str, str] = {}
    for folder in run_folders():
        for row in metric_rows(folder) if (folder / "metrics.csv").exists() else []:
            if name in row:
                assert row["step"] not in found
                found[row["step"]] = row[name]
    return found


# Lightning's words on a folder that holds the first run's checkpoints, which is the point here
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.parametrize(
    ("hook", "at", "step"),
    [
        ("on_train_batch_start", 1, 0),
        # in the midst of the optimizer's part of a step
        ("on_before_optimizer_step", 3, 3),
        # the sanity check has two batches; then comes the first validation
        ("on_validation_batch_end", 2, 2),
        ("on_validation_epoch_end", 3, 4),
        ("on_save_checkpoint", 4, 4),
        ("on_train_end", 1, 6),
    ],
)
def test_a_run_is_saved_at_a_signal_and_goes_on_from_there(
    hook: str, at: int, step: int, unbroken: Path, student_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = arguments(student_folder, "--test_after_fit=false")
    number = (signal.SIGINT, signal.SIGTERM)[at % 2]
    code, lines = stopped(capfd, "fit", given, send(hook, number, at, times=2))
    assert code == 128 + number
    name = number.name
    if step == 0:
        assert lines[0] == f"Stopped by {name} at step 0 of 6: nothing was trained that could be kept"
        assert not Path("kept/checkpoints").exists()
        return
    assert lines[0].startswith(f"Stopped by {name} at step {step} of 6: saved in ")
    assert lines[0].endswith("/kept")
    assert lines[1].startswith("To go on: python -m lit_distill fit --model=StepByStepModule ")
    assert lines[1].endswith(" --resume")
    assert lines[2] == f"lit_distill: stopped by {name}"
    assert torch.load("kept/checkpoints/last.ckpt", weights_only=True)["global_step"] == step
    run("fit", given, "--ckpt_path=kept/checkpoints/last.ckpt")
    assert_same_run(unbroken, Path("kept"))
    assert not list(Path("kept").rglob("*.tmp"))
    [whole] = run_folders(unbroken.parent / "runs")
    for column in ("val/loss", "train/loss"):
        assert logged(column) == {row["step"]: row[column] for row in metric_rows(whole) if column in row}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_sanity_check_ends_a_run_that_has_nothing(
    number: signal.Signals, student_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, lines = stopped(capfd, "fit", arguments(student_folder), send("on_sanity_check_start", number))
    assert code == 128 + number
    assert lines[0].endswith("at step 0 of 6: nothing was trained that could be kept")


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_a_signal_in_the_test_after_fit_keeps_what_was_trained(
    unbroken: Path, student_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sent = send("on_test_batch_start", signal.SIGTERM)
    code, lines = stopped(capfd, "fit", arguments(student_folder), sent)
    assert code == 143
    assert lines[0].startswith("Stopped by SIGTERM at step 6 of 6: saved in ")
    assert_same_run(unbroken, Path("kept"))
    # what goes on from here finds the checkpoint by itself, and has the test to do
    resumed = arguments(student_folder, "--ckpt_path", "kept/checkpoints/last.ckpt")
    assert stopped(capfd, "fit", resumed, sent)[1][1] == lines[1]
    assert not Path("kept/run.json").exists()
    run("fit", arguments(student_folder), "--ckpt_path=kept/checkpoints/last.ckpt")
    assert_same_run(unbroken, Path("kept"))
    assert Path("kept/run.json").exists()


@pytest.mark.parametrize(
    ("command", "hook"),
    [("validate", "on_validation_batch_start"), ("test", "on_test_batch_start"), ("predict", "on_predict_batch_start")],
)
def test_other_commands_end_with_one_line(
    command: str, hook: str, unbroken: Path, student_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained = f"--ckpt_path={unbroken / 'checkpoints' / 'last.ckpt'}"
    code, lines = stopped(capfd, command, arguments(student_folder, trained), send(hook, signal.SIGTERM))
    assert code == 143
    assert lines[-1] == "lit_distill: stopped by SIGTERM"
    assert not list(Path().rglob("predictions.jsonl"))


def test_an_exception_inside_the_optimizers_step_is_not_saved(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = torch.optim.AdamW.step, iter(range(100))

    def broken(self: torch.optim.AdamW, closure: Any = None) -> Any:
        found = step(self, closure)
        if next(calls) == 3:
            raise ArithmeticError("the weights have moved, the moments of some have not")
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(ArithmeticError):
        run("fit", arguments(student_folder))
    assert torch.load("kept/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
