"""A grid file: existing configs, what is set in all cells, and what varies.

.. code-block:: yaml

    base: configs/cqa/step_by_step.yaml     # one config of fit, or a list that is composed in its order
    out: runs/mine                          # the cells' folder
    set: {trainer.max_steps: 5000}          # in all cells
    grid:                                   # every combination is a cell
      train_fraction: [0.25, 1.0]
      seed: [0, 1, 2, 3]                    # seed_everything and data.seed
    cells:                                  # if given, each of these with every combination of the grid
      - {method: standard}
      - {method: step_by_step, rationale_weight: 0.5}
    when:                                   # set where all of `if` holds; a list there means one of them
      - if: {method: step_by_step, train_fraction: [1.0]}
        set: {model.warmup_steps: 100}

Keys are those of ``fit``, or the short ones of `ALIASES`. Where the method changes, arguments of the base's own method
that the new one does not take go with it; those that the grid file gives are refused, and belong under ``when`` or into
``cells``. ``published`` (figures in percent), ``tolerance`` (percentage points) and ``deviations`` (texts) are for a
verdict at the end.
"""

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import quote

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lit_distill.checks import check_int
from lit_distill.errors import UserError
from lit_distill.files import flatten
from lit_distill.messages import likely
from lit_distill.reading import parse_yaml, read_small

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
"""Short name -> the keys of ``fit`` that it sets. A cell's name has them in this order."""

LOCATION = ("checkpoint.dirpath", "ckpt_path", "trainer.logger", "resume")
"""Keys that decide where a run writes: the experiment sets them."""

MAX_CELLS = 2000
"""Cells of a grid: each is checked before any is run."""

Accepts = Callable[[str], Collection[str] | None]
"""``class path -> names of its arguments``; ``None`` for a class that is not known."""

_GROUPS = ("model", "data")
_OURS = r"^lit_distill\.modules\.(?:[a-z0-9_]+\.)?(?=[A-Z]\w*$)"
"""The package, or a module of it, before a class."""

_TAGS = {"train_fraction": "fraction", "rationale_weight": "weight", "seed": "seed"}
_BARE = {"method", "student", "dataset", "label_source", "rationales"}
"""Keys whose values say by themselves what they are."""


# ---------------------------------------------------------------------- keys and values


def canonical_key(key: str) -> str:
    """A key by its short name, where it has one; else as a config has it (``data.seed``: ``data.init_args.seed``)."""
    group, _, rest = key.partition(".")
    if group in _GROUPS and not rest:
        key = f"{group}.class_path"
    elif group in _GROUPS and rest.partition(".")[0] not in ("class_path", "init_args", "dict_kwargs"):
        key = f"{group}.init_args.{rest}"
    return next((alias for alias, targets in ALIASES.items() if targets == (key,)), key)


def targets(key: str) -> tuple[str, ...]:
    """The keys of ``fit`` that a canonical key sets."""
    return ALIASES.get(key, (key,))


def canonical_value(key: str, value: Any) -> Any:  # noqa: ANN401 - whatever YAML holds
    """A value as it is compared and named: methods in snake case (``StepByStepModule``: ``step_by_step``)."""
    if isinstance(value, list):
        return [canonical_value(key, one) for one in value]
    if key != "method" or not isinstance(value, str):
        return value
    bare = re.sub(_OURS, "", value)
    if not re.fullmatch(r"([A-Z][a-z0-9]+)+Module", bare):
        return bare
    return re.sub(r"(?<!^)(?=[A-Z])", "_", bare.removesuffix("Module")).lower()


def config_value(key: str, value: Any) -> Any:  # noqa: ANN401
    """A canonical value as ``fit`` takes it (``step_by_step``: ``StepByStepModule``)."""
    if key == "method" and re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", str(value)):
        return "".join(word.capitalize() for word in value.split("_")) + "Module"
    return copy.deepcopy(value)


