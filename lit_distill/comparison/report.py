"""The report of a comparison: Markdown, HTML, figures and a table of all runs."""

import base64
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from pyarrow import csv, parquet

from lit_distill.comparison import names, published
from lit_distill.comparison.comparing import FURTHER, TOKENS, TRAIN_TOKENS, VOTE_TOKENS, Comparison
from lit_distill.comparison.figures import Plot, draw
from lit_distill.comparison.runs import ACCURACY, VOTE
from lit_distill.comparison.settings import STUDENT, WEIGHT, as_text
from lit_distill.comparison.statistics import FEW
from lit_distill.files import flatten, write_text
from lit_distill.tables import markdown_table

DAGGER = "\u2020"  # marks a p-value based on few rows
DOUBLE_DAGGER = "\u2021"  # marks a difference without some seeds


_NAMED = ("setting", "student", "training rows")
"""The columns that name a row of a table."""

_TITLES = {
    TRAIN_TOKENS: "training tokens",
    TOKENS: "tokens a row",
    VOTE_TOKENS: "tokens of a vote",
    VOTE: "accuracy by vote",
    "test/worst_group_accuracy": "worst group",
    "test/group_macro_f1": "group macro-F1",
}


class Markdown(str):
    """Text that is Markdown already; the template escapes any other."""


