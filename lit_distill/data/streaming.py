"""Training rows read from shards as training goes, for data that no disk holds.

Hugging Face's streaming datasets lose the rows in their shuffle buffer when they resume, and infer columns' types, so
the shards are read here. Rows are shuffled in blocks, which are read again on resuming: a state is a few numbers, and
exact.
"""

import glob
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lit_distill.batch import TaskBatch
from lit_distill.data.sources import Placed
from lit_distill.data.tokenize import TokenRow, draw_targets
from lit_distill.errors import UserError
from lit_distill.reading import json_object
from lit_distill.remote import AnyPath, as_path, format_of, read_lines
from lit_distill.shipped import shipped
from lit_distill.tasks import Task

EMPTY = 100  # passes without a row to train on until a stream gives up
SUFFIXES = (".jsonl", ".json", ".parquet")

State = Mapping[str, Any]
"""Where a stream is: its ``pass``; the ``shard`` (of its own) and ``row`` at which its block starts; how many of the
block's rows are ``taken``; and the ``counts`` of this pass.
"""

START: State = {"pass": 0, "shard": 0, "row": 0, "taken": 0, "counts": {}}


def find_shards(patterns: Sequence[str], data_dir: AnyPath) -> list[AnyPath]:
    """The files of paths, URLs and patterns, relative to the working directory, else to ``data_dir``, in order.

    Raises a ``UserError`` if one gives no file, a file is there twice, or none of JSON lines and Parquet.
    """
    shards: list[AnyPath] = []
    for pattern in patterns:
        places = [pattern] if "://" in pattern else [shipped(pattern), str(data_dir / pattern)]
        found = next((found for place in places if (found := _matching(place))), None)
        if found is None:
            raise UserError(f"train: there is no file {' or '.join(places)}")
        shards += found
    names = [str(shard) for shard in shards]
    if len(set(names)) < len(names):
        raise UserError(f"train: {next(name for name in names if names.count(name) > 1)} is there twice")
    if other := [shard for shard in shards if format_of(shard) not in SUFFIXES]:
        raise UserError(f"train: {other[0]} is none of {', '.join(SUFFIXES)}, which streaming reads")
    return shards


def _matching(place: str) -> Sequence[AnyPath]:
    path = as_path(place)
    if isinstance(path, Path):
        # a name may hold brackets
        names = [path] if path.exists() else sorted(glob.glob(str(path), recursive=True))
        return [Path(name).absolute() for name in names]
    if glob.has_magic(place):
        return path.matching()
    return [path] if path.exists() else []


def shard_rows(path: AnyPath, start: int = 0) -> Iterator[tuple[int, bytes | dict[str, Any]]]:
    """Number and content of each row from a number on: a line of JSON that is not parsed yet, or a Parquet row.

    Raises a ``UserError`` if the shard is gone or damaged.
    """
    try:
        if format_of(path) != ".parquet":
            for number, line in islice(enumerate(read_lines(path)), start, None):
                if not line.isspace():
                    yield number, line
            return
        with path.open("rb") as opened, pq.ParquetFile(opened) as file:
            number = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if number + rows > start:
                    batches = file.iter_batches(1024, row_groups=[group])
                    found = chain.from_iterable(batch.to_pylist() for batch in batches)
                    yield from islice(enumerate(found, start=number), max(start - number, 0), None)
                number += rows
    except FileNotFoundError as error:
        raise UserError(f"train: the shard {path} is not there any more") from error
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"train: the shard {path} cannot be read ({error})") from error


def parse_row(path: AnyPath, number: int, content: bytes | dict[str, Any]) -> Placed:
    """A row of `shard_rows`, parsed. Raises a ``UserError`` if it is no JSON object."""
    if isinstance(content, dict):
        return f"{path}, row {number}", content
    place = f"{path}:{number + 1}"
    return place, json_object(content.removeprefix(b"\xef\xbb\xbf") if number == 0 else content, place)


class Reading(NamedTuple):
    """How rows become batches."""

    select: Callable[[list[Placed]], tuple[Sequence[Any], dict[str, int]]]  # rows to train on, and counts
    encode: Callable[[Sequence[Any]], tuple[dict[str, list[Any]], dict[str, int]]]  # columns of tokens, and counts
    collate: Callable[[Sequence[TokenRow]], TaskBatch]
    sampled: Sequence[Task]  # tasks that draw some of a row's targets


