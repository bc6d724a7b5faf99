"""How far an experiment is: a table that is kept up to date on a terminal, else a line for each event."""

import csv
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lit_distill.experiments.cells import Cell, State, failure_of, record_of
from lit_distill.experiments.schedule import Board, Watcher

_COLOURS = {
    State.DONE: "green",
    State.FAILED: "red",
    State.RUNNING: "cyan",
    State.RUNNING_ELSEWHERE: "cyan",
    State.STOPPED: "yellow",
    State.PENDING: "",
}
_TAIL = 8192
_LOOK_SECONDS = 2.0
"""Between two looks at the running cells' metrics."""


class Progress(Watcher):
    """Shows a board on stderr.

    Args:
        console: where; by default stderr.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._looked = 0.0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = self._stack.enter_context(Live(console=self._console, auto_refresh=False, transient=True))
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def changed(self, board: Board, cell: Cell) -> None:
        """One line; failures with what they said last."""
        state = board.states[cell.name]
        if self._live is not None and state not in (State.FAILED, State.DONE):
            return
        text = f"{time.strftime('%H:%M:%S')} {state:<9} {cell.name}  ({counts(board)})"
        if state is State.DONE and (accuracy := test_accuracy(cell)) is not None:
            text += f"  test accuracy {accuracy:.3f}"
        if state is State.FAILED and (failure := failure_of(cell.folder)):
            text += f"  {failure.reason}: {failure.lines[-1] if failure.lines else 'its log is empty'}"
        self._console.print(Text(text, style=_COLOURS[state] if self._live else ""), soft_wrap=True)

    def tick(self, board: Board) -> None:
        """Redraw the table, not too often."""
        if self._live is not None and time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            self._live.update(running_table(board), refresh=True)


def counts(board: Board) -> str:
    """How many cells are in each state."""
    parts = [f"{board.count(State.DONE)} of {len(board.cells)} done"]
    parts += [f"{count} {state}" for state in list(State) if state is not State.DONE and (count := board.count(state))]
    return ", ".join(parts)


def running_table(board: Board) -> Table:
    """What runs now, for how long, and its last validation."""
    elapsed = timedelta(seconds=round(time.monotonic() - board.began))
    table = Table(title=f"{counts(board)}, {elapsed}", title_justify="left")
    table.add_column("running", overflow="fold")
    table.add_column("time", justify="right")
    table.add_column("step", justify="right")
    table.add_column("val accuracy", justify="right")
    for cell in board.cells:
        if cell.name in board.since:
            step, accuracy = last_validation(cell.folder / "metrics.csv")
            seconds = timedelta(seconds=round(time.monotonic() - board.since[cell.name]))
            table.add_row(cell.name, str(seconds), step, accuracy)
    return table


def last_validation(path: Path) -> tuple[str, str]:
    """The step and the accuracy of a run's last validation, empty where there is none yet; reads the file's end."""
    try:
        with path.open("rb") as file:
            names = file.readline().decode().strip().split(",")
            file.seek(max(file.tell(), path.stat().st_size - _TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return "", ""
    for line in reversed(lines):
        row = dict(zip(names, next(csv.reader([line]), []), strict=False))
        if row.get("val/accuracy"):
            try:
                return row.get("step", ""), f"{float(row['val/accuracy']):.3f}"
            except ValueError:
                continue
    return "", ""


def test_accuracy(cell: Cell) -> float | None:
    """A finished cell's accuracy on test, in 0..1."""
    record = record_of(cell.folder)
    return None if record is None else record.metrics.get("test/accuracy")


def summary_table(board: Board) -> Table:
    """Each cell with its state, its accuracy on test and its minutes."""
    table = Table(title=counts(board), title_justify="left")
    table.add_column("cell", overflow="fold")
    table.add_column("state")
    table.add_column("test accuracy", justify="right")
    table.add_column("minutes", justify="right")
    for cell in board.cells:
        state, record = board.states[cell.name], record_of(cell.folder)
        accuracy = test_accuracy(cell)
        table.add_row(
            cell.name,
            Text(state, style=_COLOURS[state]),
            "" if accuracy is None else f"{accuracy:.3f}",
            "" if record is None else f"{record.wall_seconds / 60:.1f}",
        )
    return table


def failure_lines(cells: Sequence[Cell]) -> list[str]:
    """Why cells failed, a line each."""
    found = [(cell, failure) for cell in cells if (failure := failure_of(cell.folder))]
    return [
        f"{cell.name}: {failure.reason}{': ' + failure.lines[-1] if failure.lines else ''}" for cell, failure in found
    ]
