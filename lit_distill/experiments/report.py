"""What is shown of an experiment: its progress, its end, published figures beside its own, and a W&B sweep of it."""

import csv
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean, stdev
from typing import Self

import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from lit_distill.experiments.cells import CONFIG, Cell, State
from lit_distill.experiments.grid import Grid, matches, value_text
from lit_distill.experiments.launch import Board
from lit_distill.records import read_record

SWEEP = "sweep.yaml"

_COLOURS = {
    State.DONE: "green",
    State.FAILED: "red",
    State.RUNNING: "cyan",
    State.RUNNING_ELSEWHERE: "cyan",
    State.STOPPED: "yellow",
    State.PENDING: "",
}


def counts(board: Board) -> str:
    """How many cells are in each state."""
    found = list(board.values())
    others = [f"{found.count(state)} {state}" for state in State if state is not State.DONE and state in found]
    return ", ".join([f"{found.count(State.DONE)} of {len(board)} done", *others])


def _test_accuracy(cell: Cell) -> float | None:
    """A finished cell's, in 0..1."""
    return read_record(cell.folder).metrics.get("test/accuracy") if cell.state is State.DONE else None


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in texts:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


class Progress:
    """Shows a board on stderr: a table that is kept up to date on a terminal, else a line for each event."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        self._since: dict[Cell, float] = {}
        self._began, self._drawn = time.monotonic(), -math.inf
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = self._stack.enter_context(Live(console=self._console, auto_refresh=False, transient=True))
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def __call__(self, board: Board, cell: Cell | None) -> None:
        """Show that a cell's state has changed, or how long the running ones take."""
        now = time.monotonic()
        if cell is not None:
            self._since[cell] = now
            self._show_event(board, cell)
        elif self._live is not None and now - self._drawn > 2:
            self._drawn = now
            title = f"{counts(board)}, {timedelta(seconds=round(now - self._began))}"
            table = _table(title, ["running"], ["time", "step", "val accuracy"])
            for running in (cell for cell, state in board.items() if state is State.RUNNING):
                seconds = timedelta(seconds=round(now - self._since[running]))
                table.add_row(running.name, str(seconds), *last_validation(running.folder / "metrics.csv"))
            self._live.update(table, refresh=True)

    def _show_event(self, board: Board, cell: Cell) -> None:
        state = board[cell]
        if self._live is not None and state not in (State.FAILED, State.DONE):
            return
        text = f"{time.strftime('%H:%M:%S')} {state:<9} {cell.name}  ({counts(board)})"
        if (accuracy := _test_accuracy(cell)) is not None:
            text += f"  test accuracy {accuracy:.3f}"
        if state is State.FAILED:
            text += f"  {cell.failure}"
        self._console.print(Text(text, style=_COLOURS[state] if self._live else ""), soft_wrap=True)


def last_validation(path: Path) -> tuple[str, str]:
    """The step and the accuracy of a run's last validation; empty where there is none yet."""
    with suppress(OSError, ValueError, csv.Error), path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/accuracy")]
        if rows:
            return rows[-1].get("step", ""), f"{float(rows[-1]['val/accuracy']):.3f}"
    return "", ""


def summary_table(board: Board) -> Table:
    """Each cell with its state, its accuracy on test and its minutes."""
    table = _table(counts(board), ["cell", "state"], ["test accuracy", "minutes"])
    for cell, state in board.items():
        figures = []
        if state is State.DONE:
            accuracy, minutes = _test_accuracy(cell), read_record(cell.folder).wall_seconds / 60
            figures = ["" if accuracy is None else f"{accuracy:.3f}", f"{minutes:.1f}"]
        table.add_row(cell.name, Text(state, style=_COLOURS[state]), *figures)
    return table


@dataclass(frozen=True)
class Verdict:
    """A published figure and what was measured; all in percent."""

    what: str
    published: float
    measured: tuple[float, ...]
    """One a finished cell."""
    cells: int
    """How many the grid has, whether or not they were looked at."""
    tolerance: float

    @property
    def difference(self) -> float:
        """Of the mean to what was published; not a number where nothing was measured."""
        return fmean(self.measured) - self.published if self.measured else math.nan

    @property
    def verdict(self) -> str:
        """Whether the mean is within the tolerance of what was published."""
        if not self.measured:
            return "not measured"
        # 63.29 and 3.1 are no binary fractions
        if abs(self.difference) <= self.tolerance + 1e-9:
            return "within tolerance"
        return "above" if self.difference > 0 else "below"


def judge(grid: Grid, cells: Sequence[Cell]) -> list[Verdict]:
    """Each published figure beside those finished cells of the grid that it is about."""
    verdicts = []
    for one in grid.published:
        found = [_test_accuracy(cell) for cell in cells if matches(one.wanted, {**grid.fixed, **cell.point})]
        measured = tuple(100 * accuracy for accuracy in found if accuracy is not None)
        what = ", ".join(value_text(value) for value in one.wanted.values())
        count = sum(matches(one.wanted, {**grid.fixed, **point}) for point in grid.points())
        verdicts.append(Verdict(what, one.accuracy, measured, count, grid.tolerance or 0.0))
    return verdicts


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """The verdicts as a table, each mean with its standard error over the cells."""
    numbers = ["published", "measured", "cells", "difference", "tolerance", "verdict"]
    table = _table("Test accuracy in percent, beside what was published", [""], numbers)
    for one in verdicts:
        count = len(one.measured)
        spread = f" ± {stdev(one.measured) / math.sqrt(count):.2f}" if count > 1 else ""
        measured, difference = "", ""
        if count:
            measured, difference = f"{fmean(one.measured):.2f}{spread}", f"{one.difference:+.2f}"
        found = f"{count} of {one.cells}"
        table.add_row(one.what, f"{one.published:.2f}", measured, found, difference, f"{one.tolerance:g}", one.verdict)
    return table


def sweep_text(cells: Sequence[Cell], out: Path) -> str:
    """A W&B sweep whose one parameter is the cell's own config, for agents on many machines."""
    logger = ["+=WandbLogger", ".project=lit_distill", f".save_dir={out}"]
    fit = ["${env}", "${interpreter}", "-m", "${program}", "fit", "${args}"]
    sweep: Mapping[str, object] = {
        "name": out.name,
        "project": "lit_distill",
        "method": "grid",
        "metric": {"name": "test/accuracy", "goal": "maximize"},
        "program": "lit_distill",
        "command": [*fit, *(f"--trainer.logger{part}" for part in logger)],
        "parameters": {"config": {"values": [str(cell.folder / CONFIG) for cell in cells]}},
    }
    return (
        f"# wandb sweep {out / SWEEP}; then, on each machine, in this folder: wandb agent ENTITY/lit_distill/SWEEP\n"
        f"# Every machine has to see {out}: each run writes into its cell's folder there.\n"
        f"{yaml.safe_dump(dict(sweep), sort_keys=False, allow_unicode=True, width=1000)}"
    )
