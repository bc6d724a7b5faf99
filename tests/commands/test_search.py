"""``search``: a whole one whose runs are a fake's, its choice and correlations, and bad input in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]

from lit_distill.commands import rounds, search
from lit_distill.commands.search import choose, correlations
from lit_distill.data import ToyDataModule
from lit_distill.experiments.cells import State
from lit_distill.experiments.launch import Board
from lit_distill.records import write_record
from lit_distill.searching.cost import random_student
from lit_distill.students import load
from tests.experiments.fake_fit import make_record
from tests.runs import refusal, run, small_model, small_trainer, toy_data
from tests.students import add_weights, make_causal_folder, make_causal_tokenizer

SPACE = "--space={decoder_layers: [1, 2], d_model: [8, 12, 16], d_ff: [8, 16, 32], heads: [1, 2]}"
SMALL = ["--candidates=4", "--at_least=0.3", "--best=1", "--drawn=3", "--shared_steps=2", "--initialisations=1"]


def arguments(student: Path, teacher: Path, *more: str) -> list[str]:
    """A small search."""
    teachers = f"--model.teachers={{teacher: {{model: {teacher}}}}}"
    base = [*small_model(student), *toy_data(), *small_trainer(1), teachers]
    return [*base, SPACE, "--max_parameters=10000", *SMALL, "--out=out", *more]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the students that were trained, by a fake in which more parameters answer more."""
    trained: list[str] = []

    def run_cells(board: Board, launcher: object, show: Callable[[Board, Any], object]) -> bool:
        for cell in [cell for cell, state in board.items() if state is not State.DONE]:
            student = load(cell.config["model"]["init_args"]["student"], from_scratch=True, meta=True)
            trained.append(cell.name)
            write_record(cell.folder, make_record(sum(weight.numel() for weight in student.parameters()) / 20_000))
            board[cell] = State.DONE
        return True

    monkeypatch.setattr(rounds, "run_cells", run_cells)
    return trained


