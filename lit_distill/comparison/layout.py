"""Where texts of figures go, in inches: measured, wrapped and kept apart."""

from collections.abc import Sequence
from itertools import pairwise
from textwrap import wrap
from typing import Any

FONT = "DejaVu Sans"
"""It comes with matplotlib, so that a text is as wide everywhere."""


def fold(text: str, width: int) -> str:
    """A text in lines of so many characters; what is longer than that without a space is broken."""
    return "\n".join("\n".join(wrap(line, width) or [""]) for line in text.split("\n"))


def measure(text: str, size: float, weight: str = "normal") -> tuple[float, float]:
    """The width and height of a text."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    properties: Any = FontProperties(family=FONT, weight=weight)
    lines = text.split("\n")
    width = max(
        TextPath((0, 0), line, size=size, prop=properties).get_extents().width if line.strip() else 0 for line in lines
    )
    return width / 72 * 1.03, len(lines) * size * 1.25 / 72


def spread(wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Centres of labels as near as can be to where they are wanted, none over another.

    Isotonic regression: labels that would meet are moved as a block by the least squares.

    Args:
        wanted: centres, from the top down.
        heights: of the labels, space between them included.
        low: lower end of the room, which has to hold all.
        high: upper end.
    """
    below = [0.0]
    for above, own in pairwise(heights):
        below.append(below[-1] + (above + own) / 2)
    blocks: list[tuple[float, int]] = []
    for centre, offset in zip(wanted, below, strict=True):
        value, count = centre + offset, 1
        while blocks and blocks[-1][0] < value:
            other, size = blocks.pop()
            value, count = (value * count + other * size) / (count + size), count + size
        blocks.append((value, count))
    top = high - heights[0] / 2
    bottom = low + heights[-1] / 2 + below[-1]
    flat = [min(max(value, bottom), top) for value, count in blocks for _ in range(count)]
    return [value - offset for value, offset in zip(flat, below, strict=True)]


def keep_apart(places: Sequence[float], widths: Sequence[float], gap: float = 0.08) -> list[int]:
    """Which labels along an axis can stand beside each other: from the right, as many as do not meet.

    Args:
        places: their centres, rising.
        widths: theirs.
        gap: between two.
    """
    kept: list[int] = []
    for i in reversed(range(len(places))):
        if not kept or places[i] + widths[i] / 2 + gap <= places[kept[-1]] - widths[kept[-1]] / 2:
            kept.append(i)
    return kept[::-1]
