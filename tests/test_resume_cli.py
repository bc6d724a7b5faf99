"""Runs that are broken off and resumed, through the command line."""

import re
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from tests.runs import (
    at_work_in,
    metric_rows,
    refusal,
    run,
    run_folders,
    small_model,
    small_trainer,
    toy_data,
    write_lines,
)
from tests.students import make_student_folder

STEPS = 6


class Interrupt(pl.Callback):
    """Break a run off after so many micro-batches: inside the hooks of the last of them, or before the next."""

    def __init__(self, after: int = 1, keyboard: bool = False, inside: bool = False) -> None:
        self.after = after
        self.fault: type[BaseException] = KeyboardInterrupt if keyboard else FloatingPointError
        self.inside = inside

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if not self.inside and trainer.fit_loop.epoch_loop.total_batch_idx == self.after:
            raise self.fault

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.inside and trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.after:
            raise self.fault


pytestmark = pytest.mark.usefixtures("here")


def arguments(student: Path) -> list[str]:
    # 3 micro-batches an epoch in windows of 2 and 1, with dropout: nothing may start again where it began
    model = [*small_model(student), "--model.dropout=0.2", "--model.learning_rate=0.01"]
    trainer = [*small_trainer(STEPS, 2), "--trainer.accumulate_grad_batches=2"]
    return [*model, *toy_data(10, 4), *trainer, "--test_after_fit=false"]


def interrupt(after: int, keyboard: bool = False, inside: bool = False) -> list[str]:
    start = "--trainer.callbacks"
    settings = [f"{start}.after={after}", f"{start}.keyboard={keyboard}", f"{start}.inside={inside}"]
    return [f"{start}=tests.test_resume_cli.Interrupt", *settings]


def last(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return loaded


def losses(*folders: Path) -> dict[str, str]:
    """Step -> training loss over several runs; a step is in one of them only."""
    found: dict[str, str] = {}
    for folder in folders:
        for row in metric_rows(folder):
            if "train/loss" in row:
                assert row["step"] not in found
                found[row["step"]] = row["train/loss"]
    return found


@pytest.fixture(scope="module")
def unbroken(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch, at_work_in(tmp_path_factory.mktemp("unbroken"), patch) as folder:
        run("fit", arguments(student_folder))
        return folder / run_folders()[0]


# a step is 2, 3, 5, 6, 8 and 9 micro-batches into the run; validation after steps 2, 4 and 6
@pytest.mark.parametrize(
    ("after", "keyboard", "inside"),
    # signals at more places are in `test_interrupts.py`
    [(7, False, False), (3, False, True), (6, True, True)],
)
def test_a_broken_run_that_is_resumed_ends_as_the_unbroken_one(
    after: int, keyboard: bool, inside: bool, unbroken: Path, here: Path
) -> None:
    student = make_student_folder(here / "student")
    # Lightning turns Ctrl-C into an exit
    kind: type[BaseException] = SystemExit if keyboard else FloatingPointError
    with pytest.raises(kind):
        run("fit", arguments(student), interrupt(after, keyboard, inside))
    [broken] = run_folders()
    # the checkpoint brings its own student
    shutil.rmtree(student)
    run("fit", arguments(student), f"--ckpt_path={broken / 'checkpoints' / 'last.ckpt'}")
    _, resumed = run_folders()
    first, second = last(unbroken), last(resumed)
    assert first["global_step"] == second["global_step"] == STEPS
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for name, weight in first["state_dict"].items():
        assert torch.equal(weight, second["state_dict"][name]), name
    moments = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (first, second)]
    for number, state in moments[0].items():
        assert all(torch.equal(value, moments[1][number][name]) for name, value in state.items())
    # both runs together say of each step what the unbroken one says, once
    told, whole = losses(broken, resumed), losses(unbroken)
    if inside:
        # the loggers are given a step's row only after its hooks
        assert len(whole) - len(told) <= 1
        whole = {step: whole[step] for step in told}
    assert told == whole
    if not inside:
        # broken off between a step and the validation that follows it, the run goes on after both
        validated = [row["step"] for folder in (broken, resumed) for row in metric_rows(folder) if "val/loss" in row]
        assert validated == ["1", "3", "5"]
    # the student that it began with
    for name, keys in (("config.yaml", ("model", "init_args", "student")), ("hparams.yaml", ("student",))):
        found = yaml.safe_load((resumed / name).read_text())
        for key in keys:
            found = found[key]
        assert found == str(student)
    assert second["hyper_parameters"]["student"] == str(student)
    assert f"# {student.name} trained on toy" in (resumed / "student" / "README.md").read_text()


def test_a_run_on_streamed_rows_goes_on_exactly(student_folder: Path, here: Path) -> None:
    lines = [{"id": str(i), "input": f"{i} and 1?", "label": "yes", "rationale": f"{i} is so"} for i in range(23)]
    for number, start in enumerate((0, 2, 14)):
        write_lines(here / "shards" / f"{number}.jsonl", lines[start : (2, 14, 23)[number]])
    write_lines(here / "val.jsonl", lines[:2])
    data = ["--data=JSONLDataModule", "--data.train=shards/*.jsonl", "--data.val=val.jsonl", "--data.batch_size=3"]
    # with workers the loader's state is tested in `data/test_streaming.py`
    data += ["--data.streaming=true", "--data.shuffle_buffer=5"]
    own = [*arguments(student_folder), *data]
    own = [one for one in own if not re.match(r"--data(=Toy|\.\w+_size=(10|4|5)$)", one)]
    run("fit", own)
    with pytest.raises(FloatingPointError):
        # inside the fourth step's window, in the second pass over the shards
        run("fit", own, interrupt(9))
    broken = run_folders()[-1]
    run("fit", own, f"--ckpt_path={broken / 'checkpoints' / 'last.ckpt'}")
    first, _, resumed = run_folders()
    assert last(first)["global_step"] == last(resumed)["global_step"] == STEPS
    for name, weight in last(first)["state_dict"].items():
        assert torch.equal(weight, last(resumed)["state_dict"][name]), name
    assert losses(broken, resumed) == losses(first)


def test_a_resumed_run_keeps_the_earlier_best(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.9, 0.1, 0.2, 0.3])
    monkeypatch.setattr(
        "lit_distill.modules.evaluating.summarise", lambda *args, **kwargs: {"accuracy": next(accuracies)}
    )
    with pytest.raises(FloatingPointError):
        # after the first validation
        run("fit", arguments(student_folder), interrupt(4))
    [broken] = run_folders()
    checkpoints = broken / "checkpoints"
    run("fit", arguments(student_folder), f"--ckpt_path={checkpoints / 'last.ckpt'}", "--test_after_fit=true")
    _, resumed = run_folders()
    assert (checkpoints / "best-step2.ckpt").is_file()
    assert not list((resumed / "checkpoints").glob("best*"))
    best = torch.load(checkpoints / "best-step2.ckpt", weights_only=True)["state_dict"]
    from safetensors.torch import load_file

    saved = load_file(resumed / "student" / "model.safetensors")
    assert all(torch.equal(best[f"student.model.{name}"], weight) for name, weight in saved.items())


