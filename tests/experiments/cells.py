"""Cells whose runs are a fake's."""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lit_distill.experiments.cells import CONFIG, Cell, State
from lit_distill.experiments.launch import Board, Local, run_cells

FAKE = Path(__file__).with_name("fake_fit.py")


class Events(list[str]):
    """What happened, a line each."""

    def __call__(self, board: Board, cell: Cell) -> None:
        """Add a line."""
        self.append(f"{cell.name} {board[cell]}")


def make_cells(out: Path, **configs: dict[str, Any]) -> list[Cell]:
    """Laid-out cells: name -> what its run does."""
    cells = [make_cell(out, name, config) for name, config in configs.items()]
    for cell in cells:
        cell.lay_out()
    return cells


def make_cell(out: Path, name: str, config: dict[str, Any]) -> Cell:
    """One that is not laid out yet."""
    return Cell(name, out / name, config, (sys.executable, str(FAKE)))


def cells_in(out: Path) -> list[Cell]:
    """The cells that lie in a folder."""
    paths = sorted(out.glob(f"*/{CONFIG}"))
    return [make_cell(out, path.parent.name, yaml.safe_load(path.read_text())) for path in paths]


def look(cells: list[Cell]) -> Board:
    """Where cells stand."""
    return {cell: cell.state for cell in cells}


def go(cells: list[Cell], jobs: int = 1) -> tuple[list[State], Events]:
    """Run cells to their end: their states, and what happened."""
    board, events = look(cells), Events()
    assert run_cells(board, Local(jobs), events, pause=0.02)
    return list(board.values()), events


def starts(cell: Cell) -> list[str]:
    """How its runs began: ``new`` or ``resumed``."""
    path = cell.folder / "starts.txt"
    return [line.split()[1] for line in path.read_text().splitlines()] if path.exists() else []


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until something is true."""
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.02)


def soon(true: Callable[[], bool], act: Callable[[], object]) -> None:
    """Act once something is true, while the main thread goes on."""

    def wait_and_act() -> None:
        until(true)
        act()

    threading.Thread(target=wait_and_act, daemon=True).start()
