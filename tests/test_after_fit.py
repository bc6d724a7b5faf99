"""What `fit` ends with where test is absent or stumbles: the trained student is kept."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard

from lit_distill.comparison.comparing import compare_runs
from lit_distill.comparison.runs import find_runs
from lit_distill.modules import DistillModule
from lit_distill.records import read_record
from tests.runs import (
    metric_rows,
    refusal,
    run,
    run_folders,
    small_model,
    small_toy,
    small_trainer,
    toy_data,
    write_lines,
)

ROWS = [{"input": f"cat {i}", "label": "a", "rationale": "because a"} for i in range(8)]


pytestmark = pytest.mark.usefixtures("here")


def own_rows(**files: Path) -> list[str]:
    return [
        "--data=JSONLDataModule",
        *(f"--data.{split}={path}" for split, path in files.items()),
        "--data.batch_size=4",
    ]


@pytest.mark.filterwarnings("ignore:.*the student is saved untested:UserWarning")
def test_without_a_test_split_the_student_is_saved_untested(student_folder: Path, here: Path) -> None:
    rows = write_lines(here / "rows.jsonl", ROWS)
    with pytest.warns(UserWarning, match="the student is saved untested"):
        run("fit", small_model(student_folder), own_rows(train=rows, val=rows), small_trainer())
    [folder] = run_folders()
    assert (folder / "student" / "model.safetensors").is_file()


def test_the_floor_of_its_rows_is_in_the_record_and_the_table(
    student_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_lines(here / "rows.jsonl", [{"input": f"{n} {'ab'[n % 2]}", "label": "ab"[n % 2]} for n in range(20)])
    closed = [*own_rows(train=rows, val=rows, test=rows), "--data.label_set=[a,b]"]
    run("fit", small_model(student_folder, "StandardModule"), closed, small_trainer())
    [folder] = run_folders()
    found = read_record(folder)
    assert found.floors == {"words": 1.0}
    assert found.metrics["test/accuracy"] < 1
    out = capsys.readouterr().out
    assert "floor: words of the input" in out
    assert "is below the floor, 1.000" in out


def test_without_a_test_chance_and_floors_are_those_of_val(
    student_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_lines(here / "rows.jsonl", [{"input": f"{n} {'ab'[n % 2]}", "label": "ab"[n % 2]} for n in range(20)])
    val = write_lines(here / "val.jsonl", [{"input": "0 a", "label": "a"}, *({"input": "1 b", "label": "a"},) * 3])
    closed = [*own_rows(train=rows, val=val, test=rows), "--data.label_set=[a,b]"]
    run("fit", small_model(student_folder, "StandardModule"), closed, small_trainer(), "--test_after_fit=false")
    [folder] = run_folders()
    found = read_record(folder)
    assert (found.metrics, found.floors, found.chance) == ({}, {"words": 0.25}, 1.0)
    assert "floor: words of the input" in capsys.readouterr().out
    settings = compare_runs(*find_runs([folder]), metric="val/accuracy").settings
    assert (list(settings.floor), list(settings.chance)) == ([0.25], [1.0])


def test_a_test_that_stumbles_does_not_lose_the_student(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(self: DistillModule, batch: object, batch_idx: int) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(DistillModule, "test_step", stumble)
    with pytest.raises(RuntimeError, match="the device is gone"):
        run("fit", small_toy(student_folder))
    [folder] = run_folders()
    assert (folder / "student" / "model.safetensors").is_file()


@pytest.mark.parametrize("row", [{"input": "cat", "label": None}, {"input": "cat"}, {"input": ["cat"], "label": "a"}])
def test_a_test_that_cannot_be_is_refused_before_training(
    row: dict[str, Any], student_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_lines(here / "rows.jsonl", ROWS)
    data = own_rows(train=rows, val=rows, test=write_lines(here / "test.jsonl", [row]))
    with pytest.raises(SystemExit) as stopped:
        run("fit", small_model(student_folder), data, small_trainer())
    assert stopped.value.code == 2
    assert "test" in capsys.readouterr().err.splitlines()[-1]
    assert not (here / "runs").exists()
    if row["input"] == "cat" and "label" in row:
        run("fit", small_model(student_folder), data, small_trainer(), "--test_after_fit=false")


def test_a_baseline_needs_a_test(student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data=ToyDataModule", "--baseline_after_fit=true", "--test_after_fit=false"]
    assert "baseline_after_fit needs test_after_fit" in refusal(capsys, "fit", small_model(student_folder), arguments)


def test_a_run_without_an_end_is_refused(student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data=ToyDataModule", "--trainer.max_steps=-1"]
    assert "trainer.max_steps: -1 needs" in refusal(capsys, "fit", small_model(student_folder), arguments)


def test_a_run_without_validation_saves_its_last_student(student_folder: Path, here: Path) -> None:
    data = ["--data=ToyDataModule", "--data.train_size=8", "--data.test_size=4", "--data.batch_size=4"]
    more = ["--trainer.limit_val_batches=0", "--trainer.default_root_dir=elsewhere"]
    with pytest.warns(UserWarning, match="the student of the last step is tested and saved"):
        run("fit", small_model(student_folder), data, small_trainer(), more)
    assert not (here / "runs").exists()
    [folder] = run_folders(here / "elsewhere" / "runs")
    assert (folder / "student" / "model.safetensors").is_file()
    assert (folder / "checkpoints" / "last.ckpt").is_file()


def test_lightnings_own_interval_is_heard(student_folder: Path, here: Path) -> None:
    data = ["--data=ToyDataModule", "--data.train_size=16", "--data.val_size=4", "--data.test_size=4"]
    trainer = ["--trainer.accelerator=cpu", "--trainer.max_steps=4", "--trainer.val_check_interval=2"]
    run("fit", small_model(student_folder), data, "--data.batch_size=4", trainer, "--trainer.enable_progress_bar=false")
    [folder] = run_folders()
    rows = [row["step"] for row in metric_rows(folder) if "val/accuracy" in row]
    assert rows == ["1", "3"]


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_random_weights_are_not_evaluated(
    command: str, student_folder: Path, weights_folder: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    data = [*toy_data(), *small_trainer()]
    line = refusal(capsys, command, small_model(student_folder), data)
    assert line.startswith(f"ckpt_path: {command} would score random weights")
    run(command, small_model(weights_folder), data)
    told = [line for line in caplog.messages if "as it is" in line]
    assert told == [f"No ckpt_path: {command} takes the student {str(weights_folder)!r} as it is."]


class Hub:
    """A stand-in for the hub: what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.asked: list[str] = []
        self.files: dict[str, str] = {}
        monkeypatch.setattr(HfApi, "create_repo", self.create)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload)
        self.error = error

    def create(self, repository: str, *, repo_type: str, exist_ok: bool) -> None:
        self.asked.append(f"create {repository}")
        assert (repo_type, exist_ok) == ("model", True)
        assert not list(Path("runs").rglob("*.ckpt")), "asked for once the training is over"

    def upload(self, *, repo_id: str, folder_path: Path, **others: Any) -> None:
        self.asked.append(f"upload {repo_id}")
        if self.error is not None:
            raise self.error
        self.files = {path.name: str(path) for path in folder_path.iterdir()}


