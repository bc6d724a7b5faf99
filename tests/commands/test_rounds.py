"""Rounds of students: the configs of the rounds, what a student gives to the next one, and whole runs."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lit_distill.annotation.store import read_rows
from lit_distill.cli import main
from lit_distill.commands import rounds
from lit_distill.commands.rounds import cell_of, sureness, together, write_labels, write_weights
from lit_distill.data import ToyDataModule
from lit_distill.errors import UserError
from lit_distill.experiments.cells import Cell, State
from lit_distill.experiments.launch import Board, Local
from tests.runs import read_lines, refusal, run, small_model, small_trainer, toy_data, write_lines

BASE: dict[str, Any] = {
    "model": {"class_path": "StepByStepModule", "init_args": {"student": "t5"}},
    "data": {
        "class_path": "ToyDataModule",
        "init_args": {"rationales": None, "rationale_filter": "none", "label_source": "gold", "train_fraction": 0.5},
    },
    "trainer": {"max_steps": 2},
}
OWN = {"out": "out", "by": "self_training", "keep": "vote_share > 0.5", "samples": 3, "temperature": 0.7}


def changed(number: int, data: dict[str, Any] | None = None, **own: Any) -> dict[str, Any]:
    """The data arguments of a round that differ from the base's."""
    arguments = BASE["data"]["init_args"] | (data or {})
    config = cell_of({**BASE, "data": {**BASE["data"], "init_args": arguments}}, OWN | own, number).config
    return {key: value for key, value in config["data"]["init_args"].items() if arguments.get(key) != value}


def test_the_configs_of_the_rounds() -> None:
    assert changed(0) == {}
    assert changed(2) == {
        "rationales": ["released", "out/round-1/labels"],
        "rationale_filter": "(teacher == 'round-1' and (vote_share > 0.5)) or (teacher != 'round-1')",
        "pseudo_labels": "round-1",
    }
    filtered = changed(1, {"rationale_filter": "label_agrees", "rationales": "annotations/toy"})
    assert filtered["rationales"] == ["annotations/toy", "out/round-0/labels"]
    assert filtered["rationale_filter"].endswith("or (teacher != 'round-0' and agrees)")
    assert changed(1, {"rationale_filter": "length < 9"})["rationale_filter"].endswith("'round-0' and (length < 9))")
    # from a weak teacher: the student takes its place
    assert changed(1, {"label_source": "teacher", "rationales": "annotations/weak"}) == {
        "rationales": "out/round-0/labels",
        "rationale_filter": "vote_share > 0.5",
        "pseudo_labels": "round-0",
    }
    assert changed(1, by="complementary") == {"row_weights": "out/round-0/labels/weights.jsonl"}
    cell = cell_of(BASE, OWN, 1)
    assert (cell.name, cell.folder, cell.config["resume"]) == ("round-1", Path("out/round-1"), True)


def predicted(name: str, *labels: str | None, correct: bool = True) -> dict[str, Any]:
    paths = [
        {"task": "label", "text": str(label), "label": label, "rationale": None, "log_probability": -4.0, "tokens": 2}
        for label in labels
    ]
    return {"id": name, "rationale": f"because {name}", "vote_correct": correct, "paths": paths}


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    (tmp_path / "round-0" / "labels").mkdir(parents=True)
    return Cell("round-0", tmp_path / "round-0", {})


def test_a_students_answers_are_samples_of_a_teacher(cell: Cell, tmp_path: Path) -> None:
    rows = [predicted("a", "cat", "dog", "cat"), predicted("b", "owl", None, "owl")]
    data = ToyDataModule()
    write_labels(cell, write_lines(tmp_path / "p.jsonl", rows), data)
    samples = [sample for sample, _ in read_rows(cell.folder / "labels" / "rationales.jsonl")]
    assert [(one.id, one.sample, one.label) for one in samples] == [
        *(("a", 0, "cat"), ("a", 1, "dog"), ("a", 2, "cat")),
        *(("b", 0, "owl"), ("b", 1, None), ("b", 2, "owl")),
    ]
    assert {(one.teacher, one.split, one.logprob, one.output_tokens) for one in samples} == {
        ("round-0", "train", -2.0, 2)
    }
    assert [one.in_majority for one in samples] == [True, False, True, True, None, True]
    assert [one.vote_share for one in samples] == [pytest.approx(2 / 3)] * 6
    assert {one.rationale for one in samples} == {"because a", "because b"}


def test_unsure_rows_weigh_more(cell: Cell, tmp_path: Path) -> None:
    rows = [predicted("a", "cat", "cat", "cat"), predicted("b", "owl", None, "cat"), predicted("c", None, None, None)]
    assert [sureness(row, str.__eq__) for row in rows] == [1, pytest.approx(1 / 3), 0]
    write_weights(cell, write_lines(tmp_path / "p.jsonl", rows), ToyDataModule())
    found = read_lines(cell.folder / "labels" / "weights.jsonl")
    assert found == [{"id": "a", "weight": 0.1}, {"id": "b", "weight": 0.766667}, {"id": "c", "weight": 1.1}]