class _Item(NamedTuple):
    stream: int  # of this rank
    batch: TaskBatch
    state: State  # after the batch
    ended: list[tuple[int, dict[str, int]]]  # passes that ended since the last batch, and their counts


class ShardStream(IterableDataset[_Item | str]):
    """Batches of the rows of shards, pass after pass without an end.

    In each pass the order of the shards is a function of ``seed`` and the pass, and they are dealt in turn to the
    streams of all ranks: one for each loader process, or one. With fewer shards than streams, several streams read the
    same shard, each its own of the rows. A stream shuffles ``buffer`` rows at a time.

    An error is an item, its message: raised in a loader process it would arrive with a traceback.
    """

    def __init__(
        self,
        shards: Sequence[AnyPath],
        reading: Reading,
        *,
        batch_size: int,
        buffer: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        streams: int = 1,
    ) -> None:
        self.shards, self.reading, self.batch_size = shards, reading, batch_size
        self.buffer, self.seed, self.rank, self.world = buffer, seed, rank, world
        self.states: list[State] = [START] * streams
        self.next = 0  # the stream of the next batch

    def __iter__(self) -> Iterator[_Item | str]:
        worker = get_worker_info()
        stream = (self.next + (0 if worker is None else worker.id)) % len(self.states)
        try:
            yield from self._items(stream, self.states[stream])
        except UserError as error:
            yield str(error)

    def _own(self, number: int, stream: int) -> list[tuple[int, int, int]]:
        """The shards of a stream in a pass, with the remainder and divisor of its row numbers."""
        streams = self.world * len(self.states)
        shared = -(-streams // len(self.shards))
        order = np.random.RandomState([self.seed, number]).permutation(len(self.shards)).tolist()
        parts = [(shard, part, shared) for shard in order for part in range(shared)]
        return parts[self.rank * len(self.states) + stream :: streams]

    def _block(self, own: list[tuple[int, int, int]], at: int, row: int) -> tuple[list[tuple[int, int, Any]], int, int]:
        """The next ``buffer`` rows of a pass (shard, number, content), and the shard and row after them."""
        block: list[tuple[int, int, Any]] = []
        for place, (shard, part, shared) in enumerate(own[at:], start=at):
            for number, content in shard_rows(self.shards[shard], row if place == at else 0):
                if len(block) == self.buffer:
                    return block, place, number
                if number % shared == part:
                    block.append((shard, number, content))
        return block, len(own), 0

    def _items(self, stream: int, state: State) -> Iterator[_Item]:
        """The batches of a stream from a state on."""
        number, at, row, taken = (int(state[name]) for name in ("pass", "shard", "row", "taken"))
        counts: Counter[str] = Counter(state["counts"])
        ended: list[tuple[int, dict[str, int]]] = []
        chosen: list[Any] = []
        # parts of shards that were read since the last row to train on, and in how many passes
        barren, empty = set[tuple[int, int, int]](), 0

        def item() -> _Item:
            first = f"{self.seed}-{number}-{self.rank}-{stream}-{counts['used'] - len(chosen)}"
            columns, cut = self.reading.encode(chosen)
            counts.update(cut)
            place = {"pass": number, "shard": at, "row": row, "taken": taken, "counts": dict(counts)}
            found = _Item(stream, self._collated(columns, len(chosen), first), place, [*ended])
            chosen.clear()
            ended.clear()
            return found

        while True:
            own = self._own(number, stream)
            while at < len(own):
                block, after, after_row = self._block(own, at, row)
                order = np.random.RandomState([self.seed, number, own[at][0], row % 2**32]).permutation(len(block))
                while taken < len(block):
                    some = [block[i] for i in order[taken : taken + self.batch_size - len(chosen)]]
                    taken += len(some)
                    rows, found = self.reading.select([parse_row(self.shards[i], *item) for i, *item in some])
                    counts.update(found)
                    chosen += rows
                    if len(chosen) == self.batch_size:
                        yield item()
                at, row, taken = after, after_row, 0
            if chosen:
                yield item()
            # a stream may get none in one pass, and some in the next
            barren, empty = (set(), 0) if counts["used"] else (barren | set(own), empty + 1)
            nowhere = len(barren) == len(self.shards) * own[0][2]
            if nowhere or empty == EMPTY:
                why = f"train: no row to train on in {self.shards[0]} and {len(self.shards) - 1} more shards"
                share = f" for one of {self.world * len(self.states)} loader processes; take fewer, or fewer devices"
                raise UserError(why if nowhere else why + share)
            ended.append((number, dict(counts)))
            number, at, counts = number + 1, 0, Counter()

    def _collated(self, columns: Mapping[str, list[Any]], count: int, key: str) -> TaskBatch:
        rows: list[TokenRow] = [{name: of[i] for name, of in columns.items()} | {"index": i} for i in range(count)]
        draw = random.Random(key)  # noqa: S311 - no secret
        for row in rows:
            for task in self.reading.sampled:
                draw_targets(row, task, draw)
        return self.reading.collate(rows)


class StreamLoader:
    """Loads the batches of a `ShardStream`, and keeps where each of its streams is.

    Args:
        stream: the batches; its streams are as many as the loader's processes, or one.
        num_workers: loader processes; 0 loads in this one.
        on_pass: called with a pass's number and its counts when this rank has seen all of its rows.
        counts: filled with the counts of all rows that this rank has seen so far.
    """

    def __init__(
        self,
        stream: ShardStream,
        num_workers: int,
        on_pass: Callable[[int, dict[str, int]], None],
        counts: dict[str, int],
    ) -> None:
        self.stream, self.num_workers, self.on_pass, self.counts = stream, num_workers, on_pass, counts
        self._states = list(stream.states)
        self._next = 0
        # pass that not all streams have ended -> those that have, and their counts
        self._passes: dict[int, tuple[int, dict[str, int]]] = {}
        self._ended: dict[str, int] = {}  # counts of the passes that all have
        names = json.dumps([str(shard) for shard in stream.shards])
        # what a position depends on
        self._setup = [hashlib.sha256(names.encode()).hexdigest()[:16], stream.buffer, stream.seed, stream.batch_size]
        self._setup += [stream.world, len(stream.states)]

    def __iter__(self) -> Iterator[TaskBatch]:
        # lazily: a state may be loaded after the iterator is made
        self.stream.states, self.stream.next = list(self._states), self._next
        loader = DataLoader(
            self.stream,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            # the functions that select rows cannot be pickled
            multiprocessing_context="fork" if self.num_workers else None,
        )
        for item in loader:
            if isinstance(item, str):
                raise UserError(item)
            stream, batch, state, ended = item
            for number, counts in ended:
                self._end_pass(number, counts)
            self._states[stream], self._next = state, (stream + 1) % len(self._states)
            self.counts.clear()
            open_passes = (counts for _, counts in self._passes.values())
            known = chain([self._ended], open_passes, (state["counts"] for state in self._states))
            self.counts.update(sum(map(Counter, known), Counter()))
            yield batch

    def _end_pass(self, number: int, counts: Mapping[str, int]) -> None:
        streams, before = self._passes.pop(number, (0, {}))
        whole = dict(Counter(before) + Counter(counts))
        if streams + 1 < len(self._states):
            self._passes[number] = streams + 1, whole
        else:
            self._ended = dict(Counter(self._ended) + Counter(whole))
            self.on_pass(number, whole)

    def state_dict(self) -> dict[str, Any]:
        """Where each stream is, and what it depends on."""
        passes = {str(number): list(found) for number, found in self._passes.items()}
        place = {"setup": self._setup, "streams": list(self._states), "next": self._next}
        return {**place, "passes": passes, "ended": self._ended}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there at the next pass. Raises a ``UserError`` if it is of other shards or settings."""
        # a checkpoint of several ranks has those of all
        state = state["ranks"][self.stream.rank] if self.stream.rank < len(state.get("ranks", ())) else state
        if state.get("setup") != self._setup:
            raise UserError(
                "ckpt_path: training rows cannot go on where they were: the shards, shuffle_buffer, seed, batch_size,"
                " num_workers and number of devices have to be those of the checkpoint"
            )
        self._states, self._next = list(state["streams"]), state["next"]
        self._ended = dict(state["ended"])
        self._passes = {int(number): (count, dict(counts)) for number, (count, counts) in state["passes"].items()}


def _unchanged(item: Any) -> Any:
    return item
