"""THE contract between a run and whoever compares runs: what a finished ``fit`` leaves in its folder."""

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from lit_distill.errors import UserError
from lit_distill.files import atomic_write, write_text
from lit_distill.reading import parse_json

RECORD = "run.json"
"""The record; it is written last, so that a folder with one is of a run that ended."""

PREDICTIONS = "test_predictions.jsonl"
"""One object a test row, in the data's order: id, input, label, prediction, correct, rationale."""

FORMAT = 1
"""Of the record."""


@dataclass(frozen=True)
class RunRecord:
    """What a run was, what it found, and what is needed to repeat it."""

    dataset: str
    """The dataset, as in the run's name."""
    method: str
    """The method's class without ``Module``, as in the run's name."""
    student: str
    """The student, by its own name (the last part of its path)."""
    label_source: str
    """Which labels it was trained on: ``gold`` or ``teacher``."""
    train_fraction: float
    """The part of the training rows."""
    seed: int
    """Of initialisation and dropout (``seed_everything``)."""
    data_seed: int
    """Of the subset and the order (``data.seed``)."""
    train_rows: int
    """Rows that were trained on."""
    test_rows: int
    """Rows of test."""
    steps: int
    """Optimizer steps that were taken."""
    metrics: dict[str, float]
    """Test metrics by their logged names (``test/accuracy``, ...); accuracies in 0..1."""
    validation: dict[str, float] = field(default_factory=dict)
    """The metric by which the tested checkpoint was chosen, and its step."""
    rationales: str | None = None
    """Which rationales were trained on: ``own``, ``shuffled``; ``None`` where no task has them."""
    parameters: int = 0
    """The student's parameters."""
    teacher_accuracy: float | None = None
    """The accuracy of the teacher's labels on test, where there are some."""
    chance: float | None = None
    """The accuracy on test without reading an input: of a uniform guess, or of always the commonest training label."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Split -> hash of its rows in order: of train, those that were trained on, with labels and rationales; of val and
    test ids, inputs and gold labels, of test only the rows that were tested."""
    config: dict[str, Any] = field(default_factory=dict)
    """The whole config, as ``fit`` took it."""
    data: dict[str, Any] = field(default_factory=dict)
    """The data's own description, with what became of its rows."""
    command: list[str] = field(default_factory=list)
    """The command line."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of this package, of Python and of the libraries."""
    git: dict[str, str | bool] = field(default_factory=dict)
    """Commit and whether files differed from it, where the working directory is a repository."""
    machine: dict[str, Any] = field(default_factory=dict)
    """What it ran on."""
    started: str = ""
    """When, in UTC."""
    wall_seconds: float = math.nan
    """How long it took, test and saving included; of a run that was resumed all parts, without what was lost."""
    validation_seconds: float = math.nan
    """How long of that validation took."""
    peak_memory_mib: float = math.nan
    """The most memory that it held: of the accelerator where there is one, else of the process."""


def flatten(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """A config with its keys joined by dots; lists stay as they are, and empty mappings are not there."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{before}{name}.")
        else:
            flat[f"{before}{name}"] = value
    return flat


def write_record(folder: str | Path, record: RunRecord) -> None:
    """Write a run's record; it is there whole or not at all."""
    content = {"format": FORMAT, **asdict(record)}
    write_text(Path(folder) / RECORD, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def read_record(folder: str | Path) -> RunRecord:
    """Read a run's record.

    Raises:
        UserError: there is none, it is none, or a value in it is none that a run has; the message names file and key.
    """
    path = Path(folder) / RECORD
    try:
        found = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: not there; the run has not ended") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path}: no record of format {FORMAT}")
    known = {one.name for one in fields(RunRecord)}
    try:
        record = RunRecord(**{name: value for name, value in found.items() if name in known})
    except TypeError as error:
        raise UserError(f"{path}: not a whole record ({error})") from error
    try:
        check_values(record)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return record


def check_values(record: RunRecord) -> None:
    """See that each value is of its type, and within what it can be.

    Raises:
        UserError: one is not; the message names the key.
    """
    for one in fields(RunRecord):
        values, kind = {one.name: getattr(record, one.name)}, one.type
        if get_origin(kind) is dict and isinstance(values[one.name], dict):
            values, kind = flatten(values), get_args(kind)[1]
        for name, value in values.items():
            low, high = _bounds(name)
            unknown = (
                name in ("wall_seconds", "validation_seconds", "peak_memory_mib")
                and isinstance(value, float)
                and math.isnan(value)
            )
            # of a config only numbers that no float holds are out of bounds
            numeric = kind in (Any, int, float, float | None)
            bounded = numeric and isinstance(value, int if kind is Any else int | float) and not isinstance(value, bool)
            if not _fits(value, kind) or (bounded and not low <= value <= high and not unknown):
                text = repr(value)
                allowed = _KINDS.get(get_origin(kind) or kind, "text")
                if numeric:
                    allowed = f"a number from {low:g} to {high:g}"
                raise UserError(f"{name}: got {text if len(text) <= 80 else text[:77] + '...'}; allowed is {allowed}")


_KINDS: Mapping[Any, str] = {dict: "a mapping", list: "a list of texts", str | bool: "text, true or false"}


def _bounds(name: str) -> tuple[float, float]:
    if name == "train_fraction":
        return sys.float_info.min, 1
    if re.match(
        r"(metrics|validation)\..*(accuracy|macro_f1|rouge_l|in_prediction)(_low|_high)?$|teacher|chance", name
    ):
        return 0, 1
    # a metric of the user's own, or a loss; else a count, seconds or MiB
    return (-sys.float_info.max, sys.float_info.max) if "." in name else (0, 2**63 - 1)


def _fits(value: object, kind: Any) -> bool:  # noqa: ANN401 - a type, as a dataclass has it
    if kind is Any:
        return True
    if isinstance(kind, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(one, get_args(kind)[0]) for one in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, get_origin(kind) or kind) and (kind is not int or not isinstance(value, bool))


def write_predictions_file(folder: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write what a student said of each test row; the file is there whole or not at all."""
    with atomic_write(Path(folder) / PREDICTIONS) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_predictions_file(folder: str | Path) -> list[dict[str, Any]]:
    """Read it.

    Raises:
        UserError: it is absent or damaged.
    """
    path = Path(folder) / PREDICTIONS
    try:
        with path.open("rb") as file:
            rows = [parse_json(line) for line in file if line.strip()]
    except FileNotFoundError as error:
        raise UserError(f"{path}: not there") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not all(isinstance(row, dict) and {"id", "correct"} <= row.keys() for row in rows):
        raise UserError(f"{path}: rows need id and correct")
    return rows
