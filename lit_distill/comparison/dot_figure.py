"""Methods and variants below each other: what they reach, and how far they are from the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lit_distill.comparison.canvas import (
    FAINT,
    GRID,
    INK,
    PAD,
    TEXT,
    Canvas,
    Frame,
    Style,
    limits_of,
    spans,
    tick_texts,
    ticks_of,
)
from lit_distill.comparison.layout import fold, measure
from lit_distill.comparison.plots import Dot, DotPlot, StyleKey

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def dot_figure(plot: DotPlot, styles: dict[StyleKey, Style], scale: float) -> Figure:
    """A plot of dots; values are multiplied by ``scale``."""
    labels = [fold(dot.label, 34) for dot in plot.dots]
    heights = [max(0.36, measure(label, TEXT)[1] + 0.14) for label in labels]
    tall = sum(heights)
    left = PAD + max(measure(label, TEXT)[0] for label in labels) + 0.15
    wide, gap, second = 3.4, 0.45, 2.9
    compared = plot.baseline is not None
    width = left + wide + PAD + 0.15 + ((gap + second) if compared else 0.0)
    frame = Frame.of(plot.title, plot.notes, width - 2 * PAD)
    x_labels = [plot.x_label, fold(f"difference to {plot.baseline} (points)", 34)]
    lowest = max(measure(text, TEXT)[1] for text in x_labels[: 2 if compared else 1])
    bottom = PAD + frame.below + lowest + 0.34
    canvas = Canvas(width, bottom + tall + frame.above + PAD)
    frame.put(canvas)
    centres = [tall - sum(heights[:i]) - heights[i] / 2 for i in range(len(heights))]
    for label, centre in zip(labels, centres, strict=True):
        canvas.text(left - 0.12, bottom + centre, label, TEXT, color=INK, ha="right", va="center")
    axes = canvas.axes(left, bottom, wide, tall)
    _values_panel(axes, plot, centres, styles, scale)
    under = PAD + frame.below + lowest
    canvas.text(left + wide / 2, under, x_labels[0], TEXT, color=INK, ha="center", va="top")
    panels = [axes]
    if compared:
        panels.append(canvas.axes(left + wide + gap, bottom, second, tall))
        _differences_panel(panels[1], plot.dots, centres, styles, scale)
        canvas.text(left + wide + gap + second / 2, under, x_labels[1], TEXT, color=INK, ha="center", va="top")
    for panel in panels:
        panel.set_ylim(0, tall)
        panel.set_yticks([])
        panel.spines["left"].set_visible(False)
        panel.grid(axis="x", color=GRID, linewidth=0.8)
        for centre in centres:
            panel.axhline(centre, color="#efefef", linewidth=0.8, zorder=0)
    return canvas.figure


def _values_panel(
    axes: Axes, plot: DotPlot, centres: Sequence[float], styles: dict[StyleKey, Style], scale: float
) -> None:
    dots = plot.dots
    more = [scale * value for dot in dots for value in dot.values]
    more += [scale * dot.published for dot in dots if dot.published is not None]
    if plot.chance is not None:
        more.append(scale * plot.chance)
        axes.axvline(scale * plot.chance, color=FAINT, linewidth=1.2, linestyle=":", zorder=1)
    errors = [None if dot.error is None else scale * dot.error for dot in dots]
    low, high = limits_of(spans([scale * dot.mean for dot in dots], errors, more), 0.02 * scale)
    axes.set_xlim(low, high)
    ticks = ticks_of(low, high, 6, (0, 100) if scale == 100 else None)
    axes.set_xticks(ticks, tick_texts(ticks))
    for dot, centre, error in zip(dots, centres, errors, strict=True):
        style = styles[dot.style]
        if len(dot.values) > 1:
            small = [scale * value for value in dot.values]
            axes.plot(small, [centre - 0.1] * len(small), "o", markersize=3, mfc="none", mec=style.colour, alpha=0.8)
        if error is not None:
            axes.errorbar(scale * dot.mean, centre, xerr=error, color=style.colour, capsize=3, linewidth=1.5, zorder=3)
        if dot.published is not None:
            place, edge = scale * dot.published, style.colour
            axes.plot(place, centre, style.marker, markersize=10, mfc="none", mec=edge, mew=1.5, zorder=4)
        axes.plot(
            scale * dot.mean, centre, style.marker, markersize=7, color=style.colour, mec="white", mew=0.6, zorder=5
        )


def _differences_panel(
    axes: Axes, dots: Sequence[Dot], centres: Sequence[float], styles: dict[StyleKey, Style], scale: float
) -> None:
    ends = [scale * value for dot in dots if dot.difference for value in dot.difference]
    low, high = limits_of([0.0, *ends], 0.02 * scale)
    axes.set_xlim(low, high)
    ticks = ticks_of(low, high, 7)
    axes.set_xticks(ticks, tick_texts(ticks, signed=True))
    axes.axvline(0, color=FAINT, linewidth=1.2, linestyle=(0, (5, 3)), zorder=2)
    for dot, centre in zip(dots, centres, strict=True):
        style = styles[dot.style]
        if dot.difference is not None:
            middle, start, end = (scale * value for value in dot.difference)
            axes.plot([start, end], [centre, centre], color=style.colour, linewidth=1.8, zorder=3)
            axes.plot(middle, centre, style.marker, markersize=7, color=style.colour, mec="white", mew=0.6, zorder=4)
        elif dot.is_baseline:
            axes.plot(0, centre, style.marker, markersize=7, mfc="white", mec=style.colour, mew=1.2, zorder=4)
