"""Read the released files; whatever is wrong with one is said with its name and line."""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_distill.errors import UserError
from lit_distill.reading import parse_json


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The line number and the object of each line that is not blank.

    Raises:
        UserError: a line is not UTF-8, not a JSON object, or has a key twice.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                # how some programs begin a file in UTF-8
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.isspace():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: not a JSON object but {type(row).__name__}")
            yield number, row


def output_files(folder: Path, split: str) -> list[Path]:
    """The files ``<split>_CoT_<k>.json`` of a folder in the order of their number k; none if there is none.

    Raises:
        UserError: a number is missing, which would shift every output after it.
    """
    pattern = re.compile(re.escape(split) + r"_CoT_(\d+)\.json")
    numbered = {int(match[1]): path for path in folder.glob("*.json") if (match := pattern.fullmatch(path.name))}
    for expected, number in enumerate(sorted(numbered)):
        if number != expected:
            raise UserError(f"{folder}: {split}_CoT_{expected}.json is missing, but {numbered[number].name} is there")
    return [numbered[number] for number in sorted(numbered)]


def read_outputs(paths: list[Path]) -> list[str]:
    """The teacher's outputs, one file after the other; each file is a JSON list of strings.

    Raises:
        UserError: a file is something else.
    """
    outputs: list[str] = []
    for path in paths:
        found = read_json(path)
        if not isinstance(found, list):
            raise UserError(f"{path}: not a JSON list of the teacher's outputs but {type(found).__name__}")
        for position, output in enumerate(found):
            if not isinstance(output, str):
                raise UserError(f"{path}: output {position} is not a string but {type(output).__name__}")
        outputs += found
    return outputs


def read_json(path: Path) -> Any:  # noqa: ANN401 - whatever the file holds
    """The content of a JSON file.

    Raises:
        UserError: the file is not UTF-8, not JSON, or has a key twice in one object.
    """
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def text_of(row: dict[str, Any], key: str) -> str:
    """The string under a key.

    Raises:
        KeyError: there is no such key; whoever reads the row knows its file and line.
        UserError: it is not a string.
    """
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"{key!r} must be a string, got {value!r}")
    return value


def texts_of(row: dict[str, Any], key: str) -> tuple[str, ...]:
    """The list of strings under a key.

    Raises:
        KeyError: there is no such key.
        UserError: it is not a list of strings.
    """
    value = row[key]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{key!r} must be a list of strings, got {value!r}")
    return tuple(value)
