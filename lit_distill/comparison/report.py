"""The report: what was compared, what was found, and what the numbers mean and do not."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from lit_distill.comparison import numbers
from lit_distill.comparison.comparing import ACCURACY, Comparison, Row, Section
from lit_distill.comparison.document import Heading, Items, Part, Picture, Table, Text, to_html, to_markdown
from lit_distill.comparison.figures import Drawn, draw
from lit_distill.comparison.names import dataset_name, fraction_name, labels_name, metric_name, size_name
from lit_distill.comparison.notes import meaning, repeating, software
from lit_distill.comparison.plots import is_share, plots
from lit_distill.comparison.published import ROWS, SOURCE, STUDENT, TEACHER
from lit_distill.comparison.statistics import FEW
from lit_distill.comparison.table import run_rows, write_table


def write_report(comparison: Comparison, folder: Path) -> list[Drawn]:
    """Write ``report.md``, ``report.html``, ``runs.csv``, ``runs.parquet`` and ``figures/``.

    Args:
        comparison: what is said.
        folder: where to; it is made.

    Returns:
        The figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_table(run_rows(comparison), folder)
    by_section: dict[str, list[Drawn]] = defaultdict(list)
    planned = plots(comparison)
    figures = draw(planned, folder / "figures", percent=is_share(comparison.metric))
    for plot, drawn in zip(planned, figures, strict=True):
        by_section[plot.dataset].append(drawn)
    parts = _parts(comparison, by_section)
    (folder / "report.md").write_text(to_markdown(parts, folder), encoding="utf-8")
    (folder / "report.html").write_text(to_html(parts), encoding="utf-8")
    return figures


def _parts(comparison: Comparison, figures: dict[str, list[Drawn]]) -> list[Part]:
    parts: list[Part] = [Heading(1, "Comparison of runs"), *_compared(comparison)]
    for section in comparison.sections:
        parts += _section(section, comparison, figures.get(section.dataset, []))
    return parts + meaning(comparison) + software(comparison) + repeating(comparison)


# ------------------------------------------------------------------------------------------------------- overview


def _compared(comparison: Comparison) -> list[Part]:
    head = ("dataset", "students", "seeds", "test rows", "runs", "settings", "teacher's labels (%)")
    rows = []
    for section in comparison.sections:
        runs = [run for row in section.rows for run in row.runs]
        seeds = ", ".join(map(str, sorted({run.record.seed for run in runs})))
        students = ", ".join(dict.fromkeys(row.setting.student for row in section.rows))
        tests = "; ".join(f"{count:,} ({test})" if test else "not known" for test, count in section.tests.items())
        teachers = ", ".join(numbers.value(accuracy, ACCURACY) for accuracy in section.teachers)
        counts = (str(len(runs)), str(len(section.rows)))
        rows.append((dataset_name(section.dataset), students, seeds, tests, *counts, teachers))
    unit = "in %" if is_share(comparison.metric) else "as it was logged"
    parts: list[Part] = [
        Text(f"{_runs(len(comparison.runs))} by {metric_name(comparison.metric)} ({comparison.metric}), {unit}."),
        Table(head, tuple(rows), names=4),
    ]
    without = [run for run in comparison.runs if run.predictions is None]
    if without:
        parts += [Text(f"{_runs(len(without))} without predictions, of which metrics alone are compared:")]
        parts += [Items(tuple(f"{run.source}: {run.remark}" for run in without))]
    if comparison.skipped:
        parts += [Text(f"{len(comparison.skipped)} skipped:")]
        parts += [Items(tuple(f"{one.source}: {one.reason}" for one in comparison.skipped))]
    if comparison.duplicates:
        parts += [
            Text(
                f"{_runs(len(comparison.duplicates))} done again with the same setting and seeds. Of each, the run "
                "that was started last is compared; all are in runs.csv:"
            ),
            Items(tuple(f"{old}: again as {new}" for old, new in sorted(comparison.duplicates.items()))),
        ]
    parts.append(Text("All runs with all that is known of them: runs.csv and runs.parquet beside this report."))
    return parts


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


# -------------------------------------------------------------------------------------------------------- dataset


def _section(section: Section, comparison: Comparison, figures: Sequence[Drawn]) -> list[Part]:
    parts: list[Part] = [Heading(2, dataset_name(section.dataset))]
    if section.remarks:
        parts.append(Items(tuple(section.remarks)))
    for label_source in sorted({row.setting.label_source for row in section.rows}):
        rows = [row for row in section.rows if row.setting.label_source == label_source]
        parts += [Heading(3, f"Trained on {labels_name(label_source)}"), _results(rows, section, comparison.metric)]
        parts += _baseline_notes(rows, section)
    parts += [Picture(drawn) for drawn in figures]
    parts += _published(section, comparison.metric)
    return parts


