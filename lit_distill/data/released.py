"""What a dataset says about itself, and its rows with what teachers said about them."""

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
"""The teacher's name, and the word in ``rationales``, for the outputs that come with the data."""

# the logger that Lightning shows without set-up; a notice that were a `warnings.warn` would be a fault in strict runs
log = logging.getLogger("lightning.pytorch.utilities.rank_zero")


class ReleasedRows(pl.LightningDataModule):
    """The rows of a dataset, by default from files in the layout of the paper's release."""

    name: str = ""
    """Names the dataset in ids, reports and the cache."""
    hub_name: str | None = None
    """The dataset's name on the Hugging Face hub, for the cards of what is trained on it."""
    splits: Mapping[Split, str] = {"train": "train", "val": "valid", "test": "test"}
    """The splits that are released -> their word in file names; without ``val``, a tenth of train's inputs is."""
    released_rows: Mapping[Split, int] = {}
    """The rows of the released splits, by which a download is checked."""
    metric: MetricName = "exact_match"
    """How an answer is judged."""
    label_set: tuple[str, ...] | None = None
    """The closed label set that all rows share, if there is one."""
    prompt: ClassVar[str] = "default"
    """The file in ``data/prompts/`` that a teacher is asked with."""
    release_url: ClassVar[str] = RELEASE_URL
    """The archive of the released data."""

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
        """Where the dataset's files lie."""
        return self.data_dir / self.name

    def read_row(self, row: dict[str, Any]) -> Row:
        """One released row; an empty ``id`` is filled in by the row's position.

        A ``KeyError`` or a ``UserError`` is given the file's name and the line.
        """
        raise NotImplementedError(f"{type(self).__name__} does not read rows")

    def parse_teacher(self, text: str) -> tuple[str, str] | None:
        """``(rationale, label)`` in the teacher's text, neither of them empty; ``None`` where it does not parse.

        Here: ``... So the answer is LABEL.``, the label up to the end of its line without a final stop; where the mark
        stands several times, the last one counts.
        """
        label, rationale = RATIONALE_LABEL.read(text)
        label = ((label or "").splitlines() or [""])[0].strip().removesuffix(".").strip()
        return (rationale, label) if rationale and label else None

    @property
    def prompt_file(self) -> Path:
        """The YAML file of the prompt that a teacher is asked with."""
        return Path(__file__).parent / "prompts" / f"{self.prompt}.yaml"

    def prompt_fields(self, row: Row) -> dict[str, str]:
        """What the templates of a prompt can name, of one row.

        ``input``; ``choices``, the closed choices joined by commas; ``options``, a line that names them, or nothing
        where there are none.
        """
        choices = ", ".join(row.choices or self.label_set or ())
        return {"input": row.input, "choices": choices, "options": f"\nOptions: {choices}" if choices else ""}

    def load_rows(self, split: Split) -> list[Row] | None:
        """The rows of a split, the whole of it, with the teacher outputs that lie in the same file, if any.

        ``None`` where the split is absent. Data in another layout overrides this.

        Raises:
            UserError: a file is not as it should be.
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
        """Read rows one by one; errors are given their place, and rows without an id one of their position."""
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
        """Each row's released output, from the files ``llm/<split>_CoT_<k>.json``.

        Raises:
            UserError: a file is not as it should be.
        """
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
        """The file of a split, present or not; ``None`` where none is released."""
        word = self.splits.get(split)
        return None if word is None else self.folder / f"{self.name}_{word}.json"

    def absence(self, split: Split) -> str:
        """That a split is absent, with the argument that says where it is looked for."""
        return f"data_dir: {self.name} has no {split} split ({self.split_file(split) or 'none is released'})"

    def teacher_agrees(self, teacher_label: str, label: str) -> bool:
        """Whether the teacher's label is right."""
        return judge(self.metric)(teacher_label, label)

    def released(self, split: Split) -> list[Row] | None:
        """The whole of a released split with what teachers said about it; ``None`` where it is absent. Read once."""
        if split not in self._released:
            rows = self.load_checked(split)
            self._released[split] = None if rows is None else self._join(rows, split)
        return self._released[split]

    def load_checked(self, split: Split) -> list[Row] | None:
        """As `load_rows`, where the split is one of the dataset's.

        Raises:
            UserError: two rows share an id, or a label is none of its row's choices.
        """
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
        """The rows that a teacher is asked about: a released split whole, without what teachers said about it."""
        rows = self.load_checked(split)
        return None if rows is None else [replace(row, outputs=()) for row in rows]

    def _join(self, rows: list[Row], split: Split) -> list[Row]:
        """The rows with the outputs that ``rationales`` names, those of the data itself if it names none."""
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
