"""The contract between a finished run and the comparison of runs: the files that ``fit`` leaves."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from lit_distill.errors import UserError
from lit_distill.files import atomic_write, flatten, write_text
from lit_distill.reading import parse_json

RECORD = "run.json"
"""The record; written last, so its presence marks a finished run."""

PREDICTIONS = "test_predictions.jsonl"
"""One object per test row, in the data's order: id, input, label, prediction, correct, rationale."""

_SHARES = re.compile(r"(accuracy|macro_f1|rouge_l|in_prediction)(_low|_high)?$")


def _check_numbers(values: dict[str, Any]) -> dict[str, Any]:
    """Refuse numbers too large for a float, and fractions outside 0 to 1."""
    for name, value in flatten(values).items():
        if not isinstance(value, int | float):
            continue
        most = 1.0 if _SHARES.search(name) else 1e308
        if not (0 if most == 1 else -most) <= value <= most:
            raise ValueError(f"{name} is out of range: {value:.6g}" if isinstance(value, float) else f"{name} is huge")
    return values


def _check_amount(value: float) -> float:
    if value < 0 or value > 2**63:
        raise ValueError("Input should be from 0 to 2^63, or NaN where it is not known")
    return value


_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Amount = Annotated[float, AfterValidator(_check_amount)]
_Metrics = Annotated[dict[str, float], AfterValidator(_check_numbers)]


@dataclass(frozen=True)
class RunRecord:
    """Settings and results of a run, and what is needed to repeat it."""

    __pydantic_config__ = ConfigDict(strict=True, revalidate_instances="always")

    dataset: str  # the dataset, as in the run's name
    method: str  # the method's class without ``Module``, as in the run's name
    student: str  # the student, by its own name (the last part of its path)
    label_source: str  # which labels it was trained on: ``gold`` or ``teacher``
    train_fraction: Annotated[float, Field(gt=0, le=1)]  # the part of the training rows
    seed: _Count  # of initialisation and dropout (``seed_everything``)
    data_seed: _Count  # of the subset and the order (``data.seed``)
    train_rows: _Count  # rows that were trained on
    test_rows: _Count  # rows of test
    steps: _Count  # optimizer steps that were taken
    metrics: _Metrics  # test metrics by their logged names (``test/accuracy``, ...); accuracies in 0..1
    validation: _Metrics = field(default_factory=dict)  # the metric that selected the tested checkpoint, and its step
    rationales: str | None = None  # `own` or `shuffled`; `None` if no task uses rationales
    parameters: _Count = 0  # the student's parameters
    teacher_accuracy: _Share | None = None  # the accuracy of the teacher's labels on test, where there are some
    chance: _Share | None = None  # test accuracy of the better of a uniform guess and the majority class of train
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Split -> hash of its rows in order: of train, the rows trained on, with labels and rationales; of val and test,
    ids, inputs and gold labels (of test only the rows that were tested).
    """
    config: Annotated[dict[str, Any], AfterValidator(_check_numbers)] = field(default_factory=dict)  # the whole config
    data: dict[str, Any] = field(default_factory=dict)  # the data's own description, with what became of its rows
    command: list[str] = field(default_factory=list)  # the command line
    versions: dict[str, str] = field(default_factory=dict)  # of this package, of Python and of the libraries
    git: dict[str, str | bool] = field(default_factory=dict)
    """Commit, and whether files differed from it, if the working directory is a repository."""
    machine: dict[str, Any] = field(default_factory=dict)  # what it ran on
    started: str = ""  # when, in UTC
    wall_seconds: _Amount = math.nan  # run time with test and saving; of a resumed run all parts, without lost work
    validation_seconds: _Amount = math.nan  # how long of that validation took
    peak_memory_mib: _Amount = math.nan  # peak memory of the accelerator, else of the process
    format: Literal[1] = 1  # the version of this layout


@cache
def _adapter() -> TypeAdapter[RunRecord]:
    return TypeAdapter(RunRecord)


def write_record(folder: str | Path, record: RunRecord) -> None:
    """Write a run's record atomically."""
    write_text(Path(folder) / RECORD, json.dumps(asdict(record), indent=2, ensure_ascii=False, default=str) + "\n")


def read_record(folder: str | Path) -> RunRecord:
    """Read a run's record. Raises a ``UserError`` that names file and key if it is absent or damaged."""
    path = Path(folder) / RECORD
    try:
        return _adapter().validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: not there; the run has not ended") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except ValidationError as error:
        raise UserError(f"{path}: {_first_fault(error)}") from error


def check_values(record: RunRecord) -> None:
    """Check types and ranges of all values. Raises a ``UserError`` that names the key."""
    try:
        _adapter().validate_python(record)
    except ValidationError as error:
        raise UserError(_first_fault(error)) from error


def _first_fault(error: ValidationError) -> str:
    fault = min(error.errors(include_url=False), key=lambda one: one["loc"] not in ((), ("format",)))
    key, given = ".".join(map(str, fault["loc"])), repr(fault["input"])
    if fault["type"] == "json_invalid":
        return f"cannot be read ({fault['msg']})"
    if key in ("", "format"):
        return "no record of format 1"
    if fault["type"] == "missing":
        return f"not a whole record ({key} is missing)"
    return f"{key}: got {given if len(given) <= 80 else given[:77] + '...'}; {fault['msg']}"


def write_predictions_file(folder: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the predictions on test atomically."""
    with atomic_write(Path(folder) / PREDICTIONS) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_predictions_file(folder: str | Path) -> list[dict[str, Any]]:
    """Read the predictions on test. Raises a ``UserError`` if the file is absent or damaged."""
    path = Path(folder) / PREDICTIONS
    try:
        rows = [parse_json(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    except FileNotFoundError as error:
        raise UserError(f"{path}: not there") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not all(isinstance(row, dict) and {"id", "correct"} <= row.keys() for row in rows):
        raise UserError(f"{path}: rows need id and correct")
    return rows
