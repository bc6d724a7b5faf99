"""Read rows from files, folders and the hub; errors name file and line.

JSON and CSV are not read by Hugging Face datasets, whose readers infer types over the whole file, take words such as
``None`` for missing values, and name no line. It reads the rest, and is imported lazily, as it imports pandas.
"""

import csv
import io
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from lit_distill.data.store import cut
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.reading import json_object, numbered_lines, parse_json
from lit_distill.remote import AnyPath, format_of, open_bytes

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

# of a folder that `save_to_disk` wrote
_SPLIT_NAMES = {"val": ("val", "validation", "valid", "dev"), "predict": ("predict", "test")}


Placed = tuple[str, dict[str, Any]]
"""A row and its place, for messages."""


@dataclass(frozen=True)
class Lines:
    """Some lines of JSON, parsed as they are read."""

    path: AnyPath
    numbered: list[tuple[int, bytes]]

    def __len__(self) -> int:
        return len(self.numbered)

    def __iter__(self) -> Iterator[Placed]:
        for number, line in self.numbered:
            place = f"{self.path}:{number}"
            yield place, json_object(line, place)


class Table(NamedTuple):
    """A user's rows, read anew at each pass."""

    chunks: Callable[[], Iterator[Lines | list[Placed]]]  # the rows, some at a time
    header: list[str] | None = None  # column names, in order; not in JSON
    class_names: Mapping[str, list[str]] = {}  # column of class numbers -> names

    def columns(self, needed: Collection[str]) -> list[str]:
        """Column names, in order; of JSON, whose writers may omit empty values, those of as many rows as it takes."""
        if self.header is not None:
            return self.header
        found: dict[str, None] = {}
        for _, row in chain.from_iterable(self.chunks()):
            found |= dict.fromkeys(row)
            if found.keys() >= set(needed):
                break
        return list(found)


def line_chunks(path: AnyPath) -> Iterator[Lines]:
    """The rows of JSON lines."""
    return (Lines(path, some) for some in cut(numbered_lines(path)))


def read_file(path: AnyPath, split: Split) -> Table:
    """Read a JSON, JSON lines, CSV or Parquet file, or a split in a ``save_to_disk`` folder.

    All but Parquet may be compressed (`open_bytes`). Raises a ``UserError`` if it is none of these, or damaged.
    """
    if path.is_dir():
        return _read_folder(path, split)
    suffix = format_of(path)
    if suffix not in SUFFIXES:
        raise UserError(f"{split}: {path} is none of {', '.join(SUFFIXES)} and no folder")
    if suffix == ".csv":
        return _read_csv(path)
    if suffix == ".parquet":
        return _read_parquet(path)
    with open_bytes(path) as file:
        is_list = file.read(4096).lstrip()[:1] == b"["
    return Table(lambda: cut(_json_objects(path)) if is_list else line_chunks(path))


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


def read_json_list(path: AnyPath) -> list[Any]:
    """A file of one JSON list. Raises a ``UserError`` if it is none."""
    try:
        with open_bytes(path) as file:
            found = parse_json(file.read())
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(found, list):
        raise UserError(f"{path}: not a JSON list but {type(found).__name__}")
    return found


def _json_objects(path: AnyPath) -> Iterator[tuple[str, dict[str, Any]]]:
    for position, found in enumerate(read_json_list(path)):
        place = f"{path}, item {position}"
        if not isinstance(found, dict):
            raise UserError(f"{place}: not a JSON object but {type(found).__name__}")
        yield place, found


def _read_csv(path: AnyPath) -> Table:
    # a cell may be as long as an input is
    csv.field_size_limit(2**31 - 1)
    with _csv_reader(path) as reader:
        columns = list(reader.fieldnames or [])
    if len(set(columns)) < len(columns):
        raise UserError(f"{path}: a column is there twice: {', '.join(columns)}")
    return Table(lambda: cut(_csv_rows(path, len(columns))), columns)


def _csv_rows(path: AnyPath, columns: int) -> Iterator[Placed]:
    with _csv_reader(path) as reader:
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{place}: another number of cells than the {columns} columns")
            yield place, {key: value if value != "" else None for key, value in row.items()}


@contextmanager
def _csv_reader(path: AnyPath) -> Iterator["csv.DictReader[str]"]:
    try:
        with open_bytes(path) as file:
            yield csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({error})") from error


def _read_parquet(path: AnyPath) -> Table:
    from datasets import Dataset
    from datasets.table import InMemoryTable  # type: ignore[import-untyped]

    try:
        with path.open("rb") as file:
            table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from error
    try:
        rows = Dataset(InMemoryTable(table))
    except Exception:  # noqa: BLE001 - what other tools left in the file's metadata is no features of datasets
        rows = Dataset(InMemoryTable(table.replace_schema_metadata()))
    return _from_dataset(rows, str(path))


def _read_folder(path: AnyPath, split: Split) -> Table:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{split}: {path} is no folder that save_to_disk wrote ({error})") from error
    if isinstance(loaded, dict):
        allowed = _SPLIT_NAMES.get(split, (split,))
        name = next((name for name in allowed if name in loaded), None)
        if name is None:
            raise UserError(f"{split}: {path} holds {', '.join(loaded)}, none of {', '.join(allowed)}")
        loaded = loaded[name]
    return _from_dataset(loaded, str(path))


def _from_dataset(rows: Any, place: str) -> Table:
    from datasets import ClassLabel

    names = {key: feature.names for key, feature in rows.features.items() if isinstance(feature, ClassLabel)}

    def placed() -> Iterator[Placed]:
        return ((f"{place}, row {position}", dict(row)) for position, row in enumerate(rows))

    return Table(lambda: cut(placed()), list(rows.column_names), names)
