"""Checks of a parsed config: bounds, contradictions, and data arguments set by the model."""

from typing import Any

import torch
from jsonargparse import Namespace
from jsonargparse._link_arguments import skip_apply_links
from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.checks import check_range
from lit_distill.commands.parser import import_class
from lit_distill.errors import UserError
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


def check_settings(config: Namespace) -> None:
    """Check bounds beyond types. Raises a ``UserError`` that names the key, its bounds and the value."""
    for group in ("trainer", "validation", "checkpoint"):
        if not isinstance(config[group], Namespace):
            raise UserError(f"{group}: got {config[group]!r}; allowed is a mapping of the keys that --help lists")
    for name, bounds in _BOUNDS.items():
        if isinstance(value := config["trainer"][name], int | float):
            check_range(f"trainer.{name}", value, **bounds)
    check_range("seed_everything", config["seed_everything"], at_least=0, below=2**32)


def settle(config: Namespace, command: str) -> None:
    """Check combinations of keys, and set derived ones, in place. Raises a ``UserError`` that names the key."""
    trainer, fit = config["trainer"], command == "fit"
    check_range("cpu_threads", config["cpu_threads"], at_least=1, below=1025, whole=True)
    if config["baseline_after_fit"] and not config["test_after_fit"]:
        raise UserError("baseline_after_fit needs test_after_fit: the two are compared on test")
    unbound = [name for name in ("max_steps", "max_epochs") if trainer[name] in (None, -1)]
    for name in {"max_steps", "max_epochs"} - {*unbound}:
        if fit:
            check_range(f"trainer.{name}", trainer[name], at_least=1, below=2**31, whole=True)
    if fit and len(unbound) == 2 and trainer["max_time"] is None:
        raise UserError("trainer.max_steps: -1 needs trainer.max_epochs or trainer.max_time, or fit never ends")
    if not fit and config["ckpt_path"] is None:
        model = config["model"]["init_args"]
        if model.get("from_scratch"):
            raise UserError(
                f"ckpt_path: {command} would score random weights, which model.from_scratch asks for; give"
                " ckpt_path, or a student that has weights and from_scratch: false"
            )
        rank_zero_info(f"No ckpt_path: {command} takes the student {model.get('student')!r} as it is.")
    if config.get("verbose") is not None:
        # our table of metrics, with intervals, replaces Lightning's
        config["verbose"] = False
    if config.get("weights_only") is None:
        # our checkpoints have plain data only; anything else would be code to run
        config["weights_only"] = True
    if trainer["val_check_interval"] is not None:
        # an explicit interval of Lightning wins
        config["validation"]["every_n_steps"] = None
    if config["cpu_threads"] is not None:
        torch.set_num_threads(config["cpu_threads"])


def refuse_overruled(parser: LightningArgumentParser, args: ArgsType, config: Namespace) -> None:
    """Refuse data arguments that the model sets. Raises a ``UserError`` that names the argument."""
    if (model := config.get("model")) is None:
        return
    parse: Any = parser.parse_object if isinstance(args, dict | Namespace) else parser.parse_args
    with skip_apply_links():
        given = parse(args, defaults=False)
    given = given if "subcommand" not in given else given[given["subcommand"]]
    settings = (given.get("data") or Namespace()).get("init_args") or Namespace()
    for name, value in linked(model).items():
        if settings.get(name) not in (None, value):
            raise UserError(f"data.{name}: {settings[name]!r} is decided by the model, as {value!r}; leave it out")


def linked_tasks(class_path: str, init_args: Namespace | None = None) -> dict[str, Any]:
    """The tasks of a method given by name, in plain types."""
    method: type[DistillModule] = import_class(class_path)
    settings = init_args.as_dict() if isinstance(init_args, Namespace) else init_args or {}
    return {name: task.plain() for name, task in method.all_tasks(settings).items()}


def linked(model: Namespace) -> dict[str, Any]:
    """The data arguments that a method given by name sets."""
    settings = model.get("init_args") or Namespace()
    return {"tokenizer": settings.get("student"), "tasks": linked_tasks(model["class_path"], settings)}