def test_the_first_student_answers_what_it_is_sure_of(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Cell("round-1", tmp_path / "round-1", {})
    # the first is right where all of its samples agree, the second elsewhere
    files = {
        ("round-0", split): write_lines(
            tmp_path / f"first-{split}.jsonl",
            [predicted("a", "cat", "cat"), predicted("b", "cat", "dog", correct=False), predicted("c", "cat", "cat")],
        )
        for split in ("val", "test")
    } | {
        ("round-1", split): write_lines(
            tmp_path / f"second-{split}.jsonl", [predicted(name, "x", "y", correct=name == "b") for name in "abc"]
        )
        for split in ("val", "test")
    }
    monkeypatch.setattr(rounds, "answer_rows", lambda cell, base, own, split: files[cell.name, split])
    together([cell, other], BASE, OWN | {"out": str(tmp_path)}, ToyDataModule())
    found = json.loads((tmp_path / "together.json").read_text())
    assert found == {
        "share": 1.0,
        "answered by the first": pytest.approx(2 / 3),
        "round-0 alone": pytest.approx(2 / 3),
        "round-1 alone": pytest.approx(1 / 3),
        "together": 1.0,
    }
    assert "students together" in capsys.readouterr().out


def run_here(board: Board, *_: object) -> bool:
    """In this process, as importing everything takes long; cells of processes are in `test_experiment.py`."""
    for cell in board:
        main([*cell.command[3:], "--config", str(cell.folder / "fit.yaml")])
        board[cell] = cell.state
    return True


def answer_here(command: list[str], **_: object) -> SimpleNamespace:
    assert command[:3] == [sys.executable, "-m", "lit_distill"]
    main(command[3:])
    return SimpleNamespace(returncode=0)


# its `fit.yaml` lies there
@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty:UserWarning")
def test_two_rounds(
    student_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rounds, "run_cells", run_here)
    monkeypatch.setattr(rounds, "subprocess", SimpleNamespace(run=answer_here, DEVNULL=None))
    command = [*small_model(student_folder), *toy_data(12, 4), *small_trainer(2), "--data.train_fraction=0.5"]
    command += ["--rounds=2", "--samples=2", "--out=out", "--keep=sample >= 0"]
    run("rounds", *command)
    second = json.loads(Path("out/round-1/run.json").read_text())
    # what the first student said of the other rows; a sample may have no label
    labelled = {row["id"] for row in read_lines(Path("out/round-0/labels/rationales.jsonl")) if row["label"]}
    assert second["data"]["splits"]["train"]["pseudo_labelled"] == len(labelled) > 0
    assert second["train_rows"] == 6 + len(labelled)
    config = yaml.safe_load(Path("out/round-1/fit.yaml").read_text())
    assert config["data"]["init_args"]["pseudo_labels"] == "round-0"
    assert Path("out/report/report.html").exists()
    times = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.json*")}
    capsys.readouterr()
    # finished rounds are skipped
    run("rounds", *command)
    assert times == {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.json*")}
    assert "2 of 2 done" in capsys.readouterr().out
    # samples that are there are not those of another temperature
    told = refusal(capsys, "rounds", *command, "--temperature=0.2")
    assert "out/round-0/labels/train.yaml: would be another one; give another out, or delete" in told
    # another config is refused
    assert "holds a run of another config" in refusal(capsys, "rounds", *command, "--model.learning_rate=0.5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds=0"], "rounds must be"),
        (["--samples=1"], "samples must be"),
        (["--temperature=0"], "temperature must be"),
        (["--keep=os.getcwd"], "keep: got 'os.getcwd'; allowed in rounds is none, or a condition on columns"),
        (["--keep=label_agrees"], "keep: got 'label_agrees'; allowed in rounds is none, or"),
        (["--keep=vote_shar > 0.5"], "keep: no column 'vote_shar'; there are"),
        (["--data.row_weights=w.jsonl"], "data.row_weights: rounds sets it itself, got 'w.jsonl'"),
        (
            ["--model.tasks={label: {input: '{input} {candidates}'}, rationale: {}}"],
            "tasks: label: rounds asks rows that no teacher answered, got input '{input} {candidates}'",
        ),
        (["--data.rationale_filter=os.getcwd"], "data.rationale_filter: got 'os.getcwd'"),
        (["--by=boosting"], "boosting"),
        ([], "rounds: all rows of train have a gold label"),
        (["--model.adapter={r: 2, export: adapter}"], "rounds: needs whole students: model.adapter.export: merged"),
    ],
)
def test_what_is_refused(
    arguments: list[str], message: str, student_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, "rounds", *small_model(student_folder), *toy_data(), *small_trainer(), *arguments)
    assert not Path("runs").exists()


def test_a_round_that_fails_is_told(tmp_path: Path) -> None:
    cell = Cell("round-0", tmp_path / "round-0", {}, (sys.executable, "-c", "raise SystemExit('no room')"))
    with pytest.raises(UserError, match=r"^round-0: exit code 1: no room$"):
        rounds.run_all([cell], Local(), {cell: cell.state})
    assert cell.state is State.FAILED
