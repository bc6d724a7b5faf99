"""What all figures look like: colours, axes, legends and files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

GREY: Final = "#5a5a5a"
# Okabe and Ito (2008), without the yellow that is hard to see on white
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_STROKES: Final = ("-", "--", "-.", ":")

_RC: Final[Any] = {
    # shipped with matplotlib, so that figures are the same everywhere
    "font.family": "DejaVu Sans",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "svg.hashsalt": "lit_distill",
    # a $ in a name is a $
    "text.parse_math": False,
}
"""Applied to matplotlib's defaults, not the user's, for reproducible files."""


@contextmanager
def own_style() -> Iterator[None]:
    """Figures in the context are of this style."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield


def looks() -> Iterator[dict[str, Any]]:
    """Endless arguments of ``errorbar``, of which no two of hundreds are the same."""
    for colour, marker, stroke in zip(cycle(_COLOURS), cycle(_MARKERS), cycle(_STROKES), strict=False):
        look = {"color": colour, "marker": marker, "linestyle": stroke}
        yield look | {"mec": "white", "mew": 0.6, "ms": 7, "elinewidth": 1.2, "capsize": 3}


class Sheet:
    """A figure with a panel and up to one more, to be made in the context of `own_style`.

    Args:
        height: of the first panel, in inches.
        below: height of a second panel below it, which shares its x axis.
        beside: whether there is a second panel as wide on its right, which shares its y axis.

    Attributes:
        axes: of the first panel.
        second: axes of the second.
    """

    def __init__(self, height: float, *, below: float = 0, beside: bool = False) -> None:
        self.figure = Figure((9, height + below), layout="constrained")
        FigureCanvasAgg(self.figure)
        ratios = [height, below] if below else [1]
        panels = self.figure.subplots(
            len(ratios), 1 + beside, sharex=bool(below), sharey=beside, height_ratios=ratios, squeeze=False
        )
        self.axes, self.second = panels.flat[0], panels.flat[-1]
        self.heights: dict[Any, float] = {}  # artists of the legend -> where they are, from which it has its order

    def finish(self, title: str, notes: Sequence[str]) -> None:
        """Add the legend, if there are heights, title and notes, and hide tick labels that overlap."""
        if self.heights:
            self._add_legend()
        self.figure.suptitle(fill(title, 70), x=0.01, ha="left", size=11.5, weight="bold")
        self.figure.supxlabel(fill("; ".join(notes), 120), x=0.01, ha="left", size=8.5, color=GREY)
        self.figure.draw_without_rendering()
        # it stays as it is now
        self.figure.set_layout_engine("none")
        for axes in self.figure.axes:
            left = np.inf
            # those of a panel above another are hidden already
            for label in reversed(axes.get_xticklabels() if axes.xaxis.get_tick_params()["labelbottom"] else []):
                box = label.get_window_extent()
                label.set_visible(box.x1 + 4 < left)
                left = box.x0 if label.get_visible() else left

    def _add_legend(self) -> None:
        """In the order of heights; the figure grows with it."""
        handles = sorted(self.heights, key=self.heights.__getitem__, reverse=True)
        # in inches, beside title and notes
        needed = 1.0 + sum(0.08 + 0.17 * len(handle.get_label().splitlines()) for handle in handles)
        self.figure.set_figheight(max(self.figure.get_figheight(), needed))
        self.figure.legend(handles=handles, loc="outside right center")

    def save(self, path: Path) -> None:
        """Write it as PNG and SVG; ``path`` is without suffix."""
        with own_style():
            self.figure.savefig(f"{path}.png", dpi=200, metadata={"Software": None})
            self.figure.savefig(f"{path}.svg", metadata={"Date": None, "Creator": None})


def show_metric(axis: Axis, name: str, *, share: bool, unit: str = "%") -> None:
    """Label an axis, a ``share`` in % or points, which spans at least 2 of them, so that tiny differences stay tiny."""
    low, high = axis.get_view_interval()
    more = max(0.0, (0.02 - (high - low)) / 2) if share else 0.0
    axis.set_view_interval(low - more, high + more)
    axis.set_label_text(name + (f" ({unit})" if share else ""))
    if share:
        axis.set_major_formatter(lambda x, _: f"{100 * x:.6g}".replace("-", "\u2212"))
