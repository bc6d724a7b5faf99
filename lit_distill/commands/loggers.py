"""The name of a run, its folder, and its loggers, which go on where a resumed run does."""

import csv
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from lit_distill.checkpoints import RunHistory
from lit_distill.commands.settings import reads_corpus
from lit_distill.comparison.settings import identifying
from lit_distill.files import atomic_write

METRICS = "metrics.csv"


def names(config: Namespace) -> tuple[str, str]:
    """The dataset and method in a run's name; each round of ANLI is a dataset."""
    data, model = config["data"], config["model"]
    dataset = data["class_path"].rpartition(".")[2].removesuffix("DataModule").lower()
    part = (data.get("init_args") or Namespace()).get("round", "")
    return f"{dataset}{part}", model["class_path"].rpartition(".")[2].removesuffix("Module")


def _setting(config: Namespace) -> list[str]:
    arguments = config["data"].get("init_args") or Namespace()
    if reads_corpus(config):
        # which has no labels
        return [*names(config)]
    fraction = f"{arguments.get('train_fraction', 1.0):.15g}"
    return [*names(config), arguments.get("label_source", "gold"), fraction]


def run_name(config: Namespace) -> str:
    """A run's name, which is also its folder's."""
    return "-".join([*_setting(config), f"seed{config['seed_everything']}"])


def wandb_naming(config: Namespace) -> dict[str, Any]:
    """Name, group and tags of a run in W&B.

    Runs of a group differ in their seeds alone: its name ends in a hash of all settings that a comparison tells apart.
    """
    settings = identifying({key: value for key, value in config.as_dict().items() if key != "config"})
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    student, seed = Path(str(config["model"]["init_args"]["student"])).name, config["seed_everything"]
    dataset, method, *rest = _setting(config)
    group = "-".join([dataset, method, *rest, student[:60], digest])
    told = [f"{rest[0]} labels", f"fraction {rest[1]}"] if rest else []
    tags = [dataset, method, student, *told, f"seed {seed}"]
    return {"name": f"{group}-seed{seed}", "group": group, "tags": [tag[:64] for tag in tags]}


def name_loggers(config: Namespace, job_type: str) -> None:
    """Give unnamed loggers the run's name, in place, and add a CSV logger if there is none; W&B has job types, too."""
    trainer = config["trainer"]
    if trainer.get("logger") is True or trainer.get("logger") is None:
        arguments: dict[str, Any] = {"name": None, "version": None, "prefix": "", "flush_logs_every_n_steps": 100}
        arguments["save_dir"] = str(Path(trainer["default_root_dir"] or "") / "runs")
        own = Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=Namespace(arguments))
        trainer["logger"] = [own]
    for logger in loggers_of(config):
        naming = wandb_naming(config) if is_logger(logger, "WandbLogger") else {"name": run_name(config)}
        name = naming.pop("name")
        if logger.init_args.get("name") in (None, "lightning_logs"):
            logger.init_args["name"] = name
        if naming:
            logger["dict_kwargs"] = {**naming, "job_type": job_type} | dict(logger.get("dict_kwargs") or {})


def loggers_of(config: Namespace) -> list[Namespace]:
    """The loggers of a config, by their classes."""
    given = config["trainer"].get("logger")
    return [one for one in (given if isinstance(given, list) else [given]) if isinstance(one, Namespace)]


def is_logger(logger: Namespace, name: str) -> bool:
    """Whether a logger's class has this name."""
    return str(logger.class_path).rpartition(".")[2] == name


def logger_root(logger: Namespace) -> Path:
    """The folder in which a logger creates a folder per run."""
    arguments = logger.init_args
    name = arguments.get("name")
    if is_logger(logger, "WandbLogger"):
        name = arguments.get("project") or os.environ.get("WANDB_PROJECT", "lightning_logs")
    return Path(arguments.get("save_dir") or arguments.get("dir") or ".") / (name or "")


def logger_folder(logger: Namespace) -> Path | None:
    """A logger's folder for a run of fixed version; ``None`` if it counts versions."""
    version = logger.init_args.get("version")
    if version is None:
        return None
    return logger_root(logger) / (version if isinstance(version, str) else f"version_{version}")


def fixed_folder(config: Namespace) -> Path | None:
    """The run's folder if the config determines it; ``None`` if the logger counts versions."""
    if config["checkpoint"]["dirpath"]:
        return Path(config["checkpoint"]["dirpath"]).parent
    return logger_folder(loggers[0]) if (loggers := loggers_of(config)) else None


def run_folder(trainer: pl.Trainer) -> Path:
    """A run's folder: the one above its checkpoints, else the logger's."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return Path(callback.dirpath).parent
    return Path(trainer.log_dir or trainer.default_root_dir)


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


class _Continued(ExperimentWriter):
    """Writes ``metrics.csv``, and keeps the rows of earlier parts."""

    def _check_log_dir_exists(self) -> None:
        # Lightning's deletes them
        pass


@rank_zero_only
def keep_metrics(loggers: Sequence[Logger], steps: int) -> None:
    """Let CSV loggers go on after so many optimizer steps; rows of later ones are taken out."""
    for logger in loggers:
        if not isinstance(logger, CSVLogger):
            continue
        logger._experiment = writer = _Continued(logger.log_dir)
        path = Path(logger.log_dir, METRICS)
        if path.is_file():
            # a killed process may leave an incomplete row
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            reader = csv.DictReader(line for line in lines if line.endswith("\n"))
            rows = [row for row in reader if (row["step"] or "").isdigit() and int(row["step"]) < steps]
            writer.metrics_keys = list(reader.fieldnames or ())
            with atomic_write(path) as file:
                table = csv.DictWriter(file, fieldnames=writer.metrics_keys)
                table.writeheader()
                table.writerows(rows)
