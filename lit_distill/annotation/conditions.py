"""Conditions on columns as text, as in ``agrees and vote_share >= 0.6 and not contains_label``."""

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from lit_distill.errors import UserError
from lit_distill.reading import parse_yaml

MAX_LENGTH = 2000
"""Characters of all conditions together."""

Condition = Callable[[Mapping[str, Any]], bool]
"""Whether a row of columns is kept."""

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_PART = re.compile(r"(?:(?P<no>not)\s+)?(?P<name>[A-Za-z_]\w*)(?:\s*(?P<sign>==|!=|>=|<=|>|<)\s*(?P<value>.+))?")
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")
_TOKEN = re.compile(r"""(?<!\w)(?:'[^']*'|"[^"]*")|(?P<and>\s+and\s+)|.""", re.DOTALL)
"""What is quoted stays whole; a quote behind a letter, as in `it's`, is part of a word."""
_FORM = "a condition is a column, 'not' and a column, or a column, one of == != >= <= > < and a value, joined by 'and'"


def is_condition(text: str) -> bool:
    """Whether a text has the form of conditions, and is no import path."""
    return all(_PART.fullmatch(part.strip()) for part in _parts(text))


def columns_of(text: str) -> list[str]:
    """The columns that a text of conditions names."""
    return [match["name"] for match in map(_match, _parts(text))]


def condition(text: str) -> Condition:
    """What a text of conditions says of a row.

    A column that is not known of a row (``None``) fulfils no condition, ``not`` included: what is not known is not
    kept.

    Args:
        text: conditions joined by ``and``.

    Raises:
        UserError: the text is none.
    """
    tests = [_test(_match(part)) for part in _parts(text)]
    return lambda row: all(test(row) for test in tests)


def _parts(text: str) -> list[str]:
    if len(text) > MAX_LENGTH:
        raise UserError(f"rationale_filter must have at most {MAX_LENGTH:,} characters, got {len(text):,}")
    parts = [""]
    for token in _TOKEN.finditer(text.strip()):
        if token["and"]:
            parts.append("")
        else:
            parts[-1] += token[0]
    return parts


def _match(part: str) -> re.Match[str]:
    found = _PART.fullmatch(part.strip())
    if found is None or (found["no"] and found["sign"]):
        raise UserError(f"rationale_filter: {_FORM}; got {part.strip()!r}")
    return found


def _value(text: str) -> Any:  # noqa: ANN401 - whatever a column can hold
    if _NUMBER.fullmatch(text):
        return float(text)  # YAML wants a point before an exponent
    try:
        value = parse_yaml(text)
    except ValueError:
        return text
    # lists and mappings are no column's values, and YAML's aliases make them as large as they like
    return text if isinstance(value, list | dict | set) else value


def _test(found: re.Match[str]) -> Condition:
    name = found["name"]
    if found["sign"] is None:
        wanted = found["no"] is None
        return lambda row: row.get(name) is not None and bool(row[name]) is wanted
    compare = _COMPARISONS[found["sign"]]
    value = _value(found["value"].strip())

    def test(row: Mapping[str, Any]) -> bool:
        held = row.get(name)
        # a label such as `yes` or `1` is a text in its column, whatever it is in YAML
        other = found["value"].strip().strip("'\"") if isinstance(held, str) else value
        try:
            if isinstance(held, int | float) and isinstance(other, str):
                raise TypeError  # a misspelt `true` would be unlike all
            return held is not None and compare(held, other)
        except TypeError:
            raise UserError(
                f"rationale_filter: {name} holds {held!r}, which cannot be compared with {other!r}"
            ) from None

    return test
