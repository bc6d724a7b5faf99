"""``inspect``: what is in a dataset, what the teacher made of it, and what a student will see of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lit_distill.data import RationaleDataModule
from lit_distill.data.splits import UsedRows, teacher_accuracy, teacher_counts
from lit_distill.data.tokenize import CUTS, encode_examples
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.tasks import Row

EXAMPLES = 3
"""Examples that are shown."""


def inspect_data(datamodule: RationaleDataModule) -> dict[str, Any]:
    """A report in plain values: each split as it is released, and what of it this run uses.

    Of each split that is there (one that is absent is ``{"present": false}``):

    - of the released file whole, before val is taken off or anything is filtered: ``rows`` = ``parsed`` + ``unparsed``
      + ``no_output``, ``without_label`` (no gold label), ``teacher_label_accuracy`` (an output that does not parse is
      wrong; ``None`` without outputs or labels), ``outside_label_set`` (0 without closed choices) and, of train,
      ``kept``: the rows with a rationale that ``rationale_filter`` keeps. Where no val is released (``released`` is
      false), of the rows taken off train;
    - what is taken away: ``taken_as_val``, ``left_out_by_fraction``, ``dropped_without_teacher_label`` and
      ``dropped_without_target``, which lead from ``rows`` to ``used``;
    - of the rows used: ``rationale_filtered``, ``used_rationales``, ``used_teacher_accuracy`` (where a rationale is
      used), ``in_train`` (the input is also in train), the lengths in tokens before truncation, and what is truncated.

    Args:
        datamodule: the data, with a tokenizer; nothing is built of a student, and nothing is written to the cache.

    Returns:
        ``{"dataset", "metric", "tokenizer", "settings", "splits", "examples"}``.

    Raises:
        UserError: no split is there, or a file is not as it should be.
    """
    datamodule.prepare_data()
    asked: list[Split] = ["train", "val", "test"]
    if "predict" in datamodule.splits:
        asked.append("predict")
    splits = {split: _split_report(datamodule, split) for split in asked}
    present = [split for split in asked if splits[split]["present"]]
    if not present:
        raise UserError(datamodule.absence("train"))
    described = datamodule.describe()
    described.pop("splits")
    return {
        "dataset": described.pop("dataset"),
        "metric": described.pop("metric"),
        "tokenizer": str(datamodule.hparams["tokenizer"]),
        "settings": described
        | {"max_source_length": datamodule.max_source_length, "max_target_length": datamodule.max_target_length},
        "splits": splits,
        "examples": {"split": present[0], "rows": _examples(datamodule, present[0])},
    }


def write_report(report: dict[str, Any], path: str | Path) -> None:
    """Write a report as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _split_report(datamodule: RationaleDataModule, split: Split) -> dict[str, Any]:
    taken = split == "val" and "val" not in datamodule.splits
    rows = datamodule.split_rows(split) if taken else datamodule.released(split)
    if rows is None:
        return {"present": False}
    counts = teacher_counts(rows, datamodule.teacher_agrees, datamodule.label_set)
    del counts["teacher_correct"]
    used = datamodule.used_rows(split)
    report = {
        "present": True,
        "released": not taken,
        **counts,
        "without_label": sum(row.label is None for row in rows.examples),
        "teacher_label_accuracy": teacher_accuracy(rows, datamodule.teacher_agrees),
        "closed_choices": datamodule.label_set is not None or any(row.choices for row in rows.examples),
    }
    if split == "train":
        report |= {
            "kept": datamodule.kept_rows(split),
            "taken_as_val": len(rows) - len(datamodule.split_rows(split) or ()),
        }
    else:
        report["in_train"] = datamodule.repeated_rows(split)
    return report | {
        **used.counts,
        "used_rationales": sum(row.rationale is not None for row in used.examples),
        "used_teacher_accuracy": _used_accuracy(datamodule, used),
        **_lengths(datamodule, used.examples),
    }


def _used_accuracy(datamodule: RationaleDataModule, used: UsedRows) -> float | None:
    """Of the rows whose rationale is used, as far as both labels are known."""
    judged = [
        datamodule.teacher_agrees(row.teacher_label, gold)
        for row, gold in zip(used.examples, used.gold, strict=True)
        if row.rationale is not None and row.teacher_label is not None and gold is not None
    ]
    return sum(judged) / len(judged) if judged else None


def _lengths(datamodule: RationaleDataModule, rows: Sequence[Row]) -> dict[str, Any]:
    settings = datamodule.token_settings
    sources: dict[str, list[int]] = {task: [] for task in datamodule.tasks}
    targets: dict[str, list[int]] = {task: [] for task in datamodule.tasks}
    cut = dict.fromkeys(CUTS, 0)
    for columns, counts in encode_examples(rows, datamodule.tokenizer, settings):
        cut = {name: cut[name] + counts[name] for name in CUTS}
        for task in datamodule.tasks:
            sources[task] += columns[f"{task}.input_length"]
            targets[task] += [length for length in columns[f"{task}.target_length"] if length is not None]
    lengths = {
        task: {
            "input": _summary(sources[task], datamodule.max_source_length),
            "target": _summary(targets[task], datamodule.max_target_length),
        }
        for task in datamodule.tasks
    }
    return {**cut, "lengths": lengths}


