"""JSON and YAML of every kind of trouble: one line, at once."""

import time
from pathlib import Path

import pytest
import yaml

from lit_distill.errors import UserError
from lit_distill.reading import json_lines, parse_json, parse_yaml, read_small
from tests.commands.hostile import DEEP, bombs
from tests.runs import CONFIGS


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{", "not JSON: Expecting property name"),
        (b'[1,\n"\xff"]', "not JSON: 'utf-8' codec can't decode byte 0xff in position 5"),
        (b"[" * 100_000, "not JSON: nested too deep"),
        (b"9" * 6000, "not JSON: Exceeds the limit"),
        (b'"\\ud800"', "surrogates not allowed"),
    ],
)
def test_json_that_is_none(text: bytes, reason: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text follows
        parse_json(text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_a_pair_can_be_kept_and_a_whole_one_is_a_character() -> None:
    assert parse_json('"\\ud800"', surrogates=True) == "\ud800"
    assert parse_json('["\\ud83d\\ude00"]') == ["😀"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (bombs(), "stands for more than"),
        (bombs(merge=True), "stands for more than"),
        (b"[" * DEEP + b"]" * DEEP, "nested more than"),
        (b"- " * DEEP + b"1", "nested more than"),
        (b"&a [*a]", "the alias *a"),
        (b'a: 1\nb: "\\0"', "a NUL character in line 2"),
        (b"a: b: c", "not YAML"),
        (b"a: \xff", "not YAML: 'utf-8' codec"),
        (b"a: !!python/name:os.system x", "not YAML"),
    ],
)
def test_yaml_that_is_none(text: bytes, reason: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text follows
        parse_yaml(text)
    assert time.monotonic() - began < 5
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_config_reads_as_it_did() -> None:
    paths = sorted(CONFIGS.rglob("*.yaml"))
    assert paths
    for path in paths:
        assert parse_yaml(path.read_bytes()) == yaml.safe_load(path.read_text())


def test_an_alias_stands_for_what_it_names() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": [{"x": 1}, {"x": 1}],
    }


def test_a_file_without_an_end() -> None:
    with pytest.raises(ValueError, match="larger than 64 MiB"):
        read_small("/dev/zero")


def test_json_lines_are_objects_at_their_places(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n \n{"a": "\\ud800"}\n{"a')
    torn: list[str] = []
    rows = list(json_lines(path, surrogates=True, on_torn=torn.append))
    assert rows == [(f"{path}:1", {"a": 1}), (f"{path}:3", {"a": "\ud800"})]
    assert torn == [f"{path}:4"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[1]\n", "not a JSON object but list"),
        (b'{"a\n{}', "not JSON"),
        (b'{"a": "\\ud800"}', "not JSON: .*surrogates not allowed"),
    ],
)
def test_a_bad_line_is_named(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\n" + line)
    with pytest.raises(UserError, match=rf"^{path}:2: {reason}"):
        list(json_lines(path))
