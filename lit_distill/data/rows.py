"""The rows of a split, read and joined with teacher outputs once: what `RationaleDataModule.released` gives."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, filterfalse
from pathlib import Path
from typing import Any

import numpy as np

from lit_distill.annotation.record import Annotation, read_text
from lit_distill.data.cache import cached, key_of, prepare, versions, young
from lit_distill.data.dataset import Dataset, Source
from lit_distill.data.outputs import RELEASED, annotations_file, output_of, read_annotations
from lit_distill.data.selection import check_columns, flags_of, names_columns, tally_of
from lit_distill.data.store import (
    PACKED,
    Array,
    Rows,
    Stored,
    chunks,
    cut,
    hashes,
    numbered,
    of_json,
    read,
    unpack,
    written,
)
from lit_distill.data.workers import in_order
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.remote import AnyPath
from lit_distill.tasks import Row, TeacherOutput


def packed_outputs(outputs: Sequence[TeacherOutput]) -> list[Any]:
    """A row's outputs as lists."""
    return [
        # columns last, as most have none
        [one.text, one.label, one.teacher, one.kind, *([dict(one.columns)] if one.columns else [])]
        for one in outputs
    ]


def outputs_from(packed: list[Any]) -> tuple[TeacherOutput, ...]:
    """The outputs from `packed_outputs`."""
    return tuple(TeacherOutput(*values) for values in packed)


def packed_row(row: Row) -> list[Any]:
    """A row as a list."""
    # the group last, as most have none
    group = [] if row.group is None else [row.group]
    return [row.id, row.input, row.label, row.choices, packed_outputs(row.outputs), *group]


def row_from(packed: list[Any]) -> Row:
    """The row from `packed_row`."""
    row_id, text, label, choices, outputs, *group = packed
    return Row(row_id, text, label, None if choices is None else tuple(choices), outputs_from(outputs), *group)


def own_rows(data: Dataset, split: Split, code: list[Any] | None) -> Rows | None:
    """The rows of a split with the outputs in its own files, from the cache if possible; ``None`` if absent.

    ``code`` decides how rows are read, besides files; ``None`` if unknown. Sets ``label_set`` if the file tells it.
    Raises a ``UserError`` if ids repeat, or a label is none of its row's choices.
    """
    files = data.source_files(split)
    key = None if files is None else key_of("rows", split, code, versions(files))
    name = f"{data.name}-{split}-rows"
    found = cached(name, key)
    if found is None:
        load = data.load_rows if data.loads_itself else data.row_source
        loaded = load(split) if split in data.splits else None
        if loaded is None:
            return None
        found = prepare(name, key, partial(_write_rows, data, split, loaded, files or []))
    if found.meta["label_set"] is not None and data.label_set is None:
        data.label_set = tuple(found.meta["label_set"])
    stored, inputs = Stored(found.folder / "rows.arrow"), partial(found.array, "inputs")
    flags = partial(np.zeros, stored.rows, np.uint8)
    return Rows(stored.rows, partial(_rows_of, stored), found.key, {}, inputs, flags)


def _rows_of(stored: Stored, at: Array) -> list[Row]:
    return [row_from(unpack(one)) for one in stored.values("row", at)]


def _write_rows(
    data: Dataset, split: Split, loaded: Source | Iterable[Row], files: Sequence[AnyPath], folder: Path
) -> dict[str, Any]:
    def parse(task: tuple[int, Any]) -> tuple[list[Any], tuple[Array, Array, int, list[str]]]:
        start, some = task
        rows = data.read_rows(some, loaded.read, split, start) if isinstance(loaded, Source) else some
        if (wrong := next(filterfalse(_is_valid, rows), None)) is not None:
            told = (
                "a row's id and input have to be texts, its label and group texts or None, and its choices a tuple of"
                " texts or None"
            )
            raise UserError(f"{data.name} {split}: {told}, got {wrong!r:.300}")
        outside = [
            f"{row.id!r} has {row.label!r} of {', '.join(row.choices) or 'none'}"
            for row in rows
            if row.choices is not None and row.label not in (None, *row.choices)
        ]
        known = hashes(row.id for row in rows), hashes(row.input for row in rows), len(outside), outside[:1]
        return [of_json(packed_row(row) for row in rows)], known

    parts = in_order(parse, numbered(loaded.chunks if isinstance(loaded, Source) else cut(loaded)))
    path = folder / "rows.arrow"
    known = [*written(path, {"row": PACKED}, parts, f"Reading {data.name} {split}")]
    ids, inputs, outside, first = zip((hashes([]), hashes([]), 0, []), *known, strict=True)
    np.save(folder / "inputs.npy", np.concatenate(inputs))
    _check_ids(f"{data.name} {split}", np.concatenate(ids), Stored(path))
    if any(outside):
        rows, (label, *_) = sum(map(len, ids)), chain(*first)
        told = f"the label of {sum(outside)} of {rows} rows is none of the row's choices ({label})"
        raise UserError(f"{data.name} {split}: {told}")
    return {"label_set": data.label_set, "young": young(files)}


def _is_valid(row: Row) -> bool:
    choices = () if row.choices is None else row.choices
    texts = isinstance(row.id, str) and isinstance(row.input, str)
    texts = texts and isinstance(row.label, str | None) and isinstance(row.group, str | None)
    return texts and isinstance(choices, tuple | list) and all(isinstance(choice, str) for choice in choices)


