"""Evaluate arithmetic in text, safely.

A student's text is untrusted: values are computed from a syntax tree in which only numbers, ``+ - * / // % **``, signs,
parentheses and, in programs, assigned names are allowed.
"""

import ast
import operator
import warnings
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Final

MAX_LENGTH: Final = 512
"""Maximum characters of an equation or a line of a program. SVAMP's longest equation has 31; the limit bounds the cost
of a generation that does not stop.
"""

MAX_LINES: Final = 64
"""Maximum lines of a program."""

MAX_DEPTH: Final = 64
"""Maximum nesting of parentheses and operations (each term of ``1 + 1 + 1 ...`` is one level). Far below the limits of
parser and interpreter, so that the result does not depend on Python's version or the caller's stack.
"""

MAX_EXPONENT: Final = 64.0
"""Maximum absolute exponent, far more than word problems need."""

MAX_MAGNITUDE: Final = 1e15
"""Maximum absolute value of literals, intermediate results and the result. Doubles represent all integers below it
exactly.
"""

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

# RecursionError or MemoryError: deep nesting; ValueError: integers of too many digits
_FAULTS: Final = (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError)


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


def _is_short(text: str) -> bool:
    """Whether a line is within the limits; the syntax tree no longer shows redundant parentheses."""
    depths = accumulate((character == "(") - (character == ")") for character in text)
    return len(text) <= MAX_LENGTH and max(depths, default=0) <= MAX_DEPTH


def evaluate(text: str) -> float | None:
    """The value of an arithmetic expression, with Python's precedence and operators.

    Thousands separators (``1,000``) are not supported.

    Returns:
        A finite value, or ``None`` for other syntax, division by zero, a complex power, or numbers beyond the limits.
            It
        never raises.

    >>> evaluate("( 10.0 * 45.0 )")
    450.0
    >>> evaluate("84 / 0") is None
    True
    """
    text = text.strip()
    if not _is_short(text) or not _CHARACTERS.issuperset(text):
        return None
    try:
        return _value(ast.parse(text, mode="eval").body, {})
    except _FAULTS:
        return None


def run_program(text: str) -> str | None:
    r"""The last value of a program as text: lines of ``name = expression`` over numbers and earlier names.

    A last line may be an expression alone. Lines are read as `evaluate` reads them, and comments are left out.

    Returns:
        The value; ``None`` for anything that is no such program. It never raises.

    >>> run_program("apples = 3 * 4\nleft = apples - 5  # eaten")
    '7'
    """
    names: dict[str, float] = {}
    value = None
    lines = [line for raw in text.strip().splitlines() if (line := raw.partition("#")[0].strip())]
    if len(lines) > MAX_LINES:
        return None
    for line in lines:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the parser, about `1or 2`
                statements = ast.parse(line).body if _is_short(line) else []
            (statement,) = statements
            if isinstance(statement, ast.Assign) and all(isinstance(name, ast.Name) for name in statement.targets):
                value = _value(statement.value, names)
                names |= {name.id: value for name in statement.targets if isinstance(name, ast.Name)}
            elif isinstance(statement, ast.Expr) and line == lines[-1]:
                value = _value(statement.value, names)
            else:
                return None
        except _FAULTS:
            return None
    return None if value is None else str(int(value) if value.is_integer() else value)