def write_report(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``report.md``, ``report.html``, ``runs.csv``, ``runs.parquet`` and ``figures/``; return the PNG files."""
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


def run_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """A table row for each run, with duplicates; all have the same keys."""
    rows = []
    for run in comparison.runs:
        record, config = run.record, flatten(run.record.config) | {"test rows": run.test}
        row = {name: value for name, value in vars(record).items() if not isinstance(value, dict | list)}
        # 0 in a record where it is not known
        unknown = ("parameters", "train_rows", "train_tokens", "test_rows", "wall_seconds", "peak_memory_mib")
        row |= {name: row[name] or None for name in unknown}
        row |= {key: as_text(config[key]) for key in (STUDENT, WEIGHT, *comparison.keys) if key in config}
        row |= record.metrics | flatten(
            {"validation": record.validation, "floors": record.floors, "fingerprint": record.fingerprints}
        )
        row |= {"commit": record.git.get("commit"), "predictions": run.correct is not None}
        rows.append(row | {"duplicate_of": comparison.repeated.get(run.source), "folder": run.source})
    order = ("dataset", "label_source", "student", "train_fraction", "method", "seed", "data_seed", "folder")
    rows.sort(key=lambda row: [row[key] for key in order])
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def number(value: float | None, metric: str) -> str:
    """A metric as text: in %, unless it is no fraction."""
    if value is None:
        return ""
    return f"{100 * value:.2f}" if names.is_share(metric) else f"{value:.4f}"


def change(value: float, metric: str) -> str:
    """A signed difference as text, in points for fractions."""
    text = f"{100 * value:+.2f}" if names.is_share(metric) else f"{value:+.4f}"
    return text.replace("-", "\u2212") if text.strip("+-0.") else text[1:]


def with_error(text: str, error: float | None, metric: str) -> str:
    """Text such as 62.31 ± 0.45; no standard error for one seed."""
    return text if error is None else f"{text} ± {number(error, metric)}"


def cells(settings: pd.DataFrame, metric: str) -> list[dict[str, str]]:
    """The table of one dataset's settings as texts by column, without empty columns; a last row of chance if known."""
    rows = [_cells(row, metric) for row in settings.to_dict("records")]
    # one baseline is named below the table
    if settings.compared_with.nunique() <= 1:
        rows = [row | {"compared with": ""} for row in rows]
    if (chance := settings.chance.iloc[0]) is not None:
        rows.append(dict.fromkeys(rows[0], "") | {"setting": "chance", "mean ± se": number(chance, metric)})
    return [{name: text for name, text in row.items() if any(other[name] for other in rows)} for row in rows]


def _cells(row: dict[str, Any], metric: str) -> dict[str, str]:
    counts = sorted({run.record.train_rows for run in row["runs"]} - {0})
    trained = " to ".join(f"{count:,}" for count in dict.fromkeys(counts[:1] + counts[-1:]))
    mark = f" {DOUBLE_DAGGER}" if row["left_out"] else ""
    found = {"difference": "baseline" if row["is_baseline"] else "", "95 % interval": "", "p": ""}
    if row["difference"] is not None:
        few = f" {DAGGER}" if row["differing"] < FEW else ""
        found["difference"] = change(row["difference"], metric) + mark
        found["95 % interval"] = f"[{change(row['low'], metric)}, {change(row['high'], metric)}]"
        found["p"] = ("< 0.001" if row["p_value"] < 0.001 else f"{row['p_value']:.3f}") + few
    by_seed = ""
    if row["seed_n"]:
        by_seed = with_error(change(row["seed_difference"], metric), row["seed_error"], metric)
        by_seed += f" ({row['seed_n']}){mark}"
    return {
        "setting": row["name"],
        "student": row["student"] + (f" ({names.size(row['parameters'])})" if row["parameters"] else ""),
        "training rows": ", ".join(dict.fromkeys(filter(None, (names.fraction(row["train_fraction"]), trained)))),
        "n": str(row["n"]),
        "mean ± se": with_error(number(row["mean"], metric), row["error"], metric),
        **found,
        "by seed ± se (n)": by_seed,
        "compared with": row["compared_with"] or "",
        "floor": number(row["floor"], metric),
        "published": number(row["published"], metric),
    }


def further_cells(settings: pd.DataFrame, metric: str) -> list[dict[str, str]]:
    """A table as `cells`, of what else is known of the settings; empty if nothing is."""
    rows = [_further_cells(row, metric) for row in settings.to_dict("records")]
    columns = dict.fromkeys(name for row in rows for name in row)
    known = [name for name in columns if any(row.get(name) for row in rows)]
    if not set(known) - set(_NAMED):
        return []
    # the only student is named in the first table
    shown = [name for name in known if name != "student" or settings.student.nunique() > 1]
    return [{name: row.get(name, "") for name in shown} for row in rows]


def _further_cells(row: dict[str, Any], metric: str) -> dict[str, str]:
    whole = _cells(row, metric)
    found = {name: whole[name] for name in _NAMED}
    for name in FURTHER:
        mean, error = row["further"].get(name, (None, None))
        if mean is None or name == metric:
            text = ""
        elif name in (TRAIN_TOKENS, TOKENS, VOTE_TOKENS):
            text = names.size(mean) if name == TRAIN_TOKENS else f"{mean:.1f}"
        else:
            text = with_error(number(mean, name), error, name)
        found[_TITLES[name]] = text
    if row["lost"] is not None:
        fraction, lost, error, seeds = row["lost"]
        text = with_error(number(lost, metric).replace("-", "\u2212"), error, metric)
        found[f"lost at {names.fraction(fraction)}"] = f"{text} ({seeds})"
    return found


def notes(settings: pd.DataFrame, comparison: Comparison) -> list[str]:
    """What a table's reader has to know: what names leave out, the baseline, missing differences, the marks."""
    found = [f"{usual[0].upper()}{usual[1:]}." for usual in filter(None, settings.usual.unique())]
    if settings.compared_with.nunique() == 1:
        found.append(f"Baseline: {settings.compared_with.dropna().iloc[0]}.")
    for remark, some in settings[settings.remark != ""].groupby("remark"):
        own = (f"{row['name']} ({row.student}, {names.fraction(row.train_fraction)})" for _, row in some.iterrows())
        which = "" if len(some) == settings.baseline.count() else f": {', '.join(own)}"
        found.append(f"No interval: {remark}{which}.")
    if settings.left_out.any():
        found.append(f"{DOUBLE_DAGGER} Only over the seeds that both it and its baseline have.")
    if (settings.differing.dropna() < FEW).any():
        found.append(f"{DAGGER} Fewer than {FEW} test rows tell the two apart: the bootstrap is then overconfident.")
    return found


def to_markdown(comparison: Comparison, plots: Sequence[Plot] = ()) -> str:
    """The report in Markdown, with figures in ``figures/``."""
    metric = comparison.metric
    # the template escapes Markdown itself
    environment = Environment(  # noqa: S701
        loader=PackageLoader("lit_distill.comparison"),
        finalize=lambda value: value if isinstance(value, Markdown) else _escape(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "number": lambda value: number(value, metric),
        "percent": lambda value: number(value, ACCURACY),
        "change": lambda value: change(value, metric),
        "with_error": lambda text, error: with_error(text, error, metric),
    }
    text = environment.get_template("report.md").render(
        comparison=comparison,
        datasets=list(comparison.settings.groupby("dataset")),
        names=names,
        in_points=names.is_share(metric),
        table=lambda settings: _table(cells(settings, metric), ("compared with",)),
        further=lambda settings: _table(rows) if (rows := further_cells(settings, metric)) else "",
        notes=notes,
        plots=plots,
        commands=_commands(comparison),
        paper=published,
    )
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _escape(text: str) -> str:
    """Escape Markdown and join lines; underscores within words need no escape."""
    return re.sub(r"[\\`*<>\[&|~$#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.splitlines()))


def _table(rows: Sequence[dict[str, str]], texts: Sequence[str] = ()) -> Markdown:
    """A table whose first two columns and ``texts`` are aligned to the left, the others to the right."""
    columns = list(rows[0])
    numbers = [name for name in columns[2:] if name not in texts]
    return Markdown(markdown_table(columns, [list(row.values()) for row in rows], numbers=numbers, cell=_escape))


def _commands(comparison: Comparison) -> Markdown:
    """The commands of the runs as an indented code block, safe for any content."""
    runs = sorted((run for run in comparison.compared if run.record.command), key=lambda run: run.source)
    text = "\n".join(f"# {run.source}\n{shlex.join(run.record.command)}" for run in runs)
    return Markdown("\n".join(f"    {line}" for line in text.splitlines()))


def to_html(markdown: str, folder: Path) -> str:
    """The report as one self-contained page; ``folder`` has its figures."""
    content = MarkdownIt("commonmark").enable("table").render(markdown)

    def inline(source: re.Match[str]) -> str:
        svg = (folder / unquote(source[1])).with_suffix(".svg").read_bytes()
        return f'src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"'

    content = re.sub(r'src="(figures/[^"]+\.png)"', inline, content)
    page = Environment(loader=PackageLoader("lit_distill.comparison"), autoescape=True).get_template("report.html")
    return page.render(content=Markup(content))  # noqa: S704 - all escaped
