"""A grid file: existing configs, what is set in all cells, and what varies.

Keys are those of ``fit``, or the short ones of `ALIASES`. Where the method changes, arguments of the base's own method
that the new one does not take go with it; those that the grid file gives are refused, and belong under ``when`` or into
``cells``. ``overlay`` lays another config over the base, as a further ``--config`` of ``fit`` does. A number within a
key is an item of a list that the base has, as in ``model.objectives.0.init_args.layers``.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import quote

from jsonargparse import get_loader
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lit_distill.checks import check_int
from lit_distill.errors import UserError, first_fault
from lit_distill.files import flatten
from lit_distill.reading import parse_yaml, read_small

ALIASES: Mapping[str, tuple[str, ...]] = {
    "method": ("model.class_path",),
    "student": ("model.init_args.student",),
    "dataset": ("data.class_path",),
    "train_fraction": ("data.init_args.train_fraction",),
    "label_source": ("data.init_args.label_source",),
    "rationales": ("data.init_args.rationale_pairing",),
    "rationale_weight": ("model.init_args.rationale_weight",),
    "overlay": ("overlay",),
    "teacher": ("model.init_args.teachers.teacher.model",),
    "seed": ("seed_everything", "data.init_args.seed"),
}
"""Short name -> the keys of ``fit`` that it sets; also their order in cell names."""

LOCATION = ("checkpoint.dirpath", "ckpt_path", "trainer.logger", "resume", "variant")
"""Keys of where a run writes and of its name, which the experiment sets."""

MAX_CELLS = 2000  # each is checked before any runs

Accepts = Callable[[str], Collection[str] | None]
"""``class path -> names of its arguments``; ``None`` for an unknown class."""

_GROUPS = ("model", "data")
_TAGS = dict.fromkeys(ALIASES, "") | {"train_fraction": "fraction", "rationale_weight": "weight", "seed": "seed"}
"""Short name -> what stands before its value in a cell's name."""

_PREFIXES = {"student": "google/", "overlay": "method/"}
"""Short name -> what a cell's name leaves out of its value."""


