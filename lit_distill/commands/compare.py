"""``compare``: compare finished runs, with statistics."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_distill import checks
from lit_distill.errors import UserError

if TYPE_CHECKING:
    from lit_distill.comparison.comparing import Comparison


def compare(
    runs: list[str],
    out: str = "report",
    baseline: str | None = None,
    metric: str = "test/accuracy",
    allow_different_tests: bool = False,
    resamples: int = 10_000,
    seed: int = 0,
) -> "Comparison":
    """Compare runs and write a report with tables and figures.

    Args:
        runs: folders of runs, or folders to search for runs; `wandb://entity/project` reads metrics from Weights &
            Biases.
        out: folder of the report: ``report.html``, ``report.md``, ``runs.csv``, ``runs.parquet``, ``figures/``.
        baseline: the setting to compare with, as in ``method=StepByStep,rationales=shuffled``; student, labels and
            fraction are those of the compared setting unless given. By default standard finetuning.
        metric: the logged name of the metric: one of test, or ``val/accuracy``, which chose the checkpoint, to tune
            settings without test. ``test/accuracy`` and ``test/vote_accuracy`` have intervals over test rows.
        allow_different_tests: compare runs of a dataset even if their rows of test, or of val for its metrics, differ.
        resamples: of the bootstrap; at most 100,000.
        seed: of the bootstrap.

    Raises:
        UserError: an argument is wrong, or the runs cannot be compared.
    """
    if not isinstance(runs, list) or not runs:
        raise UserError("runs: must be given: folders of runs, or wandb://entity/project")
    checks.check_text("out", out)
    checks.check_text("metric", metric)
    checks.check_bool("allow_different_tests", allow_different_tests)
    checks.check_int("resamples", resamples, 100, 100_000)
    checks.check_int("seed", seed, 0, 2**32 - 1)
    # pandas takes a second to import, and no other command needs it
    from lit_distill.comparison.comparing import compare_runs
    from lit_distill.comparison.report import write_report
    from lit_distill.comparison.runs import find_runs

    comparison = compare_runs(
        *find_runs(runs),
        metric=metric,
        baseline=baseline,
        allow_different_tests=allow_different_tests,
        resamples=resamples,
        seed=seed,
    )
    try:
        write_report(comparison, Path(out))
    except OSError as error:
        raise UserError(f"out: {out!r} cannot be written ({error.strerror})") from error
    _show(comparison, Path(out) / "report.html")
    return comparison


def _show(comparison: "Comparison", report: Path) -> None:
    """Print a table for each dataset and label source, and what was left out."""
    from lit_distill.comparison import names
    from lit_distill.comparison.report import cells, further_cells, notes

    console = Console()
    lines = [remark for remarks in comparison.remarks.values() for remark in remarks]
    for (dataset, labels), settings in comparison.settings.groupby(["dataset", "label_source"]):
        title = f"{names.dataset(dataset)}, {names.labels(labels)}: {names.metric(comparison.metric)}"
        console.print(_table(title, cells(settings, comparison.metric)))
        if further := further_cells(settings, comparison.metric):
            console.print(
                _table(f"{names.dataset(dataset)}, {names.labels(labels)}: costs and further metrics", further)
            )
        lines += notes(settings, comparison)
    places: dict[str, list[str]] = {}
    for source, reason in comparison.skipped.items():
        places.setdefault(reason, []).append(source)
    for reason, (first, *others) in places.items():
        lines.append(f"skipped {first}{f' and {len(others)} more' if others else ''}: {reason}")
    lines += [f"left out {old}: repeated as {new}" for old, new in sorted(comparison.repeated.items())]
    # unwrapped, so that a path can be copied; without rich's markup
    for line in [*dict.fromkeys(lines), "Report:", f"  {report}"]:
        console.print(Text(line), soft_wrap=True)


def _table(title: str, rows: list[dict[str, str]]) -> Table:
    """A table that fits 80 columns, by stacking related values."""
    table = Table(title=title, title_justify="left", show_lines=True)
    stacks = [["setting", "student", "training rows", "compared with"], ["n"], ["mean ± se", "floor", "published"]]
    stacks += [["difference", "95 % interval"], ["p", "by seed ± se (n)"]]
    stacks += [["training tokens", "tokens a row", "tokens of a vote"]]
    stacks += [["accuracy by vote", "worst group", "group macro-F1"]]
    stacks += [[name for name in rows[0] if name.startswith("lost at ")]]
    stacks = [found for stack in stacks if (found := [name for name in stack if name in rows[0]])]
    for stack in stacks:
        numeric = stack[0] != "setting"
        table.add_column("\n".join(stack), justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in rows:
        table.add_row(*(Text("\n".join(row[name] for name in stack).rstrip()) for stack in stacks))
    return table