def _check_ids(name: str, ids: Array, stored: Stored) -> None:
    in_size = np.sort(ids)
    if not (in_size[1:] == in_size[:-1]).any():
        return
    _, first, places = np.unique(ids, return_index=True, return_inverse=True)
    for position in np.flatnonzero(first[places] != np.arange(len(ids))).tolist():
        earlier = int(first[places[position]])
        one, other = (row.id for row in _rows_of(stored, np.array([earlier, position])))
        if one == other:
            raise UserError(f"{name}: rows {earlier} and {position} share the id {one!r}")


def with_outputs(data: Dataset, rows: Rows, split: Split, code: list[Any] | None, warn: Callable[[str], None]) -> Rows:
    """The rows with the outputs of ``rationales``, from the cache if possible; ``code`` as in `own_rows`."""
    files = [
        file
        for path in data.rationales
        for file in (data.output_files(split) if str(path) == RELEASED else [annotations_file(path)])
    ]
    settings = [[str(path) for path in data.rationales], names_columns(data.rationale_filter), data.allow_extra_outputs]
    key = key_of("outputs", rows.key, code, versions(files), data.label_set or [], *settings)
    found = prepare(f"{data.name}-{split}-outputs", key, partial(_write_outputs, data, rows, split, files))
    for notice in found.meta["notices"]:
        warn(f"{split}: {notice}")
    names = found.meta["teachers"]
    if len(names) > 1 and not any(task.teacher for task in data.tasks.values()):
        warn(
            f"{split}: samples of several teachers ({', '.join(map(str, names))}), the first of which comes"
            " first; a task's teacher or rationale_filter: teacher == 'NAME' chooses"
        )
    if split == "train":
        check_columns(data.rationale_filter, found.meta["columns"])
    outputs = Stored(found.folder / "outputs.arrow")

    def some(at: Array) -> list[Row]:
        pairs = zip(rows.read(at), outputs.values("outputs", at), strict=True)
        return [replace(row, outputs=outputs_from(unpack(of_row))) for row, of_row in pairs]

    tally, flags = dict(found.meta["tally"]), partial(found.array, "flags")
    return Rows(len(rows), some, found.key, tally, rows.inputs, flags)


def _write_outputs(data: Dataset, rows: Rows, split: Split, files: Sequence[AnyPath], folder: Path) -> dict[str, Any]:
    notices: list[str] = []
    sources: list[Iterable[Sequence[Any]]] = []
    for path in data.rationales:
        if str(path) == RELEASED and data.has_outputs:
            sources.append([True] * len(positions) for positions in chunks(len(rows)))
        elif str(path) == RELEASED:
            sources.append(data.load_outputs(split, rows))
        else:
            agree, parse = data.teacher_agrees, data.parse_teacher
            sources.append(read_annotations(rows, path, split, agree, parse, notices.append))
    with_columns = names_columns(data.rationale_filter)

    # a text, none, outputs, or those that the row came with
    def outputs(row: Row, given: str | bool | tuple[TeacherOutput, ...] | None) -> tuple[TeacherOutput, ...]:
        if isinstance(given, str):
            return (_released_output(data, row, given, with_columns),)
        return row.outputs if given is True else given or ()

    def join(task: tuple[Array, tuple[Sequence[Any], ...]]) -> tuple[list[Any], tuple[Array, list[Any], list[str]]]:
        at, given = task
        joined = [
            replace(row, outputs=sum((outputs(row, one) for one in of_row), ()))
            for row, *of_row in zip(rows.read(at), *given, strict=True)
        ]
        said = [output for row in joined for output in row.outputs]
        columns = dict.fromkeys(name for output in said for name in output.columns)
        known = _flags(data, joined), list(dict.fromkeys(output.teacher for output in said)), list(columns)
        return [of_json(packed_outputs(row.outputs) for row in joined)], known

    parts = in_order(join, zip(chunks(len(rows)), zip(*sources, strict=True), strict=True))
    path, title = folder / "outputs.arrow", f"Joining outputs of {data.name} {split}"
    known = written(path, {"outputs": PACKED}, parts, title, len(rows))
    of_parts, *named = zip((_flags(data, []), [], []), *known, strict=True)
    flags = np.concatenate(of_parts)
    np.save(folder / "flags.npy", flags)
    teachers, columns = (list(dict.fromkeys(chain(*names))) for names in named)
    tally = list(tally_of(flags).items())
    return {"tally": tally, "teachers": teachers, "columns": columns, "notices": notices, "young": young(files)}


def _released_output(data: Dataset, row: Row, text: str, with_columns: bool) -> TeacherOutput:
    """A released output; with the columns that `annotate` writes, which take longer, if a filter names some."""
    if with_columns:
        sample = Annotation(row.id, teacher=RELEASED, text=text)
        return output_of(replace(read_text(sample, row, data.parse_teacher, data.teacher_agrees), distinct=True))
    rationale, label = data.parse_teacher(text) or (None, None)
    return TeacherOutput(rationale, label, RELEASED)


def counted(data: Dataset, rows: Sequence[Row]) -> Rows:
    """The rows with what is counted of them; those that a subclass made have none."""
    if isinstance(rows, Rows):
        return rows
    flags, inputs = _flags(data, rows), hashes(row.input for row in rows)
    return Rows(len(rows), partial(read, rows), None, tally_of(flags), lambda: inputs, lambda: flags)


def _flags(data: Dataset, rows: Sequence[Row]) -> Array:
    return np.array([flags_of(row, data.teacher_agrees, data.label_set) for row in rows], np.uint8)
