"""What a finished `fit` leaves for comparisons."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSeq2SeqLM

from lit_distill.commands.finish import repository_state
from lit_distill.data import ToyDataModule
from lit_distill.errors import UserError
from lit_distill.records import PREDICTIONS, RECORD, read_predictions_file, read_record, write_record
from lit_distill.students import timing
from tests.runs import metric_rows, run, run_folders, small_model, small_toy, small_trainer, toy_data

pytestmark = pytest.mark.usefixtures("here")


def test_a_record_says_what_a_run_was_and_found(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # so that the paths of a small student are timed
    monkeypatch.setattr(timing, "TOO_SHORT", 0.0)
    arguments = ["--data.train_fraction=0.5", "--data.seed=3", "--seed_everything=7", "--data.label_source=teacher"]
    run("fit", small_toy(student_folder, steps=3), arguments)
    [folder] = run_folders()
    found = read_record(folder)
    assert (found.dataset, found.method, found.student) == ("toy", "StepByStep", student_folder.name)
    assert (found.label_source, found.train_fraction, found.rationales) == ("teacher", 0.5, "own")
    assert (found.seed, found.data_seed, found.steps) == (7, 3, 3)
    assert (found.train_rows, found.test_rows) == (6, 5)
    assert found.train_tokens > 0
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert found.train_tokens == last["lit_distill_train_tokens"]
    [tested] = [row for row in metric_rows(folder) if "test/accuracy" in row]
    logged = {name: float(value) for name, value in tested.items() if name.startswith("test/")}
    assert found.metrics == pytest.approx(logged)
    best = max(float(row["val/accuracy"]) for row in metric_rows(folder) if "val/accuracy" in row)
    assert found.validation["val/accuracy"] == pytest.approx(best)
    assert found.validation["step"] in (1, 2, 3)
    student = AutoModelForSeq2SeqLM.from_pretrained(folder / "student")
    assert found.parameters == sum(parameter.numel() for parameter in student.parameters())
    assert found.teacher_accuracy == 1.0
    # one of four, which is more often right than the commonest label
    assert found.chance == 0.25
    assert found.config == yaml.safe_load((folder / "config.yaml").read_text())
    assert found.data["splits"]["train"]["left_out_by_fraction"] == 6
    assert {"torch", "lit_distill", "python", "transformers"} <= found.versions.keys()
    assert found.paths["training"]["seconds"]["packed"] > 0
    assert " (a step of 2 rows: packed " in yaml.safe_load((folder / "hparams.yaml").read_text())["fast_training"]
    assert found.started
    assert 0 < found.wall_seconds < 600
    assert 50 < found.peak_memory_mib < 100_000


def test_predictions_are_those_of_the_tested_student_in_the_data_s_order(student_folder: Path) -> None:
    run("fit", small_toy(student_folder, steps=2), "--data.test_size=9")
    [folder] = run_folders()
    rows, record = read_predictions_file(folder), read_record(folder)
    expected = ToyDataModule(test_size=9).released("test")
    assert expected is not None
    assert [(row["id"], row["label"]) for row in rows] == [(one.id, one.label) for one in expected]
    assert sum(row["correct"] for row in rows) / 9 == pytest.approx(record.metrics["test/accuracy"])
    best = next(folder.glob("checkpoints/best*.ckpt"))
    again = ["--data.test_size=9", f"--ckpt_path={best}", "--predictions=out.jsonl"]
    run(
        "predict", small_model(student_folder), toy_data(), again, "--trainer.accelerator=cpu", "--trainer.logger=false"
    )
    told = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in told] == [row["prediction"] for row in rows]


def fingerprints(student: Path, *more: str) -> dict[str, str]:
    before = set(run_folders())
    run("fit", small_toy(student, steps=1), list(more))
    (folder,) = set(run_folders()) - before
    return read_record(folder).fingerprints


def test_fingerprints_tell_data_apart(student_folder: Path) -> None:
    plain = fingerprints(student_folder)
    assert set(plain) == {"train", "val", "test"}
    other_rows = fingerprints(student_folder, "--data.toy_seed=1")
    assert not {*other_rows.values()} & {*plain.values()}
    limited = ["--trainer.limit_test_batches=1", "--data.eval_batch_size=2"]
    control = fingerprints(student_folder, "--data.rationale_pairing=shuffled", *limited)
    assert control["train"] != plain["train"]
    assert control["test"] != plain["test"]
    assert control["val"] == plain["val"]
    # the record says which one it is
    found = read_record(run_folders()[-1])
    assert found.rationales == "shuffled"
    assert found.data["splits"]["train"]["rationale_shuffled"] == 12
    assert fingerprints(student_folder, "--seed_everything=5", "--data.batch_size=2") == plain


def test_a_teacher_is_judged_by_its_labels_on_the_rows_that_are_tested(student_folder: Path, here: Path) -> None:
    rows = [{"id": str(i), "input": f"red {i}", "label": "yes", "rationale": "because"} for i in range(12)]
    for name, said in (("none", {}), ("some", {"teacher_label": "no"})):
        own = [
            row | (said if i < 4 else {}) | ({"teacher_label": "yes"} if said and i == 4 else {})
            for i, row in enumerate(rows)
        ]
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    found = []
    for name, more in (("none", []), ("some", []), ("some", ["--trainer.limit_test_batches=2"])):
        data = ["--data=JSONLDataModule", f"--data.train={name}.jsonl", f"--data.test={name}.jsonl"]
        sizes = ["--data.batch_size=4", "--data.eval_batch_size=2"]
        run("fit", small_model(student_folder), data, sizes, small_trainer(1), more)
        found.append(read_record(run_folders()[-1]).teacher_accuracy)
    # rationales alone are no labels
    assert found == [None, 1 / 5, 0.0]


def test_the_repository_s_state(here: Path) -> None:
    assert repository_state() == {}
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *command], check=True, cwd=here)  # noqa: S603
    found = repository_state()
    assert (len(str(found["commit"])), found["changed"]) == (40, False)
    (here / "file").touch()
    assert repository_state() == found | {"changed": True}


def test_an_untested_run_without_rationales(student_folder: Path) -> None:
    model = small_model(student_folder, "StandardModule")
    run("fit", model, toy_data(), small_trainer(steps=1), "--test_after_fit=false")
    found = read_record(run_folders()[0])
    assert (found.metrics, found.test_rows, found.rationales, found.git) == ({}, 0, None, {})
    assert not (run_folders()[0] / PREDICTIONS).exists()


def test_a_run_that_is_broken_off_has_no_record(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*arguments: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("lit_distill.modules.DistillModule.on_test_epoch_start", stumble, raising=False)
    with pytest.raises(ZeroDivisionError):
        run("fit", small_toy(student_folder, steps=1))
    assert list(Path("runs").rglob("config.yaml"))
    assert not list(Path("runs").rglob(RECORD))


def test_a_record_reads_as_it_was_written(student_folder: Path, here: Path) -> None:
    run("fit", small_toy(student_folder, steps=1))
    found = read_record(run_folders()[0])
    (here / "copy").mkdir()
    write_record(here / "copy", found)
    assert read_record(here / "copy") == found
    # a later version may say more
    content = json.loads((here / "copy" / RECORD).read_text()) | {"later": 1}
    (here / "copy" / RECORD).write_text(json.dumps(content))
    assert read_record(here / "copy") == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read .No such file"),
        ("{", "Invalid JSON: EOF"),
        ("[]", "Input should be an object"),
        ('{"format": 1, "dataset": "toy"}', "method: Field required"),
    ],
)
def test_what_is_no_record(content: str | None, message: str, here: Path) -> None:
    if content is not None:
        (here / RECORD).write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        read_record(here)
    assert RECORD in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ('{"id": "a"}', "rows need id and correct"),
        ("3", "not a JSON object"),
    ],
)
def test_what_are_no_predictions(content: str | None, message: str, here: Path) -> None:
    if content is not None:
        (here / PREDICTIONS).write_text(content)
    with pytest.raises(UserError, match=message):
        read_predictions_file(here)
