"""The figures of a comparison, as far as its runs allow."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from operator import attrgetter
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Final

from lit_distill.comparison.comparing import ACCURACY, Comparison, Result, Section, grouped
from lit_distill.comparison.published import SOURCE
from lit_distill.comparison.settings import (
    Setting,
    dataset_name,
    family_name,
    fraction_name,
    labels_name,
    metric_name,
    short_names,
    size_name,
    variant_names,
)

if TYPE_CHECKING:
    # imported when something is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GREY: Final = "#5a5a5a"
_DASHED: Final = (0, (5, 3))
# Okabe and Ito (2008), without the yellow that is hard to see on white
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_STROKES: Final = ("-", "--", "-.", ":")
_BARS: Final[Any] = {"mec": "white", "mew": 0.6, "ms": 7, "elinewidth": 1.2, "capsize": 3}
# the same in every report
_FIRST: Final = ("step-by-step", "standard finetuning", "single task: rationale and label", "standard distillation")

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


@dataclass(frozen=True)
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
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield


def is_share(metric: str) -> bool:
    """Whether a metric is a fraction, shown in %."""
    return not metric.endswith("loss")


def draw(comparison: Comparison) -> list[Plot]:
    """Plot the metric against training rows and student size, and for all variants, per dataset and labels."""
    plots: dict[str, Plot] = {}
    names = list(_FIRST)
    with _settings():
        for section in comparison.sections:
            for plot in _plots(section, comparison.metric, names):
                # some file systems ignore case
                numbered = (plot.name if i == 1 else f"{plot.name}-{i}" for i in count(1))
                name = next(name for name in numbered if name.lower() not in plots)
                plots[name.lower()] = replace(plot, name=name)
    return list(plots.values())


def _plots(section: Section, metric: str, names: list[str]) -> Iterator[Plot]:
    for results in _by("label_source", section.results).values():
        by_student = _by("student", results)
        for own in by_student.values():
            yield from _lines(own, "train_fraction", section, metric, names)
        sized = _by("train_fraction", [result for result in results if result.setting.parameters])
        # at the largest fraction at which there are two sizes, or two settings
        for own in [own for own in sized.values() if len(_by("parameters", own)) > 1][-1:]:
            yield from _lines(own, "parameters", section, metric, names)
        for own in by_student.values():
            for alike in [alike for alike in _by("train_fraction", own).values() if len(alike) > 1][-1:]:
                yield _variants(alike, section, metric, names)


def _by(field: str, results: Iterable[Result]) -> dict[Any, list[Result]]:
    """Results sorted by a field of their settings."""
    return dict(sorted(grouped(results, attrgetter(f"setting.{field}")).items()))


def _style(name: str, names: list[str]) -> dict[str, Any]:
    """The ``errorbar`` style of a name, the same in all figures; ``names`` grows."""
    if name not in names:
        names.append(name)
    colour, marker, stroke = (styles[names.index(name) % len(styles)] for styles in (_COLOURS, _MARKERS, _STROKES))
    return {"color": colour, "marker": marker, "linestyle": stroke, **_BARS}


def _lines(results: Sequence[Result], field: str, section: Section, metric: str, names: list[str]) -> Iterator[Plot]:
    """The metric against a field of the settings, a line per method and variant; none of single points."""
    settings = [result.setting for result in results]
    keys = {key for setting in settings for key, _ in setting.extra}
    # keys that depend on method and field do not split a line
    splitting = {key for key in keys if _splits(key, settings, field)}
    labels = variant_names(settings, splitting)
    if len({family_name(setting.student) for setting in settings}) > 1:
        labels = {setting: f"{label}, {family_name(setting.student)}" for setting, label in labels.items()}
    by_x = _by(field, results)
    lines = grouped((result for own in by_x.values() for result in own), lambda result: labels[result.setting])
    if max(map(len, lines.values())) < 2:
        return
    figure, (axes,) = _sheet(4.5)
    handles: dict[Any, float] = {}
    for i, (label, own) in enumerate(lines.items()):
        # shifted, so that error bars do not overlap
        moved = (max(by_x) / min(by_x)) ** (0.005 * (i - (len(lines) - 1) / 2))
        xs, style = [getattr(result.setting, field) * moved for result in own], _style(label, names)
        means, errors = [result.metric.mean for result in own], [result.metric.standard_error or 0 for result in own]
        handles[axes.errorbar(xs, means, errors, label=fill(label, 26), **style)] = means[-1]
        for x, result in zip(xs, own, strict=True):
            _mark_published(axes, result, style, x=x)
    levels = {"chance": section.chance}
    if field == "parameters" and metric == ACCURACY:
        levels |= {f"teacher's labels, {100 * level:.1f} %": level for level in section.teachers}
    for label, level in levels.items():
        if level is not None:
            stroke: Any = ":" if label == "chance" else _DASHED
            handles[axes.axhline(level, color=_GREY, linestyle=stroke, label=fill(label, 26))] = level
    axes.set_xscale("log")
    axes.set_xticks(list(by_x), [_tick(own, field) for own in by_x.values()])
    axes.set_xticks([], minor=True)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("training rows" if field == "train_fraction" else "parameters of the student")
    _show_metric(axes, "y", metric)
    # in the order in which the lines end
    figure.legend(handles=sorted(handles, key=handles.__getitem__, reverse=True), loc="outside right center")
    short = short_names(keys)
    notes = [f"{short[key].replace('_', ' ')} differs between points" for key in sorted(keys - splitting)]
    what = settings[0].student if field == "train_fraction" else _part(settings[0])
    file = f"{what}-training_rows" if field == "train_fraction" else "student_size"
    yield _finish(figure, settings[0], [what], file, [*notes, *_notes(results)])


def _splits(key: str, settings: Iterable[Setting], field: str) -> bool:
    """Whether otherwise equal settings differ in a key."""
    values: dict[tuple[object, ...], set[str | None]] = defaultdict(set)
    for one in settings:
        same = (one.method, one.rationales, one.rationale_weight, family_name(one.student), getattr(one, field))
        values[same].add(one.value(key))
    return any(len(found) > 1 for found in values.values())


def _tick(results: Sequence[Result], field: str) -> str:
    setting = results[0].setting
    if field == "parameters":
        return "\n".join([size_name(setting.parameters), *(fill(student, 16) for student in _by("student", results))])
    rows = max(run.record.train_rows for result in results for run in result.runs)
    return fraction_name(setting.train_fraction) + (f"\n{rows:,}" if rows else "")


def _variants(results: Sequence[Result], section: Section, metric: str, names: list[str]) -> Plot:
    """Methods and variants of one student and fraction as rows, with their differences to a baseline."""
    results = sorted(results, key=lambda result: (-result.metric.mean, result.name))
    labels = [fill(result.name, 34) for result in results]
    baselines = {result.baseline for result in results if result.by_row}
    baseline = baselines.pop() if len(baselines) == 1 else None
    figure, panels = _sheet(1.8 + sum(0.2 + 0.18 * len(label.splitlines()) for label in labels), 1 + bool(baseline))
    for y, result in enumerate(results):
        style = _style(result.name, names)
        panels[0].errorbar(result.metric.mean, y, xerr=result.metric.standard_error or 0, **style)
        if result.metric.n > 1:
            values = result.metric.values
            panels[0].plot(values, [y + 0.22] * len(values), "o", ms=3, mfc="none", mec=style["color"])
        _mark_published(panels[0], result, style, y=y)
        if baseline and (found := result.by_row):
            ends = [[found.difference - found.low], [found.high - found.difference]]
            panels[1].errorbar(found.difference, y, xerr=ends, **style)
        elif result.setting == baseline:
            panels[1].plot(0, y, style["marker"], mfc="white", mec=style["color"])
    if section.chance is not None:
        panels[0].axvline(section.chance, color=_GREY, linestyle=":", zorder=1)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    for panel in panels:
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
    _show_metric(panels[0], "x", metric)
    notes = _notes(results) + ["small circles: single seeds"] * any(result.metric.n > 1 for result in results)
    notes += ["dotted: chance"] * (section.chance is not None)
    if baseline:
        name = next(result.name for result in section.results if result.setting == baseline)
        panels[1].axvline(0, color=_GREY, linestyle=_DASHED, zorder=1)
        _show_metric(panels[1], "x", metric, fill(f"difference to {name} (points)", 40))
        notes = [f"left: {notes[0]}", *notes[1:], "right: 95 % bootstrap intervals over test rows"]
    setting = results[0].setting
    return _finish(figure, setting, [setting.student, _part(setting)], f"{setting.student}-methods", notes)


def _mark_published(axes: Axes, result: Result, style: dict[str, Any], x: float | None = None, y: float = 0) -> None:
    """A hollow marker at the published accuracy, on the axis whose coordinate is not given."""
    if result.published:
        place = (result.published.accuracy, y) if x is None else (x, result.published.accuracy)
        axes.plot(*place, style["marker"], ms=10, mfc="none", mec=style["color"], mew=1.5)


def _part(setting: Setting) -> str:
    fraction = setting.train_fraction
    return "all training rows" if fraction == 1 else f"{fraction_name(fraction)} of the training rows"


def _notes(results: Sequence[Result]) -> list[str]:
    seeds = sorted({result.metric.n for result in results})
    span = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
    bars = f"means of {span} seeds, bars: ± standard error over seeds"
    hollow = [f"hollow: published by {SOURCE}"] * any(result.published for result in results)
    return ["one seed each, so no standard errors" if seeds == [1] else bars, *hollow]


def _sheet(height: float, panels: int = 1) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((9, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False, sharey=True)[0]


def _show_metric(axes: Axes, name: str, metric: str, difference: str = "") -> None:
    """Label an axis, and let it span at least 2 %, so that tiny differences stay tiny."""
    axis, (low, high) = getattr(axes, f"{name}axis"), getattr(axes, f"get_{name}lim")()
    more = max(0.0, (0.02 - (high - low)) / 2)
    getattr(axes, f"set_{name}lim")(low - more, high + more)
    if is_share(metric):
        sign = "+" if difference else ""
        axis.set_major_formatter(lambda x, _: f"{100 * x:{sign * bool(x)}.6g}".replace("-", "\u2212"))
    axis.set_label_text(difference or metric_name(metric) + (" (%)" if is_share(metric) else ""))


def _finish(figure: Figure, setting: Setting, what: list[str], file: str, notes: list[str]) -> Plot:
    """Add title and notes, and hide tick labels that overlap."""
    title = " · ".join([dataset_name(setting.dataset), *what, labels_name(setting.label_source)])
    figure.suptitle(fill(title, 70), x=0.01, ha="left", size=11.5, weight="bold")
    figure.supxlabel(fill("; ".join(notes), 120), x=0.01, ha="left", size=8.5, color=_GREY)
    figure.draw_without_rendering()
    # it stays as it is now
    figure.set_layout_engine("none")
    for axes in figure.axes:
        left = float("inf")
        for label in reversed(axes.get_xticklabels()):
            box = label.get_window_extent()
            label.set_visible(box.x1 + 4 < left)
            left = box.x0 if label.get_visible() else left
    # file systems limit a name to 255 bytes
    parts = [part.encode()[-80:].decode(errors="ignore") for part in (setting.dataset, setting.label_source, file)]
    return Plot(re.sub(r"[^\w.-]", "_", "-".join(parts)), setting.dataset, title, figure)
