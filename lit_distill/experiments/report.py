"""Progress and results of an experiment, comparison with published results, and a W&B sweep file."""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import yaml
from rich.table import Table
from rich.text import Text

from lit_distill.experiments.cells import CONFIG, Cell, State
from lit_distill.experiments.grid import Grid, matches, value_text
from lit_distill.experiments.launch import Board
from lit_distill.records import read_record

SWEEP = "sweep.yaml"

_COLOURS = {State.DONE: "green", State.FAILED: "red", State.STOPPED: "yellow"}


def counts(board: Board) -> str:
    """Number of cells in each state."""
    found = list(board.values())
    others = [f"{found.count(state)} {state}" for state in State if state is not State.DONE and state in found]
    return ", ".join([f"{found.count(State.DONE)} of {len(board)} done", *others])


def show_event(board: Board, cell: Cell) -> None:
    """Print a cell's new state on stderr."""
    line = f"{time.strftime('%H:%M:%S')} {board[cell]:<9} {cell.name}  ({counts(board)})"
    if (accuracy := _test_accuracy(cell)) is not None:
        line += f"  test accuracy {accuracy:.3f}"
    if board[cell] is State.FAILED:
        line += f"  {cell.failure}"
    print(line, file=sys.stderr, flush=True)


def _test_accuracy(cell: Cell) -> float | None:
    """A finished cell's test accuracy, in 0..1."""
    return read_record(cell.folder).metrics.get("test/accuracy") if cell.state is State.DONE else None


def summary_table(board: Board) -> Table:
    """Each cell with its state, test accuracy and minutes."""
    table = _table(counts(board), ["cell", "state"], ["test accuracy", "minutes"])
    for cell, state in board.items():
        accuracy = _test_accuracy(cell)
        minutes = f"{read_record(cell.folder).wall_seconds / 60:.1f}" if state is State.DONE else ""
        text = Text(state, style=_COLOURS.get(state, ""))
        table.add_row(cell.name, text, "" if accuracy is None else f"{accuracy:.3f}", minutes)
    return table


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in texts:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


@dataclass(frozen=True)
class Verdict:
    """A published and a measured result, in percent."""

    what: str
    published: float
    measured: tuple[float, ...]  # one per finished cell
    cells: int  # number of matching cells, finished or not
    tolerance: float

    @property
    def difference(self) -> float:
        """Mean minus the published value; NaN without measurements."""
        return fmean(self.measured) - self.published if self.measured else math.nan

    @property
    def verdict(self) -> str:
        """Whether the mean is within the tolerance."""
        if not self.measured:
            return "not measured"
        # 63.29 and 3.1 are not exact in binary
        if abs(self.difference) <= self.tolerance + 1e-9:
            return "within tolerance"
        return "above" if self.difference > 0 else "below"


def judge(grid: Grid, cells: Sequence[Cell]) -> list[Verdict]:
    """Compare each published result with the finished cells that match it."""
    verdicts = []
    for one in grid.published:
        found = [_test_accuracy(cell) for cell in cells if matches(one.wanted, grid.settings(cell.point))]
        measured = tuple(100 * accuracy for accuracy in found if accuracy is not None)
        what = ", ".join(value_text(value) for value in (one.model_extra or {}).values())
        count = sum(matches(one.wanted, grid.settings(point)) for point in grid.points())
        verdicts.append(Verdict(what, one.accuracy, measured, count, grid.tolerance or 0.0))
    return verdicts


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """The verdicts, each mean with its standard error over the cells."""
    numbers = ["published", "measured", "cells", "difference", "tolerance", "verdict"]
    table = _table("Test accuracy in percent, beside what was published", [""], numbers)
    for one in verdicts:
        count = len(one.measured)
        measured = f"{fmean(one.measured):.2f}" if count else ""
        measured += f" ± {stdev(one.measured) / math.sqrt(count):.2f}" if count > 1 else ""
        difference = f"{one.difference:+.2f}" if count else ""
        cells, tolerance = f"{count} of {one.cells}", f"{one.tolerance:g}"
        table.add_row(one.what, f"{one.published:.2f}", measured, cells, difference, tolerance, one.verdict)
    return table


def sweep_text(cells: Sequence[Cell], out: Path) -> str:
    """A W&B sweep over the cells' configs, for agents on many machines."""
    logger = ["+=WandbLogger", ".project=lit_distill", f".save_dir={out}"]
    fit = ["${env}", "${interpreter}", "-m", "${program}", "fit", "${args}"]
    sweep = {
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
        f"{yaml.safe_dump(sweep, sort_keys=False, allow_unicode=True, width=1000)}"
    )
