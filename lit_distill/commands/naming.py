"""Names of runs, and the folders of their files."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_distill.comparison.settings import FRACTION, LABELS, PAIRING, STUDENT, WEIGHT, identifying
from lit_distill.files import flatten


def names(config: Namespace) -> tuple[str, str]:
    """The dataset and method in a run's name; each round of ANLI is a dataset."""
    data, model = config["data"], config["model"]
    dataset = data["class_path"].rpartition(".")[2].removesuffix("DataModule").lower()
    part = (data.get("init_args") or Namespace()).get("round", "")
    return f"{dataset}{part}", model["class_path"].rpartition(".")[2].removesuffix("Module")


def run_name(config: Namespace) -> str:
    """A run's name, which is also its folder's."""
    arguments = config["data"].get("init_args") or Namespace()
    source, fraction = arguments.get("label_source", "gold"), arguments.get("train_fraction", 1.0)
    return f"{'-'.join(names(config))}-{source}-{fraction:g}-seed{config['seed_everything']}"


def wandb_naming(config: Namespace) -> dict[str, Any]:
    """Name, group and tags of a run in W&B.

    Runs of a group differ in their seeds alone. The group's name has the main settings and a hash of all settings that
    a comparison distinguishes.
    """
    known = identifying({key: value for key, value in config.as_dict().items() if key != "config"})
    dataset, method = names(config)
    student = Path(known.get(STUDENT, "")).name
    source, fraction = known.get(LABELS, "gold"), float(known.get(FRACTION, 1))
    weight = known.get(WEIGHT, "1")
    odd = [f"weight{weight}"] * (weight != "1") + ["shuffled"] * (known.get(PAIRING) == "shuffled")
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:8]
    group = "-".join([dataset, method, source, f"{fraction:g}", student[:60], *odd, digest])
    seed = config["seed_everything"]
    tags = [dataset, method, student, f"{source} labels", f"fraction {fraction:g}", *odd, f"seed {seed}"]
    return {"name": f"{group}-seed{seed}", "group": group, "tags": [tag[:64] for tag in tags]}


def name_loggers(config: Namespace, job_type: str) -> None:
    """Give unnamed loggers the run's name, in place, and add a CSV logger if there is none.

    Args:
        config: of a command.
        job_type: the command, for W&B.
    """
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


def plain_config(config: Namespace) -> dict[str, Any]:
    """A config with dotted keys and plain values, for loggers."""
    flat = flatten(config.as_dict())
    return {key: value if isinstance(value, int | float | bool | None) else str(value) for key, value in flat.items()}


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
