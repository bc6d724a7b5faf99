"""``predict``: one JSON object a row."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_distill.data.toy import toy_example
from lit_distill.students.models import build_model
from tests.runs import (
    read_lines,
    refusal,
    run,
    run_folders,
    small_model,
    small_toy,
    small_trainer,
    toy_data,
    write_lines,
)
from tests.students import make_student_folder

KEYS = ["id", "input", "label", "prediction", "correct", "rationale", "tokens"]


pytestmark = pytest.mark.usefixtures("here")


def test_predictions_are_all_rows_in_order_with_rationales(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_student_folder(here / "student")
    arguments = small_toy(student)
    run("fit", arguments, "--test_after_fit=false")
    [folder] = run_folders()
    shutil.rmtree(student)
    checkpoint = folder / "checkpoints" / "last.ckpt"

    def with_weights(config: Any, weights: Any = None, **settings: Any) -> Any:
        assert weights is not None or settings.get("meta"), "random weights for a student that has its own"
        return build_model(config, weights, **settings)

    monkeypatch.setattr("lit_distill.students.loading.build_model", with_weights)
    # batches of 2 of 5 rows, and one row whose rationale is a sample: that of each is wanted
    more = ["--data.eval_batch_size=2", "--model.num_samples=1"]
    run("predict", arguments, more, f"--ckpt_path={checkpoint}", "--predictions=out/put.jsonl")
    rows = read_lines(here / "out" / "put.jsonl")
    expected = [toy_example(0, "test", position) for position in range(5)]
    assert [list(row) for row in rows] == [KEYS] * 5
    assert [row["id"] for row in rows] == [row.id for row in expected]
    assert [row["input"] for row in rows] == [row.input for row in expected]
    assert [row["label"] for row in rows] == [row.label for row in expected]
    for row in rows:
        assert isinstance(row["rationale"], str)
        assert len(row["prediction"].split()) <= 3
        assert row["correct"] is (row["prediction"] == row["label"])


def test_predictions_agree_with_plain_transformers(here: Path, student_folder: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    arguments = small_toy(student_folder)
    run("fit", arguments, "--test_after_fit=false", "--model.learning_rate=0.01")
    [folder] = run_folders()
    best = next((folder / "checkpoints").glob("best*.ckpt"))
    run("predict", arguments, f"--ckpt_path={best}", "--predictions=put.jsonl")
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    for row in read_lines(here / "put.jsonl"):
        texts = {}
        for prefix, length in (("predict: ", 3), ("explain: ", 4)):
            inputs = tokenizer(prefix + row["input"], return_tensors="pt")
            output = model.generate(**inputs, max_new_tokens=length)
            texts[prefix] = str(tokenizer.decode(output[0], skip_special_tokens=True))
        assert row["prediction"] == texts["predict: "].strip()
        assert row["rationale"] == texts["explain: "].strip()


def test_paths_that_voted(here: Path, student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*small_toy(student_folder), "--model.vote.samples=3", "--model.vote.by=likelihood"]
    run("fit", arguments)
    printed = capsys.readouterr().out
    assert "vote accuracy" in printed
    assert "vote tokens" in printed
    [folder] = run_folders()
    tested = read_lines(folder / "test_predictions.jsonl")
    assert [list(row) for row in tested] == [[*KEYS, "vote", "vote_correct", "vote_tokens"]] * 5
    best = next((folder / "checkpoints").glob("best*.ckpt"))
    run("predict", arguments, f"--ckpt_path={best}", "--seed_everything=7", "--predictions=put.jsonl")
    for row, expected in zip(read_lines(here / "put.jsonl"), tested, strict=True):
        # the samples of a checkpoint are those of its run
        assert {key: row[key] for key in ("prediction", "vote", "vote_tokens")} == {
            key: expected[key] for key in ("prediction", "vote", "vote_tokens")
        }
        assert row["vote_correct"] is (row["vote"] == row["label"])
        assert [list(path) for path in row["paths"]] == [
            ["task", "text", "label", "rationale", "log_probability", "tokens"]
        ] * 3
        assert sum(path["tokens"] for path in row["paths"]) == row["vote_tokens"]
    refused = refusal(capsys, "fit", small_toy(student_folder), "--model.vote.temperature=0.5")
    assert refused.startswith("vote: one greedy text is no vote")


def test_rows_without_labels(here: Path, weights_folder: Path) -> None:
    rows = [{"id": f"é{i}", "input": f"cat {i} ?"} for i in range(7)]
    write_lines(here / "asked.jsonl", rows)
    data = ["--data=JSONLDataModule", "--data.predict=asked.jsonl", "--data.batch_size=3"]
    run("predict", small_model(weights_folder), data, small_trainer())
    [folder] = run_folders()
    found = read_lines(folder / "predictions.jsonl")
    assert [row["id"] for row in found] == [f"é{i}" for i in range(7)]
    assert [row["input"] for row in found] == [f"cat {i} ?" for i in range(7)]
    assert all(row["label"] is None for row in found)
    assert all(row["correct"] is None for row in found)
    assert all(isinstance(row["prediction"], str) for row in found)
    # as it is read, not as escapes
    assert "é0" in (folder / "predictions.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize(("method", "rationale"), [("StandardModule", False), ("SingleTaskModule", True)])
def test_the_rationale_is_null_where_the_method_writes_none(method: str, rationale: bool, weights_folder: Path) -> None:
    arguments = [*small_model(weights_folder, method), *small_toy(weights_folder)[5:]]
    run("predict", arguments, "--predictions=put.jsonl")
    for row in read_lines(Path("put.jsonl")):
        assert (row["rationale"] is not None) == rationale


def test_another_split(weights_folder: Path) -> None:
    run("predict", small_toy(weights_folder), "--data.predict_split=val", "--predictions=put.jsonl", "--cpu_threads=2")
    assert torch.get_num_threads() == 2
    assert [row["id"] for row in read_lines(Path("put.jsonl"))] == [f"toy-val-{i}" for i in range(4)]


def test_a_file_that_cannot_be_written_is_told_before_the_work(
    weights_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.Trainer._run", lambda *args, **kwargs: pytest.fail("it predicted"))
    (tmp_path / "file").touch()
    target = f"--predictions={tmp_path / 'file' / 'out.jsonl'}"
    with pytest.raises(SystemExit) as stopped:
        run("predict", small_model(weights_folder), toy_data(), "--trainer.accelerator=cpu", target)
    assert stopped.value.code == 2
    assert f"{tmp_path / 'file'}: cannot be read or written" in capsys.readouterr().err
