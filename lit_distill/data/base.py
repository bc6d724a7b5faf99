"""What every dataset has in common: from released rows and a teacher's outputs to batches and answers."""

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lit_distill import checks
from lit_distill import rationales as reading
from lit_distill.annotation.conditions import condition, is_condition
from lit_distill.data.annotated import annotations_file, check_columns, join_annotations
from lit_distill.data.collate import RationaleCollator, TokenRows
from lit_distill.data.download import RELEASE_URL, fetch_release
from lit_distill.data.files import output_files, read_json_lines, read_outputs
from lit_distill.data.loader import ResumableLoader
from lit_distill.data.sampler import EpochSampler, rows_read
from lit_distill.data.splits import (
    SplitRows,
    UsedRows,
    evaluation_rows,
    hold_out,
    shuffle_rationales,
    teacher_counts,
    train_rows,
)
from lit_distill.data.tokenize import CUTS, TokenSettings, tokenize_once
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import AnswerKey, Split
from lit_distill.evaluation.metrics import MetricName, judge
from lit_distill.rationales import ANSWER_MARK, RationaleFilter, filter_name, find_filter, label_agrees
from lit_distill.students import load_tokenizer
from lit_distill.tasks import Row, TeacherOutput, tasks_from

CACHE_VARIABLE = "LIT_DISTILL_CACHE"
"""Environment variable that names the folder of tokenised rows."""

PROMPTS = Path(__file__).parent / "prompts"
"""The folder of the prompts that come with the datasets."""

STAGE_SPLITS: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
"""The splits that a stage of the trainer needs; ``predict`` needs `RationaleDataModule.predict_split`."""

# the logger that Lightning shows without set-up; a notice that were a `warnings.warn` would be a fault in strict runs
_log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
_info = rank_zero_only(_log.info)
_warn = rank_zero_only(_log.warning)


