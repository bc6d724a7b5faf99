"""Finding runs and reading them; of a run nothing is read but what `lit_distill.records` describes."""

import hashlib
import json
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
"""Below a run they are its own; elsewhere they may hold runs, though wandb's ``config.yaml`` is none."""

_BEGUN = (("failed.txt", "failed"), ("config.yaml", "the run has not ended"), ("checkpoints", "the run has not ended"))
"""What a run leaves before it ends, and what it says of the run; the first that is there."""

_PLANNED = "fit.yaml"
"""What there is of a run before it starts."""

_CLOSED = 10
"""Gold labels, more of which are no closed set."""

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
    ids: str = ""
    """Hash of the ids of its test rows, in whatever order; empty where they are not known."""
    chance: float | None = None
    """The accuracy on its test rows without reading them, where it is known."""
    tested: str | None = None
    """Which of its dataset's test rows it was tested on, once that was found out; see `test`."""

    @property
    def seeds(self) -> tuple[int, int]:
        """By which runs of two settings are paired: the seed, and that of the data."""
        return self.record.seed, self.record.data_seed

    @property
    def test(self) -> str:
        """What its test rows are called: by their hash; empty where it is not known."""
        return self.record.fingerprints.get("test", "") if self.tested is None else self.tested


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
    """In the order of their sources, those of a search before those without the metric."""

    def with_metric(self, metric: str) -> "Found":
        """Only the runs that have a metric; the others are skipped.

        Raises:
            UserError: none has it.
        """
        kept = tuple(run for run in self.runs if metric in run.record.metrics)
        if self.runs and not kept:
            names = sorted({name for run in self.runs for name in run.record.metrics})
            raise UserError(
                f"metric: no run has {metric!r}; allowed are {', '.join(names) or 'none: no run was tested'}"
            )
        reason = f"no {metric} among its metrics"
        more = [Skipped(run.source, reason) for run in self.runs if metric not in run.record.metrics]
        return Found(kept, (*self.skipped, *more))


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
    """The folders with a record, with what a run leaves before it has one, or with nothing at all.

    Below a run lie its own parts: a baseline's checkpoints are no run that was given up, but a record is a run's.
    """
    parts: set[Path] = set()
    for name, below, files in os.walk(top, followlinks=True):
        folder = Path(name)
        resolved = folder.resolve()
        if resolved in seen:
            below.clear()
            continue
        seen.add(resolved)
        own = folder in parts or folder.name in _NO_RUNS
        begun = _unended(files, below) is not None or not (files or below or folder == top)
        if RECORD in files or (begun and not own):
            yield folder
        is_run = RECORD in files or (begun and not own)
        below[:] = sorted(one for one in below if not one.startswith(".") and not (is_run and one in _NO_RUNS))
        if is_run or own:
            parts |= {folder / one for one in below}


def _unended(files: Sequence[str], below: Sequence[str]) -> str | None:
    """What became of a run without a record; ``None`` where there is none."""
    marked = [said for mark, said in _BEGUN if mark in files or mark in below]
    return marked[0] if marked else "not started, or ended early" if _PLANNED in files else None


def _read(folder: Path, known_ids: dict[tuple[str, ...], tuple[str, ...]]) -> Run:
    if not (folder / RECORD).exists():
        names = os.listdir(folder)
        raise UserError(f"no {RECORD}: {_unended(names, ()) or 'not started: the folder is empty'}")
    record = read_record(folder)
    if not (folder / PREDICTIONS).exists():
        return Run(folder.as_posix(), record, None, f"no {PREDICTIONS}")
    rows = read_predictions_file(folder)
    if len(rows) != record.test_rows:
        raise UserError(f"{folder / PREDICTIONS}: {len(rows)} rows, and {RECORD} speaks of {record.test_rows}")
    if any(not isinstance(row["correct"], bool | None) for row in rows):
        raise UserError(f"{folder / PREDICTIONS}: correct must be true, false or null")
    predictions, remark = _predictions(rows, known_ids)
    if predictions is not None:
        said, found = record.metrics.get("test/accuracy"), float(predictions.correct.mean())
        if said is not None and abs(said - found) > _CLOSE:
            raise UserError(
                f"{folder / PREDICTIONS}: an accuracy of {found:.4f}, and {RECORD} speaks of {said:.4f}: another run's?"
            )
    chance = _commonest(rows) if record.chance is None else record.chance
    return Run(folder.as_posix(), record, predictions, remark, _hash([str(row["id"]) for row in rows]), chance)


def _commonest(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The part of the commonest gold label, for records without a chance; none where labels are no closed set."""
    counts = Counter(str(row["label"]) for row in rows if row.get("label") is not None)
    return max(counts.values()) / counts.total() if 1 < len(counts) <= _CLOSED else None


def _hash(ids: Sequence[str]) -> str:
    """Of ids; the order of rows says nothing of accuracies."""
    known = hashlib.sha256()
    for one in sorted(ids):
        known.update(json.dumps(one).encode() + b"\n")
    return known.hexdigest()[:16]


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
