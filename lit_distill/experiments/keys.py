"""The keys of a grid: short names for the keys of ``fit``, and configs that are put together from them."""

import copy
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

ALIASES: Mapping[str, tuple[str, ...]] = {
    "method": ("model.class_path",),
    "student": ("model.init_args.student",),
    "dataset": ("data.class_path",),
    "train_fraction": ("data.init_args.train_fraction",),
    "label_source": ("data.init_args.label_source",),
    "rationales": ("data.init_args.rationale_pairing",),
    "rationale_weight": ("model.init_args.rationale_weight",),
    "seed": ("seed_everything", "data.init_args.seed"),
}
"""Short name -> the keys of ``fit`` that it sets."""

OWN = ("checkpoint.dirpath", "ckpt_path", "resume", "trainer.logger")
"""Keys that decide where a run lies: the experiment's."""

Accepts = Callable[[str], Collection[str] | None]
"""``class path -> names of its arguments``; ``None`` for a class that is not known."""

_GROUPS = ("model", "data")
_OURS = r"lit_distill\.modules\.(?:[a-z0-9_]+\.)?(?=[A-Z]\w*$)"
"""The package, or a module of it, before a class."""


def canonical(key: str) -> str:
    """A key by its short name, where it has one; else as a config has it (``data.seed``: ``data.init_args.seed``)."""
    group, dot, rest = key.partition(".")
    if dot and group in _GROUPS and rest.partition(".")[0] not in ("class_path", "init_args", "dict_kwargs"):
        key = f"{group}.init_args.{rest}"
    return next((alias for alias, targets in ALIASES.items() if targets == (key,)), key)


def targets(key: str) -> tuple[str, ...]:
    """The keys of ``fit`` that a canonical key sets."""
    return ALIASES.get(key, (key,))


def canonical_value(key: str, value: Any) -> Any:  # noqa: ANN401 - whatever YAML holds
    """A value as it is compared and named: methods in snake case (``StepByStepModule``: ``step_by_step``)."""
    if key != "method" or not isinstance(value, str):
        return value
    bare = re.sub(rf"^{_OURS}", "", value)
    if re.fullmatch(r"([A-Z][a-z0-9]+)+Module", bare):
        return re.sub(r"(?<!^)(?=[A-Z])", "_", bare.removesuffix("Module")).lower()
    return bare


def config_value(key: str, value: Any) -> Any:  # noqa: ANN401
    """A canonical value as ``fit`` takes it."""
    return _method_class(value) if key == "method" and isinstance(value, str) else value


def _method_class(method: str) -> str:
    """``step_by_step``: ``StepByStepModule``; a class's name or import path stays as it is."""
    if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", method):
        return method
    return "".join(word.capitalize() for word in method.split("_")) + "Module"


def settings(point: Mapping[str, Any]) -> dict[str, Any]:
    """Canonical keys with values as a nested config of its own: no key is a part of another's path."""
    config: dict[str, Any] = {}
    for key, value in point.items():
        for target in targets(key):
            *path, last = target.split(".")
            place = config
            for name in path:
                place = place.setdefault(name, {})
            place[last] = copy.deepcopy(config_value(key, value))
    return config


def merge(base: Mapping[str, Any], over: Mapping[str, Any], accepts: Accepts) -> dict[str, Any]:
    """A config with another one laid over it, as ``fit`` composes them.

    Where a class takes another one's place, those arguments go with the old one that the new one does not take.

    Args:
        base: a nested config.
        over: what wins.
        accepts: the arguments of a class.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if key in _GROUPS and isinstance(old, str):
            old = {"class_path": old}
        if not isinstance(old, Mapping) or not isinstance(value, Mapping):
            # a name alone is a class without arguments
            merged[key] = {"class_path": value} if key in _GROUPS and isinstance(value, str) else value
            continue
        arguments = old.get("init_args")
        if "class_path" in value and value["class_path"] != old.get("class_path") and isinstance(arguments, Mapping):
            taken = accepts(str(value["class_path"])) or ()
            old = {**old, "init_args": {name: given for name, given in arguments.items() if name in taken}}
        merged[key] = merge(old, value, accepts)
    return merged


def without_own(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the keys that decide where its run lies."""
    kept = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    for key in OWN:
        group, _, name = key.rpartition(".")
        place = kept.get(group) if group else kept
        if isinstance(place, dict):
            place.pop(name, None)
            if group and not place:
                del kept[group]
    return kept


def flattened(given: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What a grid file says, by dotted keys: ``{model: {a: 1}, model.b: 2}`` are ``model.a`` and ``model.b``.

    A class by its name alone (``model: StandardModule``) is its ``class_path``. A key may be there twice.
    """
    flat: list[tuple[str, Any]] = []
    for key, value in given.items():
        if isinstance(value, Mapping) and value and all(isinstance(name, str) and name for name in value):
            flat += flattened({f"{key}.{name}": one for name, one in value.items()})
        else:
            flat.append((f"{key}.class_path" if key in _GROUPS and not isinstance(value, Mapping) else key, value))
    return flat
