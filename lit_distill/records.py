"""The contract between a finished run and the comparison of runs: the files that ``fit`` leaves."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from lit_distill.errors import UserError, first_fault
from lit_distill.files import atomic_write, flatten, write_text
from lit_distill.reading import json_lines

RECORD = "run.json"
"""The record; written last, so its presence marks a finished run."""

PREDICTIONS = "test_predictions.jsonl"
"""One object per test row, in the data's order, of `lit_distill.evaluation.answers.answer_row`."""

NO_LABELS = "none"
"""The `RunRecord.label_source` of a run that read a corpus."""

FLOORS = {"words": "words of the input", "second_part_words": "words of its second part"}
"""The floors by their names in the record of a run: what a logistic regression reads."""


def _check_numbers(values: dict[str, Any]) -> dict[str, Any]:
    for name, value in flatten(values).items():
        if not isinstance(value, int | float):
            continue
        if not abs(value) <= 1e308:
            raise ValueError(f"{name} is no finite number")
        if re.search(r"/\w*(accuracy|macro_f1|rouge_l|in_prediction)(_low|_high)?$", name) and not 0 <= value <= 1:
            raise ValueError(f"{name} is not from 0 to 1")
    return values


_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Metrics = Annotated[dict[str, float], AfterValidator(_check_numbers)]


@dataclass(frozen=True)
class RunRecord:
    """Settings and results of a run, and what is needed to repeat it."""

    __pydantic_config__ = ConfigDict(strict=True, revalidate_instances="always")

    dataset: str  # the dataset, as in the run's name
    method: str  # the method's class without ``Module``, as in the run's name
    student: str  # the student, by its own name (the last part of its path)
    label_source: str  # which labels it was trained on: ``gold`` or ``teacher``; ``none`` of a corpus
    train_fraction: Annotated[float, Field(gt=0, allow_inf_nan=False)]  # the training rows, as data.train_fraction
    seed: _Count  # of initialisation and dropout (``seed_everything``)
    data_seed: _Count  # of the subset and the order (``data.seed``)
    train_rows: _Count  # rows that were trained on
    test_rows: _Count  # rows of test
    steps: _Count  # optimizer steps that were taken
    metrics: _Metrics  # test metrics by their logged names (``test/accuracy``, ...); accuracies in 0..1
    validation: _Metrics = field(default_factory=dict)  # the metric that selected the tested checkpoint, and its step
    rationales: str | None = None  # `own` or `shuffled`; `None` if no task uses rationales
    train_tokens: _Count = 0  # source and target tokens read in training, on all devices; 0 if unknown
    parameters: _Count = 0  # the student's parameters
    teacher_accuracy: _Share | None = None  # the accuracy of the teacher's labels on test, where there are some
    chance: _Share | None = None
    """Accuracy of the better of a uniform guess and the majority class of train: on test, else on val."""
    floors: dict[str, _Share] = field(default_factory=dict)
    """Accuracies of a bag of words on the same rows, by what it reads."""
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
    paths: dict[str, Any] = field(default_factory=dict)  # chosen with ``fast: auto``, by stage, with the timings
    started: str = ""  # when, in UTC
    wall_seconds: _Amount = 0  # with test and saving; of a resumed run all parts, without lost work
    peak_memory_mib: _Amount = 0  # of the accelerator, else of the process
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
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise UserError(f"{path}: not the record of a run: {first_fault(error)}") from error


def check_values(record: RunRecord) -> None:
    """Check types and ranges of all values. Raises a ``UserError`` that names the key."""
    try:
        _adapter().validate_python(record)
    except ValidationError as error:
        raise UserError(first_fault(error)) from error


def below_floor(accuracy: float, floor: float) -> str:
    """What is to be said of a student below a floor."""
    return f"accuracy {accuracy:.3f} is below the floor, {floor:.3f}: nothing was learned that words do not give"


def write_predictions_file(folder: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the predictions on test atomically."""
    with atomic_write(Path(folder) / PREDICTIONS) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_predictions_file(folder: str | Path) -> list[dict[str, Any]]:
    """Read the predictions on test. Raises a ``UserError`` if the file is absent or damaged."""
    path = Path(folder) / PREDICTIONS
    try:
        rows = [row for _, row in json_lines(path)]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not all({"id", "correct"} <= row.keys() for row in rows):
        raise UserError(f"{path}: rows need id and correct")
    return rows
