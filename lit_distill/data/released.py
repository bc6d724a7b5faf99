"""The definition of a dataset, and its rows with teacher outputs."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lit_distill.annotation.record import Annotation, read_text
from lit_distill.data.annotated import check_columns, names_columns, output_of, read_annotations
from lit_distill.data.download import RELEASE_URL
from lit_distill.data.sources import read_json_lines, read_outputs
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.evaluation.metrics import MetricName, judge
from lit_distill.tasks import RATIONALE_LABEL, Row, Task, TeacherOutput

RELEASED = "released"
"""The teacher name, and the word in ``rationales``, of outputs that come with the dataset."""

# the logger that Lightning shows without set-up; a notice that were a `warnings.warn` would be a fault in strict runs
log = logging.getLogger("lightning.pytorch.utilities.rank_zero")


class ReleasedRows(pl.LightningDataModule):
    """A dataset's rows, by default from files in the layout of the paper's release."""

    name: str = ""  # name in ids, reports and the cache
    hub_name: str | None = None  # name on the Hugging Face hub, for model cards
    splits: Mapping[Split, str] = {"train": "train", "val": "valid", "test": "test"}
    """Released split -> its word in file names; without ``val``, a tenth of train's inputs is val."""
    released_rows: Mapping[Split, int] = {}  # number of rows of each released split, to check a download
    metric: MetricName = "exact_match"  # how answers are compared
    label_set: tuple[str, ...] | None = None  # the closed label set that all rows share, if any
    prompt: ClassVar[str] = "default"  # prompt file in `data/prompts/`
    release_url: ClassVar[str] = RELEASE_URL  # the archive of the released data

    data_dir: Path
    tasks: dict[str, Task]
    rationales: list[Path] | None
    rationale_filter: str
    allow_extra_outputs: bool

    def __init__(self) -> None:
        super().__init__()
        self._released: dict[Split, list[Row] | None] = {}
        self._notices: set[str] = set()

    @property
    def folder(self) -> Path:
        """The dataset's folder."""
        return self.data_dir / self.name

    def read_row(self, row: dict[str, Any]) -> Row:
        """Parse a released row; an empty ``id`` becomes the position.

        A ``KeyError`` or ``UserError`` gets the file and line added.
        """
        raise NotImplementedError(f"{type(self).__name__} does not read rows")

    def parse_teacher(self, text: str) -> tuple[str, str] | None:
        """``(rationale, label)`` of the teacher's text, neither empty; ``None`` if it does not parse.

        By default ``... So the answer is LABEL.``, the last one, to the end of its line without the full stop.
        """
        label, rationale = RATIONALE_LABEL.read(text)
        label = ((label or "").splitlines() or [""])[0].strip().removesuffix(".").strip()
        return (rationale, label) if rationale and label else None

    @property
    def prompt_file(self) -> Path:
        """The YAML file of the prompt."""
        return Path(__file__).parent / "prompts" / f"{self.prompt}.yaml"

    def prompt_fields(self, row: Row) -> dict[str, str]:
        """The fields of a row for prompt templates.

        ``input``; ``choices``, joined by commas; ``options``, a line that lists them, or empty.
        """
        choices = ", ".join(row.choices or self.label_set or ())
        return {"input": row.input, "choices": choices, "options": f"\nOptions: {choices}" if choices else ""}

    def load_rows(self, split: Split) -> list[Row] | None:
        """All rows of a split, with the teacher outputs in the same file, if any; ``None`` if the split is absent.

        Override this for another layout.

        Raises:
            UserError: a file is invalid.
        """
        path = self.split_file(split)
        if path is None or not path.is_file():
            return None
        rows = self.read_rows(read_json_lines(path), self.read_row, split)
        if not rows:
            raise UserError(f"{split}: {path} is empty; give a file with rows, or remove it")
        return rows

    def read_rows(
        self, found: Iterable[tuple[str, dict[str, Any]]], read: Callable[[dict[str, Any]], Row], split: Split
    ) -> list[Row]:
        """Parse rows, adding the place to errors, and the position to rows without an id."""
        rows: list[Row] = []
        for place, values in found:
            try:
                row = read(values)
            except KeyError as error:
                raise UserError(f"{place}: no key {error}; there are {', '.join(values)}") from error
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
            rows.append(row if row.id else replace(row, id=f"{self.name}-{split}-{len(rows)}"))
        return rows

    def load_outputs(self, split: Split, rows: list[Row]) -> list[tuple[TeacherOutput, ...]]:
        """The rows with the released teacher outputs, from ``llm/<split>_CoT_<k>.json``."""
        folder, word = self.folder / "llm", self.splits[split]
        texts = read_outputs(folder, word)
        if not texts:
            return [()] * len(rows)
        counted = f"{split}: {self.split_file(split)} has {len(rows)} rows, {folder}/{word}_CoT_*.json have"
        counted += f" {len(texts)} outputs"
        if len(texts) < len(rows):
            raise UserError(f"{counted}; they are joined by position and have to be as many")
        if len(texts) > len(rows) and not self.allow_extra_outputs:
            raise UserError(f"{counted}; allow_extra_outputs: true joins the first {len(rows)} of them")
        read = self._with_columns if names_columns(self.rationale_filter) else self._without_columns
        # there may be more texts, so not strict
        return [(read(row, text),) for row, text in zip(rows, texts, strict=False)]

    def _with_columns(self, row: Row, text: str) -> TeacherOutput:
        """An output with the columns that `annotate` writes."""
        sample = Annotation(row.id, teacher=RELEASED, text=text)
        sample = read_text(sample, row, self.parse_teacher, self.teacher_agrees)
        return output_of(sample, asdict(sample))

    def _without_columns(self, row: Row, text: str) -> TeacherOutput:
        rationale, label = self.parse_teacher(text) or (None, None)
        return TeacherOutput(rationale, label, RELEASED)

    def split_file(self, split: Split) -> Path | None:
        """The file of a split, existing or not; ``None`` if none is released."""
        word = self.splits.get(split)
        return None if word is None else self.folder / f"{self.name}_{word}.json"

    def absence(self, split: Split) -> str:
        """The message for an absent split, naming the argument of its place."""
        return f"data_dir: {self.name} has no {split} split ({self.split_file(split) or 'none is released'})"

    def teacher_agrees(self, teacher_label: str, label: str) -> bool:
        """Whether the teacher's label is correct."""
        return judge(self.metric)(teacher_label, label)

    def released(self, split: Split) -> list[Row] | None:
        """A complete released split with teacher outputs, read once; ``None`` if absent."""
        if split not in self._released:
            rows = self.load_checked(split)
            self._released[split] = None if rows is None else self._join(rows, split)
        return self._released[split]

    def load_checked(self, split: Split) -> list[Row] | None:
        """As `load_rows`, after checks that ids are unique and labels among the choices."""
        rows = self.load_rows(split) if split in self.splits else None
        seen: dict[str, int] = {}
        outside = []
        for position, row in enumerate(rows or ()):
            if (first := seen.setdefault(row.id, position)) != position:
                raise UserError(f"{self.name} {split}: rows {first} and {position} share the id {row.id!r}")
            if row.choices is not None and row.label not in (None, *row.choices):
                outside.append(f"{row.id!r} has {row.label!r} of {', '.join(row.choices) or 'none'}")
        if outside:
            told = f"the label of {len(outside)} of {len(seen)} rows is none of the row's choices ({outside[0]})"
            raise UserError(f"{self.name} {split}: {told}")
        return rows

    def rows_to_ask(self, split: Split) -> list[Row] | None:
        """The rows to annotate: a complete released split, without teacher outputs."""
        rows = self.load_checked(split)
        return None if rows is None else [replace(row, outputs=()) for row in rows]

    def _join(self, rows: list[Row], split: Split) -> list[Row]:
        """The rows with the outputs of ``rationales``, by default the dataset's own."""
        parts = []
        for path in self.rationales or [Path(RELEASED)]:
            if str(path) != RELEASED:
                found, notices = read_annotations(rows, path, split, self.teacher_agrees, self.parse_teacher)
                for notice in notices:
                    self.warn(f"{split}: {notice}")
            else:
                own = type(self).load_rows is not ReleasedRows.load_rows
                found = [row.outputs for row in rows] if own else self.load_outputs(split, rows)
            parts.append(found)
        outputs = [sum(of_row, ()) for of_row in zip(*parts, strict=True)]
        rows = [replace(row, outputs=of_row) for row, of_row in zip(rows, outputs, strict=True)]
        names = dict.fromkeys(output.teacher for of_row in outputs for output in of_row)
        if len(names) > 1 and not any(task.teacher for task in self.tasks.values()):
            self.warn(
                f"{split}: samples of several teachers ({', '.join(map(str, names))}), the first of which comes"
                " first; a task's teacher or rationale_filter: teacher == 'NAME' chooses"
            )
        if split == "train":
            check_columns(self.rationale_filter, rows)
        return rows

    def warn(self, text: str) -> None:
        """Log a warning once."""
        if text not in self._notices:
            self._notices.add(text)
            rank_zero_only(log.warning)(text if text.startswith("data_dir") else f"{self.name} {text}")
