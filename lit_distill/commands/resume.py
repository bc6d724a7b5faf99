"""``--resume`` and ``--ckpt_path``: find the run and checkpoint to resume, and rewind its loggers."""

import csv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from lit_distill.checkpoints import RunHistory
from lit_distill.commands.naming import fixed_folder, is_logger, logger_folder, logger_root, loggers_of
from lit_distill.errors import UserError
from lit_distill.experiments.grid import without_location
from lit_distill.files import atomic_write
from lit_distill.modules.base import DistillModule
from lit_distill.reading import parse_yaml
from lit_distill.records import RECORD
from lit_distill.students import read_config

_CONFIG = "config.yaml"
_METRICS = "metrics.csv"

_NOT_THE_RESULT = {
    "resume", "predictions", "trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.enable_model_summary",
}  # fmt: skip
"""Keys without effect on results, besides those of the location."""

_TRAINED_WITH = ("student", "learning_rate", "weight_decay", "lr_schedule", "warmup_steps", "dropout", "dtype")
"""Method arguments that must match the checkpoint."""

_TRAINED_ON = ("label_source", "train_fraction", "rationale_filter", "rationale_pairing", "seed")


def find_checkpoint(path: str | Path | None, folder: str | None, *, required: bool) -> str | Path | None:
    """Check a checkpoint path: a file, a (sharded) folder, or ``last`` in ``folder``.

    Unless ``required``, a run without ``last`` starts from the beginning.

    Raises:
        UserError: there is none.
    """
    if path is None or path in ("hpc", "registry") or str(path).startswith("registry:"):
        return path
    if "://" in str(path):
        raise UserError(f"ckpt_path: {str(path)!r} is elsewhere; copy the file here first")
    if path == "last":
        last = None if folder is None else Path(folder) / "last.ckpt"
        if last is not None and last.exists():
            check_whole(last)
            return str(last)
        if required or last is None:
            where = "needs checkpoint.dirpath" if last is None else f"there is no {last}"
            raise UserError(f"ckpt_path: 'last' {where}; fit --resume finds the run by itself")
        return None
    file, fault = Path(path), None
    if not file.exists():
        raise UserError(f"ckpt_path: no checkpoint {str(path)!r}; {_ALLOWED}")
    if file.is_dir():
        # the files of FSDP's and of DeepSpeed's sharded checkpoints
        if not any((file / name).exists() for name in ("meta.pt", "latest")):
            fault = "is a folder, and no sharded checkpoint"
    elif file.suffix != ".ckpt":
        fault = "does not end in .ckpt"
    else:
        check_whole(file)
        try:
            read_config(path)
        except UserError as error:
            fault = f"is no checkpoint of lit_distill ({error})"
    if fault is not None:
        raise UserError(f"ckpt_path: {str(path)!r} {fault}; {_ALLOWED}")
    return path


_ALLOWED = "allowed is a file of a run's checkpoints, or 'last' with checkpoint.dirpath"


def check_whole(path: Path) -> None:
    """Raise a ``UserError``, with the newest complete file, if a checkpoint is incomplete or its checksums differ."""
    if (damage := _damage(path)) is None:
        return
    others = sorted(path.parent.glob("*.ckpt"), key=lambda other: other.stat().st_mtime, reverse=True)
    whole = next((other for other in others if _damage(other) is None), None)
    advice = "no other in its folder is whole" if whole is None else f"the newest that is whole: --ckpt_path {whole}"
    raise UserError(f"ckpt_path: {str(path)!r} is damaged ({damage}); {advice}")


def _damage(path: Path) -> str | None:
    if path.is_dir():
        return None
    try:
        with zipfile.ZipFile(path) as file:
            part = file.testzip()
    except (zipfile.BadZipFile, RuntimeError, EOFError):
        # its index is at the end
        return f"cut off at {path.stat().st_size} bytes"
    return None if part is None else f"{part} is not what was written"


