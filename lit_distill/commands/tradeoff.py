"""``tradeoff``: a student's accuracy against its speed, ended after fewer layers and on shorter inputs."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from rich.console import Console

from lit_distill import __version__
from lit_distill.checks import check_fraction, check_int
from lit_distill.commands.measuring import parse_arguments, read_subject
from lit_distill.commands.parser import Option
from lit_distill.errors import UserError
from lit_distill.exporting.tradeoff import Point, draw_tradeoff, measure_tradeoff
from lit_distill.files import atomic_folder, write_text
from lit_distill.interrupts import interruptible
from lit_distill.students import Student, StudentFiles, load
from lit_distill.tables import console_table

_OPTIONS: Sequence[Option] = (
    ("exits", list[int | str] | None, None, "Layers of the decoder to end after; null: each quarter."),
    ("keep", list[float] | None, None, "Shares of the source tokens that stay; null: 1, 0.7 and 0.5 of a T5."),
    ("after", int | None, None, "Layer of the encoder after which tokens are dropped; null: after a quarter."),
    ("rows", int | None, None, "Number of test rows; fewer than 200 only if they are asked for."),
    ("device", Literal["cpu", "cuda"], "cpu", "Where the student runs."),
    ("out", str | None, None, "Folder of the table and the figure, a new one."),
)

_COLUMNS = {
    "accuracy": ("accuracy", ".3f"), "low": ("low", ".3f"), "high": ("high", ".3f"), "difference": ("change", "+.3f"),
    "flops": ("flops", ".2f"), "speedup": ("speedup", ".2f"), "batch_1_p50_ms": ("batch 1 ms", ",.1f"),
}  # fmt: skip
"""Columns of the printed table, as wide as a terminal, and how their numbers are shown."""


@interruptible()
def tradeoff(args: list[str]) -> None:
    """Run ``tradeoff``: parse, read the test rows, measure, draw, and write."""
    name, config = parse_arguments("tradeoff", args, _OPTIONS)
    _check(config)
    files = StudentFiles(name)
    # all is checked before gigabytes of weights are read
    points, after = _points(load(files, meta=True), config)
    subject = read_subject(files, config)
    student = load(files).eval().to(config["device"])
    with atomic_folder(config["out"]) as folder:
        found = measure_tradeoff(student, points, after, subject.predictor, subject.rows)
        report = {
            "student": name, "version": __version__, "device": config["device"], "rows": len(subject.rows.inputs),
            "after": after, "points": found,
        }  # fmt: skip
        write_text(folder / "tradeoff.json", json.dumps(report, indent=2) + "\n")
        with (folder / "tradeoff.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)
        title = f"{name}: accuracy against speed on {report['rows']} test rows, {config['device']}"
        draw_tradeoff(found, title, after, folder / "tradeoff")
    render(found, Path(config["out"]))


def _check(config: Namespace) -> None:
    """Check what needs no student. Raises a ``UserError``."""
    for name in ("exits", "keep"):
        if config[name] == []:
            raise UserError(f"{name}: must have at least one entry")
    for share in config["keep"] or ():
        check_fraction("keep", share)
    if config["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError("device: there is no CUDA device; allowed is cpu")


def _points(student: Student, config: Namespace) -> tuple[list[Point], int]:
    """The whole student and the points asked for, and the layer after which tokens are dropped."""
    decoder, has_encoder = student.layers("decoder"), student.tokens.family == "seq2seq"
    exits = config["exits"] or [max(1, decoder * part // 4) for part in (1, 2, 3)] + ["all"]
    layers = [
        decoder if layer == "all" else check_int("exits: all, or else each", layer, 1, decoder) for layer in exits
    ]
    shares = config["keep"] or ([1.0, 0.7, 0.5] if has_encoder else [1.0])
    if not has_encoder and (min(shares) < 1 or config["after"] is not None):
        raise UserError("keep: a decoder-only student has no encoder whose tokens could be dropped; allowed is [1.0]")
    encoder = student.layers("encoder")
    after = check_int("after", max(1, encoder // 4) if config["after"] is None else config["after"], 1, encoder)
    asked = [Point(layer, float(share)) for share in shares for layer in layers]
    return list(dict.fromkeys([Point(decoder, 1.0), *asked])), after


def render(found: Sequence[dict[str, Any]], out: Path) -> None:
    """Print the points as a table."""
    console = Console()
    shown = [name for name, _ in _COLUMNS.values()]
    table = console_table("accuracy against speed, greedy", ["exit", "keep"], shown)
    for one in found:
        numbers = [f"{one[key]:{form}}" for key, (_, form) in _COLUMNS.items()]
        table.add_row(str(one["exit"]), f"{one['keep']:g}", *numbers)
    console.print(table)
    console.print("Table and figure:", style="bold")
    console.print(f"  {out}", soft_wrap=True, markup=False, highlight=False)
