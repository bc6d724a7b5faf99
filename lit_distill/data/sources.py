"""Read rows from files, folders and the hub; errors name file and line.

JSON and CSV are not read by Hugging Face datasets, whose readers infer types over the whole file, take words such as
``None`` for missing values, and name no line. It reads the rest, and is imported lazily, as it imports pandas.
"""

import codecs
import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.reading import parse_json

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""The files that can be read."""

_SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test",),
    "predict": ("predict", "test"),
}


class Table(NamedTuple):
    """A user's rows."""

    columns: list[str]  # column names, in order
    rows: list[tuple[str, dict[str, Any]]]  # `(place, row)`, the place for messages
    class_names: dict[str, list[str]]  # column of class numbers -> names


def read_file(path: Path, split: Split) -> Table:
    """Read a JSON, JSON lines, CSV or Parquet file, or a split in a ``save_to_disk`` folder.

    Raises:
        UserError: it is none of these, or damaged.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        return _read_folder(path, split)
    if suffix == ".csv":
        return _read_csv(path)
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix not in SUFFIXES:
        raise UserError(f"{split}: {path} is none of {', '.join(SUFFIXES)} and no folder")
    with path.open("rb") as file:
        is_list = file.read(4096).lstrip()[:1] == b"["
    rows = list(_json_list(path) if is_list else read_json_lines(path))
    # the union over rows: writers of JSON lines may omit empty values
    return Table(list(dict.fromkeys(key for _, row in rows for key in row)), rows, {})


def read_hub(name: str, config: str | None, split_name: str) -> Table:
    """Read a split of a hub dataset. Raises a ``UserError`` if it does not exist, or without a connection."""
    import datasets  # type: ignore[import-untyped]

    try:
        loaded = datasets.load_dataset(name, config, split=split_name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # OSError: also no connection, offline, no such dataset; RuntimeError: a script, which is no longer run
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"hub: {split_name!r} of {name!r} cannot be loaded ({reason})") from error
    return _from_dataset(loaded, f"{name}[{split_name}]")


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and object of each non-blank line. Raises a ``UserError`` if one is no JSON object."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                # some programs write a byte order mark
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.isspace():
                place = f"{path}:{number}"
                yield place, _object(_parsed(line, place), place)


def _json_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for position, found in enumerate(_parsed(path.read_bytes(), str(path))):
        place = f"{path}, item {position}"
        yield place, _object(found, place)


def _parsed(text: bytes, place: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error


def _object(found: Any, place: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise UserError(f"{place}: not a JSON object but {type(found).__name__}")
    return found


def _read_csv(path: Path) -> Table:
    # a cell may be as long as an input is
    csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = list(reader.fieldnames or [])
            if twice := sorted({name for name in columns if columns.count(name) > 1}):
                raise UserError(f"{path}: the column {twice[0]!r} is there twice")
            rows: list[tuple[str, dict[str, Any]]] = []
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"{place}: another number of cells than the {len(columns)} columns")
                rows.append((place, {key: value if value != "" else None for key, value in row.items()}))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({error})") from error
    return Table(columns, rows, {})


def _read_parquet(path: Path) -> Table:
    from datasets import Dataset
    from datasets.table import InMemoryTable  # type: ignore[import-untyped]

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from error
    try:
        return _from_dataset(Dataset(InMemoryTable(table)), str(path))
    except Exception:  # noqa: BLE001 - what other tools left in the file's metadata is no features of datasets
        return _from_dataset(Dataset(InMemoryTable(table.replace_schema_metadata())), str(path))


def _read_folder(path: Path, split: Split) -> Table:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{split}: {path} is no folder that save_to_disk wrote ({error})") from error
    if isinstance(loaded, dict):
        names = [name for name in _SPLIT_NAMES[split] if name in loaded]
        if not names:
            raise UserError(f"{split}: {path} holds {', '.join(loaded)}, none of {', '.join(_SPLIT_NAMES[split])}")
        loaded = loaded[names[0]]
    return _from_dataset(loaded, str(path))


def _from_dataset(rows: Any, place: str) -> Table:
    from datasets import ClassLabel

    names = {key: feature.names for key, feature in rows.features.items() if isinstance(feature, ClassLabel)}
    placed = [(f"{place}, row {position}", dict(row)) for position, row in enumerate(rows)]
    return Table(list(rows.column_names), placed, names)


def read_outputs(folder: Path, split: str) -> list[str]:
    """The teacher outputs in ``<split>_CoT_<k>.json``, each a JSON list of strings, by k.

    Raises:
        UserError: a file is invalid, or a number is missing, which would shift all later outputs.
    """
    pattern = re.compile(re.escape(split) + r"_CoT_(\d+)\.json")
    numbered = {int(match[1]): path for path in folder.glob("*.json") if (match := pattern.fullmatch(path.name))}
    outputs: list[str] = []
    for expected, (number, path) in enumerate(sorted(numbered.items())):
        if number != expected:
            raise UserError(f"{folder}: {split}_CoT_{expected}.json is missing, but {path.name} is there")
        found = _parsed(path.read_bytes(), str(path))
        if not isinstance(found, list):
            raise UserError(f"{path}: not a JSON list of the teacher's outputs but {type(found).__name__}")
        for position, output in enumerate(found):
            if not isinstance(output, str):
                raise UserError(f"{path}: output {position} is not a string but {type(output).__name__}")
        outputs += found
    return outputs


def text_of(row: dict[str, Any], key: str) -> str:
    """The string under a key.

    Raises:
        KeyError: the key is missing; the caller adds file and line.
        UserError: it is not a string.
    """
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"{key!r} must be a string, got {value!r}")
    return value


def texts_of(row: dict[str, Any], key: str) -> tuple[str, ...]:
    """The list of strings under a key; errors as in `text_of`."""
    value = row[key]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{key!r} must be a list of strings, got {value!r}")
    return tuple(value)
