"""Teacher outputs of rows: the released texts, and the samples in `annotate`'s folders, joined by id."""

import pickle
import re
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_distill.annotation.prompts import Parse
from lit_distill.annotation.record import COLUMNS, Agree, Annotation, input_hash, read_text, with_distinct, with_votes
from lit_distill.annotation.store import FILE, PARQUET, read_rows
from lit_distill.data.selection import KEPT_COLUMNS
from lit_distill.data.sources import read_json_list
from lit_distill.data.store import chunks, hashes, read
from lit_distill.errors import UserError
from lit_distill.files import cache_folder
from lit_distill.remote import AnyPath
from lit_distill.tasks import Row, TeacherOutput

RELEASED = "released"
"""The teacher name, and the word in ``rationales``, of outputs that come with the dataset."""


def read_released(folder: AnyPath, split: str) -> Iterator[str]:
    """The teacher's texts in ``<split>_CoT_<k>.json``, each a JSON list of strings, by k.

    Raises a ``UserError`` if a file is damaged, or a number is missing, which would shift all later texts.
    """
    for expected, (number, path) in enumerate(released_files(folder, split)):
        if number != expected:
            raise UserError(f"{folder}: {split}_CoT_{expected}.json is missing, but {path.name} is there")
        for position, text in enumerate(read_json_list(path)):
            if not isinstance(text, str):
                raise UserError(f"{path}: output {position} is not a string but {type(text).__name__}")
            yield text


def released_files(folder: AnyPath, split: str) -> list[tuple[int, AnyPath]]:
    """The files ``<split>_CoT_<k>.json`` by k."""
    pattern = re.compile(re.escape(split) + r"_CoT_(\d+)\.json")
    return sorted((int(match[1]), path) for path in folder.glob("*.json") if (match := pattern.fullmatch(path.name)))


def annotations_file(path: Path) -> Path:
    """The file of samples: the path itself, or the one in the folder. Raises a ``UserError`` if there is none."""
    if path.is_dir():
        found = [path / name for name in (FILE, PARQUET) if (path / name).is_file()]
        if not found:
            raise UserError(f"rationales: {str(path)!r} holds neither {FILE} nor {PARQUET}")
        return found[0]
    if not path.is_file():
        raise UserError(f"rationales: no file or folder {str(path)!r}")
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"rationales: {str(path)!r} ends neither in .jsonl nor in .parquet")
    return path


class _Sample(NamedTuple):
    group: int  # teacher, kind, prompt and settings, in the order of the file
    annotation: Annotation
    columns: Mapping[str, Any]  # its row in the file


def read_annotations(
    rows: Sequence[Row], path: Path, split: str, agree: Agree, parse: Parse, notify: Callable[[str], None]
) -> Iterator[list[tuple[TeacherOutput, ...]]]:
    """Each row's outputs in a folder or file, in chunks as `chunks` makes them of the rows.

    Sorted by teacher, kind, prompt, settings and sample; samples of other splits are skipped. A sample with only a text
    is parsed here. ``notify`` is called with notices for the user. Raises a ``UserError`` if all samples of a row were
    asked with another input, or no sample belongs to any row.
    """
    # samples wait for their rows in a file without a name; of each, place, group, number and offset
    with tempfile.TemporaryFile(dir=cache_folder()) as waiting:
        entries = array("q")
        for place, one in _placed(rows, annotations_file(path), split, agree, parse, notify):
            entries.extend((place, one.group, one.annotation.sample, waiting.tell()))
            pickle.dump(one, waiting)
        places, groups, numbers, offsets = np.frombuffer(entries, np.int64).reshape(-1, 4).T
        order = np.lexsort((numbers, groups, places))
        places, offsets = places[order], offsets[order]
        for at in chunks(len(rows)):
            outputs: list[tuple[TeacherOutput, ...]] = [()] * len(at)
            some = slice(*places.searchsorted([at[0], at[-1] + 1]))
            for place, of_row in groupby(
                zip(places[some].tolist(), offsets[some].tolist(), strict=True), itemgetter(0)
            ):
                samples = []
                for _, offset in of_row:
                    waiting.seek(offset)
                    samples.append(pickle.load(waiting))  # noqa: S301 - written above
                annotations = [sample.annotation for sample in samples]
                # a job adds these columns when it ends; earlier versions did not add the second one
                if any(one.votes is None for one in annotations):
                    annotations = with_votes(annotations, agree)
                if any(one.rationale is not None and one.distinct is None for one in annotations):
                    annotations = with_distinct(annotations, agree)
                columns = (sample.columns for sample in samples)
                outputs[place - at[0]] = tuple(map(output_of, annotations, columns))
            yield outputs


def _placed(
    rows: Sequence[Row], path: Path, split: str, agree: Agree, parse: Parse, notify: Callable[[str], None]
) -> Iterator[tuple[int, _Sample]]:
    """The samples in a file after the positions of their rows."""
    place_of = _places(rows)
    seen = np.zeros(len(rows), bool)
    groups: dict[tuple[str | None, ...], int] = {}
    outdated: dict[int, str] = {}
    joined = unmatched = 0
    torn = "{} is torn: its row may have no sample (annotate asks it again)"
    for one, columns in read_rows(path, lambda where: notify(torn.format(where))):
        if one.split is not None and one.split != split:
            continue
        place = place_of(one.id)
        if place is None:
            # samples without a split belong to train
            unmatched += one.split is not None or split == "train"
            continue
        joined += 1
        if one.input is not None and one.input != input_hash(rows[place]):
            outdated.setdefault(place, one.id)
        elif (one.text, one.rationale, one.label) != (None, None, None):
            if (one.parsed, one.rationale, one.label) == (None, None, None):
                one = read_text(one, rows[place], parse, agree)
            group = groups.setdefault((one.teacher, one.kind, one.prompt, one.settings), len(groups))
            seen[place] = True
            yield place, _Sample(group, one, columns)
    if alone := [name for place, name in outdated.items() if not seen[place]]:
        raise UserError(f"rationales: {path}: {alone[0]!r} was asked with another input than the row has now")
    if unmatched and not joined:
        raise UserError(f"rationales: none of the {unmatched} ids in {path} is one of {split}'s rows")
    if unmatched:
        notify(f"{unmatched} samples in {path} are of rows that are not here")
    if outdated:
        notify(f"samples of earlier inputs of {len(outdated)} rows in {path} are left out")


def _places(rows: Sequence[Row]) -> Callable[[str], int | None]:
    """Id -> position of its row."""
    ids = np.concatenate([hashes([]), *(hashes(row.id for row in read(rows, some)) for some in chunks(len(rows)))])
    order = ids.argsort()
    ids = ids[order]

    def place_of(row_id: str) -> int | None:
        at = int(ids.searchsorted(hashes([row_id])[0]))
        place = int(order[at]) if at < len(ids) else -1
        return place if place >= 0 and rows[place].id == row_id else None

    return place_of


def output_of(annotation: Annotation, columns: Mapping[str, Any] | None = None) -> TeacherOutput:
    """A sample as an output; ``columns`` are others of its row in the file."""
    known = {name: value for name in KEPT_COLUMNS if (value := getattr(annotation, name)) is not None}
    known |= {name: value for name, value in (columns or {}).items() if value is not None and name not in COLUMNS}
    return TeacherOutput(annotation.rationale, annotation.label, annotation.teacher, annotation.kind, known)
