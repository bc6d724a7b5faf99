"""What all figures look like: colours, sheets, legends, axes and files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lit_distill.comparison import names

GREY: Final = "#5a5a5a"
# Okabe and Ito (2008), without the yellow that is hard to see on white
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
STROKES: Final = ("-", "--", "-.", ":")
BARS: Final[Any] = {"mec": "white", "mew": 0.6, "ms": 7, "elinewidth": 1.2, "capsize": 3}

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


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and SVG; ``path`` is without suffix."""
    with own_style():
        figure.savefig(f"{path}.png", dpi=200, metadata={"Software": None})
        figure.savefig(f"{path}.svg", metadata={"Date": None, "Creator": None})


def new_sheet(height: float) -> tuple[Figure, Axes]:
    """An empty figure of this height in inches."""
    figure = Figure((9, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def add_legend(figure: Figure, heights: dict[Any, float]) -> None:
    """A legend in the order of heights; the figure grows with it."""
    handles = sorted(heights, key=heights.__getitem__, reverse=True)
    # in inches, beside title and notes
    needed = 1.0 + sum(0.08 + 0.17 * len(handle.get_label().splitlines()) for handle in handles)
    figure.set_figheight(max(figure.get_figheight(), needed))
    figure.legend(handles=handles, loc="outside right center")


def show_metric(axis: Axis, metric: str) -> None:
    """Label an axis, and let it span at least 2 %, so that tiny differences stay tiny."""
    low, high = axis.get_view_interval()
    more = max(0.0, (0.02 - (high - low)) / 2)
    axis.set_view_interval(low - more, high + more)
    axis.set_label_text(names.metric(metric) + (" (%)" if names.is_share(metric) else ""))
    if names.is_share(metric):
        axis.set_major_formatter(lambda x, _: f"{100 * x:.6g}".replace("-", "\u2212"))


def title_sheet(figure: Figure, title: str, notes: Sequence[str]) -> None:
    """Add title and notes, and hide tick labels that overlap."""
    figure.suptitle(fill(title, 70), x=0.01, ha="left", size=11.5, weight="bold")
    figure.supxlabel(fill("; ".join(notes), 120), x=0.01, ha="left", size=8.5, color=GREY)
    figure.draw_without_rendering()
    # it stays as it is now
    figure.set_layout_engine("none")
    left = np.inf
    for label in reversed(figure.axes[0].get_xticklabels()):
        box = label.get_window_extent()
        label.set_visible(box.x1 + 4 < left)
        left = box.x0 if label.get_visible() else left
