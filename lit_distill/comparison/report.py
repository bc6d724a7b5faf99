"""The report of a comparison: Markdown, HTML, figures and a table of all runs."""

import base64
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from lit_distill.comparison import published
from lit_distill.comparison.comparing import ACCURACY, Comparison, Result, Section, grouped
from lit_distill.comparison.figures import Plot, draw, is_share
from lit_distill.comparison.runs import Run
from lit_distill.comparison.settings import (
    WEIGHT,
    as_text,
    dataset_name,
    fraction_name,
    labels_name,
    metric_name,
    size_name,
)
from lit_distill.comparison.statistics import FEW, Mean
from lit_distill.files import flatten, write_text

DAGGER = "\u2020"
"""Marks a p-value based on few rows."""

DOUBLE_DAGGER = "\u2021"
"""Marks a difference without some seeds."""


class Markdown(str):
    """Text that is Markdown already; the template escapes any other."""


def write_report(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``report.md``, ``report.html``, ``runs.csv``, ``runs.parquet`` and ``figures/``; return the PNG files."""
    # imported here, as no other command needs it
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import csv, parquet

    (folder / "figures").mkdir(parents=True, exist_ok=True)
    # pandas would turn integers with gaps into floats
    runs = pa.Table.from_pylist(run_rows(comparison))
    parquet.write_table(runs, folder / "runs.parquet")
    csv.write_csv(runs, folder / "runs.csv")
    plots = draw(comparison)
    for plot in plots:
        plot.save(folder / "figures")
    markdown = to_markdown(comparison, plots)
    write_text(folder / "report.md", markdown)
    write_text(folder / "report.html", to_html(markdown, folder))
    return [folder / "figures" / f"{plot.name}.png" for plot in plots]


_AMOUNTS = ("parameters", "train_rows", "test_rows", "wall_seconds", "peak_memory_mib")
"""What is 0 in a record where it is not known."""


def run_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A table row for each run, with duplicates; all have the same keys."""
    keys = sorted({key for section in comparison.sections for key in section.keys})
    metrics = sorted({name for run in comparison.runs for name in run.record.metrics})
    rows = []
    for run in comparison.runs:
        record, config = run.record, flatten(run.record.config)
        weight = config.get(WEIGHT)
        selected = next((name for name in record.validation if name != "step"), None)
        rows.append(
            {name: value for name, value in vars(record).items() if not isinstance(value, dict | list)}
            | {name: getattr(record, name) or None for name in _AMOUNTS}
            | {"rationale_weight": float(weight) if isinstance(weight, int | float) else None}
            | {key: as_text(config[key]) if key in config else None for key in keys}
            | {name: record.metrics.get(name) for name in metrics}
            | {"validation_metric": selected, "validation_value": record.validation.get(selected or "")}
            | {"validation_step": record.validation.get("step"), "commit": str(record.git.get("commit") or "") or None}
            | {f"{split}_fingerprint": record.fingerprints.get(split) for split in ("train", "test")}
            | {"test_ids": run.ids or None, "predictions": run.correct is not None}
            | {"duplicate_of": comparison.repeated.get(run.source), "folder": run.source}
        )
    order = ("dataset", "label_source", "student", "train_fraction", "method", "seed", "data_seed", "folder")
    return sorted(rows, key=lambda row: [row[key] for key in order])


def number(value: float | None, metric: str) -> str:
    """A metric as text: in %, unless it is no fraction."""
    if value is None:
        return ""
    return f"{100 * value:.2f}" if is_share(metric) else f"{value:.4f}"


def change(value: float, metric: str) -> str:
    """A signed difference as text, in points for fractions."""
    text = f"{100 * value:+.2f}" if is_share(metric) else f"{value:+.4f}"
    return text.replace("-", "\u2212") if text.strip("+-0.") else text[1:]


def mean_and_error(mean: Mean, metric: str) -> str:
    """Text such as 62.31 ± 0.45; no standard error for one seed."""
    return " ± ".join(filter(None, (number(mean.mean, metric), number(mean.standard_error, metric))))


def cells(results: Sequence[Result], section: Section, metric: str) -> list[dict[str, str]]:
    """The table as texts by column, without empty columns; a last row of chance if known."""
    rows = [_cells(result, metric) for result in results]
    if section.chance is not None:
        rows.append(dict.fromkeys(rows[0], "") | {"setting": "chance", "mean ± se": number(section.chance, metric)})
    return [{name: text for name, text in row.items() if any(other[name] for other in rows)} for row in rows]


def _cells(result: Result, metric: str) -> dict[str, str]:
    setting, by_row, by_seed = result.setting, result.by_row, result.by_seed
    counts = sorted({run.record.train_rows for run in result.runs} - {0})
    trained = " to ".join(f"{count:,}" for count in dict.fromkeys(counts[:1] + counts[-1:]))
    mark = f" {DOUBLE_DAGGER}" if result.left_out else ""
    found = {"difference": "baseline" if result.is_baseline else "", "95 % interval": "", "p": ""}
    if by_row:
        few = f" {DAGGER}" if by_row.differing < FEW else ""
        found["difference"] = change(by_row.difference, metric) + mark
        found["95 % interval"] = f"[{change(by_row.low, metric)}, {change(by_row.high, metric)}]"
        found["p"] = ("< 0.001" if by_row.p_value < 0.001 else f"{by_row.p_value:.3f}") + few
    seeds = ""
    if by_seed:
        error = f" ± {number(by_seed.standard_error, metric)}" if by_seed.n > 1 else ""
        seeds = f"{change(by_seed.mean, metric)}{error} ({by_seed.n}){mark}"
    return {
        "setting": result.name,
        "student": setting.student + (f" ({size_name(setting.parameters)})" if setting.parameters else ""),
        "training rows": ", ".join(filter(None, (fraction_name(setting.train_fraction), trained))),
        "n": str(result.metric.n),
        "mean ± se": mean_and_error(result.metric, metric),
        **found,
        "by seed ± se (n)": seeds,
        "published": number(result.published.accuracy, metric) if result.published else "",
    }


def _notes(results: Sequence[Result], section: Section) -> list[str]:
    """The baseline, missing differences, and the meaning of marks."""
    names = {result.setting: result.name for result in section.results}
    baselines = sorted({names[result.baseline] for result in results if result.baseline})
    notes = [f"Baseline: {'; '.join(baselines)}."] if baselines else []
    for remark, some in sorted(grouped(results, lambda result: result.remark).items()):
        settings = [(result.name, result.setting) for result in some]
        own = (f"{name} ({one.student}, {fraction_name(one.train_fraction)})" for name, one in settings)
        notes += [f"No interval: {remark}: {', '.join(own)}."] if remark else []
    if any(result.left_out for result in results):
        notes.append(f"{DOUBLE_DAGGER} Only over the seeds that both it and its baseline have.")
    if any(result.by_row and result.by_row.differing < FEW for result in results):
        notes.append(f"{DAGGER} Fewer than {FEW} test rows tell the two apart: the bootstrap is then overconfident.")
    return notes


def to_markdown(comparison: Comparison, plots: Sequence[Plot] = ()) -> str:
    """The report in Markdown, with figures in ``figures/``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    metric = comparison.metric
    # the template escapes Markdown itself
    environment = Environment(  # noqa: S701
        loader=PackageLoader("lit_distill.comparison"),
        finalize=lambda value: value if isinstance(value, Markdown) else _escape(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    filters: dict[str, Callable[..., str]] = {
        "number": lambda value: number(value, metric),
        "percent": lambda value: number(value, ACCURACY),
        "change": lambda value: change(value, metric),
        "mean_and_error": lambda mean: mean_and_error(mean, metric),
        "dataset_name": dataset_name,
        "labels_name": labels_name,
    }
    environment.filters |= filters
    text = environment.get_template("report.md").render(
        comparison=comparison,
        results=[result for section in comparison.sections for result in section.results],
        metric_name=metric_name(metric),
        in_points=is_share(metric),
        table=lambda results, section: _table(cells(results, section, metric)),
        notes=_notes,
        plots=plots,
        software=_software(comparison.compared),
        commands=_commands(comparison.compared),
        paper=published,
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _software(runs: Iterable[Run]) -> dict[str, Counter[str]]:
    """Package versions and commits, each with the number of runs."""
    found: dict[str, Counter[str]] = {}
    for record in (run.record for run in runs):
        commit = str(record.git["commit"])[:12] if record.git.get("commit") else "none"
        changed = " with changes" if record.git.get("changed") else ""
        for name, version in (*record.versions.items(), ("commit", commit + changed)):
            found.setdefault(name, Counter())[version] += 1
    return found


def _escape(text: str) -> str:
    """Escape Markdown and join lines; underscores within words need no escape."""
    return re.sub(r"[\\`*<>\[&|~$#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.splitlines()))


def _table(rows: Sequence[dict[str, str]]) -> Markdown:
    """A table whose first two columns are left-aligned names, the others numbers."""
    rule = ["---", "---"] + ["---:"] * (len(rows[0]) - 2)
    lines = [map(_escape, rows[0]), rule, *(map(_escape, row.values()) for row in rows)]
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def _commands(runs: Iterable[Run]) -> Markdown:
    """The commands of the runs as an indented code block, safe for any content."""
    ordered = sorted((run for run in runs if run.record.command), key=lambda run: run.source)
    text = "\n".join(f"# {run.source}\n{shlex.join(run.record.command)}" for run in ordered)
    return Markdown("\n".join(f"    {line}" for line in text.splitlines()))


def to_html(markdown: str, folder: Path) -> str:
    """The report as one self-contained page; ``folder`` has its figures."""
    from jinja2 import Environment, PackageLoader
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    parser = MarkdownIt("commonmark").enable("table")
    tokens = parser.parse(markdown)
    columns: list[str] = []
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "table_open":
            columns = []
        elif token.type == "th_open" and following:
            columns.append(following.content)
        elif token.type == "td_open":
            # narrow screens show a row as a list of column: value
            token.attrSet("data-name", columns[0])
            columns.append(columns.pop(0))
        for image in token.children or ():
            if image.type == "image":
                svg = (folder / unquote(str(image.attrs["src"]))).with_suffix(".svg").read_bytes()
                image.attrs["src"] = f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
    page = Environment(loader=PackageLoader("lit_distill.comparison"), autoescape=True).get_template("report.html")
    return page.render(content=Markup(parser.renderer.render(tokens, parser.options, {})))  # noqa: S704 - all escaped
