"""A parsed config and its checks: bounds, contradictions, and data arguments set by the model."""

import re
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from jsonargparse import Namespace
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.checks import check_range
from lit_distill.commands.parser import Parser
from lit_distill.data import CorpusDataModule
from lit_distill.errors import UserError
from lit_distill.modules import SpanCorruptionModule
from lit_distill.modules.base import DistillModule

_BOUNDS: dict[str, dict[str, Any]] = {
    "accumulate_grad_batches": {"at_least": 1},
    "num_nodes": {"at_least": 1, "below": 2**16},
    "val_check_interval": {"above": 0},
    "check_val_every_n_epoch": {"above": 0},
    "log_every_n_steps": {"at_least": 0},
    "gradient_clip_val": {"at_least": 0},
}
"""Bounds of trainer arguments beyond their types."""


def parse_settings(parser: Parser, given: list[str] | Mapping[str, Any]) -> Namespace:
    """Parse arguments or a config; check bounds beyond types, and that nothing is given that the model sets."""
    parse: Any = parser.parse_args if isinstance(given, list) else parser.parse_object
    config: Namespace = parse(given)
    for group in ("trainer", "validation", "checkpoint"):
        if not isinstance(config[group], Namespace):
            raise UserError(f"{group}: got {config[group]!r}; allowed is a mapping of the keys that --help lists")
    for name, bounds in _BOUNDS.items():
        if isinstance(value := config["trainer"][name], int | float):
            check_range(f"trainer.{name}", value, **bounds)
    check_range("seed_everything", config["seed_everything"], at_least=0, below=2**32)
    check_range("cpu_threads", config["cpu_threads"], at_least=1, below=1025, whole=True)
    if (model := config.get("model")) is None:
        return config
    if config.get("data") is not None and _is(model, SpanCorruptionModule) != reads_corpus(config):
        raise UserError(
            f"data: {_name(model)} cannot be trained on {_name(config['data'])}: a corpus is for SpanCorruptionModule,"
            " and that for CorpusDataModule alone"
        )
    settings = (parser.unlinked.get("data") or Namespace()).get("init_args") or Namespace()
    for name, value in linked(model).items():
        if settings.get(name) not in (None, value):
            raise UserError(f"data.{name}: {settings[name]!r} is decided by the model, as {value!r}; leave it out")
    return config


def reads_corpus(config: Namespace) -> bool:
    """Whether the data is a corpus."""
    return _is(config["data"], CorpusDataModule)


def _is(given: Namespace, base: type) -> bool:
    return issubclass(resolve_name(given["class_path"]), base)


def _name(given: Namespace) -> str:
    return str(given["class_path"]).rpartition(".")[2]


def settle(config: Namespace, command: str) -> None:
    """Check combinations of keys, and set derived ones, in place. Raises a ``UserError`` that names the key."""
    trainer, fit = config["trainer"], command == "fit"
    if reads_corpus(config):
        if config["baseline_after_fit"]:
            raise UserError("baseline_after_fit: not with a corpus, which has no labels")
        config["test_after_fit"] = False
        if config["checkpoint"]["monitor"] == "val/accuracy":
            config["checkpoint"].update(Namespace(monitor="val/loss", mode="min"))
        _check_monitors(config)
    if config["baseline_after_fit"] and not config["test_after_fit"]:
        raise UserError("baseline_after_fit needs test_after_fit: the two are compared on test")
    bounded = [name for name in ("max_steps", "max_epochs") if trainer[name] not in (None, -1)]
    for name in bounded if fit else ():
        check_range(f"trainer.{name}", trainer[name], at_least=1, below=2**31, whole=True)
    if fit and not bounded and trainer["max_time"] is None and config["max_tokens"] is None:
        raise UserError(
            "trainer.max_steps: -1 needs trainer.max_epochs, trainer.max_time or max_tokens, or fit never ends"
        )
    if not fit and config["ckpt_path"] is None:
        model = config["model"]["init_args"]
        if model.get("from_scratch"):
            raise UserError(
                f"ckpt_path: {command} would score random weights, which model.from_scratch asks for; give"
                " ckpt_path, or a student that has weights and from_scratch: false"
            )
        rank_zero_info(f"No ckpt_path: {command} takes the student {model.get('student')!r} as it is.")
    if trainer["val_check_interval"] is not None:
        # an explicit interval of Lightning wins
        config["validation"]["every_n_steps"] = None


def _check_monitors(config: Namespace) -> None:
    """Raise a ``UserError`` for a callback that waits for what reading does not log."""
    if resolve_name(config["model"]["class_path"]) is not SpanCorruptionModule:
        # a subclass may log more
        return
    callbacks = config["trainer"]["callbacks"] or []
    monitors = {"checkpoint": config["checkpoint"]["monitor"]}
    for one in callbacks if isinstance(callbacks, list) else [callbacks]:
        monitors[f"trainer.callbacks: {_name(one)}"] = (one.get("init_args") or Namespace()).get("monitor")
    for key, monitor in monitors.items():
        if monitor is not None and not re.fullmatch(r"train/.+|val/(.+_)?loss|val/perplexity|step|epoch", monitor):
            raise UserError(
                f"{key}: no {monitor} is logged on a corpus, which has no labels; monitor val/loss, with mode: min"
            )


def linked_tasks(class_path: str, init_args: Namespace | None = None) -> dict[str, Any]:
    """The tasks of a method given by name, in plain types."""
    method: type[DistillModule] = resolve_name(class_path)
    settings = init_args.as_dict() if isinstance(init_args, Namespace) else init_args or {}
    return {name: task.plain() for name, task in method.all_tasks(settings).items()}


def linked(model: Namespace) -> dict[str, Any]:
    """The data arguments that a method given by name sets."""
    settings = model.get("init_args") or Namespace()
    return {"tokenizer": settings.get("student"), "tasks": linked_tasks(model["class_path"], settings)}


def fabric_of(config: Namespace, **settings: Any) -> Fabric:
    """The trainer's devices. Raises a ``UserError`` if they are not there."""
    try:
        fabric = Fabric(accelerator=config["trainer"]["accelerator"], **settings)
        fabric.launch()
    except (MisconfigurationException, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"trainer: {error}") from error
    return fabric
