"""Runs in a project of Weights & Biases: what was logged of them, without predictions."""

import ast
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from lit_distill.comparison.runs import Found, Run, Skipped
from lit_distill.errors import UserError
from lit_distill.files import flatten
from lit_distill.records import RunRecord, check_values

SCHEME = "wandb://"
"""How an address begins."""


_LOGGED = ("dataset", "method", "train_rows", "train_rationales", "val_rows", "test_rows")
"""What `fit` logs beside the keys of its config."""


class Api(Protocol):
    """The part of ``wandb.Api`` that is used."""

    def runs(self, path: str) -> Iterable[Any]:
        """The runs of ``entity/project``."""


def find_wandb_runs(address: str, api: Api | None = None) -> Found:
    """Read the finished runs of a project.

    Args:
        address: ``wandb://entity/project``.
        api: wandb's public API; its own, with the account of this machine, if not given.

    Raises:
        UserError: the address is none, or the project cannot be read.
    """
    # it takes seconds, and most comparisons are of folders
    import wandb

    path = address.removeprefix(SCHEME).strip("/")
    if path.count("/") != 1 or not all(path.split("/")):
        raise UserError(f"runs: {address!r} is no address; allowed is {SCHEME}entity/project")
    runs: list[Run] = []
    skipped: list[Skipped] = []
    try:
        for run in (api or wandb.Api()).runs(path):
            source = f"{SCHEME}{path}/{run.id}"
            try:
                runs.append(Run(source, _record(run), None, "of wandb, which has metrics only"))
            except (UserError, KeyError, TypeError, ValueError) as error:
                reason = f"its config lacks {error}" if isinstance(error, KeyError) else str(error)
                skipped.append(Skipped(source, " ".join(reason.split())))
    except (wandb.errors.Error, ValueError) as error:
        raise UserError(f"runs: {address!r} cannot be read ({' '.join(str(error).split())})") from error
    runs.sort(key=lambda run: run.source)
    return Found(tuple(runs), tuple(sorted(skipped, key=lambda one: one.source)))


def _record(run: Any) -> RunRecord:  # noqa: ANN401 - wandb's, or one like it
    if run.state != "finished":
        raise UserError(f"is {run.state}")
    config = {name: _read_list(value) for name, value in flatten(run.config).items()}
    summary: Mapping[str, Any] = dict(run.summary)
    numbers = {
        name: float(value)
        for name, value in summary.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    method = str(config["method"])
    trains_on_rationales = method not in ("Standard",)
    record = RunRecord(
        dataset=str(config["dataset"]),
        method=method,
        student=str(config["model.init_args.student"]).rstrip("/").rpartition("/")[2],
        label_source=str(config["data.init_args.label_source"]),
        train_fraction=float(config["data.init_args.train_fraction"]),
        seed=int(config["seed_everything"]),
        data_seed=int(config["data.init_args.seed"]),
        train_rows=int(config.get("train_rows", 0)),
        test_rows=int(config.get("test_rows", 0)),
        steps=int(numbers.get("trainer/global_step", 0)),
        metrics={name: value for name, value in numbers.items() if name.startswith("test/")},
        rationales=str(config.get("data.init_args.rationale_pairing", "own")) if trains_on_rationales else None,
        config={name: value for name, value in config.items() if name not in _LOGGED},
        wall_seconds=numbers.get("_runtime", math.nan),
    )
    check_values(record)
    return record


def _read_list(value: Any) -> Any:  # noqa: ANN401 - whatever was logged
    """A list, which `fit` logs as its text; all else as it is."""
    if not isinstance(value, str) or not value.startswith("["):
        return value
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value
