"""Rows: what they hold, and how they are read from JSON lines."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_distill.errors import UserError
from lit_distill.tasks import Row, TeacherOutput, fingerprint, read_rows
from tests.rows import make_row, write_rows

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ROWS = st.builds(
    make_row, TEXT, TEXT, st.none() | TEXT, st.none() | st.lists(TEXT).map(tuple), st.none() | TEXT, st.none() | TEXT
)


@given(st.lists(ROWS, max_size=5))
def test_lines_are_read(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> None:
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    write_rows(path, rows)
    assert read_rows(path) == rows


def test_a_row_speaks_of_its_first_output() -> None:
    row = Row("a", "in", "yes", outputs=(TeacherOutput("so", "no", columns={"x": 1}), TeacherOutput("or", "yes")))
    assert (row.rationale, row.teacher_label, row.columns) == ("so", "no", {"x": 1})
    bare = Row("a", "in", "yes")
    assert (bare.rationale, bare.teacher_label, bare.columns) == (None, None, {})


def test_a_fingerprint_tells_rows_apart() -> None:
    rows = [make_row("a", "in", "yes", rationale="so"), make_row("b", "in", "no")]
    others = [rows[::-1], rows[:1], [rows[0], make_row("b", "in", "yes")], [rows[0], make_row("b", "on", "no")]]
    assert len({fingerprint(rows), *map(fingerprint, others)}) == 5
    said = [make_row("a", "in", "yes", rationale="or"), rows[1]]
    assert fingerprint(said) == fingerprint(rows)
    assert fingerprint(said, rationales=True) != fingerprint(rows, rationales=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object but list"),
        ('{"id": "a"}', "missing input"),
        ('{"id": 1, "input": "x"}', "id must be a string"),
        ('{"id": "a", "input": null}', "input must be a string"),
        ('{"id": "a", "input": "x", "rationale": 3}', "rationale must be a string"),
        ('{"id": "a", "input": "x", "choices": "y"}', "choices must be a list of strings"),
        ('{"id": "a", "input": "x", "choices": [1]}', "choices must be a list of strings"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"id": "good", "input": "x", "label": None}) + f"\n\n{line}\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl:3: .*{message}"):
        read_rows(path)
