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
``cells``. ``published`` (figures in percent), ``tolerance`` (points of percent) and ``deviations`` (texts) are for a
verdict at the end.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import yaml

from lit_distill.checks import check_int
from lit_distill.errors import UserError
from lit_distill.experiments.keys import ALIASES, OWN, canonical, canonical_value, flattened, targets
from lit_distill.experiments.names import cell_name, value_text
from lit_distill.messages import likely
from lit_distill.reading import parse_yaml, read_small

KEYS = ("base", "set", "when", "grid", "cells", "out", "published", "tolerance", "deviations")
"""What a grid file may hold."""

MOST = 2000
"""Cells of a grid: each is checked before any is run."""

Point = dict[str, Any]
"""Canonical key -> value."""


@dataclass(frozen=True)
class Condition:
    """Settings of some cells."""

    wanted: Mapping[str, Sequence[Any]]
    """Key -> the values of which a cell has one."""
    settings: Point
    """What is set there."""

    def holds(self, point: Mapping[str, Any]) -> bool:
        """Whether a cell is one of them."""
        return all(
            key in point and value_text(point[key]) in {value_text(value) for value in values}
            for key, values in self.wanted.items()
        )


@dataclass(frozen=True)
class Published:
    """A figure to compare with."""

    point: Point
    """Which cells it is about."""
    accuracy: float
    """In percent, as papers print it."""


@dataclass(frozen=True)
class Grid:
    """What a grid file says, with canonical keys."""

    path: Path
    base: tuple[str, ...]
    fixed: Point
    when: tuple[Condition, ...]
    axes: Mapping[str, tuple[Any, ...]]
    cells: tuple[Point, ...]
    out: str | None = None
    published: tuple[Published, ...] = ()
    tolerance: float | None = None
    """In points of percent."""
    deviations: tuple[str, ...] = ()
    source: Mapping[str, Any] = field(default_factory=dict)
    """The file's content."""

    def points(self) -> list[Point]:
        """What varies, of each cell: every explicit cell with every combination of the axes, in the file's order."""
        product = [dict(zip(self.axes, values, strict=True)) for values in itertools.product(*self.axes.values())]
        return [{**cell, **combination} for cell in self.cells or ({},) for combination in product]

    def settings(self, point: Point) -> Point:
        """All that is laid over the base for a cell."""
        settings = dict(self.fixed)
        for condition in self.when:
            if condition.holds({**self.fixed, **point}):
                # last, also where another name of the same key is there
                settings = {key: value for key, value in settings.items() if key not in condition.settings}
                settings |= condition.settings
        return settings | point