def value_text(value: Any) -> str:  # noqa: ANN401
    """A value as it is named and compared: ``1`` and ``1.0`` are the same."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return json.dumps(value, sort_keys=True, default=str)


def matches(wanted: Mapping[str, Any], point: Mapping[str, Any]) -> bool:
    """Whether a cell has all wanted values, or one of them where a list is wanted."""
    return all(
        key in point and value_text(point[key]) in map(value_text, _as_list(value)) for key, value in wanted.items()
    )


def cell_name(point: Mapping[str, Any]) -> str:
    """The name of a folder, from canonical keys and values; the same whatever else is in the grid."""
    order = [*(key for key in ALIASES if key != "seed"), *sorted(key for key in point if key not in ALIASES), "seed"]
    parts = []
    for key in order:
        if key not in point:
            continue
        text = value_text(point[key])
        # `-` stands between the parts, but a student is known by its own
        text = text.removeprefix("google/") if key == "student" else text.replace("-", "~")
        own = _TAGS.get(key) or ("" if key in _BARE else re.sub(r"^(model|data)\.(init_args\.)?", "", key) + "_")
        parts.append(quote(own + text.replace("/", "+"), safe="+"))
    name = "-".join(parts)
    # a folder is neither hidden nor read as an option
    name = f"_{name}" if name[0] in ".-" else name
    # a file system takes 255 bytes, and a command line is read
    return name if len(name) <= 120 else f"{name[:109]}~{hashlib.sha256(name.encode()).hexdigest()[:10]}"


def _as_list(value: Any) -> list[Any]:  # noqa: ANN401
    return value if isinstance(value, list) else [value]


# ---------------------------------------------------------------------- configs


def settings(point: Mapping[str, Any]) -> dict[str, Any]:
    """Canonical keys with values as a nested config.

    Raises:
        UserError: one key is within another one.
    """
    config: dict[str, Any] = {}
    for key, value in point.items():
        for target in targets(key):
            *path, last = target.split(".")
            place: Any = config
            for name in path:
                place = place.setdefault(name, {})
                if not isinstance(place, dict):
                    raise UserError(f"{target}: lies within another key that is set; give one of them")
            if isinstance(place.get(last), dict):
                raise UserError(f"{target}: another key that is set lies within it; give one of them")
            place[last] = config_value(key, value)
    return config


def merge(base: Mapping[str, Any], over: Mapping[str, Any], accepts: Accepts) -> dict[str, Any]:
    """A nested config with another one laid over it, as ``fit`` composes them.

    Where a class takes another one's place, only those arguments stay that the new one accepts.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if key in _GROUPS:
            # a name alone is a class without arguments
            old, value = ({"class_path": one} if isinstance(one, str) else one for one in (old, value))
        if not isinstance(old, Mapping) or not isinstance(value, Mapping):
            merged[key] = value
            continue
        arguments = old.get("init_args")
        if "class_path" in value and value["class_path"] != old.get("class_path") and isinstance(arguments, Mapping):
            taken = accepts(str(value["class_path"])) or ()
            old = {**old, "init_args": {name: given for name, given in arguments.items() if name in taken}}
        merged[key] = merge(old, value, accepts)
    return merged


