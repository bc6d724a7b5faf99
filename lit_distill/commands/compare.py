"""``compare``: runs side by side, with what may be said of their differences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_distill import checks
from lit_distill.comparison import numbers
from lit_distill.comparison.comparing import ACCURACY, Comparison, Row, Section, compare_runs
from lit_distill.comparison.names import dataset_name, fraction_name, labels_name, metric_name
from lit_distill.comparison.plots import is_share
from lit_distill.comparison.report import write_report
from lit_distill.comparison.runs import Found, find_runs
from lit_distill.comparison.statistics import FEW
from lit_distill.comparison.wandb_runs import SCHEME, find_wandb_runs
from lit_distill.errors import UserError


def compare(
    runs: list[str],
    out: str = "report",
    baseline: str | None = None,
    metric: str = ACCURACY,
    allow_different_tests: bool = False,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare runs and write a report with tables and figures.

    Args:
        runs: folders of runs, or folders that are searched for runs with all below them; ``wandb://entity/project`` is
            read from Weights & Biases, metrics only.
        out: folder of the report: ``report.html``, ``report.md``, ``runs.csv``, ``runs.parquet``, ``figures/``.
        baseline: what the others are compared with, as in ``method=StepByStep,rationales=shuffled``. In what it does
            not name (student, labels, fraction) it is the same as each of the others. If not given, standard
            finetuning.
        metric: what is compared, by its logged name. Intervals over test rows are of ``test/accuracy`` alone.
        allow_different_tests: compare runs of one dataset though they were tested on different rows.
        resamples: of the bootstrap; at most 1,000,000.
        seed: of its draws.

    Returns:
        The report's path (``report``), the numbers of runs, skipped and repeated ones, and a list of ``settings`` with
        what was found of each.

    Raises:
        UserError: an argument is wrong, no run was found, or runs cannot be compared.
    """
    if isinstance(runs, str) or not runs:
        raise UserError(f"runs: must be given: folders of runs, or {SCHEME}entity/project")
    checks.check_text("out", out)
    checks.check_text("metric", metric)
    checks.check_bool("allow_different_tests", allow_different_tests)
    checks.check_int("resamples", resamples, 100, 1_000_000)
    checks.check_int("seed", seed, 0, 2**32 - 1)
    comparison = compare_runs(
        _find(runs),
        metric=metric,
        baseline=baseline,
        allow_different_tests=allow_different_tests,
        resamples=resamples,
        seed=seed,
    )
    folder = Path(out)
    try:
        figures = write_report(comparison, folder)
    except OSError as error:
        raise UserError(f"out: {out!r} cannot be written ({error.strerror})") from error
    _show(comparison, folder)
    return {
        "report": str(folder / "report.html"),
        "runs": len(comparison.runs),
        "skipped": {one.source: one.reason for one in comparison.skipped},
        "repeated": dict(comparison.duplicates),
        "figures": [str(drawn.png) for drawn in figures],
        "settings": [_plain(row) for section in comparison.sections for row in section.rows],
    }


def _find(sources: list[str]) -> Found:
    folders = [source for source in sources if not source.startswith(SCHEME)]
    parts = [find_runs(folders)]
    parts += [find_wandb_runs(source) for source in dict.fromkeys(sources) if source.startswith(SCHEME)]
    return Found(
        tuple(run for part in parts for run in part.runs), tuple(one for part in parts for one in part.skipped)
    )


def _plain(row: Row) -> dict[str, Any]:
    setting, summary = row.setting, row.summary
    return {
        "dataset": setting.dataset,
        "name": row.name,
        "method": setting.method,
        "student": setting.student,
        "label_source": setting.label_source,
        "train_fraction": setting.train_fraction,
        "rationales": setting.rationales,
        "rationale_weight": setting.rationale_weight,
        **dict(setting.extra),
        "n": summary.n,
        "mean": summary.mean,
        "standard_error": summary.standard_error,
        "pooled": summary.pooled,
        "difference": None if row.examples is None else row.examples.difference,
        "interval": None if row.examples is None else (row.examples.low, row.examples.high),
        "p_value": None if row.examples is None else row.examples.p_value,
        "difference_by_seed": None if row.seeds is None else row.seeds.mean,
        "standard_error_by_seed": None if row.seeds is None else row.seeds.standard_error,
        "seeds_left_out": row.left_out,
        "published": None if row.published is None else row.published.accuracy,
    }


