"""Join the samples in `annotate`'s folders to rows by id."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_distill.annotation.conditions import columns_of, is_condition
from lit_distill.annotation.prompts import Parse
from lit_distill.annotation.record import COLUMNS, Agree, Annotation, input_hash, read_text, same_answer, vote
from lit_distill.annotation.store import FILE, PARQUET, read_rows
from lit_distill.errors import UserError
from lit_distill.tasks import Row, TeacherOutput

Sample = tuple[Annotation, dict[str, Any]]
"""A sample and its raw row."""

_NOT_COLUMNS = {"text", "rationale", "input", "key"}
"""Columns that an output has as fields, or that describe the file only."""


def annotations_file(path: Path) -> Path:
    """The file of samples: the path itself, or the one in the folder. Raises a ``UserError`` if there is none."""
    if path.is_dir():
        for name in (FILE, PARQUET):
            if (path / name).is_file():
                return path / name
        raise UserError(f"rationales: {str(path)!r} holds neither {FILE} nor {PARQUET}")
    if not path.is_file():
        raise UserError(f"rationales: no file or folder {str(path)!r}")
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"rationales: {str(path)!r} ends neither in .jsonl nor in .parquet")
    return path


def read_annotations(
    rows: Sequence[Row], path: Path, split: str, agree: Agree, parse: Parse
) -> tuple[list[tuple[TeacherOutput, ...]], list[str]]:
    """Each row's outputs in a folder or file, and notices for the user.

    Sorted by teacher, kind, prompt, settings and sample; samples of other splits are skipped. A sample with only a text
    is parsed here.

    Raises:
        UserError: a sample belongs to another input than its row's, or no sample belongs to any row.
    """
    path = annotations_file(path)
    places = {row.id: position for position, row in enumerate(rows)}
    found: dict[int, list[tuple[tuple[int, int], Sample]]] = {}
    groups: dict[tuple[Any, ...], int] = {}
    outdated: dict[int, str] = {}
    counts: Counter[str] = Counter()
    notices: list[str] = []
    torn = "{} is torn: its row may have no sample (annotate asks it again)"
    for annotation, columns in read_rows(path, lambda where: notices.append(torn.format(where))):
        if annotation.split is not None and annotation.split != split:
            continue
        place = places.get(annotation.id)
        if place is None:
            # samples without a split belong to train
            counts["unmatched"] += annotation.split is not None or split == "train"
            continue
        counts["joined"] += 1
        if annotation.input is not None and annotation.input != input_hash(rows[place]):
            outdated.setdefault(place, annotation.id)
            continue
        if annotation.text is None and annotation.rationale is None and annotation.label is None:
            continue
        if annotation.text is not None and (annotation.parsed, annotation.rationale, annotation.label) == (None,) * 3:
            annotation = read_text(annotation, rows[place], parse, agree)
            columns |= {name: getattr(annotation, name) for name in ("parsed", "agrees", "contains_label", "length")}
        group = (annotation.teacher, columns.get("kind"), annotation.prompt, annotation.settings)
        order = groups.setdefault(group, len(groups)), annotation.sample
        found.setdefault(place, []).append((order, (annotation, columns)))
    if alone := [name for place, name in outdated.items() if place not in found]:
        raise UserError(f"rationales: {path}: {alone[0]!r} was asked with another input than the row has now")
    if counts["unmatched"] and not counts["joined"]:
        raise UserError(f"rationales: none of the {counts['unmatched']} ids in {path} is one of {split}'s rows")
    if counts["unmatched"]:
        notices.append(f"{counts['unmatched']} samples in {path} are of rows that are not here")
    if outdated:
        notices.append(f"samples of earlier inputs of {len(outdated)} rows in {path} are left out")
    outputs: list[tuple[TeacherOutput, ...]] = [()] * len(rows)
    for place, several in found.items():
        several.sort(key=lambda one: one[0])
        _fill_votes([(order[0], sample) for order, sample in several], agree)
        outputs[place] = tuple(output_of(*sample) for _, sample in several)
    return outputs, notices


def output_of(annotation: Annotation, columns: Mapping[str, Any]) -> TeacherOutput:
    """A sample as an output."""
    known = {name: value for name, value in columns.items() if value is not None and name not in _NOT_COLUMNS}
    kind = str(columns.get("kind") or "rationale")
    return TeacherOutput(annotation.rationale, annotation.label, annotation.teacher, kind, known)


def names_columns(rationale_filter: str) -> bool:
    """Whether a filter is a condition on columns."""
    return rationale_filter not in ("none", "label_agrees") and is_condition(rationale_filter)


def check_columns(rationale_filter: str, rows: Sequence[Row]) -> None:
    """Raise a ``UserError`` if a column in a filter's conditions does not exist."""
    if not names_columns(rationale_filter):
        return
    known = dict.fromkeys(column for column in COLUMNS if column not in _NOT_COLUMNS)
    for row in rows:
        for output in row.outputs:
            known |= dict.fromkeys(output.columns)
    if missing := [column for column in columns_of(rationale_filter) if column not in known]:
        raise UserError(f"rationale_filter: no column {missing[0]!r}; there are {', '.join(known)}")


def _fill_votes(several: list[tuple[int, Sample]], agree: Agree) -> None:
    """Add the columns that need all samples of a row, if their job did not finish."""
    if all(annotation.votes is not None for _, (annotation, _) in several):
        return
    by_group: dict[int, list[str | None]] = {}
    for group, (annotation, _) in several:
        by_group.setdefault(group, []).append(annotation.label)
    for group, (annotation, columns) in several:
        winner, share = vote(by_group[group], agree)
        columns |= {"votes": len(by_group[group]), "majority_label": winner, "vote_share": share}
        if annotation.label is not None and winner is not None:
            columns["in_majority"] = same_answer(annotation.label, winner, agree)
