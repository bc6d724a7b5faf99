"""``fit --resume``: the newest run of a configuration, and its folder and loggers as of its last checkpoint."""

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from lit_distill.checkpoints import RunHistory
from lit_distill.commands.runs import find_checkpoint
from lit_distill.errors import UserError
from lit_distill.experiments.grid import without_location
from lit_distill.files import atomic_write
from lit_distill.modules.base import DistillModule
from lit_distill.reading import parse_yaml
from lit_distill.records import RECORD

_CONFIG = "config.yaml"
_METRICS = "metrics.csv"

_NOT_THE_RESULT = {
    "resume",
    "predictions",
    "trainer.default_root_dir",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
}
"""Keys without effect on a run's result, besides those of its location."""

_TRAINED_WITH = ("student", "learning_rate", "weight_decay", "lr_schedule", "warmup_steps", "dropout")
"""A method's arguments that a checkpoint was trained with, beside those that it has and other methods have not."""

_TRAINED_ON = ("label_source", "train_fraction", "rationale_filter", "rationale_pairing", "seed")


@dataclass(frozen=True)
class Earlier:
    """An earlier run."""

    folder: Path
    checkpoint: Path | None
    """The newest undamaged one."""

    @property
    def finished(self) -> bool:
        """Whether it left its record."""
        return (self.folder / RECORD).exists()

    @property
    def changed(self) -> float:
        """When it last wrote something."""
        return (self.checkpoint or self.folder / _CONFIG).stat().st_mtime


def loggers_of(config: Namespace) -> list[Namespace]:
    """The loggers that a config asks for by their classes."""
    given = config["trainer"].get("logger")
    return [one for one in (given if isinstance(given, list) else [given]) if isinstance(one, Namespace)]


def fixed_folder(config: Namespace) -> Path | None:
    """The run's folder where the config says it; ``None`` where the logger counts its versions."""
    if config["checkpoint"]["dirpath"]:
        return Path(config["checkpoint"]["dirpath"]).parent
    return _fixed(loggers[0]) if (loggers := loggers_of(config)) else None


def _root(logger: Namespace) -> Path:
    arguments = logger.init_args
    name = arguments.get("name")
    if _is(logger, "WandbLogger"):
        name = arguments.get("project") or os.environ.get("WANDB_PROJECT", "lightning_logs")
    return Path(arguments.get("save_dir") or arguments.get("dir") or ".") / (name or "")


def _fixed(logger: Namespace) -> Path | None:
    version = logger.init_args.get("version")
    if version is None:
        return None
    return _root(logger) / (version if isinstance(version, str) else f"version_{version}")


def _is(logger: Namespace, name: str) -> bool:
    return str(logger.class_path).rpartition(".")[2] == name


def check_unused(config: Namespace, command: str) -> None:
    """Refuse a run that is not resumed and would overwrite an earlier one.

    Raises:
        UserError: its folder holds one; the line names the folder.
    """
    folder = fixed_folder(config)
    places = [(place, _METRICS) for one in loggers_of(config) if _is(one, "CSVLogger") and (place := _fixed(one))]
    if command == "fit" and folder is not None:
        places += [(folder, RECORD), (folder, _CONFIG)]
    for place, name in places:
        if (place / name).exists():
            finished = (place / RECORD).exists()
            kind = "a finished run" if finished else f"an earlier run ({name})"
            go_on = "" if finished or command != "fit" else "go on with it by --resume, or "
            raise UserError(f"{place}: holds {kind}; {go_on}move it away, or give another folder")


def newest_run(config: Namespace, plain: Mapping[str, Any]) -> Earlier | None:
    """The newest run of this very configuration.

    Args:
        config: what ``fit`` is given.
        plain: the same, as its ``config.yaml`` will say it.
    """
    wanted = _settings(plain)
    found: list[Earlier] = []
    others: dict[Path, str] = {}
    for folder in _folders(config):
        saved = _saved_settings(folder)
        keys = [key for key in {**wanted, **saved} if wanted.get(key) != saved.get(key)]
        if not keys:
            found.append(Earlier(folder, _newest_checkpoint(folder, config)))
        elif not (folder / RECORD).exists():
            others[folder] = ", ".join(sorted(keys)[:3])
    if found:
        return max(found, key=lambda earlier: earlier.changed)
    hint = ""
    if others:
        nearest = max(others, key=lambda folder: (folder / _CONFIG).stat().st_mtime)
        hint = f"; the unfinished {nearest} differs in {others[nearest]}"
    rank_zero_info(f"--resume: no earlier run of this configuration{hint}. A new one begins.")
    return None


def _folders(config: Namespace) -> list[Path]:
    if (fixed := fixed_folder(config)) is not None:
        folders = [fixed]
    elif loggers := loggers_of(config):
        root = _root(loggers[0])
        folders = sorted(root.iterdir()) if root.is_dir() else []
    else:
        folders = [Path(config["trainer"]["default_root_dir"] or ".")]
    return [folder for folder in folders if (folder / _CONFIG).is_file()]


def _settings(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in without_location(plain).items() if key not in _NOT_THE_RESULT}


def _saved_settings(folder: Path) -> dict[str, Any]:
    try:
        saved = parse_yaml((folder / _CONFIG).read_bytes())
    except ValueError as error:
        raise UserError(f"resume: {folder / _CONFIG} is damaged ({error}); move the run away") from error
    return _settings(saved if isinstance(saved, Mapping) else {})


