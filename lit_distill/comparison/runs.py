"""Finding runs and reading them; of a run nothing is read but what `lit_distill.records` describes."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_distill.errors import UserError
from lit_distill.records import PREDICTIONS, RECORD, RunRecord, read_predictions_file, read_record

_NO_RUNS = ("wandb", "student", "checkpoints")
"""Folders that hold no runs, though wandb's hold a ``config.yaml``."""

_STARTED = ("config.yaml", "checkpoints")
"""What a run leaves before it ends."""

_CLOSE = 1e-4
"""Metrics are kept in single precision."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """Which test rows a student had right, in the order of their ids; rows without a label are left out."""

    ids: tuple[str, ...]
    """Sorted, each once."""
    correct: NDArray[np.bool_]
    """``(examples,)``."""


@dataclass(frozen=True)
class Run:
    """A run that ended."""

    source: str
    """Its folder, or its address."""
    record: RunRecord
    """What it says of itself."""
    predictions: Predictions | None
    """``None`` where only metrics are known."""
    remark: str = ""
    """Why there are no predictions."""

    @property
    def seeds(self) -> tuple[int, int]:
        """By which runs of two settings are paired: the seed, and that of the data."""
        return self.record.seed, self.record.data_seed

    @property
    def test(self) -> str:
        """The hash of its test rows; empty where it is not known."""
        return self.record.fingerprints.get("test", "")


@dataclass(frozen=True)
class Skipped:
    """What looks like a run and cannot be compared."""

    source: str
    """Its folder, or its address."""
    reason: str
    """One line."""


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    runs: tuple[Run, ...]
    """In the order of their sources."""
    skipped: tuple[Skipped, ...]
    """Likewise."""

    def with_metric(self, metric: str) -> "Found":
        """Only the runs that have a metric; the others are skipped.

        Raises:
            UserError: none has it.
        """
        kept: list[Run] = []
        missing: list[Run] = []
        for run in self.runs:
            (kept if math.isfinite(run.record.metrics.get(metric, math.nan)) else missing).append(run)
        if self.runs and not kept:
            names = sorted({name for run in self.runs for name in run.record.metrics})
            raise UserError(
                f"metric: no run has {metric!r}; allowed are {', '.join(names) or 'none: no run was tested'}"
            )
        more = tuple(Skipped(run.source, f"no {metric} among its metrics") for run in missing)
        return Found(tuple(kept), self.skipped + more)


def find_runs(folders: Sequence[str | Path]) -> Found:
    """Read all runs in folders.

    Args:
        folders: each a run's folder, or one that is searched with all below it.

    Raises:
        UserError: a folder is not there.
    """
    runs: list[Run] = []
    skipped: list[Skipped] = []
    seen: set[Path] = set()
    known_ids: dict[tuple[str, ...], tuple[str, ...]] = {}
    for top in folders:
        if not Path(top).is_dir():
            raise UserError(f"runs: no folder {str(top)!r}")
        for folder in _candidates(Path(top), seen):
            source = folder.as_posix()
            try:
                runs.append(_read(folder, known_ids))
            except UserError as error:
                skipped.append(Skipped(source, str(error)))
    return Found(tuple(runs), tuple(skipped))


def _candidates(top: Path, seen: set[Path]) -> Iterator[Path]:
    """The folders with a record, or with what a run leaves before it has one."""
    for name, below, files in os.walk(top, followlinks=True):
        folder = Path(name)
        resolved = folder.resolve()
        if resolved in seen:
            below.clear()
            continue
        seen.add(resolved)
        is_run = RECORD in files
        if is_run or any(mark in files or mark in below for mark in _STARTED):
            yield folder
        # below a run lie its own parts: a baseline's checkpoints are no run that was given up
        below[:] = [] if is_run else sorted(one for one in below if one not in _NO_RUNS and not one.startswith("."))


def _read(folder: Path, known_ids: dict[tuple[str, ...], tuple[str, ...]]) -> Run:
    if not (folder / RECORD).exists():
        raise UserError(f"no {RECORD}: the run has not ended")
    record = read_record(folder)
    if fault := _fault(record):
        raise UserError(f"{folder / RECORD}: {fault}")
    if not (folder / PREDICTIONS).exists():
        return Run(folder.as_posix(), record, None, f"no {PREDICTIONS}")
    rows = read_predictions_file(folder)
    if len(rows) != record.test_rows:
        raise UserError(f"{folder / PREDICTIONS}: {len(rows)} rows, and {RECORD} speaks of {record.test_rows}")
    if any(not isinstance(row["correct"], bool | None) for row in rows):
        raise UserError(f"{folder / PREDICTIONS}: correct must be true, false or null")
    predictions, remark = _predictions(rows, known_ids)
    if predictions is not None and all(row["correct"] is not None for row in rows):
        said, found = record.metrics.get("test/accuracy"), float(predictions.correct.mean())
        if said is not None and math.isfinite(said) and abs(said - found) > _CLOSE:
            raise UserError(
                f"{folder / PREDICTIONS}: an accuracy of {found:.4f}, and {RECORD} speaks of {said:.4f}: another run's?"
            )
    return Run(folder.as_posix(), record, predictions, remark)


def _predictions(
    rows: Sequence[Mapping[str, Any]], known_ids: dict[tuple[str, ...], tuple[str, ...]]
) -> tuple[Predictions | None, str]:
    judged = sorted((str(row["id"]), row["correct"]) for row in rows if row["correct"] is not None)
    if not judged:
        return None, "no test row has a label"
    ids = tuple(name for name, _ in judged)
    if len(set(ids)) < len(ids):
        return None, f"the id {Counter(ids).most_common(1)[0][0]!r} occurs more than once in {PREDICTIONS}"
    # runs share their test rows, so that one copy of the ids will do
    return Predictions(known_ids.setdefault(ids, ids), np.array([right for _, right in judged], dtype=np.bool_)), ""


def _fault(record: RunRecord) -> str | None:
    """What is wrong with a record's types, which reading leaves to its readers."""
    kinds: tuple[tuple[str, type | tuple[type, ...]], ...] = (
        ("dataset", str),
        ("method", str),
        ("student", str),
        ("label_source", str),
        ("train_fraction", (int, float)),
        ("seed", int),
        ("data_seed", int),
        ("train_rows", int),
        ("test_rows", int),
        ("parameters", int),
        ("metrics", dict),
        ("validation", dict),
        ("fingerprints", dict),
        ("config", dict),
        ("versions", dict),
        ("git", dict),
        ("command", list),
    )
    for name, kind in kinds:
        value = getattr(record, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{name} is {value!r}"
    teacher = record.teacher_accuracy
    for name, value in (*record.metrics.items(), ("teacher_accuracy", 0.0 if teacher is None else teacher)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            return f"the metric {name} is {value!r}"
    return None