# ------------------------------------------------------------------------------------------------------- console

_ALWAYS = ("setting", "n", "mean ± se")
_NAMES = ("setting", "student")
_STACKED = (
    ("setting", "student", "rows"), ("n",), ("mean ± se", "published"),
    ("difference", "95 % interval"), ("p", "by seed ± se (n)"),
)  # fmt: skip
"""The columns of a narrow table, in which what belongs together stands below each other."""


def _show(comparison: Comparison, folder: Path) -> None:
    console = Console()
    for section in comparison.sections:
        for label_source in sorted({row.setting.label_source for row in section.rows}):
            rows = [row for row in section.rows if row.setting.label_source == label_source]
            console.print(_table(section, label_source, rows, comparison.metric, console.width))
        for remark in section.remarks:
            console.print(Text(remark), soft_wrap=True)
    found = [row.examples for section in comparison.sections for row in section.rows if row.examples]
    if any(one.differing < FEW for one in found):
        console.print(f"{numbers.DAGGER} rests on fewer than {FEW} rows that tell the two apart")
    if any(any(row.left_out) for section in comparison.sections for row in section.rows):
        console.print(f"{numbers.DOUBLE_DAGGER} over the seeds that both have; others were left out")
    for one in comparison.skipped:
        console.print(Text(f"skipped {one.source}: {one.reason}"), soft_wrap=True)
    for old, new in sorted(comparison.duplicates.items()):
        console.print(Text(f"left out {old}: done again as {new}"), soft_wrap=True)
    console.print("Report:", style="bold")
    # on a line of its own and unwrapped, so that it can be copied
    console.print(Text(f"  {folder / 'report.html'}"), soft_wrap=True)


def _table(section: Section, label_source: str, rows: list[Row], metric: str, width: int) -> Table:
    unit = " (%)" if is_share(metric) else ""
    title = f"{dataset_name(section.dataset)}, {labels_name(label_source)}: {metric_name(metric)}{unit}"
    cells = [_cells(row, metric) for row in rows]
    if section.chance is not None:
        chance = {"setting": "chance", "mean ± se": numbers.value(section.chance, metric)}
        cells.append(dict.fromkeys(cells[0], "") | chance)
    # what is the same for all only takes room
    kept = [name for name in cells[0] if name in _ALWAYS or len({cell[name] for cell in cells[: len(rows)]}) > 1]
    columns: list[tuple[str, ...]] = [(name,) for name in kept]
    if Console(width=1000).measure(_grid(title, columns, cells)).maximum > width:
        columns = [here for names in _STACKED if (here := tuple(name for name in names if name in kept))]
    return _grid(title, columns, cells)


def _grid(title: str, columns: Sequence[tuple[str, ...]], cells: Sequence[Mapping[str, str]]) -> Table:
    stacked = any(len(names) > 1 for names in columns)
    table = Table(title=title, title_justify="left", show_lines=stacked)
    for names in columns:
        numeric = names[0] not in _NAMES
        table.add_column(_stack(names), justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for cell in cells:
        # values of a config may look like rich's own marks
        table.add_row(*(Text(_stack([cell[name] for name in names])) for names in columns))
    return table


def _stack(texts: Sequence[str]) -> str:
    first, *others = filter(None, texts) if any(texts) else [""]
    return "\n".join(filter(None, (first, ", ".join(others))))


def _cells(row: Row, metric: str) -> dict[str, str]:
    found = row.examples
    return {
        "setting": row.name,
        "student": row.setting.student,
        "rows": fraction_name(row.setting.train_fraction),
        "n": str(row.summary.n),
        "mean ± se": numbers.mean_and_error(row, metric),
        "difference": numbers.difference(row, metric) or ("baseline" if row.is_baseline else ""),
        "95 % interval": numbers.interval(found, metric) if found else "",
        "p": numbers.p_value(found) if found else "",
        "by seed ± se (n)": numbers.by_seed(row, metric),
        "published": numbers.value(row.published.accuracy, metric) if row.published else "",
    }
