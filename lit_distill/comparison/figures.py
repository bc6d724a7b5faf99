"""Drawing plots with matplotlib, which is imported when something is drawn and keeps no state of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Final

from lit_distill.comparison.plots import DotPlot, LinePlot, StyleKey

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TEXT, _SMALL, _TITLE = 10.0, 8.5, 11.5
_INK, _FAINT, _GRID = "#1a1a1a", "#5a5a5a", "#e3e3e3"
_LETTER: Final = 0.0085
"""Inches a letter and point: DejaVu Sans, on the wide side."""

_WIDE: Final = 4.6
"""Inches of an axis along which lines are drawn."""

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
    # it comes with matplotlib, so that a text is as wide everywhere
    "font.family": "DejaVu Sans",
    "font.size": _TEXT,
    "axes.axisbelow": True,
    "axes.edgecolor": _FAINT,
    "axes.formatter.useoffset": False,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": True,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "grid.color": _GRID,
    "legend.frameon": False,
    "svg.hashsalt": "lit_distill",
    "path.simplify": False,
    # a $ in a name is a $
    "text.parse_math": False,
    **{f"{axis}tick.{name}": value for axis in "xy" for name, value in (
        ("color", _FAINT), ("labelcolor", _INK), ("labelsize", _SMALL),
    )},
}  # fmt: skip
"""Over matplotlib's own defaults in place of the user's, so that the same runs give the same files."""


@dataclass(frozen=True)
class Style:
    """How a method looks."""

    colour: str
    marker: str
    stroke: str


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
    folder.mkdir(parents=True, exist_ok=True)
    styles = styles_of(plots)
    drawn = []
    with _own_settings():
        for plot in plots:
            figure = figure_of(plot, styles, percent=percent)
            png, svg = folder / f"{plot.name}.png", folder / f"{plot.name}.svg"
            figure.savefig(png, dpi=200, facecolor="white", metadata={"Software": None})
            figure.savefig(svg, facecolor="white", metadata={"Date": None, "Creator": None})
            drawn.append(Drawn(plot.title, _alt(plot, percent), png, svg))
    return drawn


@contextmanager
def _own_settings() -> Iterator[None]:
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        yield


def figure_of(plot: LinePlot | DotPlot, styles: dict[StyleKey, Style], *, percent: bool) -> Figure:
    """A plot as a figure that no one else holds."""
    scale = 100.0 if percent else 1.0
    with _own_settings():
        return _lines(plot, styles, scale) if isinstance(plot, LinePlot) else _dots(plot, styles, scale)


def _lines(plot: LinePlot, styles: dict[StyleKey, Style], scale: float) -> Figure:
    """A metric along an axis, one line a method."""
    names = [_fold(line.label, 26) for line in plot.lines]
    levels = [_fold(f"{name}, {scale * level:.1f}{' %' if scale == 100 else ''}", 26) for level, name in plot.levels]
    width = _WIDE + 1.6 + _width([*names, *levels], _TEXT)
    height = max(4.0, 1.3 + 0.21 * sum(name.count("\n") + 1 for name in (*names, *levels)))
    figure, (axes,) = _sheet(plot, width, height, 1)
    places = _places([x for x, _ in plot.ticks])
    at = {x: place for (x, _), place in zip(plot.ticks, places, strict=True)}
    step = min(0.1, min(0.45 * (b - a) for a, b in pairwise(places)) / max(1, len(plot.lines) - 1))
    ends: list[tuple[float, Any]] = []
    for i, (line, name) in enumerate(zip(plot.lines, names, strict=True)):
        # moved aside, so that error bars at one place do not hide each other
        aside = step * (i - (len(plot.lines) - 1) / 2)
        points = [(at[point.x] + aside, scale * point.mean, point) for point in line.points]
        style = styles[line.style]
        xs, means = [x for x, _, _ in points], [mean for _, mean, _ in points]
        look: dict[str, Any] = {"color": style.colour, "marker": style.marker, "mec": "white", "mew": 0.6}
        (drawn,) = axes.plot(xs, means, linestyle=style.stroke, linewidth=1.8, zorder=4, label=name, **look)
        ends.append((means[-1], drawn))
        bars = [(x, mean, scale * point.error) for x, mean, point in points if point.error is not None]
        for x, mean, error in bars:
            axes.errorbar(x, mean, error, fmt="none", ecolor=style.colour, capsize=3, elinewidth=1.2, zorder=3)
        for x, _, point in points:
            if point.published is not None:
                axes.plot(x, scale * point.published, style.marker, ms=10, mfc="none", mec=style.colour, mew=1.5)
    for (level, what), name in zip(plot.levels, levels, strict=True):
        stroke = ":" if what == "chance" else (0, (5, 3))
        drawn = axes.axhline(scale * level, color=_FAINT, linestyle=stroke, linewidth=1.2, label=name)
        ends.append((scale * level, drawn))
    axes.set_xlim(-0.35, _WIDE - 0.35)
    axes.set_xticks(places, _x_texts([text for _, text in plot.ticks], places))
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    axes.grid(axis="y")
    _see_all(axes, "y", scale)
    # in the order in which the lines end
    figure.legend(handles=[drawn for _, drawn in sorted(ends, key=lambda end: -end[0])], loc="outside right center")
    return figure


def _dots(plot: DotPlot, styles: dict[StyleKey, Style], scale: float) -> Figure:
    """Methods and variants below each other: what they reach, and how far they are from the baseline."""
    labels = [_fold(dot.label, 34) for dot in plot.dots]
    compared = plot.baseline is not None
    height = 1.6 + sum(max(0.36, 0.18 * (label.count("\n") + 1) + 0.14) for label in labels)
    figure, panels = _sheet(
        plot, 4.2 + _width(labels, _TEXT) + (3.2 if compared else 0.0), height, 2 if compared else 1
    )
    places = range(len(labels))
    for place, dot in zip(places, plot.dots, strict=True):
        style = styles[dot.style]
        look: dict[str, Any] = {"fmt": style.marker, "color": style.colour, "mec": "white", "mew": 0.6, "ms": 7}
        if len(dot.values) > 1:
            values, below = [scale * value for value in dot.values], [place + 0.22] * len(dot.values)
            panels[0].plot(values, below, "o", ms=3, mfc="none", mec=style.colour, alpha=0.8)
        if dot.published is not None:
            panels[0].plot(scale * dot.published, place, style.marker, ms=10, mfc="none", mec=style.colour, mew=1.5)
        error = None if dot.error is None else scale * dot.error
        panels[0].errorbar(scale * dot.mean, place, xerr=error, capsize=3, zorder=4, **look)
        if compared and dot.difference is not None:
            middle, low, high = (scale * value for value in dot.difference)
            panels[1].errorbar(middle, place, xerr=[[middle - low], [high - middle]], elinewidth=1.8, **look)
        elif compared and dot.is_baseline:
            panels[1].plot(0, place, style.marker, ms=7, mfc="white", mec=style.colour, mew=1.2)
    if plot.chance is not None:
        panels[0].axvline(scale * plot.chance, color=_FAINT, linewidth=1.2, linestyle=":", zorder=1)
    panels[0].set_xlabel(plot.x_label)
    if compared:
        panels[1].axvline(0, color=_FAINT, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
        panels[1].set_xlabel(_fold(f"difference to {plot.baseline} (points)", 34))
        panels[1].xaxis.set_major_formatter(lambda value, _: f"{value:+.6g}".replace("-", "\u2212") if value else "0")
    panels[0].set_yticks(places, labels, size=_TEXT)
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    for i, panel in enumerate(panels):
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
        panel.grid()
        _see_all(panel, "x", scale, shares=i == 0)
    return figure


def _sheet(plot: LinePlot | DotPlot, width: float, height: float, panels: int) -> tuple[Figure, Sequence[Axes]]:
    """A figure in inches with panels side by side, the title above and the notes below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    title = _fold(plot.title, int(width / (_LETTER * 1.25 * _TITLE)))
    notes = _fold("; ".join(plot.notes), int(width / (_LETTER * _SMALL)))
    height += 0.2 * (title.count("\n") + notes.count("\n"))
    figure = Figure((width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    edge = 0.1 / width
    figure.suptitle(title, x=edge, ha="left", size=_TITLE, weight="bold", color=_INK)
    figure.supxlabel(notes, x=edge, ha="left", size=_SMALL, color=_FAINT)
    return figure, figure.subplots(1, panels, squeeze=False, sharey=True)[0]


def _see_all(axes: Axes, name: str, scale: float, *, shares: bool = True) -> None:
    """A range of at least 2 %, so that a difference of nothing does not fill it, with ticks where values can be."""
    from matplotlib.ticker import MaxNLocator

    axes.margins(0.08)
    low, high = getattr(axes, f"get_{name}lim")()
    room = max(0.0, (0.02 * scale - (high - low)) / 2)
    low, high = low - room, high + room
    getattr(axes, f"set_{name}lim")(low, high)
    if shares and scale == 100:
        low, high = max(low, 0), min(high, 100)
    ticks = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    getattr(axes, f"set_{name}ticks")([tick for tick in ticks if low <= tick <= high])


def _fold(text: str, width: int) -> str:
    """A text in lines of so many characters; what is longer than that without a space is broken."""
    return "\n".join("\n".join(wrap(line, width) or [""]) for line in text.split("\n"))


def _width(texts: Sequence[str], size: float) -> float:
    """Inches of the longest line."""
    return _LETTER * size * max((len(line) for text in texts for line in text.split("\n")), default=0)


def _places(xs: Sequence[float]) -> list[float]:
    """Positions along the axis, in inches: by the logarithm, as sizes grow by factors."""
    logs = [math.log(x) for x in xs]
    span = (logs[-1] - logs[0]) or 1.0
    return [(_WIDE - 0.7) * (one - logs[0]) / span for one in logs]


def _x_texts(texts: Sequence[str], places: Sequence[float]) -> list[str]:
    """Labels of the axis; where they would overlap, first their lower lines are dropped, then whole labels."""
    folded = [_fold(text, 16) for text in texts]
    short = [text.split("\n")[0] for text in texts]
    for candidate in (folded, short):
        if len(keep_apart(places, [_width([text], _SMALL) for text in candidate])) == len(places):
            return candidate
    kept = keep_apart(places, [_width([text], _SMALL) for text in short])
    return [text if i in kept else "" for i, text in enumerate(short)]


def keep_apart(places: Sequence[float], widths: Sequence[float], gap: float = 0.08) -> list[int]:
    """Which labels along an axis can stand beside each other: from the right, as many as do not meet.

    Args:
        places: their centres, rising.
        widths: theirs.
        gap: between two.
    """
    kept: list[int] = []
    for i in reversed(range(len(places))):
        if not kept or places[i] + widths[i] / 2 + gap <= places[kept[-1]] - widths[kept[-1]] / 2:
            kept.append(i)
    return kept[::-1]


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
