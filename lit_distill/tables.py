"""Tables, in Markdown and on the console."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text


def one_line(value: Any) -> str:
    """A value as a cell of a Markdown table; ``None`` is an empty cell."""
    return " ".join(str("" if value is None else value).split()).replace("|", "\\|")


def markdown_table(
    names: Sequence[str],
    rows: Iterable[Sequence[Any]],
    numbers: Sequence[str] = (),
    cell: Callable[[Any], str] = one_line,
) -> str:
    """A Markdown table with the columns ``names``; those in ``numbers`` are aligned to the right."""
    rule = ["---:" if name in numbers else "---" for name in names]
    lines = [map(cell, names), rule, *(map(cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def console_table(title: str, texts: Sequence[str], numbers: Sequence[str] = ()) -> Table:
    """An empty table for the console: columns of text, which may wrap, then columns of numbers."""
    table = Table(title=title, title_justify="left")
    for name in texts:
        table.add_column(name, overflow="fold")
    for name in numbers:
        # in a narrow terminal digits go on below, they are not cut off
        table.add_column(name, justify="right", overflow="fold")
    return table


def text_panel(title: str, texts: Iterable[tuple[str, str]]) -> Panel:
    """A frame around texts, each with its name; what looks like markup stays as it is."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in texts:
        grid.add_row(name, Text(text))
    return Panel(grid, title=Text(title), title_align="left")
