"""Arithmetic in text, valued without ever running the text.

A student's output is untrusted: the value of an equation is computed here from a syntax tree in which only numbers,
``+ - * / // % **``, signs and parentheses exist.
"""

import ast
import operator
from collections.abc import Callable
from itertools import accumulate
from typing import Final

MAX_LENGTH: Final = 512
"""Longest text read, in characters after stripping. SVAMP's longest equation has 31; the bound also caps the number of
nodes, so that a generation that never stopped costs no more than a good one."""

MAX_DEPTH: Final = 64
"""Deepest nesting read, of parentheses and of operations alike, where every term of ``1 + 1 + 1 ...`` nests one deeper.
Far below the parser's and the interpreter's own limits, so that the answer depends neither on the Python version nor on
how deep the caller's stack is."""

MAX_EXPONENT: Final = 64.0
"""Largest exponent by size. No word problem raises to more, and a student that stutters ``**`` writes no answer."""

MAX_MAGNITUDE: Final = 1e15
"""Largest number by size, for literals, intermediate results and the value. Below it (and up to 2**53, about 9e15)
doubles hold every integer, so that whole numbers are computed exactly."""

# Letters other than the exponent's are refused before the parser sees them: it would warn about some (`1or 2`) and
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


def _value(node: ast.expr, depth: int) -> float:
    """The value of a tree; raises ``ValueError`` or ``ArithmeticError`` where it has none."""
    if depth > MAX_DEPTH:
        raise ValueError("nested beyond MAX_DEPTH")
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        # In floats from the leaves on: no integer can grow without bound.
        value = float(node.value)  # type: ignore[arg-type]
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        value = _BINARY[type(node.op)](_value(node.left, depth + 1), _value(node.right, depth + 1))
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        value = _UNARY[type(node.op)](_value(node.operand, depth + 1))
    else:
        raise ValueError(f"{type(node).__name__} is no arithmetic")
    # `not <=` rather than `>`: nan fails it as well
    if not abs(value) <= MAX_MAGNITUDE:
        raise ValueError("beyond MAX_MAGNITUDE")
    return value


def _parentheses(text: str) -> int:
    """How deep a text's parentheses nest; the syntax tree no longer shows redundant ones."""
    depths = accumulate((character == "(") - (character == ")") for character in text)
    return max(depths, default=0)


def evaluate(text: str) -> float | None:
    """The value of an arithmetic expression, by Python's own precedence and meaning of each operator.

    The text is stripped of surrounding whitespace. Read are decimal integers and floats, ``+ - * / // % **``, signs and
    parentheses, within this module's limits. Commas are not thousands separators: ``1,000`` is no number here.

    Args:
        text: any text at all; it is parsed, never executed.

    Returns:
        The value, always finite; ``None`` for anything else: other syntax, division by zero, a complex power, numbers
        beyond the limits. It never raises.

    >>> evaluate("( 10.0 * 45.0 )")
    450.0
    >>> evaluate("84 / 0") is None
    True
    """
    text = text.strip()
    if len(text) > MAX_LENGTH or not _CHARACTERS.issuperset(text) or _parentheses(text) > MAX_DEPTH:
        return None
    try:
        return _value(ast.parse(text, mode="eval").body, depth=1)
    # The parser gives up on deep nesting with RecursionError or MemoryError, on overlong integers with ValueError.
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
