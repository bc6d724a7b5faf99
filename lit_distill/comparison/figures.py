"""The figures of a comparison, as far as its runs allow."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any, Final

import pandas as pd  # type: ignore[import-untyped]
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator

from lit_distill.comparison import names
from lit_distill.comparison.comparing import TOKENS, TRAIN_TOKENS, VOTE_TOKENS, Comparison
from lit_distill.comparison.runs import ACCURACY, VOTE
from lit_distill.comparison.settings import as_text
from lit_distill.sheet import GREY, Sheet, looks, own_style, show_metric

# the same in every report
_FIRST: Final = ("step-by-step", "standard finetuning", "single task: rationale and label", "standard distillation")


@dataclass
class Plot:
    """A figure and its file name without suffix."""

    name: str
    dataset: str
    title: str
    sheet: Sheet

    def save(self, folder: Path) -> None:
        """Write it as PNG and SVG."""
        self.sheet.save(folder / self.name)


def draw(comparison: Comparison) -> list[Plot]:
    """Plot the metric against training rows, student size and tokens, and for all variants, per dataset and labels."""
    # a setting's name looks the same in all figures
    often = [name for name, _ in Counter(comparison.settings.name).most_common()]
    styles = dict(zip(dict.fromkeys([*_FIRST, *often]), looks(), strict=False))
    styled = comparison.settings.assign(style=comparison.settings.name.map(styles))
    plots: dict[str, Plot] = {}
    with own_style():
        for _, settings in styled.groupby(["dataset", "label_source"]):
            for plot in _plots(settings, comparison.metric):
                # some file systems ignore case
                while plot.name.lower() in plots:
                    plot.name += "_"
                plots[plot.name.lower()] = plot
    return list(plots.values())


def _plots(settings: pd.DataFrame, metric: str) -> Iterator[Plot]:
    """The figures of one dataset and label source; a line needs two points, a comparison of variants two settings."""
    for student, own in settings.groupby("student"):
        several = own[own.name.duplicated(keep=False)]
        if len(several):
            yield _lines(several, "train_rows", metric, student, f"{student}-training_rows")
    sized = settings[settings.parameters > 0]
    for family, own in sized.groupby(sized.student.map(names.family)):
        several = own[own.duplicated(["name", "train_fraction"], keep=False)]
        if len(several):
            all_sizes, part = _most_rows(several)
            yield _lines(all_sizes, "parameters", metric, f"{family}, {part}", f"{family}-student_size")
    for student, own in settings.groupby("student"):
        in_lines = own.name.duplicated(keep=False)
        several = [part for _, part in own.groupby(["train_rows", "train_fraction"]) if len(part) > 1]
        for part in several:
            # of fewer rows only what the figure of rows leaves out
            if part is several[-1] or not in_lines[part.index].all():
                share = part.train_fraction.iloc[0]
                file = f"{student}-methods" + (f"-{as_text(share)}" if share != 1 else "")
                yield _variants(part, metric, f"{student} · {names.training_rows(share)}", file)
    for student, own in settings.groupby("student"):
        largest, part = _most_rows(own)
        generated = VOTE_TOKENS if metric == VOTE else TOKENS
        for cost, file in ((TRAIN_TOKENS, "training_tokens"), (generated, "inference_tokens")):
            known = largest[[cost in further for further in largest.further]]
            apart = {round(further[cost][0], 1) for further in known.further}
            if len(apart) > 1 or (cost == TOKENS and _voted(known, metric)):
                yield _costs(known, cost, metric, f"{student} · {part}", f"{student}-{file}")


def _voted(settings: pd.DataFrame, metric: str) -> bool:
    """Whether an accuracy by vote stands beside that of one text for a setting."""
    return metric == ACCURACY and any({VOTE, VOTE_TOKENS} <= further.keys() for further in settings.further)


def _most_rows(settings: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The settings with the most training rows, and these in words."""
    largest = settings[settings.train_rows == settings.train_rows.max()]
    fraction = largest.train_fraction.max()
    return largest[largest.train_fraction == fraction], names.training_rows(fraction)