class _Loader(yaml.SafeLoader):
    """Takes for numbers what ``fit`` does, and no key twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # noqa: ANN401 - PyYAML's
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise UserError(f"{key.value}: is there twice, again in line {key.start_mark.line + 1}; say it once")
            seen.add((key.tag, key.value))
        return node


# YAML 1.1 has 1e-4 for a text, and 2024-01-01 for a date
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
        return _grid(Path(path), parse_yaml(read_small(path), _Loader))
    except FileNotFoundError as error:
        raise UserError(f"config: no file {str(path)!r}") from error
    except OSError as error:
        raise UserError(f"config: {str(path)!r} cannot be read ({error})") from error
    except UserError as error:
        raise UserError(f"{error} (in {path})") from error
    except ValueError as error:
        raise UserError(f"config: {str(path)!r} is {error}") from error


def _grid(path: Path, content: Any) -> Grid:  # noqa: ANN401 - whatever YAML holds
    if not isinstance(content, dict):
        raise UserError(f"a grid must hold keys with values ({', '.join(KEYS)}), got {content!r}")
    for key in content:
        if key not in KEYS:
            raise UserError(f"{key}: no such key{likely(str(key), KEYS)}; allowed are {', '.join(KEYS)}")
    base = _texts("base", content.get("base", []))
    if not base:
        raise UserError("base must be given: a config of fit, or a list of them")
    given = _mapping("grid", content.get("grid"))
    explicit = content.get("cells")
    count = prod(len(values) for values in given.values() if isinstance(values, list))
    count *= len(explicit) if isinstance(explicit, list) else 1
    if count > MOST:
        raise UserError(f"grid and cells make {count:,} cells; allowed are {MOST:,} in one grid")
    axes = {key: _values(f"grid.{key}", key, values) for key, values in given.items()}
    cells = tuple(_mapping(f"cells[{i}]", cell, empty=False) for i, cell in enumerate(_list("cells", content)))
    if not axes and not cells:
        raise UserError("grid must have a key with values, or cells one cell: nothing varies")
    for key, value in ((key, value) for cell in cells for key, value in cell.items()):
        _plain(f"cells: {key}", key, value)
    out = content.get("out")
    if out is not None and (not isinstance(out, str) or not out):
        raise UserError(f"out must be a folder, got {out!r}")
    grid = Grid(
        path=path,
        base=base,
        fixed=_mapping("set", content.get("set")),
        when=tuple(_condition(f"when[{i}]", one) for i, one in enumerate(_list("when", content))),
        axes=axes,
        cells=cells,
        out=out,
        published=tuple(_published(f"published[{i}]", one) for i, one in enumerate(_list("published", content))),
        tolerance=None if content.get("tolerance") is None else _number("tolerance", content["tolerance"]),
        deviations=_texts("deviations", content.get("deviations", [])),
        source=content,
    )
    if bool(grid.published) != (grid.tolerance is not None):
        raise UserError("published and tolerance must be given together")
    _check_keys(grid)
    return grid


def _check_keys(grid: Grid) -> None:
    """No key is said twice or within another, no condition is about nothing, and no two cells are one."""
    places: list[tuple[str, Mapping[str, Any]]] = [("set", grid.fixed), ("grid", grid.axes)]
    for cell in grid.cells:
        _disjoint([*places, ("cells", cell)])
    _disjoint(places)
    varied = {*grid.axes, *(key for cell in grid.cells for key in cell)}
    known = {*varied, *grid.fixed}
    points = [{**grid.fixed, **point} for point in grid.points()]
    everywhere = {
        target: f"{place}.{key}" for place, keys in [*places, *(("cells", cell) for cell in grid.cells)]
        for key in keys for target in targets(key)
    }  # fmt: skip
    for i, condition in enumerate(grid.when):
        _known(f"when[{i}].if", condition.wanted, known)
        _check_met(f"when[{i}].if", condition, points)
        _disjoint([(f"when[{i}].set", condition.settings)])
        taken = {target for key in varied for target in targets(key)}
        for key in condition.settings:
            if taken & set(targets(key)):
                raise UserError(f"when[{i}].set.{key}: varies in grid or cells, whose names would be wrong")
        for key in condition.settings:
            for target in targets(key):
                _not_within(f"when[{i}].set.{key}", target, everywhere)
                everywhere.setdefault(target, f"when[{i}].set.{key}")
    for i, one in enumerate(grid.published):
        _known(f"published[{i}]", one.point, known)
    names: dict[str, Point] = {}
    for point in grid.points():
        name = cell_name(point)
        if name in names:
            what = "is there twice" if names[name] == point else "and another one would share a folder"
            raise UserError(f"cells: {name} {what}")
        names[name] = point


def _disjoint(places: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    taken: dict[str, str] = {}
    for place, keys in places:
        for key in keys:
            for target in targets(key):
                if target in taken:
                    raise UserError(f"{place}.{key}: {taken[target]} sets {target} as well; say it once")
                _not_within(f"{place}.{key}", target, taken)
            taken |= dict.fromkeys(targets(key), f"{place}.{key}")


def _not_within(name: str, target: str, taken: Mapping[str, str]) -> None:
    """No key is a part of another's path: one of them would be gone."""
    for other, place in taken.items():
        if other.startswith(f"{target}.") or target.startswith(f"{other}."):
            inner, outer = (other, target) if other.startswith(f"{target}.") else (target, other)
            raise UserError(f"{name}: {place} is set as well, and {inner} lies within {outer}; give one of them")


def _check_met(name: str, condition: Condition, points: Sequence[Point]) -> None:
    """Each value of a condition is some cell's, and all of it holds for one."""
    for key, values in condition.wanted.items():
        there = list(dict.fromkeys(value_text(point[key]) for point in points if key in point))
        for value in values:
            if value_text(value) not in there:
                close = likely(value_text(value), there)
                raise UserError(f"{name}.{key}: no cell has {value_text(value)}{close}; there are {', '.join(there)}")
    if not any(condition.holds(point) for point in points):
        wanted = ", ".join(
            f"{key} {' or '.join(value_text(value) for value in values)}" for key, values in condition.wanted.items()
        )
        raise UserError(f"{name}: no cell has all of {wanted}")