def best_checkpoint(trainer: pl.Trainer) -> Path | None:
    """The best checkpoint of a run; ``None`` if there is none."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            # for a resumed run it may be elsewhere, or gone
            found = Path(callback.best_model_path)
            return found if found.exists() else None
    return None


def read_progress(checkpoint: str | Path | None) -> dict[str, Any]:
    """The progress in a checkpoint, without loading weights; empty if there is none."""
    if checkpoint is not None and Path(checkpoint).is_dir():
        checkpoint = Path(checkpoint) / "meta.pt"
    if checkpoint is None or not Path(checkpoint).is_file():
        return {}
    return dict(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True))


def check_unused(config: Namespace, command: str) -> None:
    """Refuse to overwrite an earlier run. Raises a ``UserError`` that names its folder."""
    csv_folders = [logger_folder(logger) for logger in loggers_of(config) if is_logger(logger, "CSVLogger")]
    places = [(folder, _METRICS) for folder in csv_folders]
    if command == "fit":
        places += [(fixed_folder(config), name) for name in (RECORD, _CONFIG)]
    for folder, name in places:
        if folder is not None and (folder / name).exists():
            finished = (folder / RECORD).exists()
            kind = "a finished run" if finished else f"an earlier run ({name})"
            go_on = "" if finished or command != "fit" else "go on with it by --resume, or "
            raise UserError(f"{folder}: holds {kind}; {go_on}move it away, or give another folder")


def newest_run(config: Namespace, plain: Mapping[str, Any]) -> tuple[Path, Path | None] | None:
    """Folder and newest intact checkpoint of the newest run with this configuration.

    ``plain`` is the configuration as in ``config.yaml``.
    """
    wanted = _settings(plain)
    found: list[tuple[Path, Path | None]] = []
    others: dict[Path, str] = {}
    for folder in _folders(config):
        try:
            content = parse_yaml((folder / _CONFIG).read_bytes())
        except ValueError as error:
            raise UserError(f"resume: {folder / _CONFIG} is damaged ({error}); move the run away") from error
        saved = _settings(content if isinstance(content, Mapping) else {})
        keys = [key for key in {**wanted, **saved} if wanted.get(key) != saved.get(key)]
        if not keys:
            found.append((folder, _newest_checkpoint(folder, config)))
        elif not (folder / RECORD).exists():
            others[folder] = ", ".join(sorted(keys)[:3])
    if found:
        return max(found, key=lambda run: (run[1] or run[0] / _CONFIG).stat().st_mtime)
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
        folders = sorted(logger_root(loggers[0]).glob("*"))
    else:
        folders = [Path(config["trainer"]["default_root_dir"] or ".")]
    return [folder for folder in folders if (folder / _CONFIG).is_file()]


def _settings(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in without_location(plain).items() if key not in _NOT_THE_RESULT}


def _newest_checkpoint(folder: Path, config: Namespace) -> Path | None:
    """The checkpoint of the latest step, as times change when a folder is copied."""
    whole: list[Path] = []
    for path in Path(config["checkpoint"]["dirpath"] or folder / "checkpoints").glob("*.ckpt"):
        try:
            find_checkpoint(path, None, required=True)
            whole.append(path)
        except UserError as error:
            rank_zero_warn(f"--resume: passed over: {error}")
    return max(whole, key=lambda path: (read_progress(path).get("global_step", 0), path.stat().st_mtime), default=None)


def check_same_training(config: Namespace, method: type[DistillModule], progress: Mapping[str, Any]) -> None:
    """Refuse arguments that contradict the checkpoint. Raises a ``UserError`` that names the first."""
    trained = progress.get("hyper_parameters", {})
    given = method.init_settings(config["model"]["init_args"].as_dict())
    base = DistillModule.init_settings({})
    own = [name for name in trained if name in given and name not in base and not name.endswith("_prefix")]
    rows, read = config["data"]["init_args"].as_dict(), progress.get("datamodule_hyper_parameters", {})
    dataset, seed = str(config["data"]["class_path"]).rpartition(".")[2], config["seed_everything"]
    pairs: list[tuple[str, Any, Any]] = [
        ("data", RunHistory.of(progress).get("dataset") or dataset, dataset),
        *((f"model.{name}", trained[name], given.get(name, {})) for name in (*_TRAINED_WITH, *own) if name in trained),
        *((f"data.{name}", read[name], rows.get(name, {})) for name in _TRAINED_ON if name in read),
    ]
    if (drawn := progress.get("lit_distill_seed")) is not None and not isinstance(seed, bool):
        pairs.append(("seed_everything", drawn, seed))
    if "objectives" in trained:
        pairs.append(("model.objectives", _objectives(trained["objectives"]), _objectives(given["objectives"])))
    for key, before, now in pairs:
        if key == "model.student":
            before, now = Path(str(before)).name, Path(str(now)).name
        # the checkpoint has only the name of an object
        if now != before and not isinstance(now, Mapping) and not (key == "model.student" and now.endswith(".ckpt")):
            raise UserError(
                f"{key}: the checkpoint was trained with {before}, got {now}; leave it as it was, or begin another run"
                " from the checkpoint's weights: --model.student CHECKPOINT in place of --ckpt_path"
            )


def _objectives(listed: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Objectives by class name, with their plain settings."""
    found = []
    for one in listed or ():
        settings = {
            name: value for name, value in (one.get("init_args") or {}).items() if isinstance(value, int | float | str)
        }
        found.append({"class": one["class_path"].rpartition(".")[2]} | settings)
    return found


def continue_loggers(config: Namespace, folder: Path, progress: Mapping[str, Any]) -> None:
    """Change a config in place: loggers continue in the run's folder, from its checkpoint's step."""
    loggers = loggers_of(config)
    versions = RunHistory.of(progress).get("versions", [])
    if len(versions) != len(loggers):
        # no checkpoint yet: use the first logger's folder
        own = folder.name.removeprefix("version_")
        versions = [] if config["checkpoint"]["dirpath"] else [int(own) if own.isdigit() else own]
    for logger, version in zip(loggers, versions, strict=False):
        if logger.init_args.get("version") is None:
            logger.init_args["version"] = version
        if is_logger(logger, "TensorBoardLogger"):
            # it hides later steps
            logger["dict_kwargs"] = {**(logger.get("dict_kwargs") or {}), "purge_step": progress.get("global_step", 0)}


class Metrics(ExperimentWriter):
    """``metrics.csv`` of a resumed run; Lightning's own writer would delete it.

    Args:
        log_dir: its folder.
        steps: keep rows up to this optimizer step.
    """

    def __init__(self, log_dir: str, steps: int) -> None:
        super().__init__(log_dir)
        path = Path(self.metrics_file_path)
        # a killed process may leave an incomplete row
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        reader = csv.DictReader(line for line in lines if line.endswith("\n"))
        rows = [row for row in reader if (row["step"] or "").isdigit() and int(row["step"]) < steps]
        self.metrics_keys = list(reader.fieldnames or ()) if rows else []
        path.unlink(missing_ok=True) if not rows else self._write(rows, self.metrics_keys)

    def _check_log_dir_exists(self) -> None:
        """Keep the files of earlier parts."""

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
    """Make CSV loggers continue after the checkpoint's step."""
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            logger._experiment = Metrics(logger.log_dir, progress.get("global_step", 0))
