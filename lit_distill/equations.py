"""Evaluate arithmetic in text, safely.

A model's text is untrusted: values are computed from a syntax tree in which only numbers, ``+ - * / // % **``, signs,
parentheses and, in programs, assigned names and the functions ``int``, ``max``, ``min`` and ``round`` are allowed.
"""

import ast
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from keyword import iskeyword
from typing import Final

MAX_LENGTH: Final = 512  # characters of an expression; a generation may not stop, and SVAMP's longest equation has 31
MAX_STATEMENTS: Final = 64  # of a program
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

# The functions of numbers in the 1,319 programs that PAL (Gao et al. 2022, arXiv 2211.10435) published for GSM-Hard: 7,
# 4, 4 and 4 of them call these. `sum` and `len`, in 3 each, take lists; none calls `abs`.
_FUNCTIONS: Final[dict[str, Callable[..., float]]] = {
    "int": lambda number: float(int(number)),
    "max": max,
    "min": min,
    "round": lambda number, digits=0.0: float(round(number, int(digits))),
}


class ProgramError(ValueError):
    """A program does not run."""


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
    return _evaluate(text, {}, {})


def run_program(text: str) -> str | None:
    r"""The value of a program as text, see `program_value`; ``None`` for anything that is no such program.

    It never raises.

    >>> run_program("apples = 3 * 4\nleft = apples - 5  # eaten")
    '7'
    """
    try:
        return program_value(statements(text))
    except ProgramError:
        return None


def statements(text: str) -> list[str]:
    r"""The statements of a program, one a line or parted by semicolons, without comments.

    Raises a `ProgramError` if there are more than ``MAX_STATEMENTS``, or none.

    >>> statements("a = 3 * 4; b = a - 5  # left")
    ['a = 3 * 4', 'b = a - 5']
    """
    if len(text) > MAX_STATEMENTS * MAX_LENGTH:
        raise ProgramError(f"longer than {MAX_STATEMENTS * MAX_LENGTH:,} characters")
    lines = (line.partition("#")[0] for line in text.splitlines())
    found = [part.strip() for line in lines for part in line.split(";") if part.strip()]
    if not 0 < len(found) <= MAX_STATEMENTS:
        raise ProgramError(f"{len(found):,} statements; there have to be 1 to {MAX_STATEMENTS}")
    return found


def program_value(program: Sequence[str]) -> str:
    """The value of a program's last statement as text.

    A statement is ``name = expression`` over numbers, earlier names and the functions ``int``, ``max``, ``min`` and
    ``round``; the last may be an expression alone. Raises a `ProgramError` that quotes the first other statement.

    >>> program_value(["boxes = 50 / 8", "full = int(boxes)", "max(full, 4)"])
    '6'
    """
    names: dict[str, float] = {}
    value = None
    for number, statement in enumerate(program, start=1):
        *assigned, expression = map(str.strip, statement.split("="))
        allowed = (assigned or number == len(program)) and all(map(_is_name, assigned))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about `1or 2`
            value = _evaluate(expression, names, _FUNCTIONS) if allowed else None
        if value is None:
            raise ProgramError(f"statement {number} has no value: {statement:.60}")
        names |= dict.fromkeys(assigned, value)
    return str(int(value) if value is not None and value.is_integer() else value)


def _is_name(text: str) -> bool:
    return text.isidentifier() and not iskeyword(text)


def _evaluate(text: str, names: Mapping[str, float], functions: Mapping[str, Callable[..., float]]) -> float | None:
    # counted here, as the syntax tree does not show redundant parentheses
    depths = accumulate((character == "(") - (character == ")") for character in text)
    if len(text) > MAX_LENGTH or max(depths, default=0) > MAX_DEPTH:
        return None
    try:
        return _value(ast.parse(text, mode="eval").body, names, functions)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        # RecursionError or MemoryError: deep nesting; ValueError: integers of too many digits; TypeError: `round()`
        return None


def _value(
    node: ast.expr, names: Mapping[str, float], functions: Mapping[str, Callable[..., float]], depth: int = 1
) -> float:
    """The value of a tree. Raises ``ValueError``, ``TypeError`` or ``ArithmeticError`` if it has none."""
    if depth > MAX_DEPTH:
        raise ValueError("nested beyond MAX_DEPTH")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        # floats from the leaves up, so that no integer grows without bound
        value = float(node.value)  # type: ignore[arg-type]
    elif isinstance(node, ast.Name) and node.id in names:
        value = names[node.id]
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = (_value(side, names, functions, depth + 1) for side in (node.left, node.right))
        value = _BINARY[type(node.op)](left, right)
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        value = _UNARY[type(node.op)](_value(node.operand, names, functions, depth + 1))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
        if node.keywords:
            raise ValueError("keyword arguments")
        value = functions[node.func.id](*(_value(given, names, functions, depth + 1) for given in node.args))
    else:
        raise ValueError(f"{type(node).__name__} is no arithmetic")
    # `not <=` rather than `>`: nan fails it as well
    if not abs(value) <= MAX_MAGNITUDE:
        raise ValueError("beyond MAX_MAGNITUDE")
    return value
