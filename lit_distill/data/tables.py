"""Read a user's own rows, from whatever they are kept in, as plain objects.

Hugging Face datasets is imported where it reads something: it brings pandas, which takes a tenth of the start.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from lit_distill.data.files import read_json, read_json_lines
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""The files that can be read."""

_SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test",),
    "predict": ("predict", "test"),
}


class Table:
    """Rows with the place of each, for messages, and the names of a column's classes where it has them.

    Args:
        columns: the columns' names, in order.
        rows: ``(place, row)``, in order.
        class_names: column -> names of its classes, for columns of numbers that stand for names.
    """

    def __init__(
        self, columns: list[str], rows: Sequence[tuple[str, dict[str, Any]]], class_names: dict[str, list[str]]
    ) -> None:
        self.columns = columns
        self.class_names = class_names
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return iter(self._rows)


def read_file(path: Path, split: Split) -> Table:
    """The rows of a JSON, JSON lines, CSV or Parquet file, or of a folder that ``save_to_disk`` wrote.

    Args:
        path: the file or folder, which exists.
        split: the split to take where a folder holds several.

    Raises:
        UserError: the file is none of these, or is damaged.
    """
    if path.is_dir():
        return _from_dataset(_load_folder(path, split), str(path))
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return _read_csv(path)
    if suffix == ".parquet":
        from datasets import Dataset  # type: ignore[import-untyped]
        from datasets.table import InMemoryTable  # type: ignore[import-untyped]

        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a Parquet file ({error})") from error
        try:
            rows = Dataset(InMemoryTable(table))
        except Exception:  # noqa: BLE001 - what other tools left in the file's metadata is no features of datasets
            rows = Dataset(InMemoryTable(table.replace_schema_metadata()))
        return _from_dataset(rows, str(path))
    if suffix in (".json", ".jsonl"):
        return _read_json(path)
    raise UserError(f"{split}: {path} is none of {', '.join(SUFFIXES)} and no folder")


def read_hub(name: str, config: str | None, split_name: str) -> Table:
    """The rows of one split of a hub dataset.

    Raises:
        UserError: there is no such dataset or split, or no connection.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, split=split_name)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # OSError: also no connection, offline, no such dataset; RuntimeError: a script, which is no longer run
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"hub: {split_name!r} of {name!r} cannot be loaded ({reason})") from error
    return _from_dataset(loaded, f"{name}[{split_name}]")


def _read_json(path: Path) -> Table:
    with path.open("rb") as file:
        listed = file.read(4096).lstrip()[:1] == b"["
    if listed:
        found = read_json(path)
        for position, row in enumerate(found):
            if not isinstance(row, dict):
                raise UserError(f"{path}: item {position} is not an object but {type(row).__name__}")
        rows = [(f"{path}, item {position}", row) for position, row in enumerate(found)]
    else:
        rows = [(f"{path}:{line}", row) for line, row in read_json_lines(path)]
    # a column is there where any row has it: writers of JSON lines leave empty values out
    return Table(list(dict.fromkeys(key for _, row in rows for key in row)), rows, {})


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


def _load_folder(path: Path, split: Split) -> Any:  # noqa: ANN401 - datasets has no types
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{split}: {path} is no folder that save_to_disk wrote ({error})") from error
    if not isinstance(loaded, dict):
        return loaded
    for name in _SPLIT_NAMES[split]:
        if name in loaded:
            return loaded[name]
    raise UserError(f"{split}: {path} holds {', '.join(loaded)}, none of {', '.join(_SPLIT_NAMES[split])}")


def _from_dataset(rows: Any, place: str) -> Table:  # noqa: ANN401
    from datasets import ClassLabel

    names = {key: feature.names for key, feature in rows.features.items() if isinstance(feature, ClassLabel)}
    placed = ((f"{place}, row {position}", dict(row)) for position, row in enumerate(rows))
    return Table(list(rows.column_names), list(placed), names)
