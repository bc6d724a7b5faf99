"""What there is to draw: from rows to the points of figures, and only of figures that the runs give material for."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from lit_distill.comparison.comparing import ACCURACY, Comparison, Row, Section
from lit_distill.comparison.names import (
    dataset_name,
    family,
    fraction_name,
    labels_name,
    metric_name,
    short_keys,
    size_name,
    variant_names,
)
from lit_distill.comparison.published import SOURCE
from lit_distill.comparison.settings import Setting

StyleKey = tuple[str, str]
"""A method and its variant, by which the same thing looks the same in all figures."""


_LONGEST_PART = 60
"""Bytes of a name in a file's name, which file systems limit to 255."""


@dataclass(frozen=True)
class Point:
    """A setting in a figure."""

    x: float
    mean: float
    error: float | None
    """Standard error over seeds."""
    published: float | None


@dataclass(frozen=True)
class Line:
    """A method along an axis."""

    label: str
    style: StyleKey
    points: tuple[Point, ...]


@dataclass(frozen=True)
class LinePlot:
    """A metric along the size of the training set or of the student."""

    name: str
    """Of its files."""
    dataset: str
    title: str
    x_label: str
    y_label: str
    ticks: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...]
    levels: tuple[tuple[float, str], ...]
    """Dashed lines, with their labels."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Dot:
    """A setting in an ablation."""

    label: str
    style: StyleKey
    values: tuple[float, ...]
    """One a seed."""
    mean: float
    error: float | None
    published: float | None
    difference: tuple[float, float, float] | None
    """To the baseline, with the ends of its interval."""
    is_baseline: bool


@dataclass(frozen=True)
class DotPlot:
    """Methods and variants below each other."""

    name: str
    dataset: str
    title: str
    x_label: str
    dots: tuple[Dot, ...]
    """From the top."""
    baseline: str | None
    """What the second panel compares with; without it there is none."""
    chance: float | None
    notes: tuple[str, ...]


def plots(comparison: Comparison) -> list[LinePlot | DotPlot]:
    """All figures that there is material for."""
    found: list[LinePlot | DotPlot] = []
    for section in comparison.sections:
        for label_source, rows in _split(section.rows, lambda row: row.setting.label_source):
            for student, own in _split(rows, lambda row: row.setting.student):
                found += _fractions(section, own, label_source, student, comparison.metric)
            found += _sizes(section, rows, label_source, comparison.metric)
            for student, own in _split(rows, lambda row: row.setting.student):
                found += _ablation(section, own, label_source, student, comparison.metric)
    return _with_own_files(found)


def _with_own_files(found: Sequence[LinePlot | DotPlot]) -> list[LinePlot | DotPlot]:
    """Figures of which no two have one file, on file systems that do not tell cases apart either."""
    used: set[str] = set()
    named: list[LinePlot | DotPlot] = []
    for plot in found:
        name, number = plot.name, 1
        while name.lower() in used:
            number += 1
            name = f"{plot.name}-{number}"
        used.add(name.lower())
        named.append(replace(plot, name=name))
    return named


def _split(rows: Iterable[Row], key: Callable[[Row], str]) -> list[tuple[str, list[Row]]]:
    return [(name, list(group)) for name, group in groupby(sorted(rows, key=key), key=key)]


def _title(section_rows: Sequence[Row], *parts: str) -> str:
    setting = section_rows[0].setting
    return " · ".join([dataset_name(setting.dataset), *parts, labels_name(setting.label_source)])


def _file(*parts: str) -> str:
    parts = tuple(part.encode()[:_LONGEST_PART].decode(errors="ignore") for part in parts)
    return "".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in "-".join(parts))


def _y_label(metric: str) -> str:
    return f"{metric_name(metric)} (%)" if is_share(metric) else metric_name(metric)


def is_share(metric: str) -> bool:
    """Whether a metric lies in 0..1 and is shown in %."""
    return not metric.endswith("loss")


def _fractions(section: Section, rows: Sequence[Row], label_source: str, student: str, metric: str) -> list[LinePlot]:
    xs = sorted({row.setting.train_fraction for row in rows})
    if len(xs) < 2:
        return []
    lines, notes = _lines(rows, lambda setting: setting.train_fraction, with_family=False)
    if all(len(line.points) < 2 for line in lines):
        return []
    ticks = []
    for x in xs:
        trained = [run.record.train_rows for row in rows if row.setting.train_fraction == x for run in row.runs]
        count = f"\n{max(trained):,}" if any(trained) else ""
        ticks.append((x, fraction_name(x) + count))
    return [
        LinePlot(
            name=_file(section.dataset, label_source, student, "training_rows"),
            dataset=rows[0].setting.dataset,
            title=_title(rows, student),
            x_label="training rows",
            y_label=_y_label(metric),
            ticks=tuple(ticks),
            lines=tuple(lines),
            levels=_chance(section),
            notes=tuple(notes),
        )
    ]


def _sizes(section: Section, rows: Sequence[Row], label_source: str, metric: str) -> list[LinePlot]:
    """At the largest fraction at which there are two students."""
    rows = [row for row in rows if row.setting.parameters]
    sizes: dict[float, set[int]] = defaultdict(set)
    for row in rows:
        sizes[row.setting.train_fraction].add(row.setting.parameters)
    fractions = [fraction for fraction, found in sizes.items() if len(found) > 1]
    if not fractions:
        return []
    fraction = max(fractions)
    rows = [row for row in rows if row.setting.train_fraction == fraction]
    families = {family(row.setting.student) for row in rows}
    lines, notes = _lines(rows, lambda setting: float(setting.parameters), with_family=len(families) > 1)
    if all(len(line.points) < 2 for line in lines):
        return []
    students: dict[int, list[str]] = defaultdict(list)
    for row in rows:
        if row.setting.student not in students[row.setting.parameters]:
            students[row.setting.parameters].append(row.setting.student)
    levels = _chance(section)
    if metric == ACCURACY:
        levels += tuple((accuracy, "teacher's labels") for accuracy in section.teachers)
    part = "all training rows" if fraction == 1 else f"{fraction_name(fraction)} of the training rows"
    return [
        LinePlot(
            name=_file(section.dataset, label_source, "student_size"),
            dataset=rows[0].setting.dataset,
            title=_title(rows, part),
            x_label="parameters of the student",
            y_label=_y_label(metric),
            ticks=tuple(
                (float(size), "\n".join((size_name(size), *names))) for size, names in sorted(students.items())
            ),
            lines=tuple(lines),
            levels=levels,
            notes=tuple(notes),
        )
    ]


def _chance(section: Section) -> tuple[tuple[float, str], ...]:
    return () if section.chance is None else ((section.chance, "chance"),)


def _lines(rows: Sequence[Row], x: Callable[[Setting], float], *, with_family: bool) -> tuple[list[Line], list[str]]:
    """Rows as lines; keys of the config that only follow the method or the axis do not break a line."""
    settings = [row.setting for row in rows]
    keys = {key for setting in settings for key, _ in setting.extra}
    splitting = {key for key in keys if _splits(key, settings, x)}
    groups: dict[str, list[Row]] = defaultdict(list)
    names = variant_names(settings, splitting)
    for row in rows:
        name = names[row.setting]
        groups[f"{name}, {family(row.setting.student)}" if with_family else name].append(row)
    lines = [
        Line(
            label=label,
            style=style_key(group[0].setting, splitting, family(group[0].setting.student) if with_family else ""),
            points=tuple(_point(row, x(row.setting)) for row in sorted(group, key=lambda row: x(row.setting))),
        )
        for label, group in groups.items()
    ]
    short = short_keys(keys)
    notes = [
        f"{short[key].replace('_', ' ')} differs between points (see the table)" for key in sorted(keys - splitting)
    ]
    return lines, notes + _notes(rows)


def _base(setting: Setting) -> tuple[object, ...]:
    return setting.method, setting.rationales, setting.rationale_weight, family(setting.student)


def _splits(key: str, settings: Sequence[Setting], x: Callable[[Setting], float]) -> bool:
    values: dict[tuple[object, ...], set[str | None]] = defaultdict(set)
    for setting in settings:
        values[(*_base(setting), x(setting))].add(setting.value(key))
    return any(len(found) > 1 for found in values.values())


def style_key(setting: Setting, keys: Collection[str], more: str = "") -> StyleKey:
    """What a setting's look follows from: its method, and in what it is not the plain one.

    Args:
        setting: what is drawn.
        keys: the keys of the config that tell settings apart.
        more: what else does.
    """
    odd = [] if setting.rationales in (None, "own") else [setting.rationales]
    odd += [] if setting.rationale_weight in (None, 1.0) else [f"{setting.rationale_weight:g}"]
    odd += [f"{key}={value}" for key, value in setting.extra if key in keys]
    return setting.method, " ".join([*odd, more]).strip()


def _point(row: Row, x: float) -> Point:
    hollow = row.published.accuracy if row.published else None
    return Point(x, row.summary.mean, row.summary.standard_error, hollow)


def _notes(rows: Sequence[Row]) -> list[str]:
    counts = sorted({row.summary.n for row in rows})
    notes = [_seeds(counts)]
    if any(row.published for row in rows):
        notes.append(f"hollow: published by {SOURCE}")
    return notes


def _seeds(counts: Sequence[int]) -> str:
    if counts == [1]:
        return "one seed each, so no standard errors"
    span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"means of {span} seeds, bars: ± standard error over seeds"


def _ablation(section: Section, rows: Sequence[Row], label_source: str, student: str, metric: str) -> list[DotPlot]:
    """At the largest fraction at which there are two settings."""
    by_fraction: dict[float, list[Row]] = defaultdict(list)
    for row in rows:
        by_fraction[row.setting.train_fraction].append(row)
    fractions = [fraction for fraction, found in by_fraction.items() if len(found) > 1]
    if not fractions:
        return []
    fraction = max(fractions)
    rows = by_fraction[fraction]
    bases = {row.baseline for row in rows if row.examples is not None}
    compared = [row for row in rows if row.examples is not None]
    base = next(iter(bases)) if len(bases) == 1 else None
    base_name = next((row.name for row in rows if row.setting == base), None)
    settings = [row.setting for row in rows]
    # what is the same for all in this figure need not be said
    varying = {
        key
        for key in {key for setting in settings for key, _ in setting.extra}
        if len({setting.value(key) for setting in settings}) > 1
    }
    names = variant_names(settings, varying)
    if base in names:
        base_name = names[base]
    dots = [
        Dot(
            label=names[row.setting],
            style=style_key(row.setting, varying),
            values=row.summary.values,
            mean=row.summary.mean,
            error=row.summary.standard_error,
            published=row.published.accuracy if row.published else None,
            difference=(row.examples.difference, row.examples.low, row.examples.high) if row.examples else None,
            is_baseline=row.setting == base,
        )
        for row in sorted(rows, key=lambda row: (-row.summary.mean, row.name))
    ]
    counts = sorted({row.summary.n for row in rows})
    two_panels = base is not None and bool(compared)
    notes = [f"left: {_seeds(counts)}" if two_panels else _seeds(counts)]
    if counts != [1]:
        notes.append("small circles: single seeds")
    notes += _notes(rows)[1:]
    if section.chance is not None:
        notes.append("dotted: chance")
    if two_panels:
        over = ", of the seeds that both have" if any(any(row.left_out) for row in compared) else ""
        notes.append(f"right: 95 % bootstrap intervals over test rows{over}")
    part = "all training rows" if fraction == 1 else f"{fraction_name(fraction)} of the training rows"
    return [
        DotPlot(
            name=_file(rows[0].setting.dataset, label_source, student, "methods"),
            dataset=rows[0].setting.dataset,
            title=_title(rows, student, part),
            x_label=_y_label(metric),
            dots=tuple(dots),
            baseline=base_name if two_panels else None,
            chance=section.chance,
            notes=tuple(notes),
        )
    ]