def _results(rows: Sequence[Row], section: Section, metric: str) -> Table:
    points = " (points)" if is_share(metric) else ""
    columns: list[tuple[str, list[str]]] = [
        ("setting", [row.name for row in rows]),
        ("student", [_student(row) for row in rows]),
        ("training rows", [_training_rows(row) for row in rows]),
        ("n", [str(row.summary.n) for row in rows]),
        ("mean ± se", [numbers.mean_and_error(row, metric) for row in rows]),
        ("pooled", numbers.pooled(rows, metric)),
        (
            f"difference{points}",
            [numbers.difference(row, metric) or _why(row) for row in rows],
        ),
        ("95 % interval", [numbers.interval(row.examples, metric) if row.examples else "" for row in rows]),
        ("p", [numbers.p_value(row.examples) if row.examples else "" for row in rows]),
        ("by seed ± se (n)", [numbers.by_seed(row, metric) for row in rows]),
        (
            "published",
            [numbers.value(row.published.accuracy, metric) if row.published else "" for row in rows],
        ),
    ]
    always = ("setting", "student", "training rows", "n", "mean ± se")
    kept = [(name, cells) for name, cells in columns if name in always or any(cells)]
    body = list(zip(*(cells for _, cells in kept), strict=True))
    if section.chance is not None:
        said = {"setting": "chance", "mean ± se": numbers.value(section.chance, metric)}
        body.append(tuple(said.get(name, "") for name, _ in kept))
    return Table(head=tuple(name for name, _ in kept), rows=tuple(body), names=2)


def _why(row: Row) -> str:
    """In place of a difference."""
    return "baseline" if row.is_baseline else ""


def _student(row: Row) -> str:
    size = f" ({size_name(row.setting.parameters)})" if row.setting.parameters else ""
    return row.setting.student + size


def _training_rows(row: Row) -> str:
    counts = sorted({run.record.train_rows for run in row.runs if run.record.train_rows})
    part = fraction_name(row.setting.train_fraction)
    if not counts:
        return part
    return f"{part}, {counts[0]:,}" + (f" to {counts[-1]:,}" if len(counts) > 1 else "")


def _baseline_notes(rows: Sequence[Row], section: Section) -> list[Part]:
    notes = []
    bases: dict[str, int] = defaultdict(int)
    for row in rows:
        if row.baseline is not None:
            base = section.row(row.baseline)
            bases[f"{base.name} of the same {_same(row, base)}"] += 1
    if bases:
        notes.append(
            "Baseline: "
            + "; ".join(
                f"{name} ({count} {'setting' if count == 1 else 'settings'})" for name, count in sorted(bases.items())
            )
            + "."
        )
    missing: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.remark:
            missing[row.remark].append(_name(row))
    notes += [f"No interval: {reason}: {', '.join(names)}." for reason, names in sorted(missing.items())]
    partly = [row for row in rows if any(row.left_out)]
    if partly:
        notes.append(
            f"{numbers.DOUBLE_DAGGER} Both differences are over the seeds that both have. Left out, here and of the "
            "baseline: " + "; ".join(f"{_name(row)} {row.left_out[0]} and {row.left_out[1]}" for row in partly) + "."
        )
    few = [row for row in rows if row.examples is not None and row.examples.differing < FEW]
    if few:
        notes.append(
            f"{numbers.DAGGER} Fewer than {FEW} test rows tell the two apart: the bootstrap is then too sure of itself."
        )
    return [Items(tuple(notes))] if notes else []


def _name(row: Row) -> str:
    return f"{row.name} ({row.setting.student}, {fraction_name(row.setting.train_fraction)})"


def _same(row: Row, base: Row) -> str:
    shared = [
        name
        for name, key in (("student", "student"), ("labels", "label_source"), ("fraction", "train_fraction"))
        if getattr(row.setting, key) == getattr(base.setting, key)
    ]
    return ", ".join(shared) or "dataset"


def _published(section: Section, metric: str) -> list[Part]:
    found = [row for row in section.rows if row.published]
    if not found:
        return []
    rows = []
    for name, accuracies in ROWS.items():
        accuracy = accuracies[section.dataset]
        shown = numbers.value(accuracy, metric)
        beside = [row for row in found if row.published and row.published.row == name]
        for own in beside:
            apart = numbers.change(own.summary.mean - accuracy, metric)
            rows.append((name, own.name, shown, numbers.mean_and_error(own, metric), apart))
        if not beside:
            rows.append((name, "", shown, "", ""))
    head = ("as published", "here", f"published ({SOURCE})", "mean ± se", "difference (points)")
    teacher = numbers.value(TEACHER[section.dataset], ACCURACY)
    return [
        Heading(3, f"Beside what was published for {dataset_name(section.dataset)}"),
        Table(head, tuple(rows), names=2),
        Text(
            f"Published by {SOURCE} for {STUDENT}, all of the training rows and human labels, as means of 4 seeds. "
            "Their standard errors, their choice of checkpoint and the weight of the rationales were not published. "
            f"PaLM's labels are right on {teacher} % of test, by the outputs that were released."
        ),
    ]
