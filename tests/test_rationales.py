"""Examples: JSON lines, filters."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_distill.errors import UserError
from lit_distill.rationales import filter_name, find_filter, label_agrees
from lit_distill.tasks import Row, read_rows, write_rows
from tests.rows import make_row

# JSON has no lone surrogates that a file in UTF-8 could hold
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
EXAMPLES = st.builds(
    make_row, TEXT, TEXT, st.none() | TEXT, st.none() | st.lists(TEXT).map(tuple), st.none() | TEXT, st.none() | TEXT
)


@given(st.lists(EXAMPLES, max_size=5))
def test_what_is_written_reads_back(tmp_path_factory: pytest.TempPathFactory, examples: list[Row]) -> None:
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    assert write_rows(path, examples) == len(examples)
    assert read_rows(path) == examples
    assert len(path.read_bytes().split(b"\n")) == len(examples) + 1


def test_a_line_is_one_object_without_what_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    write_rows(path, [make_row("a", "naïve", None, ("x", "y"))])
    assert path.read_text(encoding="utf-8") == '{"id": "a", "input": "naïve", "choices": ["x", "y"]}\n'


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [make_row("old", "in", None)])

    def broken() -> list[Row]:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_rows(path, (example for _ in (0,) for example in broken()))
    assert [example.id for example in read_rows(path)] == ["old"]
    assert [found.name for found in tmp_path.iterdir()] == ["rows.jsonl"]


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


def test_a_line_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "a", "input": "\xff"}')
    with pytest.raises(UserError, match=r"rows\.jsonl:1: not UTF-8"):
        read_rows(path)


def test_label_agrees() -> None:
    assert label_agrees(make_row("a", "in", "yes", teacher_label="yes"))
    assert not label_agrees(make_row("a", "in", "yes", teacher_label="Yes"))
    assert label_agrees(make_row("a", "in", "yes", teacher_label="Yes"), lambda a, b: a.lower() == b)
    assert not label_agrees(make_row("a", "in", None, teacher_label=None))
    assert not label_agrees(make_row("a", "in", None, teacher_label="yes"))


def test_find_filter() -> None:
    assert find_filter("lit_distill.rationales.label_agrees") is label_agrees
    assert filter_name(label_agrees) == "lit_distill.rationales.label_agrees"
    assert filter_name("none") == "none"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "got 'nonsense'"),
        ("no_such_package.function", "'no_such_package' cannot be imported"),
        ("lit_distill.rationales.nothing", "no function 'nothing'"),
        ("lit_distill.rationales.ANSWER_MARK", "no function 'ANSWER_MARK'"),
        ("os._exit", "'os._exit' is no function of an example"),
        ("builtins.open", "'builtins.open' is no function of an example"),
        ("pathlib.Path", "'pathlib.Path' is no function of an example"),
        ("lit_distill.rationales.target_text", "takes no single example"),
    ],
)
def test_a_filter_that_is_none(name: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^rationale_filter: .*{message}") as caught:
        find_filter(name)
    assert "label_agrees" in str(caught.value)