def _lines(settings: pd.DataFrame, field: str, metric: str, what: str, file: str) -> Plot:
    """The metric against a column of the settings, a line per method and variant; below it, the differences."""
    sheet = Sheet(4.5, below=2.5 * _has_differences(settings))
    axes, heights = sheet.axes, sheet.heights
    settings = settings.sort_values(field)
    lines = settings.groupby("name", sort=False)
    # between two lines at one place, as a factor
    apart = (settings[field].max() / settings[field].min()) ** (0.06 / max(3, len(lines)))
    for i, (name, line) in enumerate(lines):
        # shifted, so that error bars do not overlap
        xs = line[field].astype(float) * apart ** (i - (len(lines) - 1) / 2)
        means, errors = line["mean"].astype(float), line.error.astype(float).fillna(0)
        handle = axes.errorbar(xs, means, errors, label=fill(name, 26), **line["style"].iloc[0])
        heights[handle] = means.iloc[-1]
        for x, row in zip(xs, line.to_dict("records"), strict=True):
            if found := _difference(row):
                sheet.second.errorbar(x, found[0], yerr=found[1], **row["style"])
                _draw_seeds(sheet.second.yaxis, row["seed_differences"], x * apart**0.5, row["style"])
    if (chance := settings.chance.iloc[0]) is not None:
        heights[axes.axhline(chance, color=GREY, linestyle=":", label="chance")] = chance
    if settings.floor.count():
        floor = settings.groupby(field).floor.max().astype(float)
        [words] = axes.plot(floor.index.astype(float), floor, color=GREY, marker="_", label="floor: words alone")
        heights[words] = floor.iloc[-1]
    for teacher in settings.teachers.iloc[0] if field == "parameters" and metric == ACCURACY else ():
        name = fill(f"teacher's labels, {100 * teacher:.1f} %", 26)
        heights[axes.axhline(teacher, color=GREY, linestyle=(0, (5, 3)), label=name)] = teacher
    axes.set_xscale("log")
    axes.set_xticks([x for x, _ in settings.groupby(field)], [_tick(own, field) for _, own in settings.groupby(field)])
    axes.set_xticks([], minor=True)
    for panel in sheet.figure.axes:
        panel.grid(axis="x", visible=False)
    _show(axes.yaxis, metric)
    notes = _show_differences(sheet, sheet.second.yaxis, settings, metric)
    sheet.second.set_xlabel("training rows" if field == "train_rows" else "parameters of the student")
    return _finish(sheet, settings, what, file, notes, circles=_has_differences(settings))


def _tick(settings: pd.DataFrame, field: str) -> str:
    if field == "parameters":
        students = [fill(student, 16) for student in sorted(settings.student.unique())]
        return "\n".join([names.size(settings.parameters.iloc[0]), *students])
    rows = max(run.record.train_rows for runs in settings.runs for run in runs)
    part = settings.train_fraction.iloc[0]
    return names.fraction(part) + (f"\n{rows:,}" if rows and part <= 1 else "")


def _variants(settings: pd.DataFrame, metric: str, what: str, file: str) -> Plot:
    """Methods and variants of one student and fraction, one below another."""
    settings = settings.sort_values(["mean", "name"], ascending=[False, True])
    labels = [fill(name, 34) for name in settings.name]
    height = 1.8 + sum(0.2 + 0.18 * len(label.splitlines()) for label in labels)
    sheet = Sheet(height, beside=_has_differences(settings))
    axes = sheet.axes
    for y, row in enumerate(settings.to_dict("records")):
        axes.errorbar(row["mean"], y, xerr=row["error"] or 0, **row["style"])
        _draw_seeds(axes.xaxis, row["values"], y + 0.22, row["style"])
        if found := _difference(row):
            sheet.second.errorbar(found[0], y, xerr=found[1], **row["style"])
            _draw_seeds(sheet.second.xaxis, row["seed_differences"], y + 0.22, row["style"])
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    for panel in sheet.figure.axes:
        panel.tick_params(axis="y", length=0)
        panel.spines["left"].set_visible(False)
    _show(axes.xaxis, metric)
    notes = _show_differences(sheet, sheet.second.xaxis, settings, metric)
    if (chance := settings.chance.iloc[0]) is not None:
        axes.axvline(chance, color=GREY, linestyle=":", zorder=1)
        notes.append("dotted: chance")
    if settings.floor.count():
        axes.plot(settings.floor.astype(float), range(len(labels)), "|", color=GREY, ms=9, zorder=1)
        notes.append("grey bars: floor, words alone")
    return _finish(sheet, settings, what, file, notes, circles=True)


def _draw_seeds(axis: Axis, values: Sequence[float] | None, place: float, look: dict[str, Any]) -> None:
    """A small circle for each of several seeds, along an axis and at a place of the other."""
    if values is None or len(values) < 2:
        return
    places = [place] * len(values)
    points = (values, places) if axis is axis.axes.xaxis else (places, values)
    axis.axes.plot(*points, "o", ms=3, mfc="none", mec=look["color"])


