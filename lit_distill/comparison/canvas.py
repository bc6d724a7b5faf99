"""What all figures are made of: a sheet in inches, a title, notes, scales of numbers, the looks of methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from lit_distill.comparison.layout import fold, measure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEXT, SMALL, TITLE = 10.0, 8.5, 11.5
INK, FAINT, GRID = "#1a1a1a", "#5a5a5a", "#e3e3e3"
PAD: Final = 0.15


@dataclass(frozen=True)
class Style:
    """How a method looks."""

    colour: str
    marker: str
    stroke: str


class Canvas:
    """A figure of which the parts are placed in inches from the lower left."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width, height), facecolor="white")
        FigureCanvasAgg(self.figure)
        self.width, self.height = width, height

    def axes(self, left: float, bottom: float, width: float, height: float) -> Axes:
        """A panel with two spines."""
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(box)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(FAINT)
        axes.tick_params(colors=FAINT, labelcolor=INK, labelsize=SMALL)
        axes.set_axisbelow(True)
        return axes

    def text(self, x: float, y: float, text: str, size: float, **how: Any) -> None:
        """Write something."""
        self.figure.text(x / self.width, y / self.height, text, size=size, linespacing=1.2, **how)

    def line(self, xs: Sequence[float], ys: Sequence[float], **how: Any) -> None:
        """Draw a line over all panels."""
        from matplotlib.lines import Line2D

        places = [x / self.width for x in xs], [y / self.height for y in ys]
        self.figure.add_artist(Line2D(*places, transform=self.figure.transFigure, **how))


@dataclass(frozen=True)
class Frame:
    """The title above and the notes below, which are as wide as the figure."""

    title: str
    notes: str
    above: float
    below: float

    @classmethod
    def of(cls, title: str, notes: Sequence[str], width: float) -> Frame:
        """A title and notes, wrapped to a width."""
        title = fold(title, int(width * 72 / (TITLE * 0.68)))
        joined = fold("; ".join(notes), int(width * 72 / (SMALL * 0.55)))
        below = measure(joined, SMALL)[1] + 0.12 if joined else 0.0
        return cls(title, joined, measure(title, TITLE, "bold")[1] + 0.22, below)

    def put(self, canvas: Canvas) -> None:
        """Write them."""
        canvas.text(PAD, canvas.height - PAD, self.title, TITLE, weight="bold", color=INK, va="top", ha="left")
        canvas.text(PAD, PAD, self.notes, SMALL, color=FAINT, va="bottom", ha="left")


def limits_of(values: Sequence[float], smallest: float) -> tuple[float, float]:
    """A range around values, never so narrow that a difference of nothing fills it."""
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), (smallest - (high - low)) / 2, smallest * 0.1)
    return low - room, high + room


def ticks_of(low: float, high: float, most: int, within: tuple[float, float] | None = None) -> list[float]:
    """Round numbers within a range, about so many, and within what is possible at all."""
    from matplotlib.ticker import MaxNLocator

    places = [float(place) for place in MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    if within:
        places = [place for place in places if within[0] <= place <= within[1]]
    return [place for place in places if low <= place <= high]


def tick_texts(places: Sequence[float], *, signed: bool = False) -> list[str]:
    """Numbers with as many digits as tell them apart."""
    step = min((b - a for a, b in pairwise(places)), default=1.0)
    digits = next((d for d in range(4) if abs(round(step, d) - step) < 1e-9), 4)
    return [
        ("+" if signed and place > 1e-12 else "") + f"{place:.{digits}f}".replace("-", "\u2212")
        if abs(place) > 1e-12
        else f"{0:.{digits}f}"
        for place in places
    ]


def spans(means: Sequence[float], errors: Sequence[float | None], more: Sequence[float]) -> list[float]:
    """The ends of error bars, and more values that have to be seen."""
    spans = [mean + sign * (error or 0.0) for mean, error in zip(means, errors, strict=True) for sign in (-1, 1)]
    return [*spans, *more]
