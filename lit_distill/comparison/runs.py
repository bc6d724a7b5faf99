"""Finding runs and reading them; of a run nothing is read but what `lit_distill.records` describes."""

import hashlib
import json
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
"""Below a run they are its own; elsewhere they may hold runs, though wandb's ``config.yaml`` is none."""

_BEGUN = (("failed.json", "failed"), ("config.yaml", "the run has not ended"), ("checkpoints", "the run has not ended"))
"""What a run leaves before it ends, and what it says of the run; the first that is there."""

_PLANNED = "fit.yaml"
"""What there is of a run before it starts."""

_LARGEST = 2**63 - 1
"""Of what tables hold."""

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
    """Likewise."""

    def with_metric(self, metric: str) -> "Found":
        """Only the runs that have a metric; the others are skipped.

        Raises:
            UserError: none has it.
        """
        kept: list[Run] = []
        more: list[Skipped] = []
        for run in self.runs:
            value = run.record.metrics.get(metric)
            if value is None:
                more.append(Skipped(run.source, f"no {metric} among its metrics"))
            elif not math.isfinite(value):
                more.append(Skipped(run.source, f"its {metric} is {value}"))
            else:
                kept.append(run)
        if self.runs and not kept:
            names = sorted({name for run in self.runs for name in run.record.metrics})
            if metric in names:
                raise UserError(f"metric: {metric!r} is no number in any run")
            raise UserError(
                f"metric: no run has {metric!r}; allowed are {', '.join(names) or 'none: no run was tested'}"
            )
        return Found(tuple(kept), (*self.skipped, *more))


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
            except RecursionError:
                skipped.append(Skipped(source, f"{folder / RECORD}: nested too deep"))
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
    if predictions is not None:
        said, found = record.metrics.get("test/accuracy"), float(predictions.correct.mean())
        if said is not None and math.isfinite(said) and abs(said - found) > _CLOSE:
            raise UserError(
                f"{folder / PREDICTIONS}: an accuracy of {found:.4f}, and {RECORD} speaks of {said:.4f}: another run's?"
            )
    return Run(folder.as_posix(), record, predictions, remark, _hash([str(row["id"]) for row in rows]))


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


def _fault(record: RunRecord) -> str | None:
    """What is wrong with a record's types, which reading leaves to its readers."""
    texts = ("dataset", "method", "student", "label_source", "started")
    counts = ("seed", "data_seed", "train_rows", "test_rows", "steps", "parameters")
    mappings = ("metrics", "validation", "fingerprints", "config", "data", "versions", "git")
    for names, fits in (
        (texts, _is_text),
        (counts, _is_count),
        (mappings, lambda value: isinstance(value, dict)),
        (("rationales",), lambda value: value is None or _is_text(value)),
        (("command",), lambda value: isinstance(value, list)),
        (("wall_seconds", "peak_memory_mib"), lambda value: value is None or _is_number(value)),
    ):
        for name in names:
            if not fits(getattr(record, name)):
                return f"{name} is {_short(getattr(record, name))}"
    fraction = record.train_fraction
    if not _is_number(fraction) or not 0 < fraction <= 1:
        return f"train_fraction is {_short(fraction)}"
    teacher = record.teacher_accuracy
    for name, value in (*record.metrics.items(), ("teacher_accuracy", 0.0 if teacher is None else teacher)):
        if not _is_number(value):
            return f"the metric {name} is {_short(value)}"
    for kind, found in (("fingerprint", record.fingerprints), ("version", record.versions)):
        for key, text in found.items():
            if not _is_text(text):
                return f"the {kind} {key} is {_short(text)}"
    if not isinstance(record.git.get("commit"), str | None):
        return f"the commit is {_short(record.git['commit'])}"
    model = record.config.get("model")
    given = model.get("init_args") if isinstance(model, dict) else None
    weight = given.get("rationale_weight") if isinstance(given, dict) else None
    if isinstance(weight, int | float) and not _is_number(weight):
        return f"rationale_weight is {_short(weight)}"
    try:
        json.dumps([record.config, record.metrics, record.command], ensure_ascii=False).encode()
    except ValueError:
        return "a text in it cannot be written"
    return None


def _is_text(value: object) -> bool:
    """A text that can be written."""
    return isinstance(value, str) and not any("\ud800" <= sign <= "\udfff" for sign in value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _is_number(value: object) -> bool:
    """A number, though it may be none (``NaN``), that is no larger than a float can be."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= _LARGEST


def _short(value: object) -> str:
    # the text of a huge number is refused by Python itself
    text = "a huge number" if isinstance(value, int) and abs(value) > _LARGEST else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
