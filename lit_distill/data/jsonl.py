"""A user's own data: files, saved folders or a hub dataset."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lit_distill import checks
from lit_distill.data.base import RationaleDataModule
from lit_distill.data.outputs import RELEASED
from lit_distill.data.sources import Table, read_file, read_hub
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.evaluation.metrics import MetricName
from lit_distill.reading import parse_json
from lit_distill.remote import AnyPath, RemotePath, as_path
from lit_distill.shipped import shipped
from lit_distill.tasks import Row, TeacherOutput


class JSONLDataModule(RationaleDataModule):
    r"""Your own rows: JSON lines, JSON, CSV, Parquet, a ``save_to_disk`` folder or a hub dataset.

    Columns have their usual names by default (``id``, ``label``, ``rationale``, ``teacher_label``, ``choices``), if
    present.

    Args:
        train: file or ``save_to_disk`` folder of the training rows, possibly at an fsspec URL (``s3://``, ``hf://``,
            ``https://``, ...); with ``hub``, the split's name. Relative to the working directory, else to ``data_dir``.
        val: the same for validation rows; by default a fixed tenth of train's inputs.
        test: the same for test rows.
        predict: the same for rows to predict, which need no label.
        hub: name of a hub dataset, or a folder for ``load_dataset``.
        hub_config: configuration of the hub dataset.
        id_column: column of ids; by default ``id``, else the position.
        input_column: column of inputs.
        input_template: format string over columns in place of ``input_column``, such as ``"{question}\n{context}"``.
        label_column: column of labels; by default ``label``. Numbers are positions in ``label_set``.
        rationale_column: column of rationales, each a text or a list; by default ``rationale``.
        teacher_label_column: column of the teacher's labels; by default ``teacher_label``.
        outputs: further columns of teacher outputs (each a text or a list) -> their kind.
        choices_column: column of each row's choices; by default ``choices``.
        label_set: the closed set of labels, ordered by their numbers in the data.
        metric: how answers are compared: ``exact_match``, or ``equation`` by value.
        predict_split: the split for ``predict``; by default ``predict`` if given, else ``test``.
        **kwargs: as in `RationaleDataModule`.
    """

    name = "jsonl"

    def __init__(
        self,
        train: str | Path | None = None,
        val: str | Path | None = None,
        test: str | Path | None = None,
        predict: str | Path | None = None,
        hub: str | None = None,
        hub_config: str | None = None,
        id_column: str | None = None,
        input_column: str = "input",
        input_template: str | None = None,
        label_column: str | None = None,
        rationale_column: str | None = None,
        teacher_label_column: str | None = None,
        outputs: dict[str, str] | None = None,
        choices_column: str | None = None,
        label_set: Sequence[str] | None = None,
        metric: MetricName = "exact_match",
        predict_split: Split | None = None,
        **kwargs: Any,
    ) -> None:
        own = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        given: dict[Split, str | Path | None] = {"train": train, "val": val, "test": test, "predict": predict}
        self.sources: dict[Split, str] = {split: str(source) for split, source in given.items() if source is not None}
        if not self.sources:
            raise UserError("train, val, test or predict must be given: a file, a folder, or a split's name with hub")
        self.splits = {split: split for split in self.sources}
        self.metric = checks.check_choice("metric", metric, ("exact_match", "equation"))
        if label_set is not None:
            texts = {label.strip() for label in label_set if isinstance(label, str)} - {""}
            if isinstance(label_set, str) or not texts or len(texts) < len(label_set):
                raise UserError(f"label_set must be a list of different texts, none of them empty, got {label_set!r}")
            self.label_set = tuple(label_set)
        named = {} if outputs is None else outputs
        if not isinstance(named, Mapping) or not all(isinstance(text, str) for pair in named.items() for text in pair):
            raise UserError(f"outputs must map columns to kinds, got {outputs!r}")
        self._outputs = dict(named)
        parts = ("id", "label", "rationale", "teacher_label", "choices")
        self._columns: dict[str, str | None] = {part: own[f"{part}_column"] for part in parts}
        self._input_column, self._template = input_column, input_template
        self._input_columns = _fields(input_template) if input_template is not None else [input_column]
        if hub is not None and not checks.check_text("hub", hub).strip("/\\. "):
            raise UserError(f"hub must be a dataset's name or a folder of one, got {hub!r}")
        self._hub, self._hub_config = hub, hub_config
        self.hub_name = None if hub is None or Path(hub).exists() else hub
        super().__init__(predict_split=predict_split or ("predict" if predict is not None else "test"), **kwargs)
        own |= {str(split): source for split, source in self.sources.items()}
        own |= {"predict_split": self.predict_split, "label_set": label_set and list(label_set)}
        self.save_hyperparameters(own)

    def prepare_data(self) -> None:
        """Check early that every file exists, and download hub data."""
        super().prepare_data()
        for split in self.sources:
            if self._hub is not None:
                self._table(split)
            else:
                self._existing_file(split)

    def split_file(self, split: Split) -> AnyPath | None:
        """The file or folder of a split; ``None`` if not given, or on the hub."""
        if self._hub is not None or split not in self.sources:
            return None
        path = as_path(shipped(self.sources[split]))
        if isinstance(path, RemotePath):
            return path
        # absolute, for messages
        here, there = path.absolute(), (self.data_dir / path).absolute()
        return there if not here.exists() and there.exists() else here

    def absence(self, split: Split) -> str:
        """The message for an absent split, naming its argument."""
        needed = "train" if split == "val" else split
        return f"{needed}: not given, so that there is no {split} split"

    def describe(self) -> dict[str, Any]:
        """As the base class, with the source of the data."""
        return super().describe() | {"sources": dict(self.sources), "hub": self._hub}

    def load_rows(self, split: Split) -> list[Row] | None:
        """The rows of a split; ``None`` if not given."""
        if split not in self.sources:
            return None
        table = self._table(split)
        if not table.rows:
            where = self.split_file(split) or f"{self.sources[split]!r} of {self._hub}"
            raise UserError(f"{split}: {where} is empty; give one with rows, or leave {split} out")
        columns = self._present_columns(table, split)
        if (label := columns.get("label")) in table.class_names and self.label_set is None:
            self.label_set = tuple(table.class_names[str(label)])
        return self.read_rows(table.rows, partial(self._row, columns=columns), split)

    def _table(self, split: Split) -> Table:
        if self._hub is not None:
            return read_hub(self._hub, self._hub_config, self.sources[split])
        return read_file(self._existing_file(split), split)

    def _existing_file(self, split: Split) -> AnyPath:
        path = self.split_file(split)
        if path is None or not path.exists():
            raise UserError(f"{split}: there is no {path}, nor {self.sources[split]!r} in {self.data_dir.absolute()}")
        return path

    def _present_columns(self, table: Table, split: Split) -> dict[str, str]:
        """Part of a row -> its column, where there is one. Columns that were named must be there."""
        needed = [*self._input_columns, self._columns["id"]]
        if split == "train":
            needed += [*self._columns.values(), *self._outputs]
        elif split != "predict":
            needed.append(self._columns["label"] or "label")
        if missing := [repr(name) for name in dict.fromkeys(needed) if name not in (None, *table.columns)]:
            there = ", ".join(table.columns) or "none"
            raise UserError(f"{split}: no column {', '.join(missing)} in {self.sources[split]}; there are {there}")
        chosen = {part: column or part for part, column in self._columns.items()}
        return {part: column for part, column in chosen.items() if column in table.columns}

    def _row(self, found: dict[str, Any], columns: dict[str, str]) -> Row:
        values = {part: found.get(columns[part]) if part in columns else None for part in self._columns}
        label, teacher_label = self._label(values["label"]), self._label(values["teacher_label"])
        if label is not None and self.label_set is not None and label not in self.label_set:
            raise UserError(f"the label {label!r} is not in label_set ({', '.join(self.label_set)})")
        texts: list[str | None] = [*_output_texts("rationale", values["rationale"])]
        if not texts and teacher_label is not None:
            texts = [None]
        outputs = [TeacherOutput(text, teacher_label, RELEASED) for text in texts]
        for column, kind in self._outputs.items():
            outputs += [TeacherOutput(text, None, RELEASED, kind) for text in _output_texts(column, found.get(column))]
        row_id = "" if values["id"] is None else str(values["id"])
        return Row(row_id, self._input(found), label, _choices(values["choices"]), tuple(outputs))

    def _input(self, row: dict[str, Any]) -> str:
        for column in self._input_columns:
            if row.get(column) is None:
                raise UserError(f"column {column!r} is empty")
        if self._template is not None:
            return self._template.format(**row)
        return _text(self._input_column, row[self._input_column])

    def _label(self, value: Any) -> str | None:
        """A label as text; numbers and digits that are no label are positions in ``label_set``."""
        # NaN is not equal to itself
        if value is None or value != value or (isinstance(value, str) and not value.strip()):
            return None
        if not isinstance(value, str | int | float):
            raise UserError(f"a label must be a text or a number, got {value!r}")
        if self.label_set is not None and isinstance(value, float) and value.is_integer():
            # a column of integers with gaps is often stored as 1.0, 2.0, ...
            value = int(value)
        text = str(value)
        if self.label_set is None or text in self.label_set or not re.fullmatch(r"-?[0-9]{1,9}", text):
            return text
        if int(text) == -1:
            return None  # hub datasets mark missing labels by -1
        return self.label_set[int(text)] if 0 <= int(text) < len(self.label_set) else text


def _fields(template: str) -> list[str]:
    names = checks.check_format("input_template", checks.check_text("input_template", template))
    if not names or not all(name.isidentifier() for name in names):
        raise UserError(f"input_template must name columns in braces, as in {{question}}, got {template!r:.200}")
    return names


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str | int | float):
        raise UserError(f"{name!r} must be a text, got {value!r}")
    return str(value)


def _output_texts(name: str, value: Any) -> list[str]:
    """The non-empty texts of a teacher output column."""
    listed = value if isinstance(value, list) else [value]
    return [text for one in listed if one is not None and (text := _text(name, one).strip())]


def _choices(value: Any) -> tuple[str, ...] | None:
    try:
        choices = parse_json(value) if isinstance(value, str) else value
    except ValueError:
        choices = value
    if choices is None:
        return None
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f"choices must be a list of texts (in a CSV cell: a JSON list), got {value!r}")
    return tuple(choices)
