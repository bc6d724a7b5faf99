"""A metric along an axis, one line a method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lit_distill.comparison.canvas import (
    FAINT,
    GRID,
    INK,
    PAD,
    SMALL,
    TEXT,
    Canvas,
    Frame,
    Style,
    limits_of,
    spans,
    tick_texts,
    ticks_of,
)
from lit_distill.comparison.layout import fold, keep_apart, measure, spread
from lit_distill.comparison.plots import Line, LinePlot, StyleKey

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def line_figure(plot: LinePlot, styles: dict[StyleKey, Style], scale: float) -> Figure:
    """A plot of lines; values are multiplied by ``scale``."""
    unit = " %" if scale == 100 else ""
    ends = sorted(
        [(scale * line.points[-1].mean, fold(line.label, 26), line) for line in plot.lines]
        + [(scale * level, fold(f"{label}, {_number(scale * level)}{unit}", 26), None) for level, label in plot.levels],
        key=lambda end: -end[0],
    )
    heights = [measure(label, TEXT)[1] + 0.09 for _, label, _ in ends]
    left, wide, tall = 0.78, 4.6, max(3.0, sum(heights))
    right = 0.62 + max(measure(label, TEXT)[0] for _, label, _ in ends) + PAD
    frame = Frame.of(plot.title, plot.notes, left + wide + right - 2 * PAD)
    places = _places([x for x, _ in plot.ticks], wide)
    texts = _x_texts([text for _, text in plot.ticks], places)
    tick_height = max(measure(text, SMALL)[1] for text in texts) + 0.1
    bottom = PAD + frame.below + 0.24 + tick_height
    canvas = Canvas(left + wide + right, bottom + tall + frame.above + PAD)
    frame.put(canvas)
    canvas.text(left + wide / 2, PAD + frame.below, plot.x_label, TEXT, color=INK, ha="center", va="bottom")
    axes = canvas.axes(left, bottom, wide, tall)
    at = {x: place for (x, _), place in zip(plot.ticks, places, strict=True)}
    axes.set_xlim(0, wide)
    axes.set_xticks(places, texts)
    axes.tick_params(axis="x", length=3)
    points = [point for line in plot.lines for point in line.points]
    hollow = [scale * point.published for point in points if point.published is not None]
    values = spans(
        [scale * point.mean for point in points],
        [None if point.error is None else scale * point.error for point in points],
        [*hollow, *(scale * level for level, _ in plot.levels)],
    )
    low, high = limits_of(values, 0.02 * scale)
    axes.set_ylim(low, high)
    ticks = ticks_of(low, high, 7, (0, 100) if scale == 100 else None)
    axes.set_yticks(ticks, tick_texts(ticks))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_ylabel(plot.y_label, color=INK)
    for level, _ in plot.levels:
        axes.axhline(scale * level, color=FAINT, linestyle=(0, (5, 3)), linewidth=1.2)
    aside = _aside(plot.lines, places)
    for line in plot.lines:
        _draw_line(axes, line, styles[line.style], {x: place + aside[line] for x, place in at.items()}, scale)
    reach = {line: at[line.points[-1].x] + aside[line] for line in plot.lines}
    _label_ends(canvas, ends, heights, styles, (left, bottom, wide, tall), (low, high), reach)
    return canvas.figure


def _places(xs: Sequence[float], wide: float) -> list[float]:
    """Positions along the axis, in inches: by the logarithm, as sizes grow by factors."""
    logs = [math.log(x) for x in xs]
    span = (logs[-1] - logs[0]) or 1.0
    return [0.35 + (wide - 0.7) * (one - logs[0]) / span for one in logs]


def _aside(lines: Sequence[Line], places: Sequence[float]) -> dict[Line, float]:
    """How far each line is moved aside, in inches, so that error bars at one place do not hide each other."""
    room = min(0.4, *(0.45 * (right - left) for left, right in pairwise(places)))
    step = min(0.1, room / max(1, len(lines) - 1))
    return {line: step * (i - (len(lines) - 1) / 2) for i, line in enumerate(lines)}


def _x_texts(texts: Sequence[str], places: Sequence[float]) -> list[str]:
    """Labels of the axis, of which those go that would meet: first the lower lines, then whole labels."""
    folded = [fold(text, 16) for text in texts]
    short = [text.split("\n")[0] for text in texts]
    for candidate in (folded, short):
        widths = [measure(text, SMALL)[0] for text in candidate]
        if len(keep_apart(places, widths)) == len(places):
            return candidate
    kept = keep_apart(places, [measure(text, SMALL)[0] for text in short])
    return [text if i in kept else "" for i, text in enumerate(short)]


def _draw_line(axes: Axes, line: Line, style: Style, at: dict[float, float], scale: float) -> None:
    xs = [at[point.x] for point in line.points]
    means = [scale * point.mean for point in line.points]
    axes.plot(xs, means, color=style.colour, linestyle=style.stroke, linewidth=1.8, zorder=3)
    for x, mean, point in zip(xs, means, line.points, strict=True):
        if point.error is not None:
            axes.errorbar(x, mean, scale * point.error, color=style.colour, capsize=3, linewidth=1.2, zorder=3)
        if point.published is not None:
            axes.plot(
                x,
                scale * point.published,
                marker=style.marker,
                markersize=10,
                markerfacecolor="none",
                markeredgecolor=style.colour,
                markeredgewidth=1.5,
                linestyle="none",
                zorder=4,
            )
    axes.plot(
        xs,
        means,
        color=style.colour,
        marker=style.marker,
        markersize=6,
        markeredgecolor="white",
        markeredgewidth=0.6,
        linestyle="none",
        zorder=5,
    )


def _label_ends(
    canvas: Canvas,
    ends: Sequence[tuple[float, str, Line | None]],
    heights: Sequence[float],
    styles: dict[StyleKey, Style],
    box: tuple[float, float, float, float],
    limits: tuple[float, float],
    reach: dict[Line, float],
) -> None:
    """Each line's name beside its end; what stands for the line is drawn once more before the name."""
    left, bottom, wide, tall = box
    low, high = limits
    ys = [bottom + tall * (value - low) / (high - low) for value, _, _ in ends]
    centres = spread(ys, heights, bottom, bottom + tall)
    edge = left + wide
    for y, centre, (_, label, line) in zip(ys, centres, ends, strict=True):
        start = edge if line is None else left + reach[line] + 0.08
        canvas.line([start, edge + 0.02, edge + 0.2], [y, y, centre], color="#b5b5b5", linewidth=0.7, zorder=1)
        if line is None:
            sample: dict[str, Any] = {"color": FAINT, "linestyle": (0, (3, 2)), "linewidth": 1.2}
        else:
            style = styles[line.style]
            sample = {"color": style.colour, "linestyle": style.stroke, "linewidth": 1.8}
            canvas.line([edge + 0.38], [centre], color=style.colour, marker=style.marker, markersize=6)
        canvas.line([edge + 0.23, edge + 0.53], [centre, centre], **sample)
        canvas.text(edge + 0.6, centre, label, TEXT, color=INK, ha="left", va="center")


def _number(value: float) -> str:
    return f"{value:.1f}"