def _known(name: str, keys: Mapping[str, Any], known: set[str]) -> None:
    for key in keys:
        if key not in known:
            raise UserError(f"{name}.{key}: no key of set, grid or cells{likely(key, sorted(known))}")


def _condition(name: str, given: Any) -> Condition:  # noqa: ANN401
    if not isinstance(given, dict) or set(given) != {"if", "set"}:
        raise UserError(f"{name} must hold the keys if and set, got {given!r}")
    wanted: dict[str, list[Any]] = {
        key: value if isinstance(value, list) else [value]
        for key, value in _mapping(f"{name}.if", given["if"], empty=False).items()
    }
    wanted = {key: [canonical_value(key, value) for value in values] for key, values in wanted.items()}
    for key, values in wanted.items():
        if not values:
            raise UserError(f"{name}.if.{key} must be a value, or a list of one or more, got []")
    return Condition(wanted, _mapping(f"{name}.set", given["set"], empty=False))


def _published(name: str, given: Any) -> Published:  # noqa: ANN401
    if not isinstance(given, dict) or "accuracy" not in given or len(given) < 2:
        raise UserError(f"{name} must hold accuracy and which cells it is of, as in method: standard, got {given!r}")
    accuracy = _number(f"{name}.accuracy", given["accuracy"])
    point = _mapping(name, {key: value for key, value in given.items() if key != "accuracy"})
    return Published(point, accuracy)


def _number(name: str, value: Any) -> float:  # noqa: ANN401
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 100:
        raise UserError(f"{name} must be a number of percent above 0 and at most 100, got {value!r}")
    return float(value)


def _mapping(name: str, given: Any, *, empty: bool = True) -> Point:  # noqa: ANN401
    """A mapping, nested or not, with canonical keys."""
    if given is None and empty:
        return {}
    right = isinstance(given, dict) and all(isinstance(key, str) for key in given) and (given or empty)
    flat = flattened(given) if right else []
    if not right or not all(all(key.split(".")) for key, _ in flat):
        raise UserError(f"{name} must map keys of fit, or {', '.join(ALIASES)}, to values, got {given!r}")
    found: Point = {}
    for key, value in flat:
        short = canonical(key)
        if short in found:
            raise UserError(f"{name}.{key}: {short} is there already; say it once")
        if any(target == own or target.startswith(f"{own}.") for target in targets(short) for own in OWN[:3]):
            raise UserError(f"{name}.{key}: the folder of a run is the experiment's own to choose; see out")
        found[short] = canonical_value(short, value)
    return found


def _values(name: str, key: str, values: Any) -> tuple[Any, ...]:  # noqa: ANN401
    if not isinstance(values, list) or not values:
        raise UserError(f"{name} must be a list of one or more values, got {values!r}")
    values = [canonical_value(key, value) for value in values]
    for value in values:
        _plain(name, key, value)
    texts = [value_text(value) for value in values]
    twice = next((text for text in texts if texts.count(text) > 1), None)
    if twice is not None:
        raise UserError(f"{name} must name each value once, got {twice} twice")
    return tuple(values)


def _plain(name: str, key: str, value: Any) -> None:  # noqa: ANN401
    """What varies has to fit into a name, and a seed is one number for two keys."""
    if key == "seed":
        check_int(name, value, 0, 2**32 - 1)
    if not isinstance(value, str | int | float | None) or value == "":
        raise UserError(f"{name} must be texts, numbers, true, false or null, got {value!r}")


def _list(name: str, content: Mapping[str, Any]) -> list[Any]:
    given = content.get(name)
    if given is None:
        if name in content:
            raise UserError(f"{name} must be a list, got nothing")
        return []
    if not isinstance(given, list) or not given:
        raise UserError(f"{name} must be a list of one or more entries, got {given!r}")
    return given


def _texts(name: str, given: Any) -> tuple[str, ...]:  # noqa: ANN401
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(text, str) and text.strip() for text in given):
        raise UserError(f"{name} must be a text or a list of texts, got {given!r}")
    return tuple(given)
