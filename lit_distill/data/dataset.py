"""What a dataset is: its files, how its rows and its teacher's texts are read, and how answers are compared."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from lit_distill.data.download import RELEASE_URL
from lit_distill.data.outputs import read_released, released_files
from lit_distill.data.sources import Lines, Placed, line_chunks
from lit_distill.data.store import chunks, numbered
from lit_distill.data.student import StudentDataModule
from lit_distill.equations import evaluate
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.evaluation.metrics import MetricName, judge
from lit_distill.remote import AnyPath
from lit_distill.tasks import RATIONALE_LABEL, Row


class Source(NamedTuple):
    """The rows of a file, before they are parsed."""

    chunks: Iterable[Lines | list[Placed]]
    read: Callable[[dict[str, Any]], Row]  # parses one


# between two operands, and so no sign
_OPERATOR = re.compile(r"(?<=[\d)])\s*([-+*/])(?=\s*[\d(.])")


class Dataset(StudentDataModule):
    """What `RationaleDataModule` needs to know of a dataset, by default in the layout of the paper's release."""

    splits: Mapping[Split, str] = {"train": "train", "val": "valid", "test": "test"}
    """Released split -> its word in file names; without ``val``, a tenth of train's inputs is val."""
    released_rows: Mapping[Split, int] = {}  # number of rows of each released split, to check a download
    metric: MetricName = "exact_match"  # how answers are compared
    label_set: tuple[str, ...] | None = None  # the closed label set that all rows share, if any
    prompt: ClassVar[str] = "default"  # prompt file in `data/prompts/`
    release_url: ClassVar[str] = RELEASE_URL  # the archive of the released data

    # settings
    data_dir: AnyPath
    rationales: list[Path]
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

        ``input``; ``choices``, joined by commas; ``options``, a line that lists them, or empty; ``wrong``, the row's
        label, which is a wrong one where a prompt names it; ``given_rationale`` and ``given_label``, those of the first
        output.
        """
        choices = ", ".join(row.choices or self.label_set or ())
        options = f"\nOptions: {choices}" if choices else ""
        given = {"given_rationale": row.rationale or "", "given_label": row.teacher_label or ""}
        return {"input": row.input, "choices": choices, "options": options, "wrong": row.label or "", **given}

    def wrong_label(self, row: Row) -> str | None:
        """A wrong answer to a row, always the same; ``None`` without a gold label or any.

        Another choice; where an equation is the answer, the gold one with another operator, which has another value.
        """
        if row.label is None:
            return None
        wrong = [choice for choice in row.choices or self.label_set or () if choice != row.label]
        if not wrong and self.metric == "equation":
            places = [at.span(1) for at in _OPERATOR.finditer(row.label)]
            changed = [row.label[:start] + sign + row.label[end:] for start, end in places for sign in "+-*/"]
            wrong = [one for one in changed if evaluate(one) is not None and not self.teacher_agrees(one, row.label)]
        number = int(hashlib.sha256(f"{row.id}\n{row.input}".encode("utf-8", "surrogatepass")).hexdigest(), 16)
        return wrong[number % len(wrong)] if wrong else None

    def split_file(self, split: Split) -> AnyPath | None:
        """The file of a split, existing or not; ``None`` if none is released."""
        word = self.splits.get(split)
        return None if word is None else self.data_dir / self.name / f"{self.name}_{word}.json"

    def absence(self, split: Split) -> str:
        """The message for an absent split, naming the argument of its place."""
        return f"data_dir: {self.name} has no {split} split ({self.split_file(split) or 'none is released'})"

    def load_rows(self, split: Split) -> Iterable[Row] | None:
        """All rows of a split, with the teacher outputs in the same file, if any; ``None`` if the split is absent.

        Override this for another layout; any iterable does. Raises a ``UserError`` if a file is invalid.
        """
        if (source := self.row_source(split)) is None:
            return None
        parts = (self.read_rows(part, source.read, split, start) for start, part in numbered(source.chunks))
        return list(chain.from_iterable(parts))

    def row_source(self, split: Split) -> Source | None:
        """The rows of a split before they are parsed; ``None`` if it is absent. Lets processes share the parsing."""
        path = self.split_file(split)
        if path is None or not path.is_file():
            return None
        if next(line_chunks(path), None) is None:
            raise UserError(f"{split}: {path} is empty; give a file with rows, or remove it")
        return Source(line_chunks(path), self.read_row)

    def source_files(self, split: Split) -> list[AnyPath] | None:
        """The files that decide what `load_rows` gives, and whose versions tell that it need not be called again.

        ``None`` if they are unknown, as where it is overridden: then it is called at each start.
        """
        path = self.split_file(split)
        return None if path is None or self.loads_itself else [path]

    @property
    def loads_itself(self) -> bool:
        """Whether `load_rows` is overridden."""
        return type(self).load_rows is not Dataset.load_rows

    @property
    def has_outputs(self) -> bool:
        """Whether the dataset's own outputs come with its rows."""
        return self.loads_itself or type(self).row_source is not Dataset.row_source

    def read_rows(
        self, found: Iterable[Placed], read: Callable[[dict[str, Any]], Row], split: Split, start: int = 0
    ) -> list[Row]:
        """Parse rows, adding the place to errors, and the position, from ``start``, to rows without an id."""
        rows: list[Row] = []
        for place, values in found:
            try:
                row = read(values)
            except KeyError as error:
                raise UserError(f"{place}: no key {error}; there are {', '.join(values)}") from error
            except UserError as error:
                raise UserError(f"{place}: {error}") from error
            rows.append(row if row.id else replace(row, id=f"{self.name}-{split}-{start + len(rows)}"))
        return rows

    def output_files(self, split: Split) -> list[AnyPath]:
        """The files of the dataset's own outputs, if they do not come with its rows."""
        if self.has_outputs or split not in self.splits:
            return []
        folder = self.data_dir / self.name / "llm"
        return [path for _, path in released_files(folder, self.splits[split])]

    def load_outputs(self, split: Split, rows: Sequence[Row]) -> Iterator[list[str | None]]:
        """The texts in ``llm/<split>_CoT_<k>.json``, in chunks as `chunks` makes them of the rows."""
        folder, word = self.data_dir / self.name / "llm", self.splits[split]
        texts, found = read_released(folder, word), 0
        for positions in chunks(len(rows)):
            some = list(islice(texts, len(positions)))
            found += len(some)
            if len(some) == len(positions):
                yield [*some]
            elif not found:
                yield [None] * len(positions)
        found += sum(1 for _ in texts)
        counted = f"{split}: {self.split_file(split)} has {len(rows)} rows, {folder}/{word}_CoT_*.json have"
        counted += f" {found} outputs"
        if 0 < found < len(rows):
            raise UserError(f"{counted}; they are joined by position and have to be as many")
        if found > len(rows) and not self.allow_extra_outputs:
            raise UserError(f"{counted}; allow_extra_outputs: true joins the first {len(rows)} of them")
