"""Rows joined to what a teacher was asked about them: by id, each of its samples, with all that is known of it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from lit_distill.annotation.conditions import columns_of, is_condition
from lit_distill.annotation.record import COLUMNS, Agree, Annotation, input_hash, read_text, same_answer, vote
from lit_distill.annotation.store import FILE, PARQUET, read_rows
from lit_distill.data.splits import SplitRows
from lit_distill.errors import UserError
from lit_distill.tasks import Row, TeacherOutput

_NOT_COLUMNS = {"text", "rationale", "input", "key"}
"""What an example holds already, or what says nothing of it."""


def annotations_file(path: Path) -> Path:
    """The file of a teacher's samples.

    Args:
        path: a folder that ``annotate`` wrote to, or a file.

    Raises:
        UserError: there is none.
    """
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


def join_annotations(
    examples: Sequence[Row],
    path: Path,
    split: str,
    agree: Agree,
    parse: Callable[[str], tuple[str, str] | None],
) -> tuple[SplitRows, str | None]:
    """Join rows with a teacher's samples.

    Of a row's samples the first stands for the teacher; the others are kept beside it. A sample that holds a text and
    nothing of what follows from it is parsed here.

    Args:
        examples: the rows of a split, without a teacher.
        path: the samples' file or folder.
        split: samples of other splits are left aside.
        agree: which labels are one answer.
        parse: the dataset's own reading of a teacher's text.

    Returns:
        The rows, and what a user has to know of the join, if anything.

    Raises:
        UserError: a sample is of another input than its row has, or no sample is of a row that there is.
    """
    path = annotations_file(path)
    places = {example.id: position for position, example in enumerate(examples)}
    found: dict[int, list[tuple[tuple[int, int], Annotation, dict[str, Any]]]] = {}
    groups: dict[tuple[Any, ...], int] = {}
    teachers: dict[str | None, None] = {}
    outdated: dict[int, str] = {}
    counts: Counter[str] = Counter()
    notices: list[str] = []
    torn = "{} is torn: no sample, so that its row may have none (annotate asks it again)"
    for annotation, row in read_rows(path, lambda where: notices.append(torn.format(where))):
        if annotation.split is not None and annotation.split != split:
            continue
        place = places.get(annotation.id)
        if place is None:
            # hand-written samples that name no split are of train; of the others they say nothing
            counts["unmatched"] += annotation.split is not None or split == "train"
            continue
        counts["joined"] += 1
        if annotation.input is not None and annotation.input != input_hash(examples[place]):
            outdated.setdefault(place, annotation.id)
            continue
        if annotation.text is None and annotation.rationale is None and annotation.label is None:
            continue
        if annotation.text is not None and (annotation.parsed, annotation.rationale, annotation.label) == (None,) * 3:
            annotation = read_text(annotation, examples[place], parse, agree)
            row |= {name: getattr(annotation, name) for name in ("parsed", "agrees", "contains_label", "length")}
        group = groups.setdefault((annotation.teacher, annotation.prompt, annotation.settings), len(groups))
        teachers[annotation.teacher] = None
        found.setdefault(place, []).append(((group, annotation.sample), annotation, row))
    if alone := [name for place, name in outdated.items() if place not in found]:
        raise UserError(f"rationales: {path}: {alone[0]!r} was asked with another input than the row has now")
    if counts["unmatched"] and not counts["joined"]:
        raise UserError(f"rationales: none of the {counts['unmatched']} ids in {path} is one of {split}'s rows")
    rows, unparsed, samples = list(examples), set(), {}
    for place, said in found.items():
        said.sort(key=lambda one: one[0])
        _fill_votes(said, agree)
        first, *others = [_with_sample(examples[place], annotation, row) for _, annotation, row in said]
        rows[place] = first
        if first.rationale is None and first.teacher_label is None:
            unparsed.add(place)
        if others:
            samples[place] = tuple(others)
    if counts["unmatched"]:
        notices.append(f"{counts['unmatched']} samples in {path} are of rows that are not here")
    if outdated:
        notices.append(f"samples of earlier inputs of {len(outdated)} rows in {path} are left aside")
    if len(teachers) > 1:
        notices.append(
            f"samples of several teachers ({', '.join(map(str, teachers))}), the first of which comes first;"
            " rationale_filter: teacher == 'NAME' chooses"
        )
    return SplitRows(rows, frozenset(unparsed), samples), "; ".join(notices) or None


def check_columns(rationale_filter: str, rows: SplitRows) -> None:
    """See that the columns are there that a filter's conditions name.

    Raises:
        UserError: one is not; the message lists those that are.
    """
    if not is_condition(rationale_filter) or rationale_filter in ("none", "label_agrees"):
        return
    known = dict.fromkeys(column for column in COLUMNS if column not in _NOT_COLUMNS)
    for example in chain(rows.examples, *rows.samples.values()):
        known |= dict.fromkeys(example.columns)
    if missing := [column for column in columns_of(rationale_filter) if column not in known]:
        raise UserError(f"rationale_filter: no column {missing[0]!r}; there are {', '.join(known)}")


def _with_sample(example: Row, annotation: Annotation, row: Mapping[str, Any]) -> Row:
    columns = {key: value for key, value in row.items() if value is not None and key not in _NOT_COLUMNS}
    output = TeacherOutput(annotation.rationale, annotation.label, annotation.teacher, columns=columns)
    return replace(example, outputs=(output,))


def _fill_votes(said: list[tuple[tuple[int, int], Annotation, dict[str, Any]]], agree: Agree) -> None:
    """The columns that need all samples of a row, where the job that wrote them had not ended."""
    if all(annotation.votes is not None for _, annotation, _ in said):
        return
    by_group: dict[int, list[str | None]] = {}
    for (group, _), annotation, _ in said:
        by_group.setdefault(group, []).append(annotation.label)
    for (group, _), annotation, row in said:
        winner, share = vote(by_group[group], agree)
        row |= {"votes": len(by_group[group]), "majority_label": winner, "vote_share": share}
        if annotation.label is not None and winner is not None:
            row["in_majority"] = same_answer(annotation.label, winner, agree)
