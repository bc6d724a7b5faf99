"""A report as parts, and the two ways of writing them: both say the same."""

import base64
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_distill.comparison.figures import Drawn


@dataclass(frozen=True)
class Heading:
    """A heading."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table; the first column holds names, the others numbers."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1
    """Columns of names, which are aligned to the left."""


@dataclass(frozen=True)
class Code:
    """Lines to be copied."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """A figure."""

    drawn: Drawn


Part = Heading | Text | Items | Table | Code | Picture

_STYLE = """
:root { color-scheme: light dark; }
:root { --ink: #1a1a1a; --faint: #5a5a5a; --rule: #d9d9d9; --paper: #ffffff; --shade: #f5f5f3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --faint: #a8a8a4; --rule: #44444a; --paper: #18181b; --shade: #232327; }
}
body { background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "DejaVu Sans", sans-serif; margin: 0; }
main { max-width: 76rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem; }
p, li { max-width: 46rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top; }
th { border-bottom: 2px solid var(--ink); font-weight: 600; vertical-align: bottom; }
td { white-space: nowrap; }
th.name, td.name { text-align: left; }
td.name { white-space: normal; min-width: 10.5rem; }
tbody tr:hover { background: var(--shade); }
figure { margin: 1.5rem 0; overflow-x: auto; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
pre { background: var(--shade); padding: .75rem 1rem; font-size: .8rem; line-height: 1.5; border-radius: 4px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
@media screen and (max-width: 45rem) {
  main { padding: 1.25rem 1rem 3rem; }
  /* below this its letters cannot be read */
  figure img { min-width: 38rem; max-width: none; }
  ul { padding-left: 1.25rem; }
  thead { display: none; }
  table, tbody, tr, td { display: block; }
  tr { border-bottom: 1px solid var(--rule); padding: .4rem 0; }
  td, td.name { border: 0; display: flex; justify-content: space-between; gap: 1rem; padding: .1rem 0; }
  td, td.name { text-align: right; white-space: normal; }
  td:first-child { font-weight: 600; text-align: left; }
  td::before { content: attr(data-name); color: var(--faint); text-align: left; white-space: nowrap; }
  td:first-child::before, td:empty { display: none; }
}
@page { size: A4 landscape; margin: 12mm; }
@media print {
  :root { --ink: #000; --faint: #333; --rule: #bbb; --paper: #fff; --shade: #f5f5f3; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  h2, h3 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  table { font-size: 7.5pt; }
  th, td { padding: .2rem .4rem; }
  td.name { min-width: 5rem; }
  .wide { overflow: visible; }
}
""".strip()


def to_markdown(parts: Sequence[Part], folder: Path) -> str:
    """The report in Markdown.

    Args:
        parts: what it says.
        folder: where it will lie, beside the figures.
    """
    return "\n\n".join(_markdown(part, folder) for part in parts) + "\n"


def _markdown(part: Part, folder: Path) -> str:
    match part:
        case Heading(level, text):
            return f"{'#' * level} {_escape(text)}"
        case Text(text):
            return _escape(text)
        case Items(items):
            return "\n".join(f"- {_escape(item)}" for item in items)
        case Code(lines):
            return "\n".join(["```", *lines, "```"])
        case Picture(drawn):
            return f"![{_escape(drawn.alt)}]({_beside(drawn.png, folder)})"
        case Table(head, rows, names):
            rule = tuple("---" if i < names else "---:" for i in range(len(head)))
            return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in (head, rule, *rows))


def _beside(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _escape(text: str) -> str:
    """Signs that would set a text otherwise; names hold underscores, which Markdown keeps within words."""
    for sign in "\\`*<[]&":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.splitlines())


def _cell(text: str) -> str:
    if set(text) <= {"-", ":"} and len(text) >= 3:
        return text
    return _escape(text).replace("|", "\\|")


def to_html(parts: Sequence[Part]) -> str:
    """The report as one page that needs no other file."""
    title = next((part.text for part in parts if isinstance(part, Heading)), "report")
    head = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>",
        f"<style>\n{_STYLE}\n</style>",
        "</head>",
        "<body>",
        "<main>",
    ]
    return "\n".join([*head, *map(_html, parts), "</main>", "</body>", "</html>"]) + "\n"


def _html(part: Part) -> str:
    say = html.escape
    match part:
        case Heading(level, text):
            return f"<h{level}>{say(text)}</h{level}>"
        case Text(text):
            return f"<p>{say(text)}</p>"
        case Items(items):
            return "<ul>\n" + "\n".join(f"<li>{say(item)}</li>" for item in items) + "\n</ul>"
        case Code(lines):
            return "<pre>" + "\n".join(map(say, lines)) + "</pre>"
        case Picture(drawn):
            content = base64.b64encode(drawn.svg.read_bytes()).decode()
            return f'<figure><img alt="{say(drawn.alt)}" src="data:image/svg+xml;base64,{content}"></figure>'
        case Table(head, rows, names):
            kinds = [' class="name"' if i < names else "" for i in range(len(head))]
            top = f"<tr>{_cells('th', head, kinds)}</tr>"
            # a phone shows a row as a list, in which each value has its column's name
            named = [f'{kind} data-name="{say(name)}"' for kind, name in zip(kinds, head, strict=True)]
            body = [f"<tr>{_cells('td', row, named)}</tr>" for row in rows]
            return "\n".join(
                ['<div class="wide"><table><thead>', top, "</thead><tbody>", *body, "</tbody></table></div>"]
            )


def _cells(tag: str, texts: Sequence[str], kinds: Sequence[str]) -> str:
    return "".join(f"<{tag}{kind}>{html.escape(text)}</{tag}>" for text, kind in zip(texts, kinds, strict=True))
