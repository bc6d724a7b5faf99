"""Drawing plots with matplotlib, which is imported when something is drawn and keeps no state of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lit_distill.comparison.canvas import TEXT, Style
from lit_distill.comparison.dot_figure import dot_figure
from lit_distill.comparison.layout import FONT
from lit_distill.comparison.line_figure import line_figure
from lit_distill.comparison.plots import DotPlot, LinePlot, StyleKey

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito (2008), without the yellow that is lost on white."""

_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_STROKES: Final = ("-", "--", "-.", ":")
_FIRST: Final[tuple[StyleKey, ...]] = (
    ("StepByStep", ""),
    ("Standard", ""),
    ("SingleTask", ""),
    ("StepByStep", "shuffled"),
)
"""These look the same in every report."""

_SETTINGS: Final[Any] = {
    "font.family": FONT,
    "font.size": TEXT,
    "svg.hashsalt": "lit_distill",
    "path.simplify": False,
    "axes.unicode_minus": True,
    # a $ in a name is a $
    "text.parse_math": False,
}
"""Over matplotlib's own defaults in place of the user's, so that the same runs give the same files."""


@dataclass(frozen=True)
class Drawn:
    """A figure that was written."""

    title: str
    alt: str
    """What is to be seen, for those who do not see it."""
    png: Path
    svg: Path


def draw(plots: Sequence[LinePlot | DotPlot], folder: Path, *, percent: bool) -> list[Drawn]:
    """Write plots as PNG (200 dpi) and SVG.

    Args:
        plots: what is drawn.
        folder: where to; it is made.
        percent: the metric lies in 0..1.
    """
    if not plots:
        return []
    import matplotlib as mpl

    folder.mkdir(parents=True, exist_ok=True)
    styles = styles_of(plots)
    drawn = []
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        for plot in plots:
            figure = figure_of(plot, styles, percent=percent)
            png, svg = folder / f"{plot.name}.png", folder / f"{plot.name}.svg"
            figure.savefig(png, dpi=200, facecolor="white", metadata={"Software": None})
            figure.savefig(svg, facecolor="white", metadata={"Date": None, "Creator": None})
            drawn.append(Drawn(plot.title, _alt(plot, percent), png, svg))
    return drawn


def figure_of(plot: LinePlot | DotPlot, styles: dict[StyleKey, Style], *, percent: bool) -> Figure:
    """A plot as a figure that no one else holds."""
    scale = 100.0 if percent else 1.0
    return line_figure(plot, styles, scale) if isinstance(plot, LinePlot) else dot_figure(plot, styles, scale)


def styles_of(plots: Sequence[LinePlot | DotPlot]) -> dict[StyleKey, Style]:
    """One look for each method and variant, in all figures."""
    keys = {line.style for plot in plots if isinstance(plot, LinePlot) for line in plot.lines}
    keys |= {dot.style for plot in plots if isinstance(plot, DotPlot) for dot in plot.dots}
    ordered = [*_FIRST, *sorted(keys - set(_FIRST))]
    return {
        key: Style(
            _COLOURS[i % len(_COLOURS)],
            _MARKERS[i % len(_MARKERS)],
            _STROKES[i % len(_STROKES)],
        )
        for i, key in enumerate(ordered)
    }


def _alt(plot: LinePlot | DotPlot, percent: bool) -> str:
    scale = 100.0 if percent else 1.0
    if isinstance(plot, DotPlot):
        said = [f"{dot.label} {scale * dot.mean:.2f}" for dot in plot.dots]
    else:
        said = [
            f"{line.label}: {', '.join(f'{scale * point.mean:.2f}' for point in line.points)}" for line in plot.lines
        ]
    return f"{plot.title}. {'; '.join(said)}."
