"""Checks of constructor arguments; errors name the argument, what is allowed and what was given."""

import math
from collections.abc import Collection
from pathlib import Path
from string import Formatter
from typing import Any, TypeVar

from lit_distill.errors import UserError

T = TypeVar("T")


def check_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """An integer from ``low`` to ``high``, by default the largest of 32 bits; no bool."""
    most = 2**31 - 1 if high is None else high
    beyond = isinstance(value, int) and value > most
    allowed = f">= {low}" if high is None and not beyond else f"in [{low}, {most}]"
    return int(_check(name, value, isinstance(value, int) and low <= value <= most, f"an integer {allowed}"))


def check_fraction(name: str, value: Any) -> float:
    """A number above 0 and not above 1."""
    return float(_check(name, value, isinstance(value, int | float) and 0 < value <= 1, "in (0, 1]"))


def check_part(name: str, value: Any) -> float:
    """A fraction above 0 and not above 1, or a whole number above 1."""
    good = isinstance(value, int | float) and (0 < value <= 1 or (value > 1 and float(value).is_integer()))
    return float(_check(name, value, good, "in (0, 1] or a whole number above 1"))


def check_range(
    name: str,
    value: float | None,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> None:
    """A finite number within its bounds; ``None`` stands for an argument that is not set."""
    if value is None:
        return
    good = isinstance(value, int if whole else int | float) and math.isfinite(value)
    good = good and (above is None or value > above) and (at_least is None or value >= at_least)
    good = good and (at_most is None or value <= at_most) and (below is None or value < below)
    bounds = {"above": above, "at least": at_least, "at most": at_most, "below": below}
    allowed = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
    _check(name, value, good, f"an integer {allowed}" if whole else allowed)


def _check(name: str, value: Any, good: bool, allowed: str) -> Any:
    if not good or isinstance(value, bool):
        raise UserError(f"{name} must be {allowed}, got {value!r}")
    return value


def check_text(name: str, value: Any) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{name} must be a text, got {value!r}")
    return value


def check_file(name: str, path: str | None) -> None:
    """The path of a file that can be written, or no path."""
    if path is None:
        return
    if not (folder := Path(path).absolute().parent).is_dir():
        raise UserError(f"{name}: there is no folder {str(folder)!r} to write it in")
    if Path(path).is_dir():
        raise UserError(f"{name}: {path!r} is a folder; give a file")


def check_bool(name: str, value: Any) -> bool:
    """A bool."""
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, got {value!r}")
    return value


def check_format(name: str, template: str) -> list[str]:
    """The fields of a format string, in order; format specs, conversions and attribute access are refused.

    ``{input:>2000000000}`` would fill the memory, and ``{input.x}`` is no column.
    """
    try:
        fields = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise UserError(f"{name}: {error}, in {template!r:.200}") from error
    for field, form, conversion in fields:
        if form or conversion:
            raise UserError(f"{name}: {{{field}}} must stand without ':' and '!', a format or a conversion")
    return [str(field) for field, _, _ in fields]


def check_choice(name: str, value: T, allowed: Collection[T]) -> T:
    """One of the allowed values."""
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        raise UserError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    return value


def check_new_folder(name: str, folder: str | None) -> None:
    """A folder to write: it must be given, and not exist or be empty."""
    if folder is None:
        raise UserError(f"{name}: must be given, as --{name} FOLDER")
    if (path := Path(folder)).exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{name}: {folder!r} exists; give a new folder")
