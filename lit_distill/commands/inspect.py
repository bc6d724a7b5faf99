"""``inspect``: a report on a dataset, its teacher outputs, and what a student will see."""

from collections.abc import Mapping
from functools import partial
from pkgutil import resolve_name
from typing import Any

import numpy as np
from jsonargparse import Namespace
from rich.console import Console

from lit_distill.commands.parser import check_nulls
from lit_distill.commands.settings import linked, parse_settings
from lit_distill.commands.train import train_parser
from lit_distill.data import RationaleDataModule
from lit_distill.data.floor import floors
from lit_distill.data.needs import check_split
from lit_distill.data.selection import Flag, having, teacher_accuracy, teacher_counts
from lit_distill.data.tokenize import beyond, cut_counts, encode_rows
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split, chance_level
from lit_distill.records import FLOORS
from lit_distill.tables import console_table, text_panel

EXAMPLES = 3
"""Number of examples to show."""


def inspect(args: list[str]) -> None:
    """Run ``inspect``: parse what ``fit`` parses, build the data alone, and print a report."""
    parser = train_parser("inspect", model=False)
    config = parse_settings(parser, args)
    datamodule = build_data(config)
    render(inspect_data(datamodule))
    if config.get("model") and datamodule.split_rows("train") is not None:
        # what `fit` would refuse
        check_split(datamodule, "train", "fit")


def build_data(config: Namespace) -> RationaleDataModule:
    """The data module of a config, as its model sets it; no model is built."""
    data, model = config["data"], config.get("model")
    arguments = (data.get("init_args") or Namespace()).as_dict() | (linked(model) if model else {})
    data_class: type[RationaleDataModule] = resolve_name(data["class_path"])
    check_nulls(data_class, arguments)
    return data_class(**arguments)


def inspect_data(datamodule: RationaleDataModule) -> dict[str, Any]:
    """A report in plain values: each split as released, and the part that this run uses.

    ``rows`` (= ``parsed`` + ``unparsed`` + ``no_output``), ``without_label``, ``teacher_label_accuracy`` (unparsed is
    wrong) and ``outside_label_set`` count the whole released file; if no val is released (``released`` is false), the
    rows taken from train. ``taken_as_val``, ``left_out_by_fraction`` and ``dropped_...`` lead to ``used``, to which the
    rest refers; lengths are in tokens before truncation, ``chance`` is the accuracy without reading the input, and
    ``floor: ...`` are accuracies of `floors`. An absent split is ``{"present": false}``.

    No student is built. What a run would read from the cache is read or made there.
    """
    datamodule.prepare_data()
    asked: list[Split] = ["train", "val", "test"]
    if "predict" in datamodule.splits:
        asked.append("predict")
    splits = {split: _split_report(datamodule, split) for split in asked}
    present = [split for split in asked if splits[split]["present"]]
    if not present:
        raise UserError(datamodule.absence("train"))
    evaluated: set[Split] = {"val", "test"}
    rows = {split: range(len(datamodule.used_rows(split).rows)) for split in present if split in evaluated}
    for split, used in rows.items():
        if chance := chance_level(datamodule.answer_key(split), used):
            splits[split]["chance"] = chance[1]
    for split, found in floors(datamodule, rows).items():
        splits[split] |= {f"floor: {FLOORS[name]}": value for name, value in found.items()}
    limits = f"inputs up to {datamodule.max_source_length:,}, targets up to {datamodule.max_target_length:,}"
    return {
        "dataset": datamodule.name,
        "rationale_filter": datamodule.rationale_filter,
        "limits": limits,
        "splits": splits,
        "examples": {"split": present[0], "rows": _examples(datamodule, present[0])},
    }


