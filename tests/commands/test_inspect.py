"""The report on a dataset, with figures counted by hand."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from lit_distill.cli import main
from lit_distill.commands.inspect import inspect_data, render
from lit_distill.data import CQADataModule, ESNLIDataModule, JSONLDataModule
from lit_distill.errors import UserError
from tests.data.conftest import character_tokenizer

BOTH = ("label", "rationale")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer()


@pytest.fixture
def cqa(tmp_path: Path) -> Path:
    """Ten rows of train whose gold answer is ``ab``; the teacher is right in six, outside in one, unread in one."""
    folder = tmp_path / "cqa"
    (folder / "llm").mkdir(parents=True)
    rows = [{"id": f"q{i}", "question": str(i), "choices": ["ab", "c"], "answer": "ab"} for i in range(10)]
    lines = "\n".join(map(json.dumps, rows))
    (folder / "cqa_train.json").write_text(lines)
    (folder / "cqa_test.json").write_text(lines)
    said = ["ab"] * 6 + ["c"] * 2 + ["zz"]
    outputs = [f"{'w' * (i + 1)} So the answer is (a) {label}." for i, label in enumerate(said)] + ["cut off"]
    (folder / "llm" / "train_CoT_0.json").write_text(json.dumps(outputs))
    return tmp_path


def test_figures(cqa: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    module = CQADataModule(data_dir=cqa, tokenizer=tokenizer, tasks=BOTH, max_target_length=5, label_source="teacher")
    report = inspect_data(module)
    assert json.loads(json.dumps(report)) == report
    assert report["dataset"] == "cqa"
    train, val, test = (report["splits"][split] for split in ("train", "val", "test"))
    # over the whole file: before val is taken off, and whatever is trained on
    expected = {
        "present": True,
        "released": True,
        "rows": 10,
        "parsed": 9,
        "unparsed": 1,
        "no_output": 0,
        "outside_label_set": 1,
        "teacher_label_accuracy": 0.6,
        "taken_as_val": 1,
        "dropped_without_teacher_label": 1,
        "used": 8,
        "used_rationales": 8,
        # row 2 is val; rationales have 1 to 9 characters and an end: those of 5 and more are beyond 5 tokens
        "truncated_inputs": 0,
        "truncated_targets": 5,
        "truncated_labels": 0,
    }
    assert {key: train[key] for key in expected} == expected
    text = "0\nAnswer Choices:\n(a) ab\n(b) c"
    assert train["lengths"]["label"] == {
        "input": {"rows": 8, "median": 10 + len(text), "p95": 10 + len(text), "max": 10 + len(text), "truncated": 0},
        "target": {"rows": 8, "median": 3, "p95": 3, "max": 3, "truncated": 0},
    }
    assert train["lengths"]["rationale"]["target"] == {
        "rows": 8,
        "median": 6.5,
        "p95": pytest.approx(9.65),
        "max": 10,
        "truncated": 5,
    }
    assert (val["present"], val["released"], val["rows"]) == (True, False, 1)
    assert test["teacher_label_accuracy"] is None
    assert (test["rows"], test["parsed"], test["no_output"]) == (10, 0, 10)
    assert "chance" not in train
    # all are "ab", as most of train are
    assert test["chance"] == 1


def test_filter_and_fraction(cqa: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    settings = {"rationale_filter": "label_agrees", "train_fraction": 0.5, "label_source": "teacher"}
    module = CQADataModule(data_dir=cqa, tokenizer=tokenizer, tasks=BOTH, **settings)  # type: ignore[arg-type]
    report = inspect_data(module)
    train = report["splits"]["train"]
    assert (train["rows"], train["parsed"], train["taken_as_val"]) == (10, 9, 1)
    taken = ("taken_as_val", "left_out_by_fraction", "dropped_without_teacher_label", "dropped_without_target")
    assert train["rows"] - sum(train[name] for name in taken) == train["used"]
    assert train["used_rationales"] + train["rationale_filtered"] == train["used"]
    assert train["teacher_label_accuracy"] == 0.6
    # what is said of lengths is of the rows used
    assert train["lengths"]["label"]["input"]["rows"] == train["used"] < 9
    assert train["lengths"]["rationale"]["target"]["rows"] == train["used_rationales"] < train["used"]
    shown = StringIO()
    render(report, Console(file=shown, width=80))
    rows = [line.split("│") for line in shown.getvalue().splitlines() if line.startswith("│")]
    cells = {row[1].strip(): row[2].strip() for row in rows}
    assert cells["taken as val"] == "1"
    assert cells["used"] == str(train["used"])
    assert "rationale_filter: label_agrees" in shown.getvalue()


def test_examples_are_what_the_student_sees(cqa: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    module = CQADataModule(data_dir=cqa, tokenizer=tokenizer, tasks=BOTH, max_source_length=12)
    path = cqa / "cqa" / "cqa_train.json"
    path.write_text(path.read_text().replace('"question": "', '"question": "é'))
    shown = inspect_data(module)["examples"]
    assert shown["split"] == "train"
    assert len(shown["rows"]) == 3
    first = shown["rows"][0]
    # cut, ended, and with what the tokenizer does not know
    assert first["tasks"]["label"] == {"input": f"predict: <unk>{first['id'][1:]}</s>", "target": "ab</s>"}
    assert first["tasks"]["rationale"]["input"] == f"explain: <unk>{first['id'][1:]}</s>"
    assert first["tasks"]["rationale"]["target"] == f"{first['rationale']}</s>"


def test_an_absent_split(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "esnli").mkdir()
    row = {"premise": "p", "hypothesis": "h", "label": 0}
    (tmp_path / "esnli" / "esnli_valid.json").write_text(json.dumps(row))
    report = inspect_data(ESNLIDataModule(data_dir=tmp_path, tokenizer=tokenizer))
    assert report["splits"]["train"] == report["splits"]["test"] == {"present": False}
    assert report["examples"]["split"] == "val"
    render(report, Console(file=StringIO()))


def test_a_file_to_predict(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "rows.jsonl").write_text('{"input": "a"}')
    report = inspect_data(JSONLDataModule(predict=tmp_path / "rows.jsonl", tokenizer=tokenizer))
    assert (report["splits"]["predict"]["rows"], report["splits"]["predict"]["without_label"]) == (1, 1)
    assert report["examples"]["rows"][0]["tasks"]["label"] == {"input": "a</s>", "target": None}


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(cqa: Path, tokenizer: PreTrainedTokenizerFast, width: int) -> None:
    report = inspect_data(CQADataModule(data_dir=cqa, tokenizer=tokenizer, tasks=BOTH))
    shown = StringIO()
    render(report, Console(file=shown, width=width))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    (accuracy,) = (line for line in lines if "teacher label accuracy" in line)
    assert next(cell.strip() for cell in accuracy.split("│")[2:-1]) == "0.6"
    assert "…" not in shown.getvalue()
    assert "val (of train)" in shown.getvalue()
    # markup in the data is shown, not obeyed
    report["examples"]["rows"][0]["rationale"] = "[bold]so[/bold]"
    shown = StringIO()
    render(report, Console(file=shown, width=width))
    assert "[bold]so[/bold]" in shown.getvalue()


def test_a_tokenizer_is_needed(cqa: Path) -> None:
    with pytest.raises(UserError, match="tokenizer must be given"):
        inspect_data(CQADataModule(data_dir=cqa))


def test_what_fit_would_refuse_is_told_after_the_report(
    here: Path, student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = "{contrast: {prefix: 'contrast: ', target: '{rationale}', kind: contrast}}"
    arguments = ["inspect", "--model=StandardModule", f"--model.student={student_folder}", f"--model.tasks={tasks}"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--data=ToyDataModule", "--data.train_size=4"])
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert "toy: rows, rationale_filter: none" in told.out
    assert "tasks: contrast has no target in train" in told.err
