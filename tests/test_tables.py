"""Tables as Markdown reads them."""

from markdown_it import MarkdownIt

from lit_distill.tables import markdown_table


def test_any_cell_stays_in_its_column() -> None:
    text = markdown_table(("a", "b"), [["x|y", None], ["two\nlines", 3]], numbers=("b",))
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert '<td>x|y</td>\n<td style="text-align:right"></td>' in html
    assert '<td>two lines</td>\n<td style="text-align:right">3</td>' in html