def _split_report(datamodule: RationaleDataModule, split: Split) -> dict[str, Any]:
    taken = split == "val" and "val" not in datamodule.splits
    if (datamodule.split_rows(split) if taken else datamodule.released(split)) is None:
        return {"present": False}
    used, tally = datamodule.used_rows(split), datamodule.tally(split, released=not taken)
    counts = teacher_counts(tally)
    del counts["teacher_correct"]
    if split == "train":
        counts["taken_as_val"] = counts["rows"] - len(datamodule.split_rows(split) or ())
    return {
        "present": True,
        "released": not taken,
        **counts,
        "without_label": having(tally, Flag.UNLABELLED),
        "teacher_label_accuracy": teacher_accuracy(tally),
        **used.counts,
        "used_rationales": len(used.with_rationale),
        **_lengths(datamodule, split),
    }


def _lengths(datamodule: RationaleDataModule, split: Split) -> dict[str, Any]:
    settings, found = datamodule.token_settings, datamodule.tokenized(split).lengths_of
    lengths = {
        task: {
            "input": _summary(of_task.inputs, settings.max_source_length),
            "target": _summary(of_task.targets, settings.max_target_length),
        }
        for task, of_task in found.items()
    }
    return {**cut_counts(found, settings), "lengths": lengths}


def _summary(lengths: Mapping[int, int], limit: int) -> dict[str, int | float | None]:
    every = np.repeat(np.array([*lengths], int), np.array([*lengths.values()], int))
    median, p95 = np.quantile(every, [0.5, 0.95]).tolist() if len(every) else (None, None)
    return {
        "rows": len(every),
        "median": median,
        "p95": p95,
        "max": max(lengths, default=None),
        "truncated": beyond(lengths, limit),
    }


def _examples(datamodule: RationaleDataModule, split: Split) -> list[dict[str, Any]]:
    """The first used rows, decoded from their ids, so that truncation and unknown tokens show."""
    rows = datamodule.used_rows(split).rows[:EXAMPLES]
    choose, decode = partial(datamodule.targets, split), datamodule.tokenizer.decode
    columns = encode_rows(rows, datamodule.tokens, datamodule.token_settings, choose)
    shown = []
    for position, row in enumerate(rows):
        tasks = {}
        for task in datamodule.tasks:
            found = [str(decode(ids)) for ids in columns[f"{task}.labels"][position]]
            tasks[task] = {
                "input": "\n".join(str(decode(ids)) for ids in columns[f"{task}.input_ids"][position]),
                "target": "\n".join(found) if found else None,
            }
        shown.append({"id": row.id, "label": row.label, "rationale": row.rationale, "tasks": tasks})
    return shown


def render(report: dict[str, Any], console: Console | None = None) -> None:
    """Print a report as tables, by default to standard output."""
    console, splits = console or Console(), report["splits"]
    names = []
    for split, found in splits.items():
        absent = "" if found["present"] else " (absent)"
        names.append(f"{split} (of train)" if found.get("released") is False else f"{split}{absent}")
    title = f"{report['dataset']}: rows, rationale_filter: {report['rationale_filter']}"
    rows = console_table(title, [""], names)
    keys = dict.fromkeys(key for found in splits.values() for key in found)
    for key in (key for key in keys if key not in ("present", "released", "lengths")):
        rows.add_row(key.replace("_", " "), *(_cell(found.get(key, "")) for found in splits.values()))
    title = f"lengths in tokens of the rows used ({report['limits']})"
    lengths = console_table(title, ["split", "task", ""], ["rows", "median", "95 %", "max", "truncated"])
    for split, found in splits.items():
        for task, parts in found.get("lengths", {}).items():
            for part, values in parts.items():
                lengths.add_row(split, task, part, *map(_cell, values.values()))
        lengths.add_section()
    console.print(rows)
    console.print(lengths)
    shown = report["examples"]
    for number, row in enumerate(shown["rows"], start=1):
        texts = [
            (f"{task} {part}", text or "none") for task, seen in row["tasks"].items() for part, text in seen.items()
        ]
        texts.append(("rationale", row["rationale"] or "none"))
        console.print(text_panel(f"example {number} of {shown['split']}: {row['id']}", texts))


def _cell(value: float | str | None) -> str:
    return value if isinstance(value, str) else "none" if value is None else f"{round(value, 3):,}"
