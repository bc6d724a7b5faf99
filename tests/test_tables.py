"""Tables as Markdown reads them, and as a console shows them."""

from io import StringIO

from markdown_it import MarkdownIt
from rich.console import Console

from lit_distill.tables import console_table, markdown_table


def test_any_cell_stays_in_its_column() -> None:
    text = markdown_table(("a", "b"), [["x|y", None], ["two\nlines", 3]], numbers=("b",))
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert '<td>x|y</td>\n<td style="text-align:right"></td>' in html
    assert '<td>two lines</td>\n<td style="text-align:right">3</td>' in html


def test_a_narrow_terminal_cuts_no_digits() -> None:
    table = console_table("numbers", ["one", "two"], [f"n{i}" for i in range(9)])
    table.add_row("a", "b", *["+0.12345"] * 9)
    console = Console(width=60, record=True, file=StringIO())
    console.print(table)
    text = console.export_text()
    assert "…" not in text
    assert sum(map(str.isdigit, text)) == 9 * 6 + 9
