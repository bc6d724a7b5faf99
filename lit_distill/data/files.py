"""Read the released files; whatever is wrong with one is said with its name and line."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_distill.errors import UserError


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
            row = _parse(line.rstrip(), path, number)
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: not a JSON object but {type(row).__name__}")
            yield number, row


def _parse(raw: bytes, path: Path, line: int) -> Any:  # noqa: ANN401 - whatever the JSON holds
    """What a JSON text holds that begins at a line of a file."""
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        where = line + raw.count(b"\n", 0, error.start)
        raise UserError(f"{path}:{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        where = line + error.lineno - 1
        raise UserError(f"{path}:{where}: not JSON ({error.msg} at column {error.colno})") from error
    except UserError as error:
        raise UserError(f"{path}:{line}: {error}") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}:{line}: JSON too deep or with too large a number") from error
    if b"\\ud" in raw.lower() and not _is_text(found):
        raise UserError(f"{path}:{line}: half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise UserError(f"the key {twice!r} is there twice in one object")
    return found


def _is_text(row: object) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


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
    return _parse(path.read_bytes(), path, 1)


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