def test_a_best_that_is_gone_is_said(student_folder: Path) -> None:
    with pytest.raises(FloatingPointError):
        run("fit", arguments(student_folder), interrupt(4))
    [broken] = run_folders()
    (broken / "checkpoints" / "best-step2.ckpt").unlink()
    with pytest.warns(UserWarning, match="earlier best checkpoints are gone"):
        run("fit", arguments(student_folder), f"--ckpt_path={broken / 'checkpoints' / 'last.ckpt'}")
    _, resumed = run_folders()
    assert list((resumed / "checkpoints").glob("best-step*.ckpt"))


def test_a_checkpoint_of_another_optimizer_is_not_gone_on_from(
    unbroken: Path, student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [*arguments(student_folder), f"--ckpt_path={unbroken / 'checkpoints' / 'last.ckpt'}"]
    line = refusal(capsys, "fit", again, "--trainer.max_steps=9", "--model.optimizer=adafactor")
    assert line.startswith("ckpt_path: the checkpoint was trained with optimizer adamw, not adafactor")


@pytest.mark.parametrize("part", ["optimizer_states", "loops", "eps", "base_lrs"])
def test_a_checkpoint_with_a_wrong_part_is_one_line(
    part: str, unbroken: Path, student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = last(unbroken)
    if part == "eps":
        content["optimizer_states"][0]["param_groups"][0][part] = []
    elif part == "base_lrs":
        content["lr_schedulers"][0][part] = [{}]
    else:
        content[part] = 3
    torch.save(content, "wrong.ckpt")
    line = refusal(capsys, "fit", arguments(student_folder), "--ckpt_path=wrong.ckpt", "--trainer.max_steps=9")
    expected = {
        "eps": "ckpt_path: the checkpoint's optimizer has eps [], which is no number",
        "base_lrs": "ckpt_path: the checkpoint's optimizer has base_lrs [{}], which is no number",
    }
    assert line.startswith(expected.get(part, "ckpt_path: 'wrong.ckpt' does not fit what is run here"))