def _newest_checkpoint(folder: Path, config: Namespace) -> Path | None:
    """The one of the latest step; a copied folder has other times."""
    whole: list[Path] = []
    for path in Path(config["checkpoint"]["dirpath"] or folder / "checkpoints").glob("*.ckpt"):
        try:
            find_checkpoint(path, None, required=True)
        except UserError as error:
            rank_zero_warn(f"--resume: passed over: {error}")
        else:
            whole.append(path)
    return max(whole, key=lambda path: (read_progress(path).get("global_step", 0), path.stat().st_mtime), default=None)


def read_progress(checkpoint: Path | None) -> dict[str, Any]:
    """What a checkpoint says of its run without its weights; empty where there is none, or a sharded one says nothing.

    They stay on the disk.
    """
    if checkpoint is not None and checkpoint.is_dir():
        checkpoint = checkpoint / "meta.pt"
    if checkpoint is None or not checkpoint.is_file():
        return {}
    return dict(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True))


def loggers_go_on(config: Namespace, folder: Path, progress: Mapping[str, Any]) -> None:
    """Have the loggers write where an earlier part of the run did, from its checkpoint's step on.

    Args:
        config: changed in place.
        folder: the run's.
        progress: what its checkpoint says.
    """
    loggers = loggers_of(config)
    versions = RunHistory.of(progress).get("versions", [])
    if len(versions) != len(loggers):
        # killed before its first checkpoint: the first logger's folder is the run's own
        own = folder.name.removeprefix("version_")
        versions = [] if config["checkpoint"]["dirpath"] else [int(own) if own.isdigit() else own]
    for logger, version in zip(loggers, versions, strict=False):
        if logger.init_args.get("version") is None:
            logger.init_args["version"] = version
        if _is(logger, "TensorBoardLogger"):
            # it hides later steps
            logger["dict_kwargs"] = {**(logger.get("dict_kwargs") or {}), "purge_step": progress.get("global_step", 0)}


class Metrics(ExperimentWriter):
    """``metrics.csv`` of a run that goes on, where Lightning's own writer deletes an earlier one.

    Args:
        log_dir: its folder.
        steps: optimizer steps up to which its rows are kept.
    """

    def __init__(self, log_dir: str, steps: int) -> None:
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        # a killed process may have left half a row
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        reader = csv.DictReader(line for line in lines if line.endswith("\n"))
        rows = [row for row in reader if (row["step"] or "").isdigit() and int(row["step"]) < steps]
        self.metrics_keys = list(reader.fieldnames or ()) if rows else []
        path.unlink(missing_ok=True) if not rows else self._write(rows, self.metrics_keys)

    def _check_log_dir_exists(self) -> None:
        """Keep the files of the run's earlier parts."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with Path(self.metrics_file_path).open(encoding="utf-8", newline="") as file:
            self._write(list(csv.DictReader(file)), fieldnames)

    def _write(self, rows: list[dict[str, Any]], names: list[str]) -> None:
        with atomic_write(self.metrics_file_path) as file:
            writer = csv.DictWriter(file, fieldnames=names)
            writer.writeheader()
            writer.writerows(rows)


@rank_zero_only
def keep_metrics(loggers: Sequence[Logger], progress: Mapping[str, Any]) -> None:
    """Have CSV loggers go on after the rows up to a checkpoint's step."""
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            logger._experiment = Metrics(logger.log_dir, progress.get("global_step", 0))


def check_same_training(config: Namespace, method: type[DistillModule], progress: Mapping[str, Any]) -> None:
    """Refuse arguments that contradict those which the checkpoint to resume from was trained with.

    Raises:
        UserError: names an argument that contradicts the checkpoint.
    """
    dataset, trained = RunHistory.of(progress).get("dataset"), progress.get("hyper_parameters", {})
    if dataset not in (None, wanted := str(config["data"]["class_path"]).rpartition(".")[2]):
        _contradicts("data", dataset, wanted)
    given = method.init_settings(config["model"]["init_args"].as_dict())
    base = DistillModule.init_settings({})
    own = [name for name in trained if name in given and name not in base and not name.endswith("_prefix")]
    pairs = [("model", name, trained, given) for name in (*_TRAINED_WITH, *own)]
    rows = config["data"]["init_args"].as_dict()
    pairs += [("data", name, progress.get("datamodule_hyper_parameters", {}), rows) for name in _TRAINED_ON]
    for group, name, before, now in pairs:
        # of an object a checkpoint has the name alone
        if name not in before or isinstance(now.get(name, {}), Mapping) or now[name] == before[name]:
            continue
        old, new = before[name], now[name]
        if name == "student":
            old, new = Path(str(old)).name, Path(str(new)).name
            if old == new or new.endswith(".ckpt"):
                continue
        _contradicts(f"{group}.{name}", old, new)
    seed, drawn = config["seed_everything"], progress.get("lit_distill_seed")
    if drawn is not None and not isinstance(seed, bool) and seed != drawn:
        _contradicts("seed_everything", drawn, seed)


def _contradicts(key: str, old: object, new: object) -> None:
    raise UserError(
        f"{key}: the checkpoint was trained with {old}, got {new}; leave it as it was, or begin another run from the"
        " checkpoint's weights: --model.student CHECKPOINT in place of --ckpt_path"
    )


@rank_zero_only
def say_finished(folder: Path) -> None:
    """Say that the run is finished, for a job that is started again."""
    print(f"--resume: this run is finished: {folder}")