class RationaleDataModule(pl.LightningDataModule):
    """Rows with a teacher's rationales, as batches for a student and as answers for its evaluation.

    A dataset is a subclass that says where it lies (`name`, `splits`), how a row and the teacher's text are read
    (`read_row`, `parse_teacher`), and how answers are judged (`metric`, `label_set`). Data that does not lie in the
    released layout overrides `load_split`, and has no `split_file`.

    Args:
        data_dir: folder that holds the datasets' folders (``cqa/``, ``svamp/``, ``esnli/``, ``anli1/``).
        tokenizer: the student's tokenizer: a hub name, a folder, or the object itself.
        batch_size: examples in a training batch, on each device.
        eval_batch_size: examples in an evaluation batch, on each device; as ``batch_size`` if not given.
        tasks: what a student is trained on, each task named after what its target holds: ``label``, ``rationale``,
            ``rationale_label``, ``label_rationale``.
        prefixes: task -> prefix of its inputs; if not given, ``predict: `` for ``label`` and ``explain: `` for
            ``rationale`` where there are several tasks, and none where there is one.
        label_source: train on the data's own labels (``gold``) or on the teacher's; val and test are always gold.
        rationale_filter: which rationales to train on: ``none`` filters nothing, ``label_agrees`` keeps those whose
            teacher label is right, ``package.module.function`` keeps those that the function returns true for. With
            ``rationales`` also conditions on their columns, as in ``agrees and not contains_label``.
        train_fraction: part of the training rows to train on, drawn by ``seed`` after val was taken off (the reference
            code draws it before).
        seed: decides the order of the training rows, and which of them a ``train_fraction`` holds.
        max_source_length: tokens of an input at most; longer ones are cut and counted.
        max_target_length: tokens of a target at most; longer ones are cut, in the rationale where there is one beside
            the label, and counted.
        num_workers: processes that load batches, on each device; 0 loads in the main process.
        allow_extra_outputs: accept more teacher outputs than rows, for a file that is the beginning of the
            released one.
        cache_dir: folder of the tokenised rows; by default ``$LIT_DISTILL_CACHE``, else a folder in the cache of
            Hugging Face datasets.
        predict_split: the split that ``predict`` reads.
        batching: what a training batch is made of: any rows (``shuffled``), or rows of similar length (``by_length``),
            which need less padding; either way the batches of an epoch come in a random order.
        rationales: what a teacher said, as ``annotate`` writes it, in place of the released outputs: a folder or its
            ``rationales.jsonl`` or ``rationales.parquet``, joined to the rows by ``id``.
        rationale_pairing: train on each row's ``own`` rationale, or, as a control, on ``shuffled`` ones: the same
            rationales, each paired with another row's input by ``seed``.
        pad_to_multiple_of: round the lengths of batches up to a multiple of this, so that a compiled student sees few
            shapes; if not given, a batch is as long as its longest row.
    """

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
    read_label = staticmethod(reading.read_label)
    """``(task, generated text) -> label``."""
    read_rationale = staticmethod(reading.read_rationale)
    """``(task, generated text) -> rationale``."""

    def __init__(
        self,
        data_dir: str | Path = "data",
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        tasks: Mapping[str, Any] | Sequence[Any] = ("label",),
        prefixes: dict[str, str] | None = None,
        label_source: Literal["gold", "teacher"] = "gold",
        rationale_filter: str | RationaleFilter = "none",
        train_fraction: float = 1.0,
        seed: int = 0,
        max_source_length: int = 1024,
        max_target_length: int = 256,
        num_workers: int = 0,
        allow_extra_outputs: bool = False,
        cache_dir: str | Path | None = None,
        predict_split: Literal["train", "val", "test", "predict"] = "test",
        batching: Literal["shuffled", "by_length"] = "shuffled",
        pad_to_multiple_of: int | None = None,
        rationales: str | Path | None = None,
        rationale_pairing: Literal["own", "shuffled"] = "own",
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.data_dir = Path(data_dir)
        self.batch_size = checks.check_int("batch_size", batch_size, 1)
        if eval_batch_size is not None:
            checks.check_int("eval_batch_size", eval_batch_size, 1)
        self.eval_batch_size = eval_batch_size
        self.tasks = tasks_from(tasks if prefixes is None else {task: {"prefix": prefixes[task]} for task in tasks})
        self.prefixes = {name: task.prefix for name, task in self.tasks.items()}
        self.label_source = checks.check_choice("label_source", label_source, ("gold", "teacher"))
        self.rationales = None if rationales is None else Path(rationales)
        self.rationale_pairing = checks.check_choice("rationale_pairing", rationale_pairing, ("own", "shuffled"))
        self.rationale_filter = filter_name(rationale_filter)
        self._keep = self._find_filter(rationale_filter)
        self.train_fraction = checks.check_fraction("train_fraction", train_fraction)
        self.seed = checks.check_int("seed", seed, 0, 2**32 - 1)
        self.max_source_length = checks.check_int("max_source_length", max_source_length, 1)
        self.max_target_length = checks.check_int("max_target_length", max_target_length, 1)
        self.num_workers = checks.check_int("num_workers", num_workers, 0, 256)
        self.allow_extra_outputs = checks.check_bool("allow_extra_outputs", allow_extra_outputs)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.predict_split: Split = checks.check_choice(
            "predict_split", predict_split, ("train", "val", "test", "predict")
        )
        self.batching = checks.check_choice("batching", batching, ("shuffled", "by_length"))
        if pad_to_multiple_of is not None:
            checks.check_int("pad_to_multiple_of", pad_to_multiple_of, 1, 4096)
        self.pad_to_multiple_of = pad_to_multiple_of
        self.counts: dict[str, dict[str, int]] = {}
        self._tokenizer = self._check_tokenizer(tokenizer)
        self._loaded: dict[Split, SplitRows | None] = {}
        self._used: dict[Split, UsedRows] = {}
        self._keys: dict[Split, AnswerKey] = {}
        self._rows: dict[Split, TokenRows] = {}
        self._majority: tuple[str | None] | None = None
        self._notices: set[str] = set()
        # plain types only: a checkpoint has to load with `weights_only=True`
        paths = {
            name: None if given[name] is None else str(given[name]) for name in ("data_dir", "cache_dir", "rationales")
        }
        plain: dict[str, Any] = {"tokenizer": self._tokenizer_name(), "rationale_filter": self.rationale_filter}
        plain |= {"tasks": {name: task.plain() for name, task in self.tasks.items()}, "prefixes": None}
        self.save_hyperparameters(given | paths | plain)

    # ---------------------------------------------------------------- what a dataset says of itself

    @property
    def folder(self) -> Path:
        """Where the dataset's files lie."""
        return self.data_dir / self.name

    def read_row(self, row: dict[str, Any]) -> Row:
        """One released row as an example; an empty ``id`` is filled in by the row's position.

        A ``KeyError`` or a ``UserError`` is given the file's name and the line.
        """
        raise NotImplementedError(f"{type(self).__name__} does not read rows")

    def parse_teacher(self, text: str) -> tuple[str, str] | None:
        """``(rationale, label)`` in the teacher's text, neither of them empty; ``None`` where it does not parse.

        Here: ``... So the answer is LABEL.``, the label up to the end of its line without a final stop; where the mark
        stands several times, the last one counts.
        """
        rationale, mark, answer = text.rpartition(ANSWER_MARK.strip())
        label = (answer.strip().splitlines() or [""])[0].strip().removesuffix(".").strip()
        rationale = rationale.strip()
        return (rationale, label) if mark and rationale and label else None

    @property
    def prompt_file(self) -> Path:
        """The YAML file of the prompt that a teacher is asked with."""
        return PROMPTS / f"{self.prompt}.yaml"

    def prompt_fields(self, example: Row) -> dict[str, str]:
        """What the templates of a prompt can name, of one example.

        ``input``; ``choices``, the closed choices joined by commas; ``options``, a line that names them, or nothing
        where there are none.
        """
        choices = ", ".join(example.choices or self.label_set or ())
        return {"input": example.input, "choices": choices, "options": f"\nOptions: {choices}" if choices else ""}

    def load_rows(self, split: Split) -> list[Row] | None:
        """The rows of a released split without their teacher, the whole of them: what a teacher is asked about.

        ``None`` where its file is absent.

        Raises:
            UserError: a file is not as it should be.
        """
        if type(self).load_split is not RationaleDataModule.load_split:
            rows = self.load_split(split)
            return None if rows is None else [_alone(row) for row in rows.examples]
        path = self.split_file(split)
        return None if path is None or not path.is_file() else self._read_rows(path, split)

    def load_split(self, split: Split) -> SplitRows | None:
        """The rows of a released split with their teacher, the whole of them, or ``None`` where its file is absent.

        Raises:
            UserError: a file is not as it should be.
        """
        path = self.split_file(split)
        if path is None or not path.is_file():
            return None
        examples = self._read_rows(path, split)
        outputs = self._read_outputs(path, split, len(examples))
        unparsed: set[int] = set()
        for position, output in enumerate(outputs):
            parsed = self.parse_teacher(output)
            if parsed is None:
                unparsed.add(position)
                continue
            row = examples[position]
            examples[position] = replace(row, outputs=(TeacherOutput(*parsed),))
        return SplitRows(examples, frozenset(unparsed))

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

    # ---------------------------------------------------------------- the rows

    def released(self, split: Split) -> SplitRows | None:
        """The rows of a released split, the whole of them; ``None`` where it is absent. Read once."""
        if split not in self._loaded:
            rows = None
            if self.rationales is None:
                rows = self.load_split(split) if split in self.splits else None
                if rows is not None:
                    self._check_rows(rows.examples, split)
            elif (asked := self.rows_to_ask(split)) is not None:
                rows, notice = join_annotations(asked, self.rationales, split, self.teacher_agrees, self.parse_teacher)
                if split == "train":
                    check_columns(self.rationale_filter, rows)
                if notice:
                    _warn(f"{self.name} {split}: {notice}")
            self._loaded[split] = rows
        return self._loaded[split]

    def rows_to_ask(self, split: Split) -> list[Row] | None:
        """The rows that a teacher is asked about: a released split whole, without what a teacher said of it.

        ``None`` where the split is absent.
        """
        rows = self.load_rows(split) if split in self.splits else None
        if rows is not None:
            self._check_rows(rows, split)
        return rows

    def split_rows(self, split: Split) -> SplitRows | None:
        """The rows of a split after val was taken off train where none is released; ``None`` where it is absent."""
        if "val" in self.splits or split not in ("train", "val"):
            return self.released(split)
        train = self.released("train")
        return None if train is None else hold_out(train)[split == "val"]

    def kept_rows(self, split: Split) -> int:
        """How many rows of a released split, the whole of it, have a rationale that ``rationale_filter`` keeps."""
        rows = self.released(split)
        return 0 if rows is None else rows.kept(self._keep)

    def repeated_rows(self, split: Split) -> int:
        """How many rows of a split have an input that is in train, too: what is measured on them is no generalisation.

        0 where either is absent.
        """
        rows, train = self.split_rows(split), self.split_rows("train")
        if rows is None or train is None:
            return 0
        inputs = {example.input for example in train.examples}
        return sum(example.input in inputs for example in rows.examples)

    def used_rows(self, split: Split) -> UsedRows:
        """The rows of a split as this run uses them.

        Raises:
            UserError: the split is absent.
        """
        if split not in self._used:
            rows = self.split_rows(split)
            if rows is None:
                raise UserError(self.absence(split))
            if split == "train":
                used = train_rows(
                    rows,
                    tasks=tuple(self.tasks.values()),
                    teacher_labels=self.label_source == "teacher",
                    keep=self._keep,
                    fraction=self.train_fraction,
                    seed=self.seed,
                )
                if self.rationale_pairing == "shuffled" and any(task.uses_output for task in self.tasks.values()):
                    used = shuffle_rationales(used, self.seed)
            else:
                used = evaluation_rows(rows)
            self.counts[split] = teacher_counts(rows, self.teacher_agrees, self.label_set) | used.counts
            self._used[split] = used
        return self._used[split]

    def answer_key(self, split: Split) -> AnswerKey:
        """The answers of a split, gold whatever the student is trained on."""
        if split not in self._keys:
            self._keys[split] = self._answer_key(self.used_rows(split))
        return self._keys[split]

    def _answer_key(self, used: UsedRows) -> AnswerKey:
        has_choices = self.label_set is not None or any(example.choices for example in used.examples)
        return AnswerKey(
            ids=[example.id for example in used.examples],
            inputs=[example.input for example in used.examples],
            labels=used.gold,
            rationales=[example.rationale for example in used.examples],
            metric=self.metric,
            label_set=self.label_set,
            choices=[example.choices or self.label_set or () for example in used.examples] if has_choices else None,
            read_label=self.read_label,
            read_rationale=self.read_rationale,
            majority_label=self.majority_label,
        )

    @property
    def majority_label(self) -> str | None:
        """The most frequent label that is trained on; ``None`` where train is absent or without labels."""
        if self._majority is None:
            labels: Counter[str] = Counter()
            try:
                if self.split_rows("train") is not None:
                    labels.update(row.label for row in self.used_rows("train").examples if row.label is not None)
            except UserError as error:
                # training on such data is an error, evaluating a student beside it is not
                _warn(f"{self.name}: the majority label is not known ({error})")
            self._majority = (labels.most_common(1)[0][0] if labels else None,)
        return self._majority[0]

    def describe(self) -> dict[str, Any]:
        """The data in plain values: its settings, and what became of the rows of each split that was used."""
        return {
            "dataset": self.name,
            "metric": self.metric,
            "tasks": list(self.tasks),
            "prefixes": dict(self.prefixes),
            "label_source": self.label_source,
            "rationale_filter": self.rationale_filter,
            "rationales": None if self.rationales is None else str(self.rationales),
            "rationale_pairing": self.rationale_pairing,
            "train_fraction": self.train_fraction,
            "seed": self.seed,
            "splits": {split: dict(counts) for split, counts in self.counts.items()},
        }

    # ---------------------------------------------------------------- Lightning's hooks

    def prepare_data(self) -> None:
        """Download the released data where none of the dataset's split files is there.

        Raises:
            UserError: there is no file of ``rationales``.
        """
        self._check_rationales()
        paths = {split: path for split in self.splits if (path := self.split_file(split)) is not None}
        if paths and not any(path.is_file() for path in paths.values()):
            rows = {path.name: self.released_rows[split] for split, path in paths.items()}
            fetch_release(self.release_url, self.data_dir, self.name, rows)

    def _check_rationales(self) -> None:
        if self.rationales is not None:
            annotations_file(self.rationales)

    def setup(self, stage: str) -> None:
        """Read and tokenise the splits that a stage needs; a second call does nothing again.

        Raises:
            UserError: a split that the stage needs is absent, or lacks what this run asks of it.
        """
        needed = (self.predict_split,) if stage == "predict" else STAGE_SPLITS[stage]
        for split in needed:
            if self.split_rows(split) is None:
                raise UserError(f"{self.absence(split)}, and {getattr(stage, 'value', stage)} needs it")
            if stage != "predict":
                self.check_split(split, stage)
            if split not in self._rows:
                self._rows[split] = self._tokenize(split)
                self._report(split)
        self._report_absent()
        if stage != "predict":
            self._report_repeated(("val", "test") if stage == "fit" else needed)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training rows, resumable."""
        return self._loader("train", "train")

    def val_dataloader(self) -> DataLoader[Any]:
        """All rows of val, the longest first."""
        return self._loader("val", "val")

    def test_dataloader(self) -> DataLoader[Any]:
        """All rows of test, the longest first."""
        return self._loader("test", "test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """All rows of ``predict_split``, the longest first."""
        return self._loader(self.predict_split, "predict")

    # ---------------------------------------------------------------- tokens

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when it is first asked for.

        Raises:
            UserError: none was given, it cannot be loaded, or it has no padding or end-of-sequence token.
        """
        if self._tokenizer is None:
            raise UserError("tokenizer must be given: a hub name, a folder or a tokenizer object")
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_tokenizer(self._tokenizer)
        loaded = self._tokenizer
        assert isinstance(loaded, PreTrainedTokenizerBase)  # noqa: S101 - for the type checker
        if loaded.eos_token_id is None or loaded.pad_token_id is None:
            raise UserError(f"tokenizer: {self._tokenizer_name()!r} needs a padding and an end-of-sequence token")
        return loaded

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @property
    def token_settings(self) -> TokenSettings:
        """What decides a row's tokens beside the tokenizer."""
        return TokenSettings(self.tasks, self.max_source_length, self.max_target_length)

    def _tokenize(self, split: Split) -> TokenRows:
        from datasets.config import HF_DATASETS_CACHE  # type: ignore[import-untyped]  # with pandas, for rows alone

        root = self.cache_dir or os.environ.get(CACHE_VARIABLE) or HF_DATASETS_CACHE / "lit_distill"
        name = f"{self.name}-{split}"
        examples = self.used_rows(split).examples
        table, cut = tokenize_once(name, examples, self.tokenizer, self.token_settings, Path(root))
        self.counts[split] |= cut
        return TokenRows(table, tuple(self.tasks))

    def target_limits(self) -> dict[str, int]:
        """Task -> generated tokens that its targets ask for: half more than the longest in train, and 4.

        Never more than ``max_target_length``. A task without targets is absent.
        """
        found = {task: max(self._rows["train"].target_lengths(task), default=0) for task in self.tasks}
        return {task: min(n + n // 2 + 4, self.max_target_length) for task, n in found.items() if n}

    def longer_targets(self, split: Split, task: str, tokens: int) -> int:
        """How many targets of a task are longer than so many tokens."""
        return sum(length > tokens for length in self._rows[split].target_lengths(task))

    def _loader(self, split: Split, stage: Split) -> DataLoader[Any]:
        if split not in self._rows:
            raise RuntimeError(f"setup has not built the {split} split")
        rows, evaluation = self._rows[split], stage != "train"
        batch_size = (self.eval_batch_size or self.batch_size) if evaluation else self.batch_size
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)  # noqa: S101 - for the type checker; the property has checked it
        if self.num_workers:
            # the workers are forked after the tokenizer ran in threads; without this it complains in each of them
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        loader = DataLoader if evaluation else ResumableLoader
        return loader(
            rows,
            batch_size=batch_size,
            sampler=self._sampler(rows, stage, batch_size),
            collate_fn=RationaleCollator(pad, tuple(self.tasks), evaluation, self.pad_to_multiple_of),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _sampler(self, rows: TokenRows, stage: Split, batch_size: int) -> EpochSampler:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        if stage == "train":
            lengths = rows.lengths(evaluation=False) if self.batching == "by_length" else None
            return EpochSampler(rows, world, rank, seed=self.seed, lengths=lengths, batch_size=batch_size)
        # the longest first pads least, and memory that does not suffice shows at once; a trainer that reads a part of
        # the split alone reads the rows that it would read without sorting
        limit = 1.0 if self.trainer is None else getattr(self.trainer, f"limit_{stage}_batches")
        first = rows_read(limit, len(rows), batch_size, world)
        return EpochSampler(rows, world, rank, shuffle=False, lengths=rows.lengths(evaluation=True), first=first)

    # ---------------------------------------------------------------- reading

    def _read_rows(self, path: Path, split: Split) -> list[Row]:
        examples: list[Row] = []
        for line, row in read_json_lines(path):
            try:
                example = self.read_row(row)
            except KeyError as error:
                raise UserError(f"{path}:{line}: no key {error}; there are {', '.join(row)}") from error
            except UserError as error:
                raise UserError(f"{path}:{line}: {error}") from error
            examples.append(self.with_id(example, split, len(examples)))
        if not examples:
            raise UserError(f"{split}: {path} is empty; give a file with rows, or remove it")
        return examples

    def with_id(self, example: Row, split: Split, position: int) -> Row:
        """The example, with an id made of its position where it has none."""
        if example.id:
            return example
        return replace(example, id=f"{self.name}-{split}-{position}")

    def _read_outputs(self, path: Path, split: Split, rows: int) -> list[str]:
        folder, word = self.folder / "llm", self.splits[split]
        outputs = read_outputs(output_files(folder, word))
        if not outputs or len(outputs) == rows:
            return outputs
        counted = f"{split}: {path} has {rows} rows, {folder}/{word}_CoT_*.json have {len(outputs)} outputs"
        if len(outputs) < rows:
            raise UserError(f"{counted}; they are joined by position and have to be as many")
        if not self.allow_extra_outputs:
            raise UserError(f"{counted}; allow_extra_outputs: true joins the first {rows} of them")
        return outputs[:rows]

    def _check_rows(self, rows: Sequence[Row], split: Split) -> None:
        """Rows are told apart by their ids in predictions and annotations, and answered by one of their choices."""
        seen: dict[str, int] = {}
        outside = []
        for position, example in enumerate(rows):
            if (first := seen.setdefault(example.id, position)) != position:
                raise UserError(f"{self.name} {split}: rows {first} and {position} share the id {example.id!r}")
            if example.choices is not None and example.label is not None and example.label not in example.choices:
                outside.append(example)
        if outside:
            first_one = f"{outside[0].id!r} has {outside[0].label!r} of {', '.join(outside[0].choices or ()) or 'none'}"
            raise UserError(
                f"{self.name} {split}: the label of {len(outside)} of {len(rows)} rows is none of the row's choices"
                f" ({first_one})"
            )

    def check_split(self, split: Split, stage: str) -> None:
        """See that a split, which is there, has what a stage needs of it.

        Raises:
            UserError: it has not.
        """
        rows, used = self.split_rows(split), self.used_rows(split)
        assert rows is not None  # noqa: S101 - for the type checker; setup has checked it
        if split != "train":
            unlabelled = sum(label is None for label in used.gold)
            if unlabelled:
                needing = getattr(stage, "value", stage)
                raise UserError(f"{split}: {unlabelled} of {len(used.gold)} rows have no label, which {needing} needs")
            return
        asking = ["label_source: teacher"] if self.label_source == "teacher" else []
        asking += ["rationale_filter: label_agrees"] if self.rationale_filter == "label_agrees" else []
        if asking and all(example.teacher_label is None for example in rows.examples):
            raise UserError(f"{asking[0]} needs the teacher's labels of train, {self._missing_teacher()}")
        asking = [f"tasks: {name}" for name, task in self.tasks.items() if task.uses_output]
        asking += [] if self._keep is None else [f"rationale_filter: {self.rationale_filter}"]
        if asking and all(example.rationale is None for example in rows.examples):
            raise UserError(f"{asking[0]} needs the teacher's rationales of train, {self._missing_teacher()}")
        if self.label_source == "gold" and (asking := [name for name, task in self.tasks.items() if task.needs_label]):
            unlabelled = sum(example.label is None for example in rows.examples)
            if unlabelled == len(rows):
                raise UserError(f"tasks: {asking[0]} needs the labels of train, {self.missing_labels()}")
            if unlabelled:
                _warn(f"{self.name} train: {unlabelled} of {len(rows)} rows have no label to train on")
        if not used.examples:
            raise UserError(f"train: no row is left to train on ({self.counts['train']})")
        if self._keep is not None and all(example.rationale is None for example in used.examples):
            raise UserError(f"rationale_filter: {self.rationale_filter} leaves no rationale ({self.counts['train']})")

    def _missing_teacher(self) -> str:
        return self.missing_teacher() if self.rationales is None else f"of which there is none in {self.rationales}"

    def missing_teacher(self) -> str:
        """What is missing where train has no teacher outputs, for messages."""
        return f"of which there is none in {self.folder / 'llm'}/{self.splits['train']}_CoT_*.json"

    def missing_labels(self) -> str:
        """What is missing where train has no labels, for messages."""
        return f"of which there is none in {self.split_file('train') or self.name}"

    # ---------------------------------------------------------------- arguments and notices

    def _find_filter(self, rationale_filter: str | RationaleFilter) -> RationaleFilter | None:
        if rationale_filter == "none":
            return None
        if rationale_filter == "label_agrees":
            return lambda example: label_agrees(example, self.teacher_agrees)
        if isinstance(rationale_filter, str):
            # whatever holds more than names and points is meant as conditions, and told what they are
            path = re.fullmatch(r"[\w.]+", rationale_filter) and not is_condition(rationale_filter)
            find = find_filter if path else self._condition
            return find(rationale_filter)
        if not callable(rationale_filter):
            raise UserError(
                "rationale_filter must be none, label_agrees or a function (package.module.function),"
                f" got {rationale_filter!r}"
            )
        return rationale_filter

    def _condition(self, text: str) -> RationaleFilter:
        test = condition(text)
        if self.rationales is None:
            raise UserError(
                f"rationale_filter: {text!r} is a condition on columns, which need rationales; allowed without them are"
                " none, label_agrees or a function's import path (package.module.function)"
            )
        return lambda example: bool(example.columns) and test(example.columns)

    @staticmethod
    def _check_tokenizer(
        tokenizer: str | Path | PreTrainedTokenizerBase | None,
    ) -> str | PreTrainedTokenizerBase | None:
        if tokenizer is None or isinstance(tokenizer, str | PreTrainedTokenizerBase):
            return tokenizer
        if isinstance(tokenizer, Path):
            return str(tokenizer)
        raise UserError(f"tokenizer must be a hub name, a folder or a tokenizer object, got {tokenizer!r}")

    def _tokenizer_name(self) -> str | None:
        if self._tokenizer is None or isinstance(self._tokenizer, str):
            return self._tokenizer
        return str(self._tokenizer.name_or_path) or None

    def _report(self, split: Split) -> None:
        counts = self.counts[split]
        parts = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items() if count)
        _info(f"{self.name} {split}: {parts}")
        cut = {name: counts[name] for name in CUTS if counts[name]}
        if cut:
            limits = f"max_source_length {self.max_source_length}, max_target_length {self.max_target_length}"
            found = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in cut.items())
            _warn(f"{self.name} {split}: {found} ({limits})")

    def _report_absent(self) -> None:
        for split in self.splits:
            path = self.split_file(split)
            if path is not None and not path.exists() and split not in self._notices:
                self._notices.add(split)
                _warn(self.absence(split))

    def _report_repeated(self, splits: Sequence[Split]) -> None:
        """Check before training, not after it."""
        for split in splits:
            if f"repeated {split}" in self._notices:
                continue
            self._notices.add(f"repeated {split}")
            try:
                repeated = self.repeated_rows(split)
            except UserError as error:
                # what needs the split will say so; the rest can run without it
                _warn(f"{self.name}: whether {split} repeats inputs of train is not known ({error})")
                continue
            if repeated:
                total = len(self.split_rows(split) or ())
                _warn(f"{self.name} {split}: {repeated} of {total} rows have an input that is also in train")


def _alone(example: Row) -> Row:
    """A row without what a teacher said of it."""
    return replace(example, outputs=())
