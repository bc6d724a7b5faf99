"""``compare``: compare finished runs, with statistics."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_distill import checks
from lit_distill.comparison.comparing import ACCURACY, Comparison, Result, Section, compare_runs, grouped
from lit_distill.comparison.report import DAGGER, DOUBLE_DAGGER, cells, write_report
from lit_distill.comparison.runs import find_runs
from lit_distill.comparison.settings import dataset_name, labels_name, metric_name
from lit_distill.comparison.statistics import FEW
from lit_distill.errors import UserError


def compare(
    runs: list[str],
    out: str = "report",
    baseline: str | None = None,
    metric: str = ACCURACY,
    allow_different_tests: bool = False,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare runs and write a report with tables and figures.

    Args:
        runs: folders of runs, or folders to search for runs; `wandb://entity/project` reads metrics from Weights &
            Biases.
        out: folder of the report: ``report.html``, ``report.md``, ``runs.csv``, ``runs.parquet``, ``figures/``.
        baseline: the setting to compare with, as in ``method=StepByStep,rationales=shuffled``; student, labels and
            fraction are those of the compared setting unless given. By default standard finetuning.
        metric: the logged name of the metric. Only ``test/accuracy`` has intervals over test rows.
        allow_different_tests: compare runs of a dataset even if their test rows differ.
        resamples: of the bootstrap; at most 100,000.
        seed: of the bootstrap.

    Raises:
        UserError: an argument is wrong, no run was found, or runs cannot be compared.
    """
    if isinstance(runs, str) or not runs:
        raise UserError("runs: must be given: folders of runs, or wandb://entity/project")
    checks.check_text("out", out)
    checks.check_text("metric", metric)
    checks.check_bool("allow_different_tests", allow_different_tests)
    checks.check_int("resamples", resamples, 100, 100_000)
    checks.check_int("seed", seed, 0, 2**32 - 1)
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


def _show(comparison: Comparison, report: Path) -> None:
    console = Console()
    results = [result for section in comparison.sections for result in section.results]
    for section in comparison.sections:
        for source, own in grouped(section.results, lambda result: result.setting.label_source).items():
            console.print(_table(section, source, own, comparison.metric))
    lines = [remark for section in comparison.sections for remark in section.remarks]
    if any(result.by_row and result.by_row.differing < FEW for result in results):
        lines.append(f"{DAGGER} rests on fewer than {FEW} rows that tell the two apart")
    if any(result.left_out for result in results):
        lines.append(f"{DOUBLE_DAGGER} only over the seeds that both it and its baseline have")
    lines += [f"skipped {source}: {reason}" for source, reason in comparison.skipped.items()]
    lines += [f"left out {old}: repeated as {new}" for old, new in sorted(comparison.repeated.items())]
    # unwrapped, so that a path can be copied; without rich's markup
    for line in [*lines, "Report:", f"  {report}"]:
        console.print(Text(line), soft_wrap=True)


def _table(section: Section, label_source: str, results: list[Result], metric: str) -> Table:
    """A table that fits 80 columns, by stacking related values."""
    title = f"{dataset_name(section.dataset)}, {labels_name(label_source)}: {metric_name(metric)}"
    table = Table(title=title, title_justify="left", show_lines=True)
    stacks: list[tuple[str, ...]] = [("setting", "student", "training rows"), ("n",), ("mean ± se", "published")]
    stacks += [("difference", "95 % interval"), ("p", "by seed ± se (n)")]
    rows = cells(results, section, metric)
    for stack in stacks:
        numeric = stack[0] != "setting"
        head = "\n".join(name for name in stack if name in rows[0])
        table.add_column(head, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in rows:
        table.add_row(*(Text("\n".join(filter(None, (row.get(name) for name in stack)))) for stack in stacks))
    return table
