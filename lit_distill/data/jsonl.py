"""A user's own data: files, saved folders or a hub dataset."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_distill import checks
from lit_distill.data.base import RationaleDataModule
from lit_distill.data.dataset import Source
from lit_distill.data.outputs import RELEASED
from lit_distill.data.selection import flags_of, select_rows, teacher_counts
from lit_distill.data.sources import Table, read_file, read_hub
from lit_distill.data.store import cut
from lit_distill.data.streaming import (
    Reading,
    ShardStream,
    StreamLoader,
    check_endless,
    find_shards,
    parse_row,
    shard_rows,
)
from lit_distill.data.tokenize import TokenRows, cut_counts, encode_rows, lengths_of
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.evaluation.metrics import MetricName
from lit_distill.reading import parse_json
from lit_distill.remote import AnyPath, RemotePath, as_path
from lit_distill.shipped import shipped
from lit_distill.tasks import Row, TeacherOutput

HEAD = 1_000  # streamed rows that are read for `inspect` and checks


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
        group_column: column of groups, texts or numbers, by which evaluation tells rows apart, too.
        label_set: the closed set of labels, ordered by their numbers in the data.
        metric: how answers are compared: ``exact_match``, or ``equation`` by value.
        predict_split: the split for ``predict``; by default ``predict`` if given, else ``test``.
        streaming: read training rows while training, and keep none: ``train`` is a path, URL or pattern of shards (JSON
            lines or Parquet), or a list of them. ``inspect`` and checks read the first 1,000 rows.
        shuffle_buffer: with ``streaming``, the number of rows that a loader process shuffles at a time.
        **kwargs: as in `RationaleDataModule`.
    """

    name = "jsonl"

    def __init__(
        self,
        train: str | Path | list[str] | None = None,
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
        group_column: str | None = None,
        label_set: Sequence[str] | None = None,
        metric: MetricName = "exact_match",
        predict_split: Split | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
        **kwargs: Any,
    ) -> None:
        own = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        self.streaming = checks.check_bool("streaming", streaming)
        self.shuffle_buffer = checks.check_int("shuffle_buffer", shuffle_buffer, 1)
        self._patterns = [str(one) for one in (train if isinstance(train, list) else [train]) if one is not None]
        if isinstance(train, list) and not (streaming and train):
            raise UserError(f"train: a list of shards is for streaming: true, and not empty, got {train!r}")
        if streaming:
            _check_streaming(hub, train, val, kwargs)
        joined = ", ".join(self._patterns) or None
        given: dict[Split, str | Path | None] = {"train": joined, "val": val, "test": test, "predict": predict}
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
        self._named = [part for part in parts if own[f"{part}_column"] is not None]
        self._columns: dict[str, str] = {part: own[f"{part}_column"] or part for part in parts}
        self._group_column = None if group_column is None else checks.check_text("group_column", group_column)
        self._input_column, self._template = input_column, input_template
        self._input_columns = _fields(input_template) if input_template is not None else [input_column]
        if hub is not None and not checks.check_text("hub", hub).strip("/\\. "):
            raise UserError(f"hub must be a dataset's name or a folder of one, got {hub!r}")
        self._hub, self._hub_config = hub, hub_config
        self.hub_name = None if hub is None or Path(hub).exists() else hub
        super().__init__(predict_split=predict_split or ("predict" if predict is not None else "test"), **kwargs)
        own |= {str(split): source for split, source in self.sources.items()}
        own |= {"train": self._patterns} if isinstance(train, list) else {}
        own |= {"predict_split": self.predict_split, "label_set": label_set and list(label_set)}
        self.save_hyperparameters(own)

    def prepare_data(self) -> None:
        """Check early that every file exists, and download hub data."""
        super().prepare_data()
        for split in self.sources:
            if split == "train" and self.streaming:
                find_shards(self._patterns, self.data_dir)
            elif self._hub is not None:
                self._table(split)
            else:
                self._existing_file(split)

    def split_file(self, split: Split) -> AnyPath | None:
        """The file or folder of a split; ``None`` if not given, or on the hub."""
        if self._hub is not None or split not in self.sources:
            return None
        if self.streaming and split == "train":
            return find_shards(self._patterns, self.data_dir)[0]
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
        own = {"streaming": True, "shuffle_buffer": self.shuffle_buffer} if self.streaming else {}
        return super().describe() | {"sources": dict(self.sources), "hub": self._hub} | own

    def source_files(self, split: Split) -> list[AnyPath] | None:
        """The file, or those in the folder; unknown for hub data and streamed rows."""
        files = None if self.streaming and split == "train" else super().source_files(split)
        if not files or not files[0].is_dir():
            return files
        return [path for path in sorted(files[0].rglob("*")) if path.is_file()] if isinstance(files[0], Path) else None

    def row_source(self, split: Split) -> Source | None:
        """The rows of a split; ``None`` if not given."""
        if split not in self.sources:
            return None
        table = self._table(split)
        where = self.split_file(split) or f"{self.sources[split]!r} of {self._hub}"
        if next(table.chunks(), None) is None:
            raise UserError(f"{split}: {where} is empty; give one with rows, or leave {split} out")
        self._check_columns(table, split)
        if (names := table.class_names.get(self._columns["label"])) is not None and self.label_set is None:
            self.label_set = tuple(names)
        return Source(table.chunks(), self._row)

    def _table(self, split: Split) -> Table:
        if self._hub is not None:
            return read_hub(self._hub, self._hub_config, self.sources[split])
        if self.streaming and split == "train":
            first = find_shards(self._patterns, self.data_dir)[0]
            rows = [parse_row(first, *row) for row in islice(shard_rows(first), HEAD)]
            return Table(lambda: cut(rows))
        return read_file(self._existing_file(split), split)

    def setup(self, stage: str) -> None:
        """As the base class; with ``streaming``, check what a trainer has to have."""
        if self.streaming and stage == "fit" and self.trainer is not None:
            check_endless(self.trainer)
        super().setup(stage)

    def rows_to_ask(self, split: Split) -> Sequence[Row] | None:
        """As the base class. Raises a ``UserError`` for rows that are streamed."""
        if self.streaming and split == "train":
            raise UserError("streaming: annotate asks rows of files; give one shard after another, without streaming")
        return super().rows_to_ask(split)

    def token_rows(self, split: Split) -> TokenRows:
        """As the base class. Raises a ``UserError`` for rows that are streamed."""
        if self.streaming and split == "train":
            raise UserError(
                "streaming: keeps no tokenised training rows, which captured distributions and max_tokens need"
            )
        return super().token_rows(split)

    def train_dataloader(self) -> Any:
        """As the base class; with ``streaming``, batches without an end."""
        return self._stream() if self.streaming and "train" in self._tokenized else super().train_dataloader()

    def _stream(self) -> StreamLoader:
        settings, select_row, choose = self.token_settings, self._selector, partial(self.targets, "train")

        def select(found: list[tuple[str, dict[str, Any]]]) -> tuple[Sequence[Row], dict[str, int]]:
            rows = self.read_rows(found, self._row, "train")
            tally = Counter(flags_of(row, self.teacher_agrees, self.label_set) for row in rows)
            counts = teacher_counts(tally) | select_rows(rows, select_row, 1.0, 0).counts
            return select_row.rows(rows), counts

        def encode(rows: Sequence[Row]) -> tuple[dict[str, list[Any]], dict[str, int]]:
            encoded = encode_rows(rows, self.tokens, settings, choose)
            return encoded, cut_counts(lengths_of(encoded, settings), settings)

        def on_pass(number: int, counts: dict[str, int]) -> None:
            told = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items() if count)
            rank_zero_info(f"{self.name} train, pass {number + 1}: {told}")

        sampled = [task for task in self.tasks.values() if task.select == "sample"]
        shards = find_shards(self._patterns, self.data_dir)
        reading = Reading(select, encode, self._collator(evaluation=False), sampled)
        stream = ShardStream(shards, reading, **self.stream_settings(self.shuffle_buffer))
        return StreamLoader(stream, self.num_workers, on_pass, self.counts["train"])

    def _existing_file(self, split: Split) -> AnyPath:
        path = self.split_file(split)
        if path is None or not path.exists():
            raise UserError(f"{split}: there is no {path}, nor {self.sources[split]!r} in {self.data_dir.absolute()}")
        return path

    def _check_columns(self, table: Table, split: Split) -> None:
        """Raise a ``UserError`` if a column that was named, or is needed, is not there."""
        needed = [*self._input_columns, *(self._columns[part] for part in self._named if part == "id")]
        if split == "train":
            needed += [*(self._columns[part] for part in self._named), *self._outputs]
        elif split != "predict":
            needed += [self._columns["label"], *filter(None, [self._group_column])]
        columns = table.columns(needed)
        if missing := [repr(name) for name in dict.fromkeys(needed) if name not in columns]:
            there = ", ".join(columns) or "none"
            raise UserError(f"{split}: no column {', '.join(missing)} in {self.sources[split]}; there are {there}")

    def _row(self, found: dict[str, Any]) -> Row:
        values = {part: found.get(column) for part, column in self._columns.items()}
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
        group = None if self._group_column is None else found.get(self._group_column)
        # NaN is not equal to itself
        group = None if group is None or group != group else _text(str(self._group_column), group)
        return Row(row_id, self._input(found), label, _choices(values["choices"]), tuple(outputs), group)

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


def _check_streaming(hub: str | None, train: Any, val: Any, settings: Mapping[str, Any]) -> None:
    """Raise a ``UserError`` for what streaming cannot do."""
    if train is None:
        raise UserError("train: must be given with streaming: a path, URL or pattern of shards, or a list of them")
    if hub is not None:
        raise UserError("hub: not with streaming; give the shards as train: hf://datasets/USER/NAME/*.parquet")
    if val is None:
        raise UserError("val: must be given with streaming, which takes no rows from train")
    needs: dict[str, tuple[list[Any], str]] = {
        "train_fraction": ([1], "draws from all rows; give fewer shards"),
        "rationale_pairing": (["own"], "needs all rows at once"),
        "batching": (["shuffled"], "sorts many rows"),
        "row_weights": ([None], "needs all rows at once"),
        "rationales": ([None, RELEASED, [RELEASED]], "looks for all ids; put rationales into a column of the shards"),
    }
    for name, (allowed, why) in needs.items():
        if name in settings and settings[name] not in allowed:
            raise UserError(f"{name}: {settings[name]!r} is not for streaming, as it {why}")


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