def fit_keys(point: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted keys of ``fit`` that short or dotted keys set.

    ``method: step_by_step`` is ``model.class_path: StepByStepModule``, ``data.seed`` is ``data.init_args.seed``.

    Raises:
        UserError: a key of ``fit`` is set twice, or belongs to the experiment.
    """
    found: dict[str, Any] = {}
    for key, value in point.items():
        group, _, rest = key.partition(".")
        if group in _GROUPS and rest.partition(".")[0] not in ("class_path", "init_args", "dict_kwargs"):
            key = f"{group}.init_args.{rest}" if rest else f"{group}.class_path"
        for seed in as_list(value) if key == "seed" else ():
            check_int("seed", seed, 0, 2**32 - 1)
        for target in ALIASES.get(key, (key,)):
            if target in found:
                raise UserError(f"{target} is set twice")
            if not without_location({target: None}):
                raise UserError(f"{key}: the experiment chooses the folder of a run; see out")
            found[target] = _methods(value) if target == "model.class_path" else value
    return found


def _methods(value: Any) -> Any:
    """The method classes in snake case; class names and import paths stay."""
    if isinstance(value, list):
        return [_methods(one) for one in value]
    if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", str(value)):
        return value
    return "".join(word.capitalize() for word in value.split("_")) + "Module"


def as_list(value: Any) -> list[Any]:
    """A list as it is, anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def cell_name(point: Mapping[str, Any]) -> str:
    """A readable folder name that does not depend on the rest of the grid."""
    order = [*(key for key in ALIASES if key != "seed"), *sorted(key for key in point if key not in ALIASES), "seed"]
    parts = []
    for key in (key for key in order if key in point):
        value = point[key]
        # 1 and 1.0 are the same
        number = int(value) if isinstance(value, float) and value.is_integer() else value
        text = value if isinstance(value, str) else json.dumps(number)
        # `-` stands between the parts, but a student is known by its own
        prefix = _PREFIXES.get(key)
        text = text.replace("-", "~") if prefix is None else text.removeprefix(prefix)
        tag = _TAGS.get(key, re.sub(r"^(model|data)\.(init_args\.)?", "", key) + "_")
        parts.append(quote(tag + text.replace("/", "+"), safe="+"))
    name = "-".join(parts)
    # neither a hidden folder nor an option
    name = f"_{name}" if name[0] in ".-" else name
    # file systems allow 255 bytes, and people read it
    return name if len(name) <= 120 else f"{name[:109]}~{hashlib.sha256(name.encode()).hexdigest()[:10]}"


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A nested config from dotted keys. Raises a ``UserError`` if one key is within another."""
    config: dict[str, Any] = {}
    # an outer key comes before those within it
    for key in sorted(settings):
        *path, last = key.split(".")
        place: Any = config
        for name in path:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise UserError(f"{key}: lies within another key that is set; give one of them")
        place[last] = settings[key]
    return config


def merge(base: Mapping[str, Any], over: Mapping[str, Any], accepts: Accepts) -> dict[str, Any]:
    """Merge a config into another one, as ``fit`` composes them.

    If a class changes, only the arguments that the new one accepts stay. Numbers as keys change items of a list.

    Raises a ``UserError`` if a list has no such item.
    """
    merged = dict(base)
    for key, value in over.items():
        if key.endswith("+"):
            # as in `fit`, appended to the list
            key = key[:-1]
            value = [*(merged.get(key) or []), *as_list(value)]
        old = merged.get(key)
        if isinstance(old, list) and isinstance(value, Mapping) and all(name.isdecimal() for name in value):
            items = {str(number): item for number, item in enumerate(old)}
            if missing := value.keys() - items.keys():
                raise UserError(f"{key}: there is no item {min(missing)}; the base has {len(old)}, counted from 0")
            merged[key] = list(merge(items, value, accepts).values())
            continue
        # a teacher's `model` is a name, too
        if key in _GROUPS and isinstance(old, Mapping) != isinstance(value, Mapping):
            # a name alone is a class without arguments
            old, value = ({"class_path": one} if isinstance(one, str) else one for one in (old, value))
        if not isinstance(old, Mapping) or not isinstance(value, Mapping):
            merged[key] = value
            continue
        arguments = old.get("init_args")
        if "class_path" in value and value["class_path"] != old.get("class_path") and isinstance(arguments, Mapping):
            accepted = accepts(str(value["class_path"])) or ()
            old = {**old, "init_args": {name: given for name, given in arguments.items() if name in accepted}}
        merged[key] = merge(old, value, accepts)
    return merged


def without_location(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with dotted keys, without those of where its run writes."""
    own = tuple(f"{key}." for key in LOCATION)
    return {key: value for key, value in flatten(config).items() if not f"{key}.".startswith(own)}


def differences(there: Any, wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The dotted keys in which two configs differ, with both values, besides those of where a run writes."""
    found, own = without_location(there if isinstance(there, Mapping) else {}), without_location(wanted)
    pairs = {key: (found.get(key), own.get(key)) for key in {**own, **found}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flat(content: Any) -> Any:
    return flatten(content) if isinstance(content, Mapping) else content


def _check_value(value: Any) -> Any:
    """Check that a value can name a cell."""
    if not isinstance(value, str | int | float | None) or value == "":
        raise UserError(f"must be text, a number, true, false or null, got {value!r}")
    return value


Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], BeforeValidator(as_list)]
Value = Annotated[Any, AfterValidator(_check_value)]
Settings = Annotated[dict[str, Any], BeforeValidator(_flat), AfterValidator(fit_keys)]
Axes = Annotated[dict[str, Annotated[list[Value], Field(min_length=1)]], BeforeValidator(_flat)]
Cells = list[Annotated[dict[str, Value], Field(min_length=1), BeforeValidator(_flat)]]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def matches(wanted: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a cell's settings have all wanted values; a list allows any of its values."""
    return all(key in settings and settings[key] in as_list(value) for key, value in wanted.items())


class Condition(_Part):
    """Settings for some of the cells."""

    wanted: Annotated[Settings, Field(alias="if", min_length=1)]
    settings: Annotated[Settings, Field(alias="set", min_length=1)]


class Grid(_Part):
    """The content of a grid file."""

    base: Annotated[Texts, Field(min_length=1)]
    out: Text | None = None
    fixed: Annotated[Settings, Field(alias="set")] = {}
    axes: Annotated[Axes, Field(alias="grid")] = {}
    cells: Annotated[Cells, Field(min_length=1)] = [{}]
    when: list[Condition] = []
    # for a verdict at the end: percentage points to the published accuracy, and where the procedure is another
    tolerance: Annotated[float, Field(gt=0, le=100)] | None = None
    deviations: Texts = []

    def points(self) -> list[dict[str, Any]]:
        """Each cell's varying values: every explicit cell with every combination of the axes, in order."""
        product = [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]
        return [{**cell, **combination} for cell in self.cells for combination in product]

    def settings(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """A cell's changes to the base, by the keys of ``fit`` and ``overlay``; later conditions win."""
        settings, varied = dict(self.fixed), fit_keys(point)
        for condition in self.when:
            if matches(condition.wanted, self.fixed | varied):
                settings |= condition.settings
        return settings | varied

    @model_validator(mode="after")
    def _check(self) -> Self:
        count = len(self.cells) * prod(map(len, self.axes.values()))
        if count > MAX_CELLS:
            raise UserError(f"grid and cells make {count:,} cells; allowed are {MAX_CELLS:,}")
        if not self.axes and self.cells == [{}]:
            raise UserError("grid or cells must be given: nothing varies")
        for i, cell in enumerate(self.cells):
            if both := set(cell) & set(self.axes):
                raise UserError(f"cells[{i}]: {min(both)} varies in grid as well; set it once")
        cells = [fit_keys(point) for point in self.points()]
        given = {"set": self.fixed} | {f"when[{i}].set": one.settings for i, one in enumerate(self.when)}
        for place, settings in given.items():
            if both := set(settings) & set().union(*cells):
                raise UserError(f"{place}: {min(both)} varies in grid or cells as well; set it once")
        for i, condition in enumerate(self.when):
            single = [{key: value} for key, values in condition.wanted.items() for value in as_list(values)]
            for wanted in (*single, condition.wanted):
                if not any(matches(wanted, self.fixed | cell) for cell in cells):
                    raise UserError(f"when[{i}].if: no cell has {wanted}")
        names = [cell_name(point) for point in self.points()]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"grid and cells make two cells with the name {twice}")
        return self


def read_grid(path: str | Path) -> Grid:
    """Read a grid file. Raises a ``UserError`` if it is absent or invalid; names the file and the key."""
    try:
        content = read_small(path)
        parse_yaml(content)
        # its size is checked: parse numbers as `fit` does
        return Grid.model_validate(get_loader("yaml")(content.decode("utf-8-sig")))
    except OSError as error:
        raise UserError(f"config: {str(path)!r} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise UserError(f"{first_fault(error)} (in {path})") from error
    except ValueError as error:
        raise UserError(f"config: {str(path)!r} is {error}") from error
