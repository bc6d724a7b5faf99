"""A folder of captured distributions, which trains a student with no teacher in memory.

Of each target position it holds an exact head and a sampled tail: the ``head`` most likely ids with their
probabilities, and ``draws`` ids drawn with replacement from the rest, whose mass is :math:`m`. The target is the head
plus :math:`m c_j / n` for an id that was drawn :math:`c_j` times in :math:`n`. Its expectation is the teacher's
distribution, so that what is linear in it is unbiased: cross-entropy and forward KL, value and gradient (Anshumann et
al., arXiv 2503.16870, who draw all ids). Without draws the target is the head, renormalised, which is biased.

A row is found by a hash of its source and target token ids, on which alone a teacher's distributions depend.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import blake2b, file_digest, sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from filelock import FileLock
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from lit_distill.batch import IGNORE_INDEX, TaskBatch, TaskInputs, on_host
from lit_distill.errors import UserError, first_fault
from lit_distill.files import CACHE, atomic_folder, atomic_write, cache_folder, write_text
from lit_distill.students import Student, Tokens
from lit_distill.students.files import StudentFiles

HEADER = "store.json"

LEVELS = 2**16 - 1
"""Head probabilities are stored as multiples of 1 / LEVELS, rounded at random so that their expectation is exact."""

Keys = NDArray[np.bytes_]


@dataclass(frozen=True)
class Header:
    """What a store holds."""

    __pydantic_config__ = ConfigDict(strict=True)

    teacher: str  # as it was given
    revision: str  # of the teacher's weights, see `revision`
    dtype: str  # of the teacher's weights
    tokenizer: str  # see `tokenizer_hash`
    vocabulary: int  # number of ids that distributions are over, those of the tokenizer
    temperature: float
    head: int
    draws: int
    renormalised: bool  # whether the head is the whole target: without draws
    seed: int  # of the draws
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Hash of a split's rows and targets -> dataset, split, and number of rows."""
    version: str = ""  # of this package
    format: Literal[1] = 1  # the version of this layout

    @property
    def record(self) -> np.dtype[Any]:
        """The type of a target position.

        ``ids`` are the head, the most likely first, then the draws; ``head`` are probabilities times ``LEVELS``;
        ``entropy`` is that of the distribution that targets have in expectation, in nats.
        """
        id_type = np.uint16 if self.vocabulary <= 2**16 else np.uint32
        ids, head = (self.head + self.draws,), (self.head,)
        return np.dtype([("ids", id_type, ids), ("head", np.uint16, head), ("entropy", np.float32)])


class SparseTargets(NamedTuple):
    """Distributions as a few ids and their probabilities, which add up to 1; to 0 where nothing is stored."""

    ids: Tensor  # `(positions, ids)`; an id may occur several times
    probabilities: Tensor  # `(positions, ids)`
    entropy: Tensor  # `(positions,)`


def unpack(records: NDArray[Any]) -> SparseTargets:
    """The distributions in records, see `Header.record`."""
    draws = records["ids"].shape[1] - records["head"].shape[1]
    head = records["head"].astype(np.int64)
    # the levels that the head leaves, in equal parts
    tail = ((LEVELS - head.sum(1, keepdims=True)) / max(draws, 1)).repeat(draws, 1)
    probabilities = (np.concatenate([head, tail], 1) / LEVELS).astype(np.float32)
    found = records["ids"].astype(np.int64), probabilities, np.ascontiguousarray(records["entropy"])
    return SparseTargets(*map(torch.from_numpy, found))


def is_store(folder: str | Path) -> bool:
    """Whether a path is the folder of a store."""
    return (Path(folder) / HEADER).is_file()


def read_header(folder: str | Path) -> Header:
    """A store's header. Raises a ``UserError`` that names file and key if it is absent or damaged."""
    path = Path(folder) / HEADER
    try:
        return TypeAdapter(Header).validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise UserError(f"{path}: not the header of captured distributions: {first_fault(error)}") from error


def write_header(folder: str | Path, header: Header) -> None:
    """Write a store's header atomically."""
    write_text(Path(folder) / HEADER, json.dumps(asdict(header), indent=2) + "\n")


def check_same(folder: str | Path, header: Header) -> Header:
    """The header in a folder. Raises a ``UserError`` if it is of another teacher or other settings."""
    found = read_header(folder)
    for name, value in asdict(header).items():
        if name not in ("data", "version") and getattr(found, name) != value:
            raise UserError(
                f"out: {folder} was captured with {name} {getattr(found, name)}, not {value}: give that, or another"
                " folder"
            )
    return found


def tokenizer_hash(tokens: Tokens) -> str:
    """A hash of what token ids mean: the vocabulary, and the family's format."""
    content = [tokens.family, tokens.tokenizer.eos_token_id, sorted(tokens.tokenizer.get_vocab().items())]
    return sha256(json.dumps(content).encode()).hexdigest()[:16]


