"""Evaluate arithmetic in text, safely.

A student's text is untrusted: values are computed from a syntax tree in which only numbers, ``+ - * / // % **``, signs,
parentheses and, in programs, assigned names are allowed.
"""

import ast
import operator
import warnings
from collections.abc import Callable, Mapping
from itertools import accumulate
from keyword import iskeyword
from typing import Final

MAX_LENGTH: Final = 512  # characters of an expression; a generation may not stop, and SVAMP's longest equation has 31
MAX_LINES: Final = 64  # of a program
# Nested parentheses and operations (each term of ``1 + 1 + 1 ...`` is one level): far below the limits of parser and
# interpreter, so that the result does not depend on Python's version or the caller's stack.
MAX_DEPTH: Final = 64
MAX_EXPONENT: Final = 64.0  # absolute
MAX_MAGNITUDE: Final = 1e15  # of literals and results; doubles represent all integers below it exactly

# Letters other than the exponent's are refused before parsing: the parser would warn about some (`1or 2`) and
# read others that are no plain decimal numbers (`0x1f`, `1_000`, `2j`).
_CHARACTERS: Final = frozenset("0123456789.eE+-*/%() \t\n")


def _power(base: float, exponent: float) -> float:
    if abs(exponent) > MAX_EXPONENT:
        raise ValueError("exponent beyond MAX_EXPONENT")
    if base < 0 and not exponent.is_integer():
        raise ValueError("complex value")
    return float(base**exponent)


_BINARY: Final[dict[type[ast.operator], Callable[[float, float], float]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_UNARY: Final[dict[type[ast.unaryop], Callable[[float], float]]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def evaluate(text: str) -> float | None:
    """The value of an arithmetic expression, with Python's precedence and operators.

    ``None`` for other syntax (also thousands separators), division by zero, a complex power, or numbers beyond the
    limits. It never raises.

    >>> evaluate("( 10.0 * 45.0 )")
    450.0
    >>> evaluate("84 / 0") is None
    True
    """
    text = text.strip()
    if len(text) > MAX_LENGTH or not _CHARACTERS.issuperset(text):
        return None
    return _evaluate(text, {})


def run_program(text: str) -> str | None:
    r"""The last value of a program as text: lines of ``name = expression`` over numbers and earlier names.

    The last line may be an expression alone; comments are left out. ``None`` for anything that is no such program. It
    never raises.

    >>> run_program("apples = 3 * 4\nleft = apples - 5  # eaten")
    '7'
    """
    names: dict[str, float] = {}
    value = None
    lines = [line for raw in text.splitlines() if (line := raw.partition("#")[0].strip())]
    if len(lines) > MAX_LINES:
        return None
    for number, line in enumerate(lines, start=1):
        *assigned, expression = map(str.strip, line.split("="))
        if not (assigned or number == len(lines)) or not all(map(_is_name, assigned)):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about `1or 2`
            value = _evaluate(expression, names)
        if value is None:
            return None
        names |= dict.fromkeys(assigned, value)
    return None if value is None else str(int(value) if value.is_integer() else value)


def _is_name(text: str) -> bool:
    return text.isidentifier() and not iskeyword(text)


def _evaluate(text: str, names: Mapping[str, float]) -> float | None:
    # counted here, as the syntax tree does not show redundant parentheses
    depths = accumulate((character == "(") - (character == ")") for character in text)
    if len(text) > MAX_LENGTH or max(depths, default=0) > MAX_DEPTH:
        return None
    try:
        return _value(ast.parse(text, mode="eval").body, names)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        # RecursionError or MemoryError: deep nesting; ValueError: integers of too many digits
        return None


def _value(node: ast.expr, names: Mapping[str, float], depth: int = 1) -> float:
    """The value of a tree. Raises ``ValueError`` or ``ArithmeticError`` if it has none."""
    if depth > MAX_DEPTH:
        raise ValueError("nested beyond MAX_DEPTH")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        # floats from the leaves up, so that no integer grows without bound
        value = float(node.value)  # type: ignore[arg-type]
    elif isinstance(node, ast.Name) and node.id in names:
        value = names[node.id]
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left, names, depth + 1), _value(node.right, names, depth + 1)
        value = _BINARY[type(node.op)](left, right)
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        value = _UNARY[type(node.op)](_value(node.operand, names, depth + 1))
    else:
        raise ValueError(f"{type(node).__name__} is no arithmetic")
    # `not <=` rather than `>`: nan fails it as well
    if not abs(value) <= MAX_MAGNITUDE:
        raise ValueError("beyond MAX_MAGNITUDE")
    return value
