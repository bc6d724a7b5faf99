"""What was measured, beside what was published."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from rich.table import Table

from lit_distill.experiments.cells import Cell, record_of
from lit_distill.experiments.grid import Grid, Point
from lit_distill.experiments.names import value_text

WITHIN, ABOVE, BELOW, NOTHING = "within tolerance", "above", "below", "not measured"


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
    def mean(self) -> float:
        """Of the cells; not a number where there is none."""
        return fmean(self.measured) if self.measured else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean over the cells; not a number where there are not two."""
        return stdev(self.measured) / math.sqrt(len(self.measured)) if len(self.measured) > 1 else math.nan

    @property
    def verdict(self) -> str:
        """Whether the mean is within the tolerance of what was published."""
        if not self.measured:
            return NOTHING
        difference = self.mean - self.published
        # 63.29 and 3.1 are no binary fractions
        if abs(difference) <= self.tolerance + 1e-9:
            return WITHIN
        return ABOVE if difference > 0 else BELOW


def judge(grid: Grid, cells: Sequence[Cell]) -> list[Verdict]:
    """Each published figure beside the finished cells that it is about.

    Args:
        grid: it.
        cells: those of its cells that are looked at.
    """
    verdicts = []
    points = [{**grid.fixed, **point} for point in grid.points()]
    for one in grid.published:
        about = [cell for cell in cells if _matches(one.point, {**grid.fixed, **cell.point})]
        records = [record for cell in about if (record := record_of(cell.folder)) is not None]
        measured = [100 * record.metrics["test/accuracy"] for record in records if "test/accuracy" in record.metrics]
        what = ", ".join(value_text(value) for value in one.point.values())
        count = sum(_matches(one.point, point) for point in points)
        verdicts.append(Verdict(what, one.accuracy, tuple(measured), count, grid.tolerance or 0.0))
    return verdicts


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """The verdicts as a table."""
    table = Table(title="Test accuracy in percent, beside what was published", title_justify="left")
    table.add_column("")
    for name in ("published", "measured", "cells", "difference", "tolerance"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for one in verdicts:
        spread = "" if math.isnan(one.error) else f" ± {one.error:.2f}"
        table.add_row(
            one.what,
            f"{one.published:.2f}",
            f"{one.mean:.2f}{spread}" if one.measured else "",
            f"{len(one.measured)} of {one.cells}",
            f"{one.mean - one.published:+.2f}" if one.measured else "",
            f"{one.tolerance:g}",
            one.verdict,
        )
    return table


def _matches(wanted: Point, point: Point) -> bool:
    return all(key in point and value_text(point[key]) == value_text(value) for key, value in wanted.items())