def revision(name: str) -> str:
    """What identifies a model's weights: the hub's commit, or a hash of the checkpoint or of the folder's weights."""
    path = Path(StudentFiles(name).name)
    if not path.exists():
        return str(StudentFiles(name).config.get("_commit_hash"))
    weights = [file for file in path.rglob("*") if file.suffix in (".safetensors", ".bin")] if path.is_dir() else [path]
    found = sha256()
    for file in sorted(weights):
        with file.open("rb") as content:
            found.update(file_digest(content, "sha256").digest())
    return found.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------- rows


def keys_of(rows: pa.Table) -> Keys:
    """The key of each row: a 128-bit hash of its ``source`` and ``target`` token ids."""
    pairs = zip(_lists(rows["source"]), _lists(rows["target"]), strict=True)
    return np.array([_key(source, target) for source, target in pairs], dtype="S16")


def _key(source: NDArray[np.int32], target: NDArray[np.int32]) -> bytes:
    found = blake2b(len(source).to_bytes(8, "little"), digest_size=16)
    found.update(source.tobytes())
    found.update(target.tobytes())
    return found.digest()


def _lists(column: pa.ChunkedArray) -> Iterable[NDArray[np.int32]]:
    values = pc.list_flatten(column).to_numpy().astype(np.int32, copy=False)
    ends = pc.list_value_length(column).to_numpy().cumsum().tolist()
    return (values[start:end] for start, end in zip([0, *ends], ends, strict=False))


def data_hash(split: str, keys: Keys) -> str:
    """A hash of the rows of a split, in any order."""
    return sha256(split.encode() + np.unique(keys).tobytes()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------- shards


def write_shard(folder: Path, rows: pa.Table, records: NDArray[Any]) -> Path:
    """Write rows as a Parquet file, named by them; ``records`` are of all their target positions, see `Header`."""
    keys, ends = keys_of(rows), np.cumsum([0, *pc.list_value_length(rows["target"]).to_pylist()])
    columns = {
        "key": pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(keys), [None, pa.py_buffer(keys.tobytes())])
    }
    for name in records.dtype.names or ():
        values = records[name].reshape(len(records), -1)
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        columns[name] = pa.ListArray.from_arrays(pa.array(ends * values.shape[1], pa.int32()), flat)
    path = folder / f"{sha256(keys.tobytes()).hexdigest()[:16]}.parquet"
    with atomic_write(path, "wb") as file:
        pq.write_table(
            pa.table(columns),
            file,
            compression="zstd",
            write_page_checksum=True,
            # the high bytes of ids compress by themselves: a twentieth less than with dictionaries
            use_dictionary=False,
            column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in records.dtype.names or ()},
        )
    return path


def shards(folder: str | Path) -> list[Path]:
    """The files of a store's rows."""
    return sorted(Path(folder).glob("*.parquet"))


