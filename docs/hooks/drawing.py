"""Small drawings of what a method reads, computes and compares, as SVG that is read on light and dark pages."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

COLOURS = {
    "reads": ("#e8eaf6", "#5c6bc0"),
    "model": ("#e0f2f1", "#00897b"),
    "teacher": ("#fff3e0", "#fb8c00"),
    "writes": ("#f1f8e9", "#7cb342"),
    "objective": ("#fce4ec", "#d81b60"),
}
"""Fill and stroke; the text is always dark."""

ROW, GAP = 46, 12
COLUMNS = ((0, 250), (290, 100), (430, 314))
"""Left edge and width: what is read, the models, what is compared."""
WIDTH = 744
STYLE = (
    "text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;fill:#212121}"
    ".b{font-weight:600}.s{font-size:12px}path{stroke:#8d8d8d;stroke-width:1.5;fill:none;marker-end:url(#a)}"
    ".n{fill:#8d8d8d}"
)
ARROW = (
    '<marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<polygon points="0,0 8,4 0,8" fill="#8d8d8d"/></marker>'
)


class Box(NamedTuple):
    """A box of one or two lines."""

    kind: str
    lines: list[str]


def draw(rows: Sequence[tuple[Box, Box]], terms: Sequence[Box], teachers: Sequence[str], again: str) -> str:
    """A method's drawing.

    Args:
        rows: of each task what is read and what is written, with the student between them.
        terms: of each objective its term, below.
        teachers: the models that the terms learn from.
        again: what follows the last row and leads back to what is read; nothing if it is empty.
    """
    shapes, middle = [], COLUMNS[1][0] + COLUMNS[1][1]
    tasks_end = len(rows) * (ROW + GAP) - GAP
    terms_top = tasks_end + 2 * GAP
    heights = max(len(terms), len(teachers))
    end = terms_top + heights * (ROW + GAP) - GAP if heights else tasks_end
    # without a teacher the student alone gives what an objective reads
    shapes.append(_box(1, 0, tasks_end if teachers or not terms else end, Box("model", ["student"])))
    for number, (reads, writes) in enumerate(rows):
        top = number * (ROW + GAP)
        shapes += [_box(0, top, ROW, reads), _box(2, top, ROW, writes)]
        shapes += [_arrow(COLUMNS[0][1], top + ROW / 2, COLUMNS[1][0], top + ROW / 2)]
        shapes += [_arrow(middle, top + ROW / 2, COLUMNS[2][0], top + ROW / 2)]
    if teachers:
        shapes.append(_box(1, terms_top, end - terms_top, Box("teacher", ["teacher", *teachers])))
        shapes.append(_arrow(COLUMNS[0][1] / 2, tasks_end, COLUMNS[1][0], (terms_top + end) / 2, bend=True))
    for number, term in enumerate(terms):
        top = terms_top + number * (ROW + GAP)
        shapes += [_box(2, top, ROW, term), _arrow(middle, top + 2 * ROW / 3, COLUMNS[2][0], top + 2 * ROW / 3)]
        if teachers:
            shapes.append(_arrow(middle, tasks_end - 6, COLUMNS[2][0], top + ROW / 4))
    if again:
        shapes.append(_arrow(COLUMNS[2][0] + 60, tasks_end, COLUMNS[0][1] / 2, end, back=end + 26))
        shapes.append(f'<text class="s n" x="{WIDTH / 2}" y="{end + 44}" text-anchor="middle">{escape(again)}</text>')
        end += 52
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-4 -4 {WIDTH + 8} {end + 8}" width="{WIDTH + 8}">'
        f"<style>{STYLE}</style><defs>{ARROW}</defs>{''.join(shapes)}</svg>\n"
    )


def _box(column: int, top: float, height: float, box: Box) -> str:
    left, width = COLUMNS[column]
    fill, stroke = COLOURS[box.kind]
    shape = f'<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{stroke}"/>'
    first = top + height / 2 - 9 * (len(box.lines) - 1) + 4.5
    texts = [
        f'<text class="{"s" if number else "b"}" x="{left + width / 2}" y="{first + 18 * number}"'
        f' text-anchor="middle">{escape(_short(line, int(width / 6.4)))}</text>'
        for number, line in enumerate(box.lines)
    ]
    return shape + "".join(texts)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _arrow(x: float, y: float, to_x: float, to_y: float, *, bend: bool = False, back: float = 0) -> str:
    """An arrow: straight, down and then right, or down, left and up again."""
    if back:
        return f'<path d="M{x},{y} V{back} H{to_x} V{to_y + 2}"/>'
    return f'<path d="M{x},{y} V{to_y} H{to_x}"/>' if bend else f'<path d="M{x},{y} L{to_x},{to_y}"/>'
