"""Conditions on columns, such as ``agrees and vote_share >= 0.6 and not contains_label``.

Parsed by Python, but only comparisons are evaluated: ``pandas.eval`` would also call methods.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from lit_distill.errors import UserError

MAX_LENGTH = 2000
"""Maximum characters of conditions."""

Condition = Callable[[Mapping[str, Any]], bool | None]
"""Whether a row of columns meets a condition; ``None`` if a column is unknown."""

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    **{ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.GtE: operator.ge},
    **{ast.LtE: operator.le, ast.Gt: operator.gt, ast.Lt: operator.lt},
}
_BROKEN = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)


def is_condition(text: str) -> bool:
    """Whether a text looks like conditions, not an import path."""
    try:
        condition(text)
    except UserError:
        if len(text) > MAX_LENGTH:
            raise
        return False
    return True


def columns_of(text: str) -> list[str]:
    """The columns that conditions name."""
    columns: list[str] = []
    _parse(text, columns)
    return columns


def condition(text: str) -> Callable[[Mapping[str, Any]], bool]:
    """Compile conditions; a row with unknown result is not selected, even under ``not``.

    Raises:
        UserError: the text is no condition, or, from the function, a value cannot be compared.
    """
    holds = _parse(text, [])
    return lambda row: holds(row) is True


def _parse(text: str, columns: list[str]) -> Condition:
    if len(text) > MAX_LENGTH:
        raise UserError(f"rationale_filter must have at most {MAX_LENGTH:,} characters, got {len(text):,}")
    source = " ".join(text.split())
    try:
        return _compile(ast.parse(source, mode="eval").body, source, columns)
    except _BROKEN as error:
        raise UserError(
            "rationale_filter: a condition is a column, or a column, one of == != >= <= > < and a value (a number, a"
            f" word or 'quoted'), joined by and, or, not and parentheses; got {source!r:.200}"
        ) from error


def _compile(node: ast.expr, source: str, columns: list[str]) -> Condition:
    """The value of a node for a row; unknown follows Kleene's logic."""
    if isinstance(node, ast.BoolOp):
        parts = [_compile(value, source, columns) for value in node.values]
        decisive = isinstance(node.op, ast.Or)

        def combined(row: Mapping[str, Any]) -> bool | None:
            found = [part(row) for part in parts]
            return decisive if decisive in found else None if None in found else not decisive

        return combined
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = _compile(node.operand, source, columns)
        return lambda row: None if (found := inner(row)) is None else not found
    if isinstance(node, ast.Name):
        columns.append(name := node.id)
        return lambda row: None if row.get(name) is None else bool(row[name])
    if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and len(node.ops) == 1:
        columns.append(node.left.id)
        return _comparison(node.left.id, _COMPARISONS.get(type(node.ops[0])), node.comparators[0], source)
    raise ValueError("no condition")


def _comparison(name: str, compare: Callable[[Any, Any], bool] | None, node: ast.expr, source: str) -> Condition:
    if compare is None:
        raise ValueError("no comparison")
    written = ast.get_source_segment(source, node) or ""
    try:
        value = ast.literal_eval(node)
    except _BROKEN:
        # a bare word is a string
        value = {"true": True, "false": False}.get(written, written)

    def test(row: Mapping[str, Any]) -> bool | None:
        found = row.get(name)
        if found is None or value is None:
            return None
        # labels such as 1 are text
        other = written if isinstance(found, str) and not isinstance(value, str) else value
        if not isinstance(found, str | int | float) or isinstance(found, str) is not isinstance(other, str):
            raise UserError(f"rationale_filter: {name} is {found!r}, which cannot be compared with {other!r}")
        try:
            return compare(found, other)
        except TypeError as error:
            raise UserError(f"rationale_filter: {name} is {found!r}, and {other!r} is of another type") from error

    return test