def test_the_student_is_pushed_with_its_baseline_in_the_card(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch)
    run("fit", small_toy(student_folder), "--baseline_after_fit=true", "--push_to_hub=me/student")
    assert hub.asked == ["create me/student", "upload me/student"]
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= hub.files.keys()
    card = Path(hub.files["README.md"]).read_text()
    assert "| accuracy of the label-only baseline | 0." in card
    data: Any = ModelCard(card).data
    assert {result.dataset_args["rows"] for result in data.eval_results} == {5}


def test_a_repository_that_cannot_be_written_to_is_known_before_the_training(
    student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # the tests are offline; the second is no name of a repository
    for name in ("me/student", "a/b/c"):
        line = refusal(capsys, "fit", small_toy(student_folder), f"--push_to_hub={name}")
        assert line.startswith(f"push_to_hub: cannot write to '{name}' on the Hugging Face hub (")
        assert not list(Path("runs").rglob("*.ckpt"))


def test_an_upload_that_fails_leaves_the_student_and_says_how_to_go_on(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Hub(monkeypatch, ConnectionError("the line is dead"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run("fit", small_toy(student_folder), "--push_to_hub=me/student")
    assert stopped.value.code == 2
    [folder] = run_folders()
    assert (folder / "student" / "model.safetensors").is_file()
    assert (folder / "run.json").is_file()
    error = capsys.readouterr().err
    assert f"(the line is dead); `hf upload me/student {folder / 'student'}` tries again" in error
