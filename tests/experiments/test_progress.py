"""What is shown of an experiment."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from lit_distill.experiments.cells import State, write_failure
from lit_distill.experiments.progress import Progress, failure_lines, last_validation, running_table, summary_table
from lit_distill.experiments.schedule import Board
from lit_distill.records import write_record
from tests.experiments.cells import make_cells
from tests.experiments.fake_fit import make_record


@pytest.fixture
def board(tmp_path: Path) -> Board:
    cells = make_cells(tmp_path, done={}, failed={}, running={}, pending={})
    write_record(cells[0].folder, make_record(0.625))
    (cells[1].folder / "log.txt").write_text("Traceback\nout of memory\n\n")
    write_failure(cells[1].folder, 1, "exit code 1")
    (cells[2].folder / "metrics.csv").write_text("step,train/loss,val/accuracy\n0,1.5,\n9,,0.25\n19,1.25,\n")
    states = {"done": State.DONE, "failed": State.FAILED, "running": State.RUNNING, "pending": State.PENDING}
    made = Board(cells, states)
    made.since["running"] = made.began
    return made


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_line_for_each_event_where_there_is_no_terminal(board: Board) -> None:
    console = Console(file=io.StringIO(), width=40)
    with Progress(console) as progress:
        for cell in board.cells[:3]:
            progress.changed(board, cell)
        progress.tick(board)
    lines = [line.split(maxsplit=1)[1] for line in text(console).splitlines()]
    counts = "(1 of 4 done, 1 pending, 1 running, 1 failed)"
    assert lines == [
        f"done      done  {counts}  test accuracy 0.625",
        f"failed    failed  {counts}  exit code 1: out of memory",
        f"running   running  {counts}",
    ]


def test_a_table_on_a_terminal(board: Board) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with Progress(console) as progress:
        progress.tick(board)
        shown = text(console)
        # what starts is in the table
        progress.changed(board, board.cells[2])
        assert text(console) == shown
        progress.changed(board, board.cells[1])
    assert "1 of 4 done" in shown
    assert "0.250" in shown
    assert "out of memory" in text(console)


def test_what_runs_with_its_last_validation(board: Board) -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(running_table(board))
    [row] = [line for line in text(console).splitlines() if "running " in line and "0:00:0" in line]
    assert [part.strip() for part in row.split("│")[1:-1]][2:] == ["9", "0.250"]


def test_the_summary_has_all_cells(board: Board) -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(summary_table(board))
    rows = [[part.strip() for part in line.split("│")[1:-1]] for line in text(console).splitlines() if "│" in line]
    assert rows == [
        ["done", "done", "0.625", "1.5"],
        ["failed", "failed", "", ""],
        ["running", "running", "", ""],
        ["pending", "pending", "", ""],
    ]
    assert failure_lines(board.cells) == ["failed: exit code 1: out of memory"]


@pytest.mark.parametrize("content", ["", "step,val/accuracy\n", "step\n1\n", "step,val/accuracy\n1,\n", "\0\n1"])
def test_metrics_without_a_validation(tmp_path: Path, content: str) -> None:
    path = tmp_path / "metrics.csv"
    assert last_validation(path) == ("", "")
    path.write_text(content)
    assert last_validation(path) == ("", "")


def test_only_the_end_of_metrics_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    rows = [f"{i},,0.5" for i in range(5000)]
    path.write_text("\n".join(["step,train/loss,val/accuracy", *rows, "5000,,0.75", "5001,1.0,"]))
    assert last_validation(path) == ("5000", "0.750")
