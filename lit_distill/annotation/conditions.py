"""Conditions on columns, such as ``agrees and vote_share >= 0.6 and not contains_label``.

Parsed by Python, but only comparisons are evaluated: ``pandas.eval`` would also call methods.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

from lit_distill.errors import UserError

MAX_LENGTH = 2000  # characters of conditions

_SIGNS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    **{ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.GtE: operator.ge},
    **{ast.LtE: operator.le, ast.Gt: operator.gt, ast.Lt: operator.lt},
}
_BROKEN = (SyntaxError, ValueError, TypeError, KeyError, RecursionError, MemoryError)


def is_condition(text: str) -> bool:
    """Whether a text looks like conditions, not an import path; one that is too long does."""
    try:
        _parse(text)
    except UserError:
        return len(text) > MAX_LENGTH
    return True


def columns_of(text: str) -> list[str]:
    """The columns that conditions name."""
    return [node.id for node in ast.walk(_parse(text)) if isinstance(node, ast.Name)]


def condition(text: str) -> Callable[[Mapping[str, Any]], bool]:
    """Compile conditions; a row with unknown result is not selected, even under ``not``.

    Raises a ``UserError`` if the text is no condition; so does the function if a value cannot be compared.
    """
    tree = _parse(text)
    return lambda row: _holds(tree, row) is True


def _parse(text: str) -> ast.expr:
    """The tree of conditions; the right side of a comparison is a constant: its value, and how it is written."""
    if len(text) > MAX_LENGTH:
        raise UserError(f"rationale_filter must have at most {MAX_LENGTH:,} characters, got {len(text):,}")
    source = " ".join(text.split())
    try:
        tree = ast.parse(source, mode="eval").body
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                node.comparators = [ast.Constant(_value(right, source)) for right in node.comparators]
        # raises for all that is no condition
        _holds(tree, {})
    except _BROKEN as error:
        raise UserError(
            "rationale_filter: a condition is a column, or a column, one of == != >= <= > < and a value (a number, a"
            f" word or 'quoted'), joined by and, or, not and parentheses; got {source!r:.200}"
        ) from error
    return tree


def _value(node: ast.expr, source: str) -> Any:
    written = ast.get_source_segment(source, node) or ""
    try:
        return ast.literal_eval(node), written
    except _BROKEN:
        # a bare word is a string
        return {"true": True, "false": False}.get(written, written), written


def _holds(node: ast.expr, row: Mapping[str, Any]) -> bool | None:
    """Whether a condition holds for a row; ``None`` where a column is unknown, by Kleene's logic."""
    match node:
        case ast.BoolOp():
            decisive = isinstance(node.op, ast.Or)
            parts = [_holds(value, row) for value in node.values]
            return decisive if decisive in parts else None if None in parts else not decisive
        case ast.UnaryOp(op=ast.Not()):
            inner = _holds(node.operand, row)
            return None if inner is None else not inner
        case ast.Name():
            return None if row.get(node.id) is None else bool(row[node.id])
        case ast.Compare(left=ast.Name(id=name), ops=[sign], comparators=[ast.Constant() as right]):
            found, compare = row.get(name), _SIGNS[type(sign)]
            value, written = cast(tuple[Any, str], right.value)
            if found is None or value is None:
                return None
            # labels such as 1 are text
            other = written if isinstance(found, str) and not isinstance(value, str) else value
            try:
                if isinstance(found, str | int | float) and isinstance(found, str) is isinstance(other, str):
                    return compare(found, other)
            except TypeError:
                pass
            raise UserError(f"rationale_filter: {name} is {found!r}, which cannot be compared with {other!r}")
    raise ValueError("no condition")