def test_a_search(
    student_folder: Path,
    teacher_folder: Path,
    here: Path,
    fits: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("lit_distill.searching.cost.TIMED", 1)
    given = arguments(student_folder, teacher_folder, "--model.from_scratch=mimetic")
    kinds: list[object] = []

    def make(*arguments: Any, from_scratch: Any = True) -> Any:
        kinds.append(from_scratch)
        return random_student(*arguments, from_scratch=from_scratch)

    monkeypatch.setattr(search, "random_student", make)
    run("search", *given)
    # timed, and ranked as they are trained
    assert set(kinds) == {True, "mimetic"}
    found = json.loads(Path("out/search.json").read_text())
    students = {one["name"]: one for one in found["students"]}
    assert len(students) == 4
    assert sorted(fits) == sorted(name for name, one in students.items() if one["best"] or one["drawn"])
    assert sum(one["drawn"] for one in students.values()) == 3
    # the lowest loss with shared weights
    assert [name for name, one in students.items() if one["best"]] == [
        min(students, key=lambda name: students[name]["shared"])
    ]
    for name in fits:
        made = load(f"out/students/{name}", from_scratch=True)
        assert sum(weight.numel() for weight in made.parameters()) == students[name]["parameters"]
        assert students[name]["accuracy"] == students[name]["parameters"] / 20_000
        assert students[name]["relations"] < 0 < students[name]["ms"]
    # torchmetrics adds a little to what it divides by
    one = pytest.approx(1, abs=1e-5)
    assert found["correlations"]["parameters"] == {"kendall": one, "spearman": one, "n": 3}
    shown = capsys.readouterr().out
    assert "students, the best by shared first" in shown
    assert "A score that does not beat the number of parameters has found nothing." in shown
    assert Path("out/report/report.html").exists()
    ranked = Path("out/ranking.json").read_text()
    # a further one trains what is new, and ranks nothing
    monkeypatch.setattr(search, "build", None)
    monkeypatch.setattr(search, "compare", lambda *given: None)
    before = len(fits)
    run("search", *given, "--best=4")
    assert len(fits) == 4 > before
    assert Path("out/ranking.json").read_text() == ranked
    assert "ranked with another search.candidates: 4, 5 is wanted; give another out" in refusal(
        capsys, "search", *given, "--candidates=5"
    )


def test_a_budget_of_milliseconds_and_the_same_seed_of_a_llama(
    here: Path, fits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_causal_folder(Path("student"), num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    teacher = add_weights(make_causal_folder(Path("teacher"), hidden_size=24), make_causal_tokenizer())
    monkeypatch.setattr("lit_distill.searching.cost.TIMED", 1)
    monkeypatch.setattr(search, "compare", lambda *given: None)
    given = [one for one in arguments(student, teacher) if not one.startswith("--max_parameters")]
    given += ["--max_ms=60000", "--at_least=0.000001", "--candidates=2", "--drawn=1", "--best=0", "--shared_steps=1"]
    found = []
    for out in ("a", "b"):
        run("search", *given, f"--out={out}")
        rows = json.loads(Path(out, "search.json").read_text())["students"]
        assert all(0.06 <= row["ms"] <= 60000 for row in rows)
        found.append([{key: value for key, value in row.items() if key != "ms"} for row in rows])
    assert found[0] == found[1]


def rows_of(**columns: list[float]) -> list[dict[str, Any]]:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [row | {"name": str(number)} for number, row in enumerate(rows)]


def test_correlations_are_scipys() -> None:
    draw = np.random.default_rng(0)
    accuracy = draw.integers(0, 4, 9) / 4
    shared, relations = draw.normal(size=9), draw.normal(size=9)
    rows = rows_of(
        parameters=[7.0] * 9, shared=shared.tolist(), relations=relations.tolist(), accuracy=accuracy.tolist()
    )
    found = correlations(rows)
    # a lower loss is better
    for name, values in (("shared", -shared), ("relations", relations)):
        assert found[name]["kendall"] == pytest.approx(stats.kendalltau(values, accuracy).statistic)
        assert found[name]["spearman"] == pytest.approx(stats.spearmanr(values, accuracy).statistic)
        assert found[name]["n"] == 9
    assert found["parameters"] == {"kendall": None, "spearman": None, "n": 9}
    assert correlations([]) == {}


def test_the_best_and_the_drawn() -> None:
    rows = rows_of(parameters=[5.0, 9.0, 1.0], shared=[2.0, 3.0, 1.0], relations=[-1.0, -3.0, -2.0])
    for by, best in (("shared", {"2", "0"}), ("relations", {"0", "2"}), ("parameters", {"1", "0"})):
        assert choose(rows, {"by": by, "best": 2, "drawn": 0, "search_seed": 0}) == (best, set())
    drawn = [choose(rows, {"by": "shared", "best": 0, "drawn": 2, "search_seed": seed})[1] for seed in range(9)]
    assert all(len(names) == 2 for names in drawn)
    assert set.union(*drawn) == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--space=null"], "space: must be given"),
        (["--space={width: [3]}"], "space: 'width' is no size of this student; allowed are encoder_layers,"),
        (["--max_ms=3"], "give the budget, either max_parameters or max_ms"),
        (["--at_least=0"], "at_least must be in (0, 1]"),
        (["--drawn=5"], "drawn must be an integer in [0, 4]"),
        (["--out=file"], "out: 'file' is a file; give a folder"),
        (["--best=0", "--drawn=0"], "best: 0 and drawn: 0 train nothing"),
        (["--by=relations", "--rankings=[shared]"], "by: relations is not among rankings"),
        (["--model.teachers=null"], "model.teachers: relations compares with a teacher"),
        (["--model.teachers={t: {model: runs/none}}"], "teachers: t: there is no 'runs/none' yet"),
        (["--model.from_scratch=false"], "model.from_scratch: must be true"),
        (["--model.adapter={r: 2}"], "model.adapter: the students of a search are trained whole"),
        (
            ["--max_parameters=10", "--space={d_ff: [8, 16]}"],
            "candidates: 4 are wanted, and of 2 students drawn from the space 0 have 3 to 10 parameters; theirs are",
        ),
        (["--test_after_fit=false"], "test_after_fit: must be true"),
        (["--trainer.limit_test_batches=0"], "trainer.limit_test_batches: must be above 0"),
        (["--model.teachers={a: {model: m}, b: {model: m}}"], "model.teachers: relations compares with one teacher"),
    ],
)
def test_what_is_refused(
    more: list[str],
    message: str,
    student_folder: Path,
    teacher_folder: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("file").touch()
    line = refusal(capsys, "search", *arguments(student_folder, teacher_folder, *more))
    assert line.startswith(message)
    assert not Path("out").exists()


def test_without_test_rows_nothing_is_ranked(
    student_folder: Path,
    teacher_folder: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = ToyDataModule.split_rows
    monkeypatch.setattr(ToyDataModule, "split_rows", lambda self, split: None if split == "test" else own(self, split))
    line = refusal(capsys, "search", *arguments(student_folder, teacher_folder))
    assert line.endswith("and search compares the rankings with test accuracy")
    assert not Path("out").exists()
