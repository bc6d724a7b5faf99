"""The figures of a comparison, as far as its runs allow."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any, Final

import matplotlib as mpl
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lit_distill.comparison import names
from lit_distill.comparison.comparing import ACCURACY, Comparison

_GREY: Final = "#5a5a5a"
# Okabe and Ito (2008), without the yellow that is hard to see on white
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_STROKES: Final = ("-", "--", "-.", ":")
# the same in every report
_FIRST: Final = ("step-by-step", "standard finetuning", "single task: rationale and label", "standard distillation")

_BARS: Final[Any] = {"mec": "white", "mew": 0.6, "ms": 7, "elinewidth": 1.2, "capsize": 3}

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


@dataclass
class Plot:
    """A figure and its file name without suffix."""

    name: str
    dataset: str
    title: str
    figure: Figure

    def save(self, folder: Path) -> None:
        """Write it as PNG and SVG."""
        with _settings():
            self.figure.savefig(folder / f"{self.name}.png", dpi=200, metadata={"Software": None})
            self.figure.savefig(folder / f"{self.name}.svg", metadata={"Date": None, "Creator": None})


@contextmanager
def _settings() -> Iterator[None]:
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield


def draw(comparison: Comparison) -> list[Plot]:
    """Plot the metric against training rows and student size, and for all variants, per dataset and labels."""
    metric, plots = comparison.metric, dict[str, Plot]()
    with _settings():
        styles = _styles(comparison.settings.name)
        for _, settings in comparison.settings.groupby(["dataset", "label_source"]):
            for plot in _plots(settings, metric, styles):
                # some file systems ignore case
                while plot.name.lower() in plots:
                    plot.name += "_"
                plots[plot.name.lower()] = plot
    return list(plots.values())


def _styles(in_use: pd.Series) -> dict[str, dict[str, Any]]:
    """How each setting's name is drawn, the same in all figures."""
    looks = zip(cycle(_COLOURS), cycle(_MARKERS), cycle(_STROKES), strict=False)
    return {
        name: {"color": colour, "marker": marker, "linestyle": stroke, **_BARS}
        for name, (colour, marker, stroke) in zip(dict.fromkeys([*_FIRST, *in_use]), looks, strict=False)
    }


def _plots(settings: pd.DataFrame, metric: str, styles: dict[str, dict[str, Any]]) -> Iterator[Plot]:
    """The figures of one dataset and label source; a line needs two points, a comparison of variants two settings."""
    for student, own in settings.groupby("student"):
        if own.name.duplicated().any():
            yield _lines(own, "train_fraction", student, f"{student}-training_rows", metric, styles)
    sized = settings[settings.parameters > 0]
    for family, own in sized.groupby(sized.student.map(names.family)):
        several = own[own.duplicated(["name", "train_fraction"], keep=False)]
        largest = several[several.train_fraction == several.train_fraction.max()]
        if len(largest):
            yield _lines(largest, "parameters", f"{family}, {_part(largest)}", f"{family}-student_size", metric, styles)
    for student, own in settings.groupby("student"):
        several = own[own.duplicated("train_fraction", keep=False)]
        largest = several[several.train_fraction == several.train_fraction.max()]
        if len(largest):
            yield _variants(largest, f"{student} · {_part(largest)}", f"{student}-methods", metric, styles)


def _part(settings: pd.DataFrame) -> str:
    fraction = settings.train_fraction.iloc[0]
    return "all training rows" if fraction == 1 else f"{names.fraction(fraction)} of the training rows"


def _lines(
    settings: pd.DataFrame, field: str, what: str, file: str, metric: str, styles: dict[str, dict[str, Any]]
) -> Plot:
    """The metric against a column of the settings, a line per method and variant."""
    figure, axes = _sheet(4.5)
    settings = settings.sort_values(field)
    lines = settings.groupby("name", sort=False)
    widest = settings[field].max() / settings[field].min()
    handles: dict[Any, float] = {}
    for i, (name, line) in enumerate(lines):
        # shifted, so that error bars do not overlap
        xs = line[field].astype(float) * widest ** (0.005 * (i - (len(lines) - 1) / 2))
        means, errors = line["mean"].astype(float), line.error.astype(float).fillna(0)
        handles[axes.errorbar(xs, means, errors, label=fill(name, 26), **styles[name])] = means.iloc[-1]
    levels = {"chance": settings.chance.iloc[0]}
    if field == "parameters" and metric == ACCURACY and (teacher := settings.teacher.iloc[0]):
        levels[f"teacher's labels, {100 * teacher:.1f} %"] = teacher
    for name, level in levels.items():
        if level is not None:
            stroke: Any = ":" if name == "chance" else (0, (5, 3))
            handles[axes.axhline(level, color=_GREY, linestyle=stroke, label=fill(name, 26))] = level
    axes.set_xscale("log")
    axes.set_xticks([x for x, _ in settings.groupby(field)], [_tick(own, field) for _, own in settings.groupby(field)])
    axes.set_xticks([], minor=True)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("training rows" if field == "train_fraction" else "parameters of the student")
    _show_metric(axes.yaxis, metric)
    # in the order in which the lines end
    figure.legend(handles=sorted(handles, key=handles.__getitem__, reverse=True), loc="outside right center")
    return _finish(figure, settings, what, file, [])