def _costs(settings: pd.DataFrame, cost: str, metric: str, what: str, file: str) -> Plot:
    """The metric against tokens, a point a setting; a vote is a further point, joined to its setting."""
    sheet = Sheet(4.5)
    axes, heights = sheet.axes, sheet.heights
    xs: list[float] = []
    voted = cost == TOKENS and _voted(settings, metric)
    for row in settings.to_dict("records"):
        further, look = row["further"], row["style"]
        xs.append(further[cost][0])
        handle = axes.errorbar(xs[-1], row["mean"], row["error"] or 0, label=fill(row["name"], 26), **look)
        heights[handle] = row["mean"]
        if voted and {VOTE, VOTE_TOKENS} <= further.keys():
            vote, error = further[VOTE]
            xs.append(further[VOTE_TOKENS][0])
            axes.plot(xs[-2:], [row["mean"], vote], color=look["color"], linestyle=look["linestyle"], linewidth=1)
            axes.errorbar(xs[-1], vote, error or 0, **look | {"mfc": "white", "mec": look["color"]})
    if (chance := settings.chance.iloc[0]) is not None:
        heights[axes.axhline(chance, color=GREY, linestyle=":", label="chance")] = chance
    if settings.floor.count():
        floor = settings.floor.max()
        heights[axes.axhline(floor, color=GREY, label="floor: words alone")] = floor
    if max(xs) > 3 * min(xs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.set_xticks([], minor=True)
    # equal numbers stay equal
    axes.set_xlim(min(xs) / 1.15, max(xs) * 1.15)
    axes.xaxis.set_major_formatter(lambda x, _: names.size(x))
    what_read = "source and target tokens read in training"
    axes.set_xlabel(what_read if cost == TRAIN_TOKENS else "tokens generated for a row, with end-of-sequence")
    _show(axes.yaxis, metric)
    return _finish(sheet, settings, what, file, ["hollow: by the vote of several texts"] if voted else [])


def _has_differences(settings: pd.DataFrame) -> bool:
    return bool(settings.difference.count() + settings.seed_n.count())


def _difference(row: dict[str, Any]) -> tuple[float, list[list[float]] | None] | None:
    """The difference of a setting from its baseline, if there is one, and its 95 % interval as bars."""
    if row["difference"] is None:
        return (row["seed_difference"], None) if row["seed_n"] else None
    return row["difference"], [[row["difference"] - row["low"]], [row["high"] - row["difference"]]]


def _show_differences(sheet: Sheet, axis: Axis, settings: pd.DataFrame, metric: str) -> list[str]:
    """Label the panel of differences, if there is one; return its notes."""
    if sheet.second is sheet.axes:
        return []
    (sheet.second.axhline if axis is sheet.second.yaxis else sheet.second.axvline)(0, color=GREY, linewidth=1, zorder=1)
    show_metric(axis, "difference", share=names.is_share(metric), unit="points")
    intervals = ", bars: 95 % interval over test rows" if settings.difference.count() else ""
    baselines = settings.compared_with.dropna().unique()
    baseline = baselines[0] if len(baselines) == 1 else "the baseline of each"
    return [f"differences: from {baseline}{intervals}"]


def _show(axis: Axis, metric: str) -> None:
    show_metric(axis, names.metric(metric), share=names.is_share(metric))


def _finish(
    sheet: Sheet, settings: pd.DataFrame, what: str, file: str, notes: list[str], *, circles: bool = False
) -> Plot:
    dataset, labels = settings.dataset.iloc[0], settings.label_source.iloc[0]
    seeds = " to ".join(dict.fromkeys([str(settings.n.min()), str(settings.n.max())]))
    bars = f"means of {seeds} seeds, bars: ± standard error over seeds"
    notes = ["one seed each, so no standard errors" if seeds == "1" else bars, *notes]
    if circles and seeds != "1":
        notes.append("small circles: single seeds")
    notes += [*filter(None, settings.usual.unique())]
    title = f"{names.dataset(dataset)} · {what} · {names.labels(labels)}"
    sheet.finish(title, notes)
    # file systems limit a name to 255 bytes
    parts = [part.encode()[-80:].decode(errors="ignore") for part in (dataset, labels, file)]
    return Plot(re.sub(r"[^\w.-]", "_", "-".join(parts)), dataset, title, sheet)