def without_location(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config by dotted keys, without those that decide where its run writes."""
    own = tuple(f"{key}." for key in LOCATION)
    return {key: value for key, value in flatten(config).items() if not f"{key}.".startswith(own)}


# ---------------------------------------------------------------------- the file


def _canonical(given: dict[str, Any]) -> dict[str, Any]:
    """Nested or dotted keys as canonical ones."""
    point: dict[str, Any] = {}
    for name, value in flatten(given).items():
        key = canonical_key(name)
        if key in point:
            raise ValueError(f"{key} is set twice")
        if not without_location({target: None for target in targets(key)}):
            raise ValueError(f"{name}: the experiment chooses the folder of a run; see out")
        point[key] = canonical_value(key, value)
    return point


def _cell(point: dict[str, Any]) -> dict[str, Any]:
    """What varies is named by its value, and a seed is one number for two keys."""
    for key, value in point.items():
        if key == "seed":
            check_int("seed", value, 0, 2**32 - 1)
        if not isinstance(value, str | int | float | None) or value == "":
            raise ValueError(f"{key} must be text, a number, true, false or null, got {value!r}")
    return point


def _axes(axes: dict[str, Any]) -> dict[str, Any]:
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{key} must be a list of one or more values, got {values!r}")
        for value in values:
            _cell({key: value})
    return axes


Point = Annotated[dict[str, Any], AfterValidator(_canonical)]
"""Canonical key -> value."""

Percent = Annotated[float, Field(gt=0, le=100)]
Texts = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Condition(_Part):
    """Settings of some cells."""

    wanted: Annotated[Point, Field(alias="if", min_length=1)]
    settings: Annotated[Point, Field(alias="set", min_length=1)]


class Published(BaseModel):
    """A figure to compare with, beside the values of the cells that it is about."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    accuracy: Percent

    @property
    def wanted(self) -> dict[str, Any]:
        """Those values."""
        return _canonical(self.model_extra or {})


class Grid(_Part):
    """What a grid file says, with canonical keys."""

    base: Annotated[Texts, Field(min_length=1)]
    out: Annotated[str, Field(min_length=1)] | None = None
    fixed: Annotated[Point, Field(alias="set")] = {}
    axes: Annotated[Point, AfterValidator(_axes), Field(alias="grid")] = {}
    cells: Annotated[list[Annotated[Point, AfterValidator(_cell), Field(min_length=1)]], Field(min_length=1)] = [{}]
    when: list[Condition] = []
    published: list[Published] = []
    tolerance: Percent | None = None
    """In percentage points."""
    deviations: Texts = []

    def points(self) -> list[dict[str, Any]]:
        """What varies, of each cell: every explicit cell with every combination of the axes, in the file's order."""
        product = [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]
        return [{**cell, **combination} for cell in self.cells for combination in product]

    def overrides(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The nested config that is laid over the base for a cell."""
        laid = dict(self.fixed)
        for condition in self.when:
            if matches(condition.wanted, {**self.fixed, **point}):
                # the last one wins, also where it names the same key of fit in another way
                laid = {key: value for key, value in laid.items() if key not in condition.settings}
                laid |= condition.settings
        return settings({**laid, **point})

    @model_validator(mode="after")
    def _check(self) -> Self:
        count = len(self.cells) * prod(map(len, self.axes.values()))
        if count > MAX_CELLS:
            raise UserError(f"grid and cells make {count:,} cells; allowed are {MAX_CELLS:,}")
        if not self.axes and self.cells == [{}]:
            raise UserError("grid or cells must be given: nothing varies")
        if bool(self.published) != (self.tolerance is not None):
            raise UserError("published and tolerance must be given together")
        self._check_set_once()
        points = [{**self.fixed, **point} for point in self.points()]
        for i, condition in enumerate(self.when):
            _check_met(f"when[{i}].if", condition.wanted, points)
        for i, one in enumerate(self.published):
            _check_met(f"published[{i}]", one.wanted, points)
        names = [cell_name(point) for point in self.points()]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"grid and cells make two cells with the name {twice}")
        return self

    def _check_set_once(self) -> None:
        """A key that varies is set nowhere else, and no key twice in one place."""
        axes = _set_in("grid", self.axes, {})
        varied = dict(axes)
        for i, cell in enumerate(self.cells):
            varied |= _set_in(f"cells[{i}]", cell, axes)
        _set_in("set", self.fixed, varied)
        for i, condition in enumerate(self.when):
            _set_in(f"when[{i}].set", condition.settings, varied)


def _set_in(place: str, keys: Collection[str], taken: Mapping[str, str]) -> dict[str, str]:
    """The keys of ``fit`` that are set in one place, each with where it is set; none may be taken."""
    found: dict[str, str] = {}
    for key in keys:
        for target in targets(key):
            if other := taken.get(target) or found.get(target):
                raise UserError(f"{place}.{key}: {other} sets {target} as well; set it once")
            found[target] = f"{place}.{key}"
    return found


def _check_met(name: str, wanted: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> None:
    """Each wanted value is some cell's, and one cell has all of them."""
    for key, values in wanted.items():
        there = list(dict.fromkeys(value_text(point[key]) for point in points if key in point))
        if not there:
            known = sorted({key for point in points for key in point})
            raise UserError(f"{name}.{key}: no key of set, grid or cells{likely(key, known)}")
        for text in map(value_text, _as_list(values)):
            if text not in there:
                raise UserError(f"{name}.{key}: no cell has {text}{likely(text, there)}; there are {', '.join(there)}")
    if not any(matches(wanted, point) for point in points):
        raise UserError(f"{name}: no cell has all of these values together")


class _Loader(yaml.SafeLoader):
    """Reads numbers as ``fit`` does, and refuses a key that is given twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: ANN401 - PyYAML's
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise UserError(f"{key.value}: given twice, again in line {key.start_mark.line + 1}")
            seen.add((key.tag, str(key.value)))
        return node


# YAML 1.1 reads 1e-4 as text, and 2024-01-01 as a date
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_grid(path: str | Path) -> Grid:
    """Read a grid file.

    Raises:
        UserError: it is absent, or something in it is wrong; the message names the file and the key.
    """
    try:
        return Grid.model_validate(parse_yaml(read_small(path), _Loader))
    except FileNotFoundError as error:
        raise UserError(f"config: no file {str(path)!r}") from error
    except OSError as error:
        raise UserError(f"config: {str(path)!r} cannot be read ({error})") from error
    except ValidationError as error:
        raise UserError(f"{_line(error)} (in {path})") from error
    except UserError as error:
        raise UserError(f"{error} (in {path})") from error
    except ValueError as error:
        raise UserError(f"config: {str(path)!r} is {error}") from error


def _line(error: ValidationError) -> str:
    """The first of pydantic's errors."""
    first = error.errors()[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).removeprefix(".")
    if first["type"] == "extra_forbidden":
        known = [field.alias or name for name, field in Grid.model_fields.items()]
        return f"{place}: no such key{likely(place, known)}; allowed are {', '.join(known)}"
    text = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] in ("value_error", "missing") else f", got {first['input']!r:.200}"
    return f"{place}: {text[:1].lower()}{text[1:]}{got}" if place else text