def _tick(settings: pd.DataFrame, field: str) -> str:
    if field == "parameters":
        students = [fill(student, 16) for student in sorted(settings.student.unique())]
        return "\n".join([names.size(settings.parameters.iloc[0]), *students])
    rows = max(run.record.train_rows for runs in settings.runs for run in runs)
    return names.fraction(settings.train_fraction.iloc[0]) + (f"\n{rows:,}" if rows else "")


def _variants(settings: pd.DataFrame, what: str, file: str, metric: str, styles: dict[str, dict[str, Any]]) -> Plot:
    """Methods and variants of one student and fraction, one below another."""
    settings = settings.sort_values(["mean", "name"], ascending=[False, True])
    labels = [fill(name, 34) for name in settings.name]
    figure, axes = _sheet(1.8 + sum(0.2 + 0.18 * len(label.splitlines()) for label in labels))
    for y, (_, row) in enumerate(settings.iterrows()):
        style = styles[row["name"]]
        axes.errorbar(row["mean"], y, xerr=row.error or 0, **style)
        if row.n > 1:
            axes.plot(row["values"], [y + 0.22] * row.n, "o", ms=3, mfc="none", mec=style["color"])
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    _show_metric(axes.xaxis, metric)
    notes = ["small circles: single seeds"] if (settings.n > 1).any() else []
    if (chance := settings.chance.iloc[0]) is not None:
        axes.axvline(chance, color=_GREY, linestyle=":", zorder=1)
        notes.append("dotted: chance")
    return _finish(figure, settings, what, file, notes)


def _sheet(height: float) -> tuple[Figure, Axes]:
    figure = Figure((9, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _show_metric(axis: Axis, metric: str) -> None:
    """Label an axis, and let it span at least 2 %, so that tiny differences stay tiny."""
    low, high = axis.get_view_interval()
    more = max(0.0, (0.02 - (high - low)) / 2)
    axis.set_view_interval(low - more, high + more)
    if names.is_share(metric):
        axis.set_major_formatter(lambda x, _: f"{100 * x:.6g}".replace("-", "\u2212"))
    axis.set_label_text(names.metric(metric) + (" (%)" if names.is_share(metric) else ""))


def _finish(figure: Figure, settings: pd.DataFrame, what: str, file: str, notes: list[str]) -> Plot:
    """Add title and notes, and hide tick labels that overlap."""
    dataset, labels = settings.dataset.iloc[0], settings.label_source.iloc[0]
    fewest, most = settings.n.min(), settings.n.max()
    seeds = fewest if fewest == most else f"{fewest} to {most}"
    bars = f"means of {seeds} seeds, bars: ± standard error over seeds"
    notes = [bars if most > 1 else "one seed each, so no standard errors", *notes]
    title = f"{names.dataset(dataset)} · {what} · {names.labels(labels)}"
    figure.suptitle(fill(title, 70), x=0.01, ha="left", size=11.5, weight="bold")
    figure.supxlabel(fill("; ".join(notes), 120), x=0.01, ha="left", size=8.5, color=_GREY)
    figure.draw_without_rendering()
    # it stays as it is now
    figure.set_layout_engine("none")
    left = np.inf
    for label in reversed(figure.axes[0].get_xticklabels()):
        box = label.get_window_extent()
        label.set_visible(box.x1 + 4 < left)
        left = box.x0 if label.get_visible() else left
    # file systems limit a name to 255 bytes
    parts = [part.encode()[-80:].decode(errors="ignore") for part in (dataset, labels, file)]
    return Plot(re.sub(r"[^\w.-]", "_", "-".join(parts)), dataset, title, figure)
