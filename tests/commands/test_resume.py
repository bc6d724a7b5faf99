"""``fit --resume``: the same command goes on in the folder of the run that was broken off."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock, Timeout
from safetensors.torch import load_file

from lit_distill.callbacks import Throughput
from lit_distill.cli import main
from lit_distill.objectives import Objective, Step
from lit_distill.records import RECORD, read_record
from tests.modules.running import identical
from tests.runs import (
    at_work_in,
    break_off,
    flat,
    last,
    metric_rows,
    refusal,
    run,
    run_folders,
    small_model,
    small_toy,
    toy_data,
    write_lines,
)
from tests.runs import small_trainer as trainer_settings
from tests.students import make_student_folder

STEPS = 6


pytestmark = pytest.mark.usefixtures("here")


def command(student: Path) -> list[str]:
    # 3 micro-batches an epoch in windows of 2 and 1, with dropout: nothing may start again where it began
    model = [*small_model(student), "--model.dropout=0.2", "--model.learning_rate=0.01"]
    return [*model, *toy_data(10, 4), *trainer_settings(STEPS, 2), "--trainer.accumulate_grad_batches=2"]


def steps(folder: Path, name: str) -> list[int]:
    return [int(row["step"]) for row in metric_rows(folder) if name in row]


def losses(*folders: Path) -> dict[str, str]:
    """Step -> training loss over several runs; a step is in one of them only."""
    found: dict[str, str] = {}
    for folder in folders:
        for row in metric_rows(folder):
            if "train/loss" in row:
                assert row["step"] not in found
                found[row["step"]] = row["train/loss"]
    return found


def without(row: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in row.items() if not name.endswith("_per_second")}


@pytest.fixture(scope="module")
def unbroken(student_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch, at_work_in(tmp_path_factory.mktemp("unbroken"), patch) as folder:
        run("fit", command(student_folder))
        return folder / run_folders()[0]


# before the first checkpoint, and within steps 4, 5 and 6; what was validated last is step 2, 4 and 4
@pytest.mark.parametrize(("saving", "places"), [(True, (5, 8)), (False, (2, 7))])
def test_a_run_goes_on_in_its_own_folder(
    saving: bool, places: tuple[int, ...], unbroken: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = [*command(student_folder), "--resume"]
    for after in places:
        break_off(monkeypatch, after, same, saving=saving)
    run("fit", same)
    [folder] = run_folders()
    rows, whole = metric_rows(folder), metric_rows(unbroken)
    assert [without(row) for row in rows] == [without(row) for row in whole]
    assert steps(folder, "train/loss") == list(range(STEPS))
    assert identical(last(folder)["state_dict"], last(unbroken)["state_dict"])
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert (kept["resume"], kept["trainer"]["logger"][0]["init_args"]["version"]) == (False, None)


# a step is 2, 3, 5, 6, 8 and 9 micro-batches into the run; validation after steps 2, 4 and 6
@pytest.mark.parametrize(
    ("after", "keyboard", "inside"),
    # signals at more places are in `tests/test_interrupts.py`
    [(7, False, False), (3, False, True), (6, True, True)],
)
def test_a_broken_run_that_is_resumed_ends_as_the_unbroken_one(
    after: int, keyboard: bool, inside: bool, unbroken: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_student_folder(here / "student")
    break_off(monkeypatch, after, command(student), inside=inside, keyboard=keyboard)
    [first_part] = run_folders()
    # the checkpoint brings its own student
    shutil.rmtree(student)
    run("fit", command(student), f"--ckpt_path={first_part / 'checkpoints' / 'last.ckpt'}")
    _, resumed = run_folders()
    first, second = last(unbroken), last(resumed)
    assert first["global_step"] == second["global_step"] == STEPS
    assert identical(first["state_dict"], second["state_dict"])
    assert identical(*(checkpoint["optimizer_states"][0]["state"] for checkpoint in (first, second)))
    # both runs together say of each step what the unbroken one says, once
    told, whole = losses(first_part, resumed), losses(unbroken)
    if inside:
        # the loggers are given a step's row only after its hooks
        assert len(whole) - len(told) <= 1
        whole = {step: whole[step] for step in told}
    assert told == whole
    if not inside:
        # broken off between a step and the validation that follows it, the run goes on after both
        validated = [
            row["step"] for folder in (first_part, resumed) for row in metric_rows(folder) if "val/loss" in row
        ]
        assert validated == ["1", "3", "5"]
    # the student that it began with
    for name, keys in (("config.yaml", ("model", "init_args", "student")), ("hparams.yaml", ("student",))):
        found = yaml.safe_load((resumed / name).read_text())
        for key in keys:
            found = found[key]
        assert found == str(student)
    assert second["hyper_parameters"]["student"] == str(student)
    assert f"# {student.name} trained on toy" in (resumed / "student" / "README.md").read_text()


def test_a_run_on_streamed_rows_goes_on_exactly(
    student_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"id": str(i), "input": f"{i} and 1?", "label": "yes", "rationale": f"{i} is so"} for i in range(23)]
    for number, start in enumerate((0, 2, 14)):
        write_lines(here / "shards" / f"{number}.jsonl", lines[start : (2, 14, 23)[number]])
    write_lines(here / "val.jsonl", lines[:2])
    data = ["--data=JSONLDataModule", "--data.train=shards/*.jsonl", "--data.val=val.jsonl", "--data.batch_size=3"]
    # with workers the loader's state is tested in `data/test_streaming.py`
    data += ["--data.streaming=true", "--data.shuffle_buffer=5"]
    own = [*command(student_folder), *data, "--test_after_fit=false"]
    own = [one for one in own if not re.match(r"--data(=Toy|\.\w+_size=(10|4|5)$)", one)]
    run("fit", own)
    # inside the fourth step's window, in the second pass over the shards
    break_off(monkeypatch, 9, own)
    first_part = run_folders()[-1]
    run("fit", own, f"--ckpt_path={first_part / 'checkpoints' / 'last.ckpt'}")
    first, _, resumed = run_folders()
    assert last(first)["global_step"] == last(resumed)["global_step"] == STEPS
    assert identical(last(first)["state_dict"], last(resumed)["state_dict"])
    assert losses(first_part, resumed) == losses(first)


def test_a_resumed_run_keeps_the_earlier_best(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.9, 0.1, 0.2, 0.3])
    monkeypatch.setattr(
        "lit_distill.modules.evaluating.summarise", lambda *args, **kwargs: {"accuracy": next(accuracies)}
    )
    # after the first validation
    break_off(monkeypatch, 4, command(student_folder))
    [first_part] = run_folders()
    checkpoints = first_part / "checkpoints"
    run("fit", command(student_folder), f"--ckpt_path={checkpoints / 'last.ckpt'}")
    _, resumed = run_folders()
    assert (checkpoints / "best-step2.ckpt").is_file()
    assert not list((resumed / "checkpoints").glob("best*"))
    best = torch.load(checkpoints / "best-step2.ckpt", weights_only=True)["state_dict"]
    saved = load_file(resumed / "student" / "model.safetensors")
    assert all(torch.equal(best[f"student.model.{name}"], weight) for name, weight in saved.items())


def test_a_best_that_is_gone_is_said(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_off(monkeypatch, 4, command(student_folder))
    [first_part] = run_folders()
    (first_part / "checkpoints" / "best-step2.ckpt").unlink()
    with pytest.warns(UserWarning, match="earlier best checkpoints are gone"):
        run("fit", command(student_folder), f"--ckpt_path={first_part / 'checkpoints' / 'last.ckpt'}")
    _, resumed = run_folders()
    assert list((resumed / "checkpoints").glob("best-step*.ckpt"))


def test_a_checkpoint_of_another_optimizer_is_not_gone_on_from(
    unbroken: Path, student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [*command(student_folder), f"--ckpt_path={unbroken / 'checkpoints' / 'last.ckpt'}"]
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
    line = refusal(capsys, "fit", command(student_folder), "--ckpt_path=wrong.ckpt", "--trainer.max_steps=9")
    expected = {
        "eps": "ckpt_path: the checkpoint's optimizer has eps [], which is no number",
        "base_lrs": "ckpt_path: the checkpoint's optimizer has base_lrs [{}], which is no number",
    }
    assert line.startswith(expected.get(part, "ckpt_path: 'wrong.ckpt' does not fit what is run here"))


def test_another_configuration_is_another_run(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    break_off(monkeypatch, 2, small_toy(student_folder, steps=4), "--resume")
    assert "no earlier run" in caplog.text
    with caplog.at_level("INFO"):
        run("fit", small_toy(student_folder, steps=3), "--resume", "--test_after_fit=false")
    assert len(run_folders()) == 2
    assert "version_0 differs in test_after_fit, trainer.max_steps" in caplog.text


def test_a_run_that_an_earlier_version_began_goes_on(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = small_toy(student_folder)
    break_off(monkeypatch, 1, same)
    [folder] = run_folders()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["init_args"] |= {"compile": False, "evaluate_losses": "all"}
    config["data"]["init_args"] |= {"pad_to_multiple_of": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    path = folder / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["callbacks"]["SaveConfig"]
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="the checkpoint holds no config to compare"):
        run("fit", same, f"--ckpt_path={path}", "--trainer.default_root_dir=elsewhere")
    run("fit", same, "--resume")
    assert run_folders() == [folder]
    assert (folder / RECORD).is_file()


def test_damaged_checkpoints_are_named_and_passed_over(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = [*command(student_folder), "--resume"]
    break_off(monkeypatch, 7, same)
    [folder] = run_folders()
    path = folder / "checkpoints" / "last.ckpt"
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(2000) + content[middle + 2000 :])
    (folder / "checkpoints" / "empty.ckpt").mkdir()
    with pytest.warns(UserWarning, match="passed over") as told:
        run("fit", same)
    named = " ".join(str(one.message) for one in told)
    assert f"'{path}' is damaged (" in named
    assert "empty.ckpt' is a folder" in named
    assert run_folders() == [folder]
    assert steps(folder, "train/loss") == list(range(STEPS))


def test_a_run_that_was_moved_goes_on_from_its_latest_step_and_keeps_its_best_and_its_time(
    here: Path, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the loss falls: the first validation stays the best
    best = ["--checkpoint.monitor=val/loss", "--checkpoint.mode=max", "--resume"]
    break_off(monkeypatch, 7, command(student_folder), best, f"--trainer.default_root_dir={here / 'before'}")
    shutil.move("before", "after")
    [folder] = run_folders(Path("after/runs"))
    path = folder / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    [state] = [state for name, state in checkpoint["callbacks"].items() if name.startswith("RunHistory")]
    assert 0 < state["seconds"] < 600
    state |= {"seconds": 5000.0, "started": "2020-01-01T00:00:00+00:00"}
    torch.save(checkpoint, path)
    # a copy's files are as old as the copying of each
    for older in folder.glob("checkpoints/best*"):
        os.utime(older, (2e9, 2e9))
    with monkeypatch.context() as patch:
        started: list[int] = []
        patch.setattr(Throughput, "on_train_start", lambda self, trainer, module: started.append(trainer.global_step))
        run("fit", command(student_folder), best, f"--trainer.default_root_dir={here / 'after'}")
    assert started == [4]
    assert run_folders(Path("after/runs")) == [folder]
    assert steps(folder, "train/loss") == list(range(STEPS))
    assert [path.name for path in folder.glob("checkpoints/best*")] == ["best-step2.ckpt"]
    record = read_record(folder)
    assert (record.validation["step"], record.steps, record.started) == (2, STEPS, "2020-01-01T00:00:00+00:00")
    assert 5000 < record.wall_seconds < 5600


def test_a_run_that_is_running_or_has_a_damaged_config_is_left_alone(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [*command(student_folder), "--resume"]
    break_off(monkeypatch, 7, same)
    [folder] = run_folders()
    before = (folder / "metrics.csv").read_bytes()
    with FileLock(folder / ".lock"):
        assert refusal(capsys, "fit", same) == f"{folder}: another process is running it"
    assert (folder / "metrics.csv").read_bytes() == before

    def locked(*args: object) -> None:
        with pytest.raises(Timeout):
            FileLock(folder / ".lock").acquire(timeout=0)
        raise FloatingPointError

    # nothing is changed before it is locked
    monkeypatch.setattr("lit_distill.commands.train.keep_metrics", locked)
    with pytest.raises(FloatingPointError):
        run("fit", same)
    for content in (b"{a: [", b"\xff", b"!!python/object:os.system {}"):
        (folder / "config.yaml").write_bytes(content)
        assert refusal(capsys, "fit", same).startswith(f"resume: {folder}/config.yaml is damaged (")


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_only_fit_resumes(student_folder: Path, capsys: pytest.CaptureFixture[str], subcommand: str) -> None:
    assert refusal(capsys, subcommand, small_toy(student_folder), "--resume").startswith("resume: only fit")


def test_what_to_resume_is_said_once(student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "fit", small_toy(student_folder), "--resume", "--ckpt_path=a.ckpt")
    assert line.startswith("ckpt_path: not with --resume")


@pytest.mark.parametrize("more", ["--resume", "--ckpt_path=kept/checkpoints/last.ckpt"])
def test_a_checkpoint_folder_of_its_own(more: str, student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = [*command(student_folder), "--checkpoint.dirpath=kept/checkpoints"]
    break_off(monkeypatch, 7, same)
    with pytest.raises(SystemExit) as refused:
        main(flat(["fit", same, more, "--model.learning_rate=0.5"]))
    # as a notebook keeps the last error; nothing stays locked
    assert refused.value.code == 2
    run("fit", same, more)
    assert read_record("kept").steps == STEPS
    [folder] = run_folders()
    assert steps(folder, "train/loss") == list(range(STEPS))


def test_tensorboard_goes_on_in_its_folder(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    logger = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=runs"]
    same = [*command(student_folder), *logger, "--resume"]
    break_off(monkeypatch, 7, same, saving=False)
    run("fit", same)
    [folder] = run_folders()
    events: Any = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(STEPS))


def test_a_fixed_version_writes_over_nothing(
    student_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs", "--trainer.logger.version=0"]
    same = [*command(student_folder), *logger]
    break_off(monkeypatch, 7, same)
    [folder] = run_folders()
    before = (folder / "metrics.csv").read_bytes()
    last = f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"
    for again in (["fit", same], ["test", same, last]):
        assert refusal(capsys, again).startswith(f"{folder}: holds an earlier run")
    assert (folder / "metrics.csv").read_bytes() == before
    run("fit", same, "--resume")
    assert run_folders() == [folder]
    assert steps(folder, "train/loss") == list(range(STEPS))


def test_a_finished_run_is_neither_run_again_nor_written_over(
    student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [*small_toy(student_folder), "--checkpoint.dirpath=kept/checkpoints"]
    run("fit", same)
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(flat(["fit", same, "--resume"]))
    assert ended.value.code == 0
    assert "this run is finished: kept" in capsys.readouterr().out
    for more in ([], ["--ckpt_path=kept/checkpoints/last.ckpt"]):
        line = refusal(capsys, "fit", same, "--trainer.max_steps=3", more)
        assert line.startswith("kept: holds a finished run")
    assert before == {path: path.stat().st_mtime_ns for path in Path().rglob("*")}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("--model.learning_rate=0.5", "model.learning_rate: the checkpoint was trained with 0.01, got 0.5"),
        ("--model.rationale_weight=3", "model.rationale_weight: the checkpoint was trained with 1.0, got 3.0"),
        ("--seed_everything=4", "seed_everything: the checkpoint was trained with 0, got 4"),
        ("--data.train_fraction=0.5", "data.train_fraction: the checkpoint was trained with 1.0, got 0.5"),
        (
            "--data=CQADataModule",
            "data: the checkpoint was trained with lit_distill.data.ToyDataModule, got lit_distill",
        ),
        ("--data.rationale_filter=agrees", "data.rationale_filter: the checkpoint was trained with none, got agrees"),
        ("--model.dtype=bfloat16", "model.dtype: the checkpoint was trained with float32, got bfloat16"),
        (
            "--model.objectives=[{class_path: tests.commands.test_resume.Extra, init_args: {weight: 2}}]",
            "model.objectives: the checkpoint was trained with None, got [{'class_path'",
        ),
        ("--model.student=other", "model.student: the checkpoint was trained with /"),
    ],
)
def test_what_contradicts_a_checkpoint_is_refused(
    change: str, line: str, unbroken: Path, student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(student_folder, "other")
    path = unbroken / "checkpoints" / "last.ckpt"
    assert refusal(capsys, "fit", command(student_folder), f"--ckpt_path={path}", change).startswith(line)


class Extra(Objective):
    """A term that is the mean of the label task's losses once more."""

    def forward(self, step: Step) -> torch.Tensor:
        return step.student.loss("label")


class Keep:
    """A filter that has settings."""

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def __call__(self, row: object) -> bool:
        return True


def test_an_objective_and_a_filter_with_settings_are_the_same_when_resumed(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = [
        *command(student_folder),
        f"--model.objectives=[{{class_path: {__name__}.Extra, init_args: {{weight: 2}}}}]",
    ]
    same += [f"--data.rationale_filter={__name__}.Keep", "--data.rationale_filter.count=3", "--resume"]
    break_off(monkeypatch, 7, same)
    run("fit", same)
    [folder] = run_folders()
    assert steps(folder, "train/extra_loss") == list(range(STEPS))


def test_an_evaluation_s_settings_may_differ(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_off(monkeypatch, 5, command(student_folder))
    [path] = Path("runs").glob("*/*/checkpoints/last.ckpt")
    run("fit", command(student_folder), f"--ckpt_path={path}", "--model.max_label_length=4")
    record = json.loads((run_folders()[1] / RECORD).read_text())
    assert record["student"] == student_folder.name
