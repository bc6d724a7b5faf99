"""Find finished runs in folders and W&B projects, and read their records."""

import ast
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lit_distill.errors import UserError
from lit_distill.files import flatten
from lit_distill.records import (
    NO_LABELS,
    PREDICTIONS,
    RECORD,
    RunRecord,
    check_values,
    read_predictions_file,
    read_record,
)

WANDB = "wandb://"  # prefix of a W&B project address

ACCURACY, VOTE = "test/accuracy", "test/vote_accuracy"
"""The metrics that predictions give per row: of their keys ``correct`` and ``vote_correct``."""

NOT_TESTED = "not tested"
"""The `Run.test` of a run that was only validated."""

OURS = "lit_distill"
"""The `Run.module_path` of all modules of this package, whose places in it have changed."""

_UNFINISHED = {
    "failed.txt": "failed",
    "config.yaml": "the run has not ended",
    "fit.yaml": "not started, or ended early",
}
"""File of an unfinished run -> what it means; the first match counts."""

# what ``fit`` logs in addition to its config
_LOGGED = ("dataset", "method", "train_tokens", "train_rows", "train_rationales", "val_rows", "test_rows")


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run."""

    source: str  # its folder or address
    record: RunRecord
    correct: NDArray[np.float64] | None = None
    """``(test rows,)`` sorted by id: 1 right, 0 wrong, NaN unlabelled; ``None`` without predictions."""
    remark: str = ""  # why `correct` is missing
    voted: NDArray[np.float64] | None = None  # as `correct`, of the votes; `None` if there was no vote

    @property
    def seeds(self) -> tuple[int, int]:
        """Seed and data seed, to pair runs of two settings."""
        return self.record.seed, self.record.data_seed

    @property
    def metrics(self) -> Mapping[str, float]:
        """Those of test, and of validation the one that chose the checkpoint."""
        chose = {name: value for name, value in self.record.validation.items() if name != "step"}
        return chose | dict(self.record.metrics)

    def outcomes(self, metric: str) -> NDArray[np.float64] | None:
        """`correct` or `voted`."""
        return {ACCURACY: self.correct, VOTE: self.voted}.get(metric)

    @property
    def test(self) -> str:
        """Its test rows, by the hash of their ids, inputs and labels; empty if unknown."""
        if not self.record.metrics:
            return NOT_TESTED
        known = self.record.fingerprints.get("test")
        return f"{known}, {self.record.test_rows:,} rows" if known else ""

    @property
    def student_path(self) -> str:
        """The student as in the config, else its own name."""
        path = flatten(self.record.config).get("model.init_args.student")
        return os.path.normpath(path) if isinstance(path, str) and path else self.record.student

    @property
    def module_path(self) -> str:
        """The import path of its module's class without ``Module``, if it is the user's own."""
        path = str(flatten(self.record.config).get("model.class_path", ""))
        return path.removesuffix("Module") if "." in path and not path.startswith(f"{OURS}.") else OURS


def find_runs(sources: Sequence[str | Path]) -> tuple[list[Run], dict[str, str]]:
    """Read all runs below some folders or in ``wandb://entity/project``.

    Returns:
        The runs, and source -> reason for candidates that cannot be compared.

    Raises:
        UserError: a folder does not exist, or a project cannot be read.
    """
    runs: list[Run] = []
    skipped: dict[str, str] = {}
    seen: set[Path] = set()
    for source in dict.fromkeys(map(str, sources)):
        if source.startswith(WANDB):
            _read_project(source, runs, skipped)
            continue
        if not Path(source).is_dir():
            raise UserError(f"runs: no folder {source!r}")
        for folder in _run_folders(Path(source), seen):
            try:
                runs.append(_read_run(folder))
            except UserError as error:
                skipped[folder.as_posix()] = str(error)
    return list({run.source: run for run in runs}.values()), skipped


def _run_folders(top: Path, seen: set[Path]) -> Iterator[Path]:
    """Folders with a record or with files of an unfinished run; ``seen`` breaks loops of links."""
    for name, below, files in os.walk(top, followlinks=True):
        folder = Path(name)
        if folder.resolve() in seen:
            below.clear()
            continue
        seen.add(folder.resolve())
        is_run = RECORD in files or any(file in _UNFINISHED for file in files)
        if is_run:
            yield folder
        # W&B keeps a copy of each run's config
        own = {"wandb", "student", "checkpoints"} if is_run else {"wandb"}
        below[:] = sorted(one for one in below if one not in own and not one.startswith("."))


def _read_run(folder: Path) -> Run:
    source = folder.as_posix()
    if not (folder / RECORD).exists():
        state = next(state for name, state in _UNFINISHED.items() if (folder / name).exists())
        raise UserError(f"no {RECORD}: {state}")
    record = read_record(folder)
    if record.label_source == NO_LABELS:
        raise UserError("it read a corpus, and was tested on no rows")
    path = folder / PREDICTIONS
    if not path.exists():
        return Run(source, record, remark=f"no {PREDICTIONS}" if record.metrics else "")
    rows = read_predictions_file(folder)
    if len(rows) != record.test_rows:
        raise UserError(f"{path}: {len(rows)} rows, but {RECORD} says {record.test_rows}")
    if any(not isinstance(row.get(name), bool | None) for row in rows for name in ("correct", "vote_correct")):
        raise UserError(f"{path}: correct and vote_correct must be true, false or null")
    rows.sort(key=lambda row: str(row["id"]))
    ids = [str(row["id"]) for row in rows]
    correct, voted = (
        np.array([np.nan if row.get(name) is None else row[name] for row in rows], dtype=np.float64)
        for name in ("correct", "vote_correct")
    )
    remark = ""
    if np.isnan(correct).all():
        remark = "no test row has a label"
    elif len(set(ids)) < len(ids):
        remark = f"the id {Counter(ids).most_common(1)[0][0]!r} occurs more than once in {PREDICTIONS}"
    else:
        found = float(np.nanmean(correct))
        recorded = record.metrics.get(ACCURACY, found)
        # recorded in single precision
        if abs(recorded - found) > 1e-4:
            raise UserError(f"{path}: its accuracy is {found:.4f}, but {RECORD} says {recorded:.4f}: another run's?")
    if remark:
        return Run(source, record, remark=remark)
    # votes of all rows that have a label, or of none
    whole = np.array_equal(np.isnan(voted), np.isnan(correct))
    return Run(source, record, correct, voted=voted if whole else None)


def _read_project(address: str, runs: list[Run], skipped: dict[str, str]) -> None:
    """Add the finished runs of a W&B project, which have metrics but no predictions."""
    # slow to import, and most comparisons are of folders
    import wandb

    path = address.removeprefix(WANDB).strip("/")
    if path.count("/") != 1 or not all(path.split("/")):
        raise UserError(f"runs: {address!r} is not an address; allowed is {WANDB}entity/project")
    try:
        for run in sorted(wandb.Api().runs(path), key=lambda run: str(run.id)):
            source = f"{WANDB}{path}/{run.id}"
            try:
                runs.append(Run(source, _record(run), remark="from W&B, which has metrics only"))
            except (UserError, KeyError, TypeError, ValueError) as error:
                reason = f"its config lacks {error}" if isinstance(error, KeyError) else str(error)
                skipped[source] = " ".join(reason.split())
    except (wandb.errors.Error, ValueError) as error:
        raise UserError(f"runs: {address!r} cannot be read ({' '.join(str(error).split())})") from error


def _record(run: Any) -> RunRecord:
    """The record of a W&B run, from the config and summary that ``fit`` logged."""
    if run.state != "finished":
        raise UserError(f"is {run.state}")
    config = {name: _parse_list(value) for name, value in flatten(run.config).items()}
    summary, method = dict(run.summary), str(config["method"])
    metrics = {name: value for name, value in summary.items() if name.startswith("test/")}
    record = RunRecord(
        dataset=str(config["dataset"]),
        method=method,
        student=Path(str(config["model.init_args.student"])).name,
        label_source=str(config["data.init_args.label_source"]),
        train_fraction=float(config["data.init_args.train_fraction"]),
        seed=int(config["seed_everything"]),
        data_seed=int(config["data.init_args.seed"]),
        train_rows=int(config.get("train_rows", 0)),
        test_rows=int(config.get("test_rows", 0)),
        steps=int(summary.get("trainer/global_step", 0)),
        metrics={name: float(value) for name, value in metrics.items() if isinstance(value, int | float)},
        train_tokens=int(config.get("train_tokens", 0)),
        rationales=None if method == "Standard" else str(config.get("data.init_args.rationale_pairing", "own")),
        config={name: value for name, value in config.items() if name not in _LOGGED},
        wall_seconds=float(summary.get("_runtime", 0)),
    )
    check_values(record)
    return record


def _parse_list(value: Any) -> Any:
    """A list, which ``fit`` logs as text; anything else unchanged."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) and value.startswith("[") else value
    except (SyntaxError, ValueError):
        return value
