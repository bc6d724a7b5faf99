"""Verdicts on published figures, against numbers worked out by hand."""

import io
import math
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from lit_distill.experiments.cells import Cell
from lit_distill.experiments.grid import read_grid
from lit_distill.experiments.verdict import ABOVE, BELOW, NOTHING, WITHIN, Verdict, judge, verdict_table
from lit_distill.records import write_record
from tests.experiments.fake_fit import make_record


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        ((), NOTHING),
        ((63.29,), WITHIN),
        ((66.39,), WITHIN),
        ((66.41,), ABOVE),
        ((60.19,), WITHIN),
        ((60.17,), BELOW),
        ((50.0, 76.58), WITHIN),
    ],
)
def test_a_verdict(measured: tuple[float, ...], verdict: str) -> None:
    assert Verdict("", 63.29, measured, 4, 3.1).verdict == verdict


def test_mean_and_standard_error() -> None:
    one = Verdict("", 62.0, (60.0, 62.0, 64.0, 66.0), 4, 1.0)
    # deviations -3, -1, 1, 3: variance 20 / 3, over 4 of them
    assert one.mean == 63.0
    assert one.error == pytest.approx(math.sqrt(20 / 3 / 4))
    assert math.isnan(Verdict("", 62.0, (60.0,), 4, 1.0).error)
    assert math.isnan(Verdict("", 62.0, (), 4, 1.0).mean)


def test_figures_find_their_cells(tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    published = [
        {"method": "standard", "accuracy": 50.0},
        {"method": "StepByStepModule", "label_source": "gold", "accuracy": 60.0},
    ]
    content = {
        "base": "x", "set": {"label_source": "gold"}, "published": published, "tolerance": 2,
        "grid": {"method": ["standard", "step_by_step"], "seed": [0, 1]},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    grid = read_grid(path)
    cells = [Cell(str(i), tmp_path / str(i), point, {}) for i, point in enumerate(grid.points())]
    for cell, accuracy in zip(cells[:3], (0.52, 0.5, 0.7), strict=True):
        cell.folder.mkdir()
        write_record(cell.folder, make_record(accuracy))
    standard, step_by_step = judge(grid, cells)
    assert standard.measured == pytest.approx((52.0, 50.0))
    assert (standard.cells, standard.verdict) == (2, WITHIN)
    assert (step_by_step.what, step_by_step.cells, step_by_step.verdict) == ("step_by_step, gold", 2, ABOVE)
    # of cells that were not looked at, nothing is known; but there are as many as there are
    assert [(len(one.measured), one.cells) for one in judge(grid, cells[:1])] == [(1, 2), (0, 2)]
    console = Console(width=150, file=io.StringIO(), record=True)
    console.print(verdict_table([standard, step_by_step]))
    lines = console.export_text().splitlines()
    assert any("standard" in line and "51.00 ± 1.00" in line and "2 of 2" in line and "+1.00" in line for line in lines)
    assert any("step_by_step, gold" in line and "1 of 2" in line and "+10.00" in line for line in lines)
