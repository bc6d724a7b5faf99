"""What is shown of an experiment."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from lit_distill.experiments.cells import State
from lit_distill.experiments.launch import Board
from lit_distill.experiments.report import show_event, summary_table
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
