"""Cells whose runs are a fake's."""

import sys
from pathlib import Path
from typing import Any

import yaml

from lit_distill.experiments.cells import CONFIG, Cell, lay_out

FAKE = Path(__file__).with_name("fake_fit.py")


def make_cells(out: Path, **configs: dict[str, Any]) -> list[Cell]:
    """Laid-out cells: name -> what its run does."""
    cells = [make_cell(out, name, config) for name, config in configs.items()]
    for cell in cells:
        lay_out(cell)
    return cells


def make_cell(out: Path, name: str, config: dict[str, Any]) -> Cell:
    """One that is not laid out yet."""
    return Cell(name, out / name, {}, config, (sys.executable, str(FAKE)))


def cells_in(out: Path) -> list[Cell]:
    """The cells that lie in a folder."""
    paths = sorted(out.glob(f"*/{CONFIG}"))
    return [make_cell(out, path.parent.name, yaml.safe_load(path.read_text())) for path in paths]


def starts(cell: Cell) -> list[str]:
    """How its runs began: ``new`` or ``resumed``."""
    path = cell.folder / "starts.txt"
    return [line.split()[2] for line in path.read_text().splitlines()] if path.exists() else []