def _summary(lengths: Sequence[int], limit: int) -> dict[str, int | float | None]:
    summary: dict[str, int | float | None] = {"rows": len(lengths), "median": None, "p95": None, "max": None}
    if lengths:
        median, p95 = np.percentile(lengths, [50, 95]).tolist()
        summary |= {"median": median, "p95": p95, "max": max(lengths)}
    return summary | {"truncated": sum(length > limit for length in lengths)}


def _examples(datamodule: RationaleDataModule, split: Split) -> list[dict[str, Any]]:
    """The first rows that are used, decoded from their ids, so that cuts and unknown tokens show."""
    rows: list[Row] = list(datamodule.used_rows(split).examples[:EXAMPLES])
    shown: list[dict[str, Any]] = [{"id": row.id, "label": row.label, "rationale": row.rationale} for row in rows]
    decode = datamodule.tokenizer.decode
    for columns, _ in encode_examples(rows, datamodule.tokenizer, datamodule.token_settings):
        for position, row in enumerate(shown):
            row["tasks"] = {
                task: {
                    "input": decode(columns[f"{task}.input_ids"][position]),
                    "target": None if (ids := columns[f"{task}.labels"][position]) is None else decode(ids),
                }
                for task in datamodule.tasks
            }
    return shown


def render(report: dict[str, Any], console: Console | None = None) -> None:
    """Print a report as tables.

    Args:
        report: of `inspect_data`.
        console: where to; standard output if not given.
    """
    console = console or Console()
    console.print(_rows_table(report))
    console.print(_lengths_table(report))
    shown = report["examples"]
    for number, row in enumerate(shown["rows"], start=1):
        console.print(_example_panel(row, f"example {number} of {shown['split']}: {row['id']}"))


_RELEASED = {
    "rows": "rows of the file",
    "without_label": "- no gold label",
    "parsed": "- output parsed",
    "unparsed": "- output not parsed",
    "no_output": "- no output",
    "teacher_label_accuracy": "teacher accuracy, of all outputs",
    "outside_label_set": "teacher outside the choices",
    "kept": "rationale kept by the filter",
}
_USED = {
    "taken_as_val": "taken off for val",
    "left_out_by_fraction": "left out by train_fraction",
    "dropped_without_teacher_label": "dropped: no teacher label",
    "dropped_without_target": "dropped: no target",
    "used": "rows used",
    "rationale_filtered": "- rationale filtered out",
    "used_rationales": "- with a rationale",
    "used_teacher_accuracy": "- teacher accuracy on these",
    "in_train": "- input is also in train",
}


def _rows_table(report: dict[str, Any]) -> Table:
    """Above the line each file whole, below it what this run takes of it."""
    chosen = f"rationale_filter: {report['settings']['rationale_filter']}"
    table = Table(title=f"{report['dataset']}: rows released, and rows used ({chosen})", title_justify="left")
    table.add_column("")
    splits: dict[str, dict[str, Any]] = report["splits"]
    for split, found in splits.items():
        taken = found["present"] and not found["released"]
        table.add_column(f"{split} (of train)" if taken else split, justify="right")
    for names in (_RELEASED, _USED):
        for key, name in names.items():
            table.add_row(name, *(_cell(found, key) for found in splits.values()))
        table.add_section()
    return table


def _cell(found: dict[str, Any], key: str) -> str:
    if not found["present"]:
        return "absent" if key == "rows" else ""
    if key not in found:
        return ""
    value = found[key]
    if key.endswith("_accuracy"):
        return "none" if value is None else f"{100 * value:.2f} %"
    if key == "outside_label_set" and not found["closed_choices"]:
        return "no choices"
    return f"{value:,}"


def _lengths_table(report: dict[str, Any]) -> Table:
    settings = report["settings"]
    limits = f"inputs up to {settings['max_source_length']:,}, targets up to {settings['max_target_length']:,}"
    table = Table(title=f"lengths in tokens of the rows used ({limits})", title_justify="left")
    table.add_column("split")
    table.add_column("task")
    table.add_column("")
    for name in ("rows", "median", "95 %", "max", "truncated"):
        table.add_column(name, justify="right")
    for split, found in report["splits"].items():
        for task, parts in found.get("lengths", {}).items():
            for part, values in parts.items():
                numbers = (values[key] for key in ("rows", "median", "p95", "max", "truncated"))
                cells = ["" if number is None else f"{number:,.0f}" for number in numbers]
                table.add_row(split, task, part, *cells)
        table.add_section()
    return table


def _example_panel(row: dict[str, Any], title: str) -> Panel:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for task, seen in row["tasks"].items():
        grid.add_row(f"{task} input", Text(seen["input"]))
        grid.add_row(f"{task} target", Text("none" if seen["target"] is None else seen["target"]))
    grid.add_row("rationale", Text("none" if row["rationale"] is None else row["rationale"]))
    return Panel(grid, title=Text(title), title_align="left")
