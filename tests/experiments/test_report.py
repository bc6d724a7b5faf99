"""What is shown of an experiment, and verdicts on published figures against numbers worked out by hand."""

import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from rich.table import Table

from lit_distill.experiments.cells import Cell, State
from lit_distill.experiments.grid import read_grid
from lit_distill.experiments.launch import Board
from lit_distill.experiments.report import Verdict, judge, show_event, summary_table, verdict_table
from lit_distill.records import write_record
from tests.experiments.cells import make_cells
from tests.experiments.fake_fit import make_record


@pytest.fixture
def board(tmp_path: Path) -> Board:
    cells = make_cells(tmp_path, done={}, failed={}, running={}, pending={})
    write_record(cells[0].folder, make_record(0.625))
    (cells[1].folder / "log.txt").write_text("Traceback\nout of memory\n\n")
    cells[1].fail("exit code 1")
    return dict(zip(cells, (State.DONE, State.FAILED, State.RUNNING, State.PENDING), strict=True))


def rows(table: Table) -> list[list[str]]:
    text = io.StringIO()
    Console(file=text, width=200).print(table)
    lines = [line for line in text.getvalue().splitlines() if "│" in line]
    return [[part.strip() for part in line.split("│")[1:-1]] for line in lines]


def test_a_line_for_each_event(board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    for cell in list(board)[:3]:
        show_event(board, cell)
    lines = [line.split(maxsplit=1)[1] for line in capsys.readouterr().err.splitlines()]
    counts = "(1 of 4 done, 1 pending, 1 running, 1 failed)"
    assert lines == [
        f"done      done  {counts}  test accuracy 0.625",
        f"failed    failed  {counts}  exit code 1: out of memory",
        f"running   running  {counts}",
    ]


def test_the_summary_has_all_cells(board: Board) -> None:
    assert rows(summary_table(board)) == [
        ["done", "done", "0.625", "1.5"],
        ["failed", "failed", "", ""],
        ["running", "running", "", ""],
        ["pending", "pending", "", ""],
    ]


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        ((), "not measured"),
        ((66.39,), "within tolerance"),
        ((66.41,), "above"),
        ((60.19,), "within tolerance"),
        ((60.17,), "below"),
        ((50.0, 76.58), "within tolerance"),
    ],
)
def test_a_verdict(measured: tuple[float, ...], verdict: str) -> None:
    assert Verdict("", 63.29, measured, 4, 3.1).verdict == verdict


def test_figures_find_their_cells(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    published = [
        {"method": "standard", "accuracy": 50.0},
        {"method": "StepByStepModule", "label_source": "gold", "accuracy": 60.0},
    ]
    content = {
        "base": "x", "set": {"label_source": "gold"}, "published": published, "tolerance": 2,
        "grid": {"method": ["standard", "step_by_step"], "seed": [0, 1, 2, 3]},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    grid = read_grid(path)
    cells = [Cell(str(i), tmp_path / str(i), point, {}) for i, point in enumerate(grid.points())]
    for cell, accuracy in zip(cells[:5], (0.49, 0.51, 0.53, 0.55, 0.7), strict=True):
        cell.folder.mkdir()
        write_record(cell.folder, make_record(accuracy))
    assert rows(verdict_table(judge(grid, cells))) == [
        # deviations -3, -1, 1, 3: variance 20 / 3, standard error sqrt(20 / 3 / 4)
        ["standard", "50.00", "52.00 ± 1.29", "4 of 4", "+2.00", "2", "within tolerance"],
        ["StepByStepModule, gold", "60.00", "70.00", "1 of 4", "+10.00", "2", "above"],
    ]
    # of cells that were not looked at, nothing is known; but there are as many as there are
    assert [(len(one.measured), one.cells) for one in judge(grid, cells[:1])] == [(1, 4), (0, 4)]
