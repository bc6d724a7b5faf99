"""What a report says of all its numbers: what they mean and do not, and how they came about."""

import shlex
from collections.abc import Sequence
from typing import Any

from lit_distill.comparison.comparing import Comparison
from lit_distill.comparison.document import Code, Heading, Items, Part, Table
from lit_distill.comparison.numbers import DOUBLE_DAGGER, pooled
from lit_distill.comparison.runs import Run


def meaning(comparison: Comparison) -> list[Part]:
    """What the statistics say and what they do not."""
    rows = [row for section in comparison.sections for row in section.rows]
    compared = sum(row.examples is not None for row in rows)
    by_seed = any(row.seeds is not None for row in rows)
    expected = f"{0.05 * compared:.2g}"
    plural = "" if compared == 1 else "s"
    items = [
        "mean ± se: the mean over seeds and its standard error (divisor n - 1). It says how far another set of seeds "
        "would move the mean, with the test rows as they are. A single seed has no standard error."
    ]
    if any(section.chance is not None for section in comparison.sections):
        items.append(
            "chance: the accuracy without reading the input, by a uniform guess among closed choices or always the "
            "most frequent label, whichever is better. Differences between settings that are not above it say "
            "nothing."
        )
    if any(any(pooled(section.rows, comparison.metric)) for section in comparison.sections):
        items.append(
            "pooled: the share of all seeds' answers that is right; shown where it differs from the mean because seeds "
            "were tested on different numbers of rows."
        )
    if compared:
        items.append(
            "difference, 95 % interval, p: the difference to the baseline by a paired bootstrap over test rows "
            f"({comparison.resamples:,} resamples, seed {comparison.seed}). With several seeds, each row first gets "
            "the share of seeds that answered it right. The interval covers the choice of test rows, for these "
            "very students, but not the choice of seeds."
        )
    if by_seed:
        both = " Where there are seeds that both have, both differences are over those"
        left_out = any(any(row.left_out) for row in rows)
        both += f"; {DOUBLE_DAGGER} marks where others were left out." if left_out else "."
        items.append(
            "by seed: the difference between runs with the same seed and data seed, its mean and standard error over "
            "those seeds (their number in brackets). It covers seeds and not test rows. With fewer than 4 or 5 seeds "
            "the standard error is itself a rough guess." + both
        )
    if compared and by_seed:
        items.append(
            "Believe a difference where both agree. Neither says anything about other datasets, students or settings, "
            "nor corrects for choosing settings by their test results."
        )
    if compared:
        items.append(
            "p-values are not corrected for their number. If these very students were equally good on the population "
            f"of test rows, of {compared} comparison{plural} here, about {expected} would have p < 0.05. This "
            "does not hold for methods: with few seeds, two identical methods get such p far more often (in a "
            "simulation of one seed each, with a standard deviation over seeds of 1.5 points and 2,000 test rows, 41 % "
            "had p < 0.05)." + (" See the column by seed." if by_seed else "")
        )
    if any(row.published for row in rows):
        items.append(
            "published: the paper's number, from other code. Its single answers are not known, so it cannot be paired."
        )
    return [Heading(2, "What the numbers mean"), Items(tuple(items))]


def software(comparison: Comparison) -> list[Part]:
    """Versions and commits, and whether they differ."""
    runs = [run for run in comparison.runs if run.record.versions]
    names = sorted({name for run in runs for name in run.record.versions})
    rows, differing = [], []
    for name in names:
        found = _counted([run.record.versions.get(name, "absent") for run in runs])
        rows.append((name, found))
        if ";" in found:
            differing.append(name)
    known = [run for run in comparison.runs if run.record.git.get("commit")]
    if known:
        rows.append(("commit", _counted([_commit(run) for run in comparison.runs])))
    if not rows:
        return []
    parts: list[Part] = [Heading(2, "What the runs were run with"), Table(("", "version (runs)"), tuple(rows), names=2)]
    warnings = []
    if differing:
        warnings.append(f"Versions differ between runs: {', '.join(differing)}.")
    if len({run.record.git["commit"] for run in known}) > 1:
        warnings.append("Runs are of different commits.")
    if any(run.record.git.get("changed") for run in comparison.runs):
        warnings.append("Some runs had files that differed from their commit.")
    return [*parts, Items(tuple(warnings))] if warnings else parts


def _commit(run: Run) -> str:
    git: dict[str, Any] = run.record.git
    if not git.get("commit"):
        return "no git checkout"
    return str(git["commit"])[:12] + (" with changes" if git.get("changed") else "")


def _counted(values: Sequence[str]) -> str:
    return "; ".join(f"{value} ({values.count(value)})" for value in sorted(set(values)))


def repeating(comparison: Comparison) -> list[Part]:
    """The commands of the runs."""
    known = [run for run in comparison.runs if run.record.command]
    if not known:
        return []
    lines: list[str] = []
    for run in sorted(known, key=lambda run: run.source):
        lines += [f"# {run.source}", shlex.join(map(str, run.record.command))]
    return [Heading(2, "How to repeat the runs"), Code(tuple(lines))]
