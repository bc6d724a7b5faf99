"""The base of all datasets: from rows and teacher outputs to batches and answers."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lit_distill import checks
from lit_distill.data.batches import EpochSampler, ResumableLoader
from lit_distill.data.cache import code_of, key_of, versions
from lit_distill.data.controls import permute_rationales, shuffle_rationales
from lit_distill.data.dataset import Dataset
from lit_distill.data.download import fetch_release
from lit_distill.data.needs import check_split
from lit_distill.data.outputs import RELEASED, annotations_file
from lit_distill.data.rows import counted, own_rows, with_outputs
from lit_distill.data.selection import (
    Flag,
    Selector,
    Tally,
    Target,
    UsedRows,
    filter_name,
    having,
    make_filter,
    targets,
    teacher_counts,
)
from lit_distill.data.store import Rows, of_each
from lit_distill.data.student import Tokenizer
from lit_distill.data.tokenize import TokenRows, TokenSettings, cut_counts, tokenize_once
from lit_distill.data.used import count_repeated, held_out, select_once
from lit_distill.data.weights import read_weights, weigh_rows
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import AnswerKey, Split
from lit_distill.remote import RemotePath, as_path
from lit_distill.tasks import Row, RowFilter, Select, Task, rationale_task, tasks_from

T = TypeVar("T")

LISTED = 100_000  # rows of a split whose answers are lists, which are read faster than the cache


class RationaleDataModule(Dataset):
    """Rows with teacher rationales, as batches for a student and answers for its evaluation.

    A dataset is a subclass that defines its files (`name`, `splits`), how a row and a teacher's text are parsed
    (`read_row`, `parse_teacher`), and how answers are compared (`metric`, `label_set`). Data in another layout
    overrides `load_rows`.

    Args:
        data_dir: folder of the datasets' folders (``cqa/``, ``svamp/``, ``esnli/``, ``anli1/``), possibly at an fsspec
            URL (``s3://``, ``gs://``, ``hf://``, ...).
        tokenizer: the student's: a hub name, a folder, a tokenizer, or `Tokens`.
        batch_size: training examples per batch and device.
        eval_batch_size: evaluation examples per batch and device; ``batch_size`` by default.
        tasks: task name -> settings, or a list of ``label``, ``rationale``, ``rationale_label``, ``label_rationale``.
        label_source: train on the data's labels (``gold``) or on the teacher's; val and test are always gold.
        pseudo_labels: train on the rows without a gold label, too, and on those that ``train_fraction`` leaves out,
            with the labels and rationales of this teacher alone that pass ``rationale_filter`` (Lee 2013; self-training
            if it is an earlier student); with ``label_source: teacher`` on all rows.
        row_weights: JSON lines with ``id`` and ``weight`` of each training row, in proportion to which rows occur.
        rationale_filter: which teacher outputs to train on: ``none`` keeps all, ``label_agrees`` those with the gold
            label, ``package.module.function`` those for which the function is true, and conditions on columns, such as
            ``agrees and not contains_label``, those that meet them.
        train_fraction: fraction of the training rows, or above 1 a number, drawn by ``seed`` after val is split off.
        seed: of the order of training rows, the ``train_fraction``, and sampled targets.
        max_source_length: maximum tokens of an input; longer ones are truncated and counted.
        max_target_length: the same of a target; the rationale is cut before the label.
        num_workers: data loader processes per device; 0 loads in the main process.
        allow_extra_outputs: accept more teacher outputs than rows, where a file is the beginning of the released one.
        predict_split: the split for ``predict``.
        batching: ``shuffled`` training batches, or ``by_length`` for rows of similar length (length bucketing), with
            less padding; batches are in random order either way.
        rationales: teacher outputs in place of the dataset's own, joined by ``id``: a folder of ``annotate``, its JSON
            lines or Parquet file, or a list of them, in which ``released`` means the dataset's own.
        select: in place of the ``select`` of each task that uses teacher outputs: ``first``, ``all``, ``sample`` or
            ``vote``.
        rationale_pairing: train on each row's ``own`` rationale, or, as a control, by ``seed`` on ``shuffled`` ones
            (the same rationales paired with other rows) or ``permuted`` ones (the words of each in random order).
    """

    def __init__(
        self,
        data_dir: str | Path = "data",
        tokenizer: Tokenizer | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        tasks: Mapping[str, Any] | Sequence[Any] = ("label",),
        label_source: Literal["gold", "teacher"] = "gold",
        rationale_filter: str | RowFilter = "none",
        train_fraction: float = 1.0,
        seed: int = 0,
        max_source_length: int = 1024,
        max_target_length: int = 256,
        num_workers: int = 0,
        allow_extra_outputs: bool = False,
        predict_split: Split = "test",
        batching: Literal["shuffled", "by_length"] = "shuffled",
        rationales: list[str | Path] | str | Path | None = None,
        rationale_pairing: Literal["own", "shuffled", "permuted"] = "own",
        select: Select | None = None,
        pseudo_labels: str | None = None,
        row_weights: str | Path | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        earlier = {*vars(self)}
        super().__init__(tokenizer, batch_size, eval_batch_size, seed, num_workers)
        self.data_dir = as_path(data_dir)
        self.tasks = tasks_from(tasks)
        if select is not None:
            checks.check_choice("select", select, get_args(Select))
            own = {name: replace(task, select=select) for name, task in self.tasks.items() if task.uses_output}
            self.tasks |= own
        self.label_source = checks.check_choice("label_source", label_source, ("gold", "teacher"))
        self.row_weights = None if row_weights is None else Path(row_weights)
        self.pseudo_labels = None if pseudo_labels is None else checks.check_text("pseudo_labels", pseudo_labels)
        given_paths = RELEASED if rationales is None else rationales
        listed = given_paths if isinstance(given_paths, list | tuple) else [given_paths]
        if not listed or not all(isinstance(path, str | Path) for path in listed):
            raise UserError(f"rationales must be a path or a list of paths, got {rationales!r}")
        if remote := [path for path in listed if isinstance(as_path(path), RemotePath)]:
            raise UserError(f"rationales: {remote[0]} is at a URL, and has to be a local file or folder")
        self.rationales = [Path(str(as_path(path))) for path in listed]
        pairings = ("own", "shuffled", "permuted")
        self.rationale_pairing = checks.check_choice("rationale_pairing", rationale_pairing, pairings)
        self.keep = make_filter(rationale_filter, self.teacher_agrees)
        self.rationale_filter = filter_name(rationale_filter)
        self.train_fraction = checks.check_part("train_fraction", train_fraction)
        self.max_source_length = checks.check_int("max_source_length", max_source_length, 1)
        self.max_target_length = checks.check_int("max_target_length", max_target_length, 1)
        self.allow_extra_outputs = checks.check_bool("allow_extra_outputs", allow_extra_outputs)
        self.predict_split: Split = checks.check_choice("predict_split", predict_split, get_args(Split))
        self.batching = checks.check_choice("batching", batching, ("shuffled", "by_length"))
        self.counts: dict[str, dict[str, int]] = {}
        self._released: dict[Split, Sequence[Row] | None] = {}
        self._held_out: dict[str, Rows] | None = None
        self._used: dict[Split, UsedRows] = {}
        self._keys: dict[Split, AnswerKey] = {}
        self._tokenized: dict[Split, TokenRows] = {}
        # plain types only: a checkpoint has to load with `weights_only=True`
        plain = {
            "data_dir": str(data_dir),
            "tokenizer": self.tokenizer_name,
            "tasks": {name: task.plain() for name, task in self.tasks.items()},
            "rationale_filter": self.rationale_filter,
            "rationales": [str(path) for path in listed] if len(listed) > 1 else rationales and str(listed[0]),
            "row_weights": row_weights and str(row_weights),
        }
        self.save_hyperparameters(given | plain)
        self._base_names: set[str] = {"_base_names", *vars(self)} - earlier

    def released(self, split: Split) -> Sequence[Row] | None:
        """A complete released split with teacher outputs, read once; ``None`` if absent."""
        if split not in self._released:
            rows = own_rows(self, split, self._code())
            joined = None if rows is None else with_outputs(self, rows, split, self._code(), self.warn)
            self._released[split] = joined
        return self._released[split]

    def rows_to_ask(self, split: Split) -> Sequence[Row] | None:
        """The rows to annotate: a complete released split, without teacher outputs."""
        rows = own_rows(self, split, self._code())
        return None if rows is None else of_each(rows, lambda row: replace(row, outputs=()))

    def _code(self) -> list[Any] | None:
        """What decides how rows are read, besides files: code, and attributes that subclasses add."""
        own = {name: value for name, value in vars(self).items() if name not in self._base_names}
        try:
            settings = json.dumps(own, sort_keys=True)
        except (TypeError, ValueError):
            return None
        code = code_of(type(self))
        return None if code is None else [type(self).__qualname__, code, settings]

    def split_rows(self, split: Split) -> Sequence[Row] | None:
        """The rows of a split, train without val; ``None`` if absent."""
        if "val" in self.splits or split not in ("train", "val"):
            return self.released(split)
        if self._held_out is None and (released := self.released("train")) is not None:
            self._held_out = held_out(self.name, counted(self, released))
        return None if self._held_out is None else self._held_out[split]

    def tally(self, split: Split, *, released: bool = False) -> Tally:
        """How many rows of a split, or with ``released`` of its file, have which flags; empty if it is absent."""
        rows = self.released(split) if released else self.split_rows(split)
        return {} if rows is None else counted(self, rows).tally

    def repeated_rows(self, split: Split) -> int:
        """Number of rows of a split whose input also occurs in train (leakage)."""
        train, rows = (counted(self, self.split_rows(name) or ()) for name in ("train", split))
        return count_repeated(f"{self.name}-{split}-repeated", train, rows)

    def _written_tasks(self) -> list[Any]:
        """What of the tasks decides their targets, and the lengths of rows."""
        names = ("name", "prefix", "input", "target", "teacher", "kind", "select", "draws")
        return [[getattr(task, name) for name in names] for task in self.tasks.values()]

    @property
    def _selector(self) -> Selector:
        """What becomes of a row in training."""
        tasks, teacher_labels = tuple(self.tasks.values()), self.label_source == "teacher"
        return Selector(tasks, teacher_labels, self.keep, self.teacher_agrees, self.pseudo_labels)

    def _select(self, rows: Rows) -> UsedRows:
        """The rows of train that are used."""
        select, pseudo = self._selector, self.pseudo_labels
        own_filter = self.keep is not None and self.keep.__module__ != make_filter.__module__
        # what does not depend on the seed is shared by the seeds
        seed = self.seed if self.train_fraction != 1 or self.rationale_pairing != "own" else 0
        drawn = [self.train_fraction, self.rationale_pairing, seed]
        settings = [self._written_tasks(), select.teacher_labels, pseudo or "", self.rationale_filter, *drawn]
        key = key_of("used", rows.key, self._code(), code_of(self.keep) if own_filter else [], *settings)
        used = select_once(f"{self.name}-train-used", rows, key, select, self.train_fraction, self.seed)
        pairing = self.rationale_pairing if any(task.uses_output for task in self.tasks.values()) else "own"
        if pairing == "permuted":
            used = permute_rationales(used, self.seed)
        elif pairing == "shuffled":
            used = shuffle_rationales(used, self.seed, teacher_labels=select.teacher_labels)
        if self.row_weights is not None:
            # last, so that a row that occurs twice has no rationale of its own
            used = weigh_rows(used, read_weights(self.row_weights), self.seed)
            version = versions([self.row_weights])
            used = replace(used, key=key_of("weighed", used.key, version, self.seed))
        return used

    def used_rows(self, split: Split) -> UsedRows:
        """The rows of a split that this run uses. Raises a ``UserError`` if the split is absent."""
        if split not in self._used:
            released = self.split_rows(split)
            if released is None:
                raise UserError(self.absence(split))
            rows = counted(self, released)
            if split == "train":
                used = self._select(rows)
            else:
                with_rationale = np.flatnonzero(rows.flags() & Flag.RATIONALE)
                gold = of_each(rows, lambda row: row.label)
                used = UsedRows(rows, gold, {"used": len(rows)}, with_rationale, rows.key)
            self.counts[split] = teacher_counts(rows.tally) | used.counts
            self._used[split] = used
        return self._used[split]

    def targets(self, split: Split, task: Task, row: Row) -> list[Target]:
        """A task's targets for a used row."""
        train = split == "train"
        labels = train and self.label_source == "teacher"
        return targets(task, row, self.teacher_agrees, teacher_labels=labels, evaluation=not train)

    def answer_key(self, split: Split) -> AnswerKey:
        """The answer key of a split, always with gold labels."""
        if split not in self._keys:
            used = self.used_rows(split)
            rows, task = used.rows, rationale_task(self.tasks)

            def rationale(row: Row) -> str | None:
                # of the outputs that the student's rationales are trained on
                texts = (one.text for one in row.outputs if task is None or task.accepts(one))
                return next((text for text in texts if text is not None), None)

            def column(value: Callable[[Row], T]) -> Sequence[T]:
                found = of_each(rows, value)
                return list(found) if len(rows) <= LISTED else found

            has_choices = self.label_set is not None or having(self.tally(split), Flag.CHOICES) > 0
            self._keys[split] = AnswerKey(
                ids=column(lambda row: row.id),
                inputs=column(lambda row: row.input),
                labels=list(used.gold) if len(rows) <= LISTED else used.gold,
                rationales=column(rationale),
                metric=self.metric,
                label_set=self.label_set,
                choices=column(lambda row: row.choices or self.label_set or ()) if has_choices else None,
                majority_label=self.majority_label,
                groups=column(lambda row: row.group),
                max_source_length=self.max_source_length,
            )
        return self._keys[split]

    @property
    def majority_label(self) -> str | None:
        """The most frequent training label; ``None`` without any, or if the training rows have not been read."""
        return self._used["train"].majority_label if "train" in self._used else None

    def describe(self) -> dict[str, Any]:
        """Settings and row counts of the used splits, in plain values."""
        names = ("tasks", "label_source", "rationale_filter", "rationales", "rationale_pairing", "train_fraction")
        settings = {name: self.hparams[name] for name in (*names, "seed")}
        splits = {split: dict(counts) for split, counts in self.counts.items()}
        return {"dataset": self.name, "metric": self.metric, **settings, "splits": splits}

    def prepare_data(self) -> None:
        """Download the released data if no split file exists, and check that files of ``rationales`` do."""
        for path in self.rationales:
            if str(path) != RELEASED:
                annotations_file(path)
        files = {self.split_file(split): count for split, count in self.released_rows.items()}
        expected = {file.name: count for file, count in files.items() if file is not None}
        if expected and not any(file is not None and file.is_file() for file in files):
            if isinstance(self.data_dir, RemotePath):
                raise UserError(f"data_dir: none of {', '.join(expected)} is in {self.data_dir / self.name}")
            fetch_release(self.release_url, self.data_dir, self.name, expected)

    def setup(self, stage: str) -> None:
        """Read and tokenise the splits of a stage, once. Raises a ``UserError`` if one is absent."""
        stage = str(getattr(stage, "value", stage))
        stages: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for split in stages.get(stage, (self.predict_split,)):
            if self.split_rows(split) is None:
                raise UserError(f"{self.absence(split)}, and {stage} needs it")
            if stage != "predict":
                check_split(self, split, stage)
            self.tokenized(split)
        for split in self.splits:
            if (file := self.split_file(split)) is not None and not file.exists():
                self.warn(self.absence(split))
            elif stage == "fit" and split in ("val", "test") and (repeated := self.repeated_rows(split)):
                total = len(self.split_rows(split) or ())
                self.warn(f"{split}: {repeated} of {total} rows have an input that is also in train")

    @property
    def token_settings(self) -> TokenSettings:
        """Settings that affect tokenisation, besides the tokenizer."""
        return TokenSettings(self.tasks, self.max_source_length, self.max_target_length)

    def train_rows(self) -> int:
        """Those that are left of train."""
        return self.counts["train"]["used"]

    def token_rows(self, split: Split) -> TokenRows:
        """The tokenised rows of a split, for other parts of a run."""
        return self.tokenized(split)

    def tokens_per_row(self) -> float:
        """The mean over the training rows."""
        return float(self.token_rows("train").lengths(evaluation=False).mean())

    def tokenized(self, split: Split) -> TokenRows:
        """The tokenised rows of a split, from the cache if possible."""
        if split in self._tokenized:
            return self._tokenized[split]
        used, settings, choose = self.used_rows(split), self.token_settings, partial(self.targets, split)
        key = key_of("tokens", used.key, split == "train", self._code(), self._written_tasks())
        found = tokenize_once(f"{self.name}-{split}-tokens", used.rows, key, self.tokens, settings, choose)
        rows = self._tokenized[split] = TokenRows(found, settings, self.seed)
        cut = cut_counts(rows.lengths_of, settings)
        self.counts[split] |= cut
        told = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in self.counts[split].items() if count)
        rank_zero_info(f"{self.name} {split}: {told}")
        if any(cut.values()):
            told = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in cut.items() if count)
            limits = f"max_source_length {self.max_source_length}, max_target_length {self.max_target_length}"
            self.warn(f"{split}: {told} ({limits})")
        return rows

    def target_limits(self) -> dict[str, int]:
        """Task -> maximum generated tokens: 1.5 times the longest target in train, plus 4, up to ``max_target_length``.

        Tasks without targets are absent.
        """
        limits = {}
        for task in self.tasks:
            lengths = self._tokenized["train"].lengths_of[task].targets
            if longest := min(max(lengths, default=0), self.max_target_length):
                limits[task] = min(longest + longest // 2 + 4, self.max_target_length)
        return limits

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", "train")

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val", "val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test", "test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.predict_split, "predict")

    def _loader(self, split: Split, stage: Split) -> DataLoader[Any]:
        """Shuffled, resumable batches for training, else all rows of the split."""
        if split not in self._tokenized:
            raise RuntimeError(f"setup has not built the {split} split")
        rows, evaluation = self._tokenized[split], stage != "train"
        batch_size = self.eval_batch_size if evaluation else self.batch_size
        rank, world = self.rank_and_world
        # the longest first pads least, and memory that does not suffice shows at once; but a trainer that reads a part
        # of the split alone is to read its first rows
        limit = getattr(self.trainer, f"limit_{stage}_batches", 1.0)
        is_whole = isinstance(limit, float) and limit == 1  # the integer is one batch
        by_length = is_whole if evaluation else self.batching == "by_length"
        lengths = rows.lengths(evaluation=evaluation) if by_length else None
        sampler = EpochSampler(rows, world, rank, not evaluation, self.seed, lengths=lengths, batch_size=batch_size)
        return (DataLoader if evaluation else ResumableLoader)(
            rows,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=self._collator(evaluation=evaluation),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
