"""What a dataset is: its files, how its rows and its teacher's texts are read, and how answers are compared."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl

from lit_distill.annotation.record import Annotation, read_text
from lit_distill.data.download import RELEASE_URL
from lit_distill.data.outputs import RELEASED, output_of, read_released
from lit_distill.data.selection import names_columns
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.evaluation.metrics import MetricName, judge
from lit_distill.reading import json_lines
from lit_distill.remote import AnyPath
from lit_distill.tasks import RATIONALE_LABEL, Row, TeacherOutput


class Dataset(pl.LightningDataModule):
    """What `RationaleDataModule` needs to know of a dataset, by default in the layout of the paper's release."""

    name: str = ""  # name in ids, reports and the cache
    hub_name: str | None = None  # name on the Hugging Face hub, for model cards
    splits: Mapping[Split, str] = {"train": "train", "val": "valid", "test": "test"}
    """Released split -> its word in file names; without ``val``, a tenth of train's inputs is val."""
    released_rows: Mapping[Split, int] = {}  # number of rows of each released split, to check a download
    metric: MetricName = "exact_match"  # how answers are compared
    label_set: tuple[str, ...] | None = None  # the closed label set that all rows share, if any
    prompt: ClassVar[str] = "default"  # prompt file in `data/prompts/`
    release_url: ClassVar[str] = RELEASE_URL  # the archive of the released data

    data_dir: AnyPath
    rationale_filter: str
    allow_extra_outputs: bool

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

    def teacher_agrees(self, teacher_label: str, label: str) -> bool:
        """Whether the teacher's label is correct."""
        return judge(self.metric)(teacher_label, label)

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

    def split_file(self, split: Split) -> AnyPath | None:
        """The file of a split, existing or not; ``None`` if none is released."""
        word = self.splits.get(split)
        return None if word is None else self.data_dir / self.name / f"{self.name}_{word}.json"

    def absence(self, split: Split) -> str:
        """The message for an absent split, naming the argument of its place."""
        return f"data_dir: {self.name} has no {split} split ({self.split_file(split) or 'none is released'})"

    def load_rows(self, split: Split) -> list[Row] | None:
        """All rows of a split, with the teacher outputs in the same file, if any; ``None`` if the split is absent.

        Override this for another layout. Raises a ``UserError`` if a file is invalid.
        """
        path = self.split_file(split)
        if path is None or not path.is_file():
            return None
        rows = self.read_rows(json_lines(path), self.read_row, split)
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
        """The dataset's own outputs of each row: those of `load_rows`, else texts in ``llm/<split>_CoT_<k>.json``."""
        if type(self).load_rows is not Dataset.load_rows:
            return [row.outputs for row in rows]
        word = self.splits[split]
        folder = self.data_dir / self.name / "llm"
        texts = read_released(folder, word)
        if not texts:
            return [()] * len(rows)
        counted = f"{split}: {self.split_file(split)} has {len(rows)} rows, {folder}/{word}_CoT_*.json have"
        counted += f" {len(texts)} outputs"
        if len(texts) < len(rows):
            raise UserError(f"{counted}; they are joined by position and have to be as many")
        if len(texts) > len(rows) and not self.allow_extra_outputs:
            raise UserError(f"{counted}; allow_extra_outputs: true joins the first {len(rows)} of them")
        with_columns = names_columns(self.rationale_filter)
        # there may be more texts, so not strict
        return [(self._output(row, text, with_columns),) for row, text in zip(rows, texts, strict=False)]

    def _output(self, row: Row, text: str, with_columns: bool) -> TeacherOutput:
        """A released output; with the columns that `annotate` writes, which take longer, if a filter names some."""
        if with_columns:
            sample = Annotation(row.id, teacher=RELEASED, text=text)
            return output_of(read_text(sample, row, self.parse_teacher, self.teacher_agrees))
        rationale, label = self.parse_teacher(text) or (None, None)
        return TeacherOutput(rationale, label, RELEASED)

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
