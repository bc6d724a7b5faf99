"""A corpus to read before any task: files of texts, packed to one length and corrupted as training goes."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from lit_distill import checks
from lit_distill.batch import PADDING_ROW
from lit_distill.data.batches import EpochSampler
from lit_distill.data.corpus.corruption import Array, corrupt, corrupted_lengths, noise_mask, raw_length, sentinel_ids
from lit_distill.data.corpus.documents import FORMATS, HELD_OUT, Sorting, rows_of, tested_lines
from lit_distill.data.corpus.mixture import DocumentStream, Packing, Source
from lit_distill.data.streaming import StreamLoader, check_endless, check_unlimited, find_shards
from lit_distill.data.student import StudentDataModule, Tokenizer
from lit_distill.data.tokenize import TokenRow
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Split
from lit_distill.remote import AnyPath, as_path
from lit_distill.tasks import TEXT


class CorpusDataModule(StudentDataModule):
    """Texts without labels, for ``SpanCorruptionModule``: what a student reads before it learns a task.

    A file has a document a line: plain text (``.txt``), or JSON lines of strings or of objects (``.jsonl``, ``.json``),
    each also as ``.gz``, ``.bz2``, ``.xz`` or ``.zst``; or it is Parquet. Files are streamed, and nothing of them is
    kept. Documents are joined in their order, each with end-of-sequence, and cut to one length, so that no batch
    is padded. A T5 reads each sequence with gaps, T5's span corruption (`corpus.corruption`); a decoder-only student
    predicts each of its tokens but the first.

    Args:
        train: a path, URL (``s3://``, ``hf://datasets/USER/NAME/...``) or pattern of files, or a list of them, relative
            to the working directory, else to ``data_dir``; or a mixture: names -> ``paths`` and ``weight``, in
            proportion to which documents are read. A source that ends starts again.
        val: the same without weights for validation; by default one document in 100, by a hash of its words, which no
            training reads.
        tokenizer: the student's: a hub name, a folder, a tokenizer, or `Tokens`.
        batch_size: sequences per batch and device.
        eval_batch_size: the same in validation; ``batch_size`` by default.
        max_length: tokens of a source, with end-of-sequence; 512 are made of 568, as T5's. For a decoder-only student,
            tokens of a sequence.
        noise_density: share of the tokens that are in gaps.
        mean_span_length: mean tokens of a gap.
        column: the text's column, in JSON objects and in Parquet.
        val_documents: number of documents of validation, the first ones.
        test_sets: files, as those of ``train``, whose lines no document may have; of JSON objects all texts count.
            Lines, and parts of a document's, are compared by their words; lines of fewer than five are left out.
        overlap: ``refuse`` a corpus with such a document, before training if its files are local, or ``drop`` them.
        shuffle_buffer: number of documents whose sequences a loader process shuffles at a time; fewer where a pass over
            a single source ends.
        seed: of the order of documents and of the gaps.
        num_workers: data loader processes per device; 0 loads in the main process.
        data_dir: folder of relative paths, possibly at an fsspec URL.
    """

    name = "corpus"

    def __init__(
        self,
        train: str | list[str] | dict[str, Any],
        val: str | list[str] | None = None,
        tokenizer: Tokenizer | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        max_length: int = 512,
        noise_density: float = 0.15,
        mean_span_length: float = 3.0,
        column: str = "text",
        val_documents: int = 500,
        test_sets: list[str] | None = None,
        overlap: Literal["refuse", "drop"] = "refuse",
        shuffle_buffer: int = 10_000,
        seed: int = 0,
        num_workers: int = 0,
        data_dir: str | Path = "data",
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__(tokenizer, batch_size, eval_batch_size, seed, num_workers)
        self.data_dir = as_path(data_dir)
        self.tasks = {TEXT.name: TEXT}
        self._patterns = _sources(train)
        self._val = [] if val is None else _paths("val", val)
        self._test_sets = [] if test_sets is None else _paths("test_sets", test_sets)
        self.max_length = checks.check_int("max_length", max_length, 4, 2**20)
        checks.check_range("noise_density", noise_density, above=0, at_most=0.5)
        checks.check_range("mean_span_length", mean_span_length, at_least=1)
        self._rates = float(noise_density), float(mean_span_length)
        self.column = checks.check_text("column", column)
        self.val_documents = checks.check_int("val_documents", val_documents, 1)
        self.overlap = checks.check_choice("overlap", overlap, ("refuse", "drop"))
        self.shuffle_buffer = checks.check_int("shuffle_buffer", shuffle_buffer, 1)
        # of different documents that this process has come to, by what became of them; ``documents`` were trained on
        self.counts: dict[str, int] = {}
        self._fault: str | None = None  # that `prepare_data` found
        self._val_rows: _Sequences | None = None
        # plain types only: a checkpoint has to load with `weights_only=True`
        self.save_hyperparameters(given | {"data_dir": str(data_dir), "tokenizer": self.tokenizer_name})

    @cached_property
    def sources(self) -> list[Source]:
        """What is read. Raises a ``UserError`` if a path gives no file."""
        total = sum(weight for _, weight in self._patterns.values())
        return [
            Source(name, find_shards(paths, self.data_dir, FORMATS), weight / total)
            for name, (paths, weight) in self._patterns.items()
        ]

    @cached_property
    def sorting(self) -> Sorting:
        """Which documents are trained on."""
        test_sets = find_shards(self._test_sets, self.data_dir, FORMATS, name="test_sets")
        return Sorting(self.column, not self._val, tested_lines(test_sets), self.overlap == "refuse")

    @cached_property
    def packing(self) -> Packing:
        """How documents become training examples. Raises a ``UserError`` if the tokenizer has too few sentinels."""
        tokens, (density, mean_length) = self.tokens, self._rates
        collate = self._collator(evaluation=False)
        if tokens.family == "causal":
            return Packing(tokens, self.max_length, _split, collate)
        length, eos = raw_length(self.max_length, density, mean_length), int(tokens.tokenizer.eos_token_id)
        sentinels = sentinel_ids(tokens, length, density, mean_length)

        def pair(ids: Array, words: Sequence[int]) -> tuple[list[int], list[int]]:
            random = np.random.default_rng(words)
            return corrupt(ids, noise_mask(len(ids), density, mean_length, random), sentinels, eos)

        return Packing(tokens, length, pair, collate)

    def train_rows(self) -> int:
        """The different documents that all ranks have read."""
        documents = torch.tensor(self.counts.get("documents", 0))
        if self.trainer is None:
            return int(documents)
        return int(self.trainer.strategy.reduce(documents.to(self.trainer.strategy.root_device), reduce_op="sum"))

    def tokens_per_row(self) -> float:
        """Those of a whole sequence: few are shorter."""
        length = self.packing.length
        return length if self.tokens.family == "causal" else sum(corrupted_lengths(length, *self._rates))

    def token_rows(self, split: Split) -> NoReturn:
        """Raises a ``UserError``: there are none."""
        raise UserError("objectives: a corpus keeps no tokenised rows, which captured distributions and this one need")

    def prepare_data(self) -> None:
        """Check early that files exist, and that no local one has a line of a test set."""
        try:
            self._check_files()
        except UserError as error:
            if self.rank_and_world[1] == 1:
                raise
            # for `setup`: the other ranks are not here, and would wait for this one
            self._fault = str(error)

    def _check_files(self) -> None:
        shards = [shard for source in self.sources for shard in source.shards]
        trained = {_resolved(shard) for shard in shards}
        for shard in find_shards(self._val, self.data_dir, FORMATS, name="val"):
            if _resolved(shard) in trained:
                raise UserError(f"val: {shard} is in train, too; by default documents of train are held out")
        if self.sorting.tested and self.sorting.refuses:
            local = [shard for shard in shards if isinstance(shard, Path)]
            rank_zero_info(f"Looking for {len(self.sorting.tested):,} lines of test_sets in {len(local)} files.")
            # raises at the first
            for _ in self.sorting.sorted(rows_of(local)):
                pass

    def setup(self, stage: str) -> None:
        """Read the documents of validation. Raises a ``UserError`` if there are none."""
        if self.trainer is not None and self.trainer.world_size > 1:
            self._fault = self.trainer.strategy.broadcast(self._fault)
        if self._fault is not None:
            raise UserError(self._fault)
        if self.trainer is not None and stage == "fit":
            check_unlimited(self.trainer)
        if self._val_rows is None:
            # whose errors come at once
            packing = self.packing
            for source in self.sources:
                self._check_source(source)
            texts = self._val_texts()
            self._val_rows = _Sequences(
                packing.row(sequence, number, (self.seed, 0, number))
                for number, (sequence, _) in enumerate(packing.sequences(texts))
            )
            rank_zero_info(f"{self.name} val: {len(texts)} documents, {len(self._val_rows)} sequences")

    def _check_source(self, source: Source) -> None:
        """Raise a ``UserError`` if all of a source's documents are left out."""
        seen = Counter[str]()
        for _, kind in self.sorting.sorted(rows_of(source.shards)):
            seen[kind] += 1
            if kind == "documents":
                return
        files = f"{source.name}: {source.shards[0]}, {len(source.shards)} file(s)"
        if not seen["overlapping"] + seen["held_out"]:
            raise UserError(f"train: no text in {files}")
        raise UserError(
            f"train: no text to train on in {files}: {seen['overlapping']} documents have a line of test_sets, and"
            f" {seen['held_out']} are held out for validation"
        )

    def _val_texts(self) -> list[str]:
        """The first documents that are for validation, of each source its share."""
        if self._val:
            shards = find_shards(self._val, self.data_dir, FORMATS, name="val")
            rows = Sorting(self.column, holds_out=False).sorted(rows_of(shards, "val"))
            texts = list(islice((text for text, kind in rows if kind == "documents"), self.val_documents))
            if not texts:
                raise UserError(f"val: no text in {shards[0]}{f' and {len(shards) - 1} more' * (len(shards) > 1)}")
            return texts
        texts, seen = [], 0
        for source in self.sources:
            wanted = len(texts) + max(1, round(source.share * self.val_documents))
            for text, kind in self.sorting.sorted(rows_of(source.shards)):
                seen += 1
                texts += [text] * (kind == "held_out")
                if len(texts) == wanted:
                    break
        if not texts:
            raise UserError(
                f"val: must be given for so small a corpus: of {seen} documents none is the one in {HELD_OUT}"
                " that is held out"
            )
        return texts

    def describe(self) -> dict[str, Any]:
        """As `StudentDataModule.describe`."""
        names = ["val_documents", "overlap", "seed", *self._length_names]
        sources = {source.name: {"files": len(source.shards), "share": source.share} for source in self.sources}
        settings = {name: self.hparams[name] for name in names}
        return {"dataset": self.name, "sources": sources, **settings, "documents": dict(self.counts)}

    @property
    def _length_names(self) -> list[str]:
        """The settings of a sequence's length and gaps."""
        return ["max_length", *["noise_density", "mean_span_length"] * (self.tokens.family == "seq2seq")]

    def train_dataloader(self) -> StreamLoader:
        """Batches without an end. Raises a ``UserError`` if the trainer needs one."""
        if self.trainer is not None:
            # by now a budget of tokens has set its steps
            check_endless(self.trainer)
        settings = self.stream_settings(self.shuffle_buffer)
        stream = DocumentStream(self.sources, self.sorting, self.packing, self._setup(), **settings)
        return StreamLoader(stream, self.num_workers, lambda number, counts: None, self.counts)

    def _setup(self) -> dict[str, Any]:
        """The settings that what is read depends on, which a resumed run must share."""
        tested = "\n".join(sorted(self.sorting.tested)).encode("utf-8", "surrogatepass")
        # files of val leave documents to train that are held out without them
        own = {"val": bool(self._val), "test_sets": hashlib.sha256(tested).hexdigest()[:16]}
        return {name: self.hparams[name] for name in ("column", "overlap", *self._length_names)} | own

    def val_dataloader(self) -> DataLoader[Any]:
        """The sequences of validation, with the same gaps each time."""
        if self._val_rows is None:
            raise RuntimeError("setup has not read the documents of validation")
        rank, world = self.rank_and_world
        return DataLoader(
            self._val_rows,
            batch_size=self.eval_batch_size,
            sampler=EpochSampler(self._val_rows, world, rank, shuffle=False),
            collate_fn=self._collator(evaluation=True),
        )


class _Sequences(Dataset[TokenRow]):
    """The rows of validation by position."""

    def __init__(self, rows: Any) -> None:
        self._rows: list[TokenRow] = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> TokenRow:
        if position == PADDING_ROW:
            return {**self._rows[0], "index": PADDING_ROW, f"{TEXT.name}.labels": []}
        return self._rows[position]


def _resolved(shard: AnyPath) -> str:
    return str(shard.resolve() if isinstance(shard, Path) else shard)


def _split(ids: Array, words: Sequence[int]) -> tuple[list[int], list[int]]:
    """The first token of a sequence as the prompt, and the others as the target."""
    return ids[:1].tolist(), ids[1:].tolist()


def _paths(name: str, given: Any) -> list[str]:
    listed = [given] if isinstance(given, str | Path) else given
    if not isinstance(listed, list) or not listed or not all(isinstance(path, str | Path) for path in listed):
        raise UserError(f"{name} must be a path or a list of paths, got {given!r:.200}")
    return [str(path) for path in listed]


def _sources(given: Any) -> dict[str, tuple[list[str], float]]:
    """The paths and weights of a corpus, by name."""
    if not isinstance(given, Mapping):
        return {"train": (_paths("train", given), 1.0)}
    found: dict[str, tuple[list[str], float]] = {}
    for name, settings in given.items():
        if not isinstance(settings, Mapping) or not {"paths"} <= settings.keys() <= {"paths", "weight"}:
            raise UserError(f"train: {name} must map paths and weight to values, got {settings!r:.200}")
        if (weight := settings.get("weight", 1.0)) is None:
            raise UserError(f"train: {name}: weight must be a number above 0, got none")
        checks.check_range(f"train: {name}: weight", weight, above=0, at_most=1e9)
        found[str(name)] = _paths(f"train: {name}: paths", settings["paths"]), float(weight)
    if not found:
        raise UserError("train: a mixture must name sources, got none")
    return found
