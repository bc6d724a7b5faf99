"""``fit --resume``: the same command goes on in the folder of the run that was broken off."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock, Timeout

from lit_distill.callbacks import Throughput
from lit_distill.cli import main
from lit_distill.objectives import Objective, Step
from lit_distill.records import RECORD, read_record
from tests.runs import at_work_in, flat, metric_rows, refusal, run, run_folders, small_model, small_toy, toy_data
from tests.runs import small_trainer as trainer_settings

STEPS = 6


pytestmark = pytest.mark.usefixtures("here")


def command(student: Path) -> list[str]:
    # with dropout and accumulation: nothing may start again where it began
    model = [*small_model(student), "--model.dropout=0.2", "--model.learning_rate=0.01"]
    return [*model, *toy_data(10, 4), *trainer_settings(STEPS, 2), "--trainer.accumulate_grad_batches=2"]


def broken(monkeypatch: pytest.MonkeyPatch, after: int, *arguments: object, saving: bool = True) -> None:
    """Break a run off before micro-batch ``after``; without saving, as a kill would."""
    with monkeypatch.context() as patch:

        def stop(self: Throughput, trainer: Any, *args: Any) -> None:
            if trainer.fit_loop.epoch_loop.total_batch_idx == after:
                raise FloatingPointError

        patch.setattr(Throughput, "on_train_batch_start", stop)
        if not saving:
            patch.setattr("lit_distill.checkpoints.LastCheckpoint.on_exception", lambda *args: None)
        with pytest.raises(FloatingPointError):
            run("fit", *arguments)


def steps(folder: Path, name: str) -> list[int]:
    return [int(row["step"]) for row in metric_rows(folder) if name in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
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
        broken(monkeypatch, after, same, saving=saving)
    run("fit", same)
    [folder] = run_folders()
    rows, whole = metric_rows(folder), metric_rows(unbroken)
    assert [without(row) for row in rows] == [without(row) for row in whole]
    assert steps(folder, "train/loss") == list(range(STEPS))
    assert all(torch.equal(weight, weights(unbroken)[name]) for name, weight in weights(folder).items())
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert (kept["resume"], kept["trainer"]["logger"][0]["init_args"]["version"]) == (False, None)


def test_another_configuration_is_another_run(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken(monkeypatch, 2, small_toy(student_folder, steps=4), "--resume")
    assert "no earlier run" in caplog.text
    with caplog.at_level("INFO"):
        run("fit", small_toy(student_folder, steps=3), "--resume", "--test_after_fit=false")
    assert len(run_folders()) == 2
    assert "version_0 differs in test_after_fit, trainer.max_steps" in caplog.text


def test_a_run_that_an_earlier_version_began_goes_on(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = small_toy(student_folder)
    broken(monkeypatch, 1, same)
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
    broken(monkeypatch, 7, same)
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
    broken(monkeypatch, 7, command(student_folder), best, f"--trainer.default_root_dir={here / 'before'}")
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
    broken(monkeypatch, 7, same)
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
    broken(monkeypatch, 7, same)
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
    broken(monkeypatch, 7, same, saving=False)
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
    broken(monkeypatch, 7, same)
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
    broken(monkeypatch, 7, same)
    run("fit", same)
    [folder] = run_folders()
    assert steps(folder, "train/extra_loss") == list(range(STEPS))


def test_an_evaluation_s_settings_may_differ(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, 5, command(student_folder))
    [path] = Path("runs").glob("*/*/checkpoints/last.ckpt")
    run("fit", command(student_folder), f"--ckpt_path={path}", "--model.max_label_length=4")
    record = json.loads((run_folders()[1] / RECORD).read_text())
    assert record["student"] == student_folder.name