def read_shard(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A shard. Raises a ``UserError`` that names the file if it is torn or damaged."""
    try:
        return pq.read_table(path, columns=columns, memory_map=True, page_checksum_verification=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path}: torn or no captured distributions ({reason}); remove it and run the same capture again, which"
            " captures its rows alone"
        ) from error


def shard_keys(shard: pa.Table) -> Keys:
    """The keys of a shard's rows."""
    column = shard["key"].combine_chunks()
    return np.frombuffer(column.buffers()[1], dtype="S16")[column.offset : column.offset + len(column)]


def stored_keys(folder: str | Path) -> Keys:
    """The keys of all rows of a store."""
    return np.concatenate([np.empty(0, "S16"), *(shard_keys(read_shard(path, ["key"])) for path in shards(folder))])


def store_size(folder: str | Path) -> tuple[int, int, int]:
    """Rows, target positions and bytes of a store."""
    found = [(pq.read_metadata(path), path.stat().st_size) for path in shards(folder)]
    rows = sum(footer.num_rows for footer, _ in found)
    # the entropy is the last column
    groups = [footer.row_group(i) for footer, _ in found for i in range(footer.num_row_groups)]
    return rows, sum(group.column(group.num_columns - 1).num_values for group in groups), sum(size for _, size in found)


# ---------------------------------------------------------------------------------------------------------- reading


class Store:
    """The distributions in a folder.

    Parquet cannot be read row by row, so its rows are once written as arrays into the cache of tokenised rows, and
    mapped into memory from there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.header = read_header(folder)

    def __reduce__(self) -> tuple[type["Store"], tuple[Path]]:
        return Store, (self.folder,)

    def check_student(self, student: Student) -> None:
        """Raise a ``UserError`` if token ids mean something else to a student."""
        if (found := tokenizer_hash(student.tokens)) != self.header.tokenizer:
            raise UserError(
                f"{self.folder}: captured for another tokenizer ({self.header.tokenizer}) than the student's ({found});"
                " capture with this student's config"
            )

    def check_revision(self) -> None:
        """Raise a ``UserError`` if the teacher's weights have changed."""
        if (found := revision(self.header.teacher)) != self.header.revision:
            raise UserError(
                f"{self.folder}: captured from {self.header.teacher} at revision {self.header.revision}, which is now"
                f" {found}; capture again, into another folder"
            )

    def check_rows(self) -> None:
        """Raise a ``UserError`` if there are no rows, or a file of them is torn."""
        _ = self._arrays

    def check_train(self) -> None:
        """Raise a ``UserError`` if nothing was captured of train."""
        splits = {str(one["split"]) for one in self.header.data.values()}
        if "train" not in splits:
            raise UserError(
                f"{self.folder}: holds the split {', '.join(sorted(splits))}, not train: capture --splits [train]"
            )

    def check_targets(self, keys: Mapping[str, Keys]) -> None:
        """Raise a ``UserError`` if the store lacks training targets; ``keys`` are those of each task."""
        self.check_train()
        for task, own in keys.items():
            if lacking := int((self.find(own) < 0).sum()):
                raise UserError(
                    f"{self.folder}: lacks {lacking:,} of the {len(own):,} training targets of {task}: it was captured"
                    " from other data, settings or tasks, or not to the end; capture with this config, into it too"
                )

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """The first position of each row; -1 of rows that are not stored."""
        rows, _ = self._arrays
        places = np.searchsorted(rows["key"], keys).clip(max=len(rows) - 1)
        return np.where(rows["key"][places] == keys, rows["first"][places], -1)

    def known(self, inputs: TaskInputs) -> int:
        """Number of a task's target positions that are stored."""
        first, lengths = self._places(inputs)
        return int(lengths[first >= 0].sum())

    def targets(self, inputs: TaskInputs, *, whole: bool) -> SparseTargets:
        """The distributions at a task's real target positions, row by row, on the device of its labels.

        Raises a ``UserError`` if some are absent and the ``whole`` is needed.
        """
        first, lengths = self._places(inputs)
        if whole and (lacking := int((first < 0).sum())):
            raise UserError(
                f"{self.folder}: lacks {lacking} of the {len(first)} targets of a batch; it holds those of the data,"
                " none that training changes or samples"
            )
        start = np.repeat(first, lengths)
        known = start >= 0
        within = np.arange(len(start)) - np.repeat(lengths.cumsum() - lengths, lengths)
        records = self._arrays[1][np.where(known, start + within, 0)]
        ids, probabilities, entropy = unpack(records)
        held = torch.from_numpy(known)
        found = SparseTargets(ids, probabilities * held[:, None], entropy * held)
        return SparseTargets(*(each.to(inputs["labels"].device) for each in found))

    def _places(self, inputs: TaskInputs) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first stored position of each row that has a target, and its length."""
        ids, mask, labels = (on_host(inputs[name]).numpy() for name in ("input_ids", "attention_mask", "labels"))
        rows = [
            (source[real != 0].astype(np.int32), target[target != IGNORE_INDEX].astype(np.int32))
            for source, real, target in zip(ids, mask, labels, strict=True)
        ]
        rows = [(source, target) for source, target in rows if len(target)]
        lengths = np.array([len(target) for _, target in rows], dtype=np.int64)
        return self.find(np.array([_key(*row) for row in rows], dtype="S16")), lengths

    @cached_property
    def _arrays(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """The rows, sorted by key, with the first position of each; and the records of all positions."""
        files = shards(self.folder)
        if not files:
            raise UserError(f"{self.folder}: holds no distributions yet; run its capture again")
        stamps = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        name = sha256(json.dumps([str(self.folder.resolve()), stamps]).encode()).hexdigest()[:32]
        path = cache_folder() / f"distributions-{name}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # a second process waits and maps the files of the first
            with FileLock(path.with_suffix(".lock")):
                if not path.is_dir():
                    with atomic_folder(path) as made:
                        self._unpack(files, made)
            return np.load(path / "rows.npy"), np.memmap(path / "records", self.header.record, "r")
        except OSError as error:
            raise UserError(f"distributions cannot be kept in {str(path.parent)!r} ({error}); set {CACHE}") from error

    def _unpack(self, files: Sequence[Path], folder: Path) -> None:
        """Write the rows of shards as arrays into a folder."""
        rows, first = [], 0
        with (folder / "records").open("wb") as out:
            for path in files:
                shard = read_shard(path)
                lengths = pc.list_value_length(shard["entropy"]).to_numpy()
                records = np.empty(int(lengths.sum()), self.header.record)
                for name in self.header.record.names or ():
                    values = shard[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
                    records[name] = values.reshape(records[name].shape)
                out.write(records.tobytes())
                own = np.empty(len(lengths), [("key", "S16"), ("first", np.int64)])
                own["key"], own["first"] = shard_keys(shard), first + lengths.cumsum() - lengths
                rows.append(own)
                first += len(records)
        np.save(folder / "rows.npy", np.sort(np.concatenate(rows), order="key"))


class StoredPass:
    """What a store has in place of a teacher's pass: no states, and of its distributions a few ids."""

    def __init__(self, store: Store, batch: TaskBatch, *, whole: bool) -> None:
        self.batch = batch
        self._store, self._whole = store, whole

    def targets(self, task: str) -> SparseTargets:
        """The teacher's distributions at each target token of a task."""
        return self._store.targets(self.batch[task], whole=self._whole)
