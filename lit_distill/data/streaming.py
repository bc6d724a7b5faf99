"""Training rows read from shards as training goes, for data that no disk holds.

Hugging Face's streaming datasets lose the rows in their shuffle buffer when they resume, and infer columns' types, so
the shards are read here. Rows are shuffled in blocks, which are read again on resuming: a state is a few numbers, and
exact.
"""

import codecs
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

LONGEST = 2**24  # bytes of a line: ten times as much memory and more is needed to tokenise it
EMPTY = 100  # passes without a row to train on until a stream gives up
SUFFIXES = (".jsonl", ".json", ".parquet")

State = Mapping[str, Any]
"""Where a stream is: its ``pass``; the ``shard`` (of its own) and ``row`` at which its block starts; how many of the
block's rows are ``taken``; and the ``counts`` of this pass.
"""

START: State = {"pass": 0, "shard": 0, "row": 0, "taken": 0, "counts": {}}


def find_shards(
    patterns: Sequence[str], data_dir: AnyPath, suffixes: Sequence[str] = SUFFIXES, *, name: str = "train"
) -> list[AnyPath]:
    """The files of paths, URLs and patterns, relative to the working directory, else to ``data_dir``, in order.

    Raises a ``UserError`` that begins with ``name`` if one gives no file, a file is there twice, or of none of these
    formats.
    """
    shards: list[AnyPath] = []
    for pattern in patterns:
        places = [pattern] if "://" in pattern else [shipped(pattern), str(data_dir / pattern)]
        found = next((found for place in places if (found := _matching(place))), None)
        if found is None:
            raise UserError(f"{name}: there is no file {' or '.join(places)}")
        shards += found
    # links of other names are other files
    names = [str(shard.parent.resolve() / shard.name if isinstance(shard, Path) else shard) for shard in shards]
    if len(set(names)) < len(names):
        raise UserError(f"{name}: {next(one for one in names if names.count(one) > 1)} is there twice")
    if other := [shard for shard in shards if format_of(shard) not in suffixes]:
        raise UserError(f"{name}: {other[0]} is none of {', '.join(suffixes)}, which streaming reads")
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


Content = bytes | dict[str, Any]
"""A row: a line that is not parsed yet, or a Parquet row."""


def shard_rows(path: AnyPath, start: int = 0, *, name: str = "train") -> Iterator[tuple[int, Content]]:
    """Number and content of each row from a number on.

    Raises a ``UserError`` if the shard is gone or damaged, or has a line above ``LONGEST``.
    """
    try:
        if format_of(path) != ".parquet":
            for number, line in islice(enumerate(read_lines(path, LONGEST)), start, None):
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
        raise UserError(f"{name}: the shard {path} is not there any more") from error
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{name}: the shard {path} cannot be read ({error})") from error


def placed(path: AnyPath, number: int, content: Content) -> tuple[str, Content]:
    """A row of `shard_rows` with its place, for messages; a line without a byte order mark."""
    if isinstance(content, dict):
        return f"{path}, row {number}", content
    return f"{path}:{number + 1}", content.removeprefix(codecs.BOM_UTF8) if number == 0 else content


def parse_row(path: AnyPath, number: int, content: Content) -> Placed:
    """A row of `shard_rows`, parsed. Raises a ``UserError`` if it is no JSON object."""
    place, content = placed(path, number, content)
    return place, content if isinstance(content, dict) else json_object(content, place)


Part = tuple[int, int, int]
"""A shard's number, and the remainder and divisor of the numbers of its rows that are meant."""


def part_rows(
    shards: Sequence[AnyPath], parts: Sequence[Part], at: int, row: int
) -> Iterator[tuple[int, int, int, Content]]:
    """The rows of parts of shards, from a row of the part at a place on: place, shard, number and content."""
    for place, (shard, part, shared) in enumerate(parts[at:], start=at):
        for number, content in shard_rows(shards[shard], row if place == at else 0):
            if number % shared == part:
                yield place, shard, number, content


class Reading(NamedTuple):
    """How rows become batches."""

    select: Callable[[list[Placed]], tuple[Sequence[Any], dict[str, int]]]  # rows to train on, and counts
    encode: Callable[[Sequence[Any]], tuple[dict[str, list[Any]], dict[str, int]]]  # columns of tokens, and counts
    collate: Callable[[Sequence[TokenRow]], TaskBatch]
    sampled: Sequence[Task]  # tasks that draw some of a row's targets


class Item(NamedTuple):
    """A batch, and where its stream is then."""

    stream: int  # of this rank
    batch: TaskBatch
    state: State  # after the batch
    ended: list[tuple[int, dict[str, int]]]  # passes that ended since the last batch, and their counts


class Stream(IterableDataset[Item | str]):
    """Batches that are made of the rows of shards, pass after pass without an end.

    In each pass the order of the shards is a function of ``seed`` and the pass, and they are dealt in turn to the
    streams of all ranks: one for each loader process, or one. With fewer shards than streams, several streams read the
    same shard, each its own of the rows. A stream shuffles ``buffer`` rows at a time.

    An error is an item, its message: raised in a loader process it would arrive with a traceback.

    Attributes:
        setup: what a position depends on, by the names of settings.
    """

    def __init__(
        self,
        shards: Sequence[AnyPath],
        start: State,
        *,
        batch_size: int,
        buffer: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        streams: int = 1,
    ) -> None:
        self.shards, self.batch_size = shards, batch_size
        self.buffer, self.seed, self.rank, self.world = buffer, seed, rank, world
        self.states: list[State] = [start] * streams
        self.next = 0  # the stream of the next batch
        names = json.dumps([str(shard) for shard in shards])
        self.setup: dict[str, Any] = {
            "the shards": hashlib.sha256(names.encode()).hexdigest()[:16],
            "shuffle_buffer": buffer,
            "seed": seed,
            "batch_size": batch_size,
            "number of devices": world,
            "num_workers": streams,
        }

    def __iter__(self) -> Iterator[Item | str]:
        worker = get_worker_info()
        stream = (self.next + (0 if worker is None else worker.id)) % len(self.states)
        try:
            yield from self._items(stream, self.states[stream])
        except UserError as error:
            yield str(error)

    def _items(self, stream: int, state: State) -> Iterator[Item]:
        """The batches of a stream from a state on."""
        raise NotImplementedError

    def _own(self, shards: Sequence[AnyPath], number: int, stream: int) -> list[Part]:
        """The parts of shards that a stream reads in a pass."""
        streams = self.world * len(self.states)
        shared = -(-streams // len(shards))
        order = np.random.RandomState([self.seed, number]).permutation(len(shards)).tolist()
        parts = [(shard, part, shared) for shard in order for part in range(shared)]
        return parts[self.rank * len(self.states) + stream :: streams]


class ShardStream(Stream):
    """Batches of the rows of shards that are trained on.

    Args:
        shards: the files.
        reading: how rows become batches.
        **kwargs: as in `Stream`.
    """

    def __init__(self, shards: Sequence[AnyPath], reading: Reading, **kwargs: Any) -> None:
        super().__init__(shards, START, **kwargs)
        self.reading = reading

    def _items(self, stream: int, state: State) -> Iterator[Item]:
        number, at, row, taken = (int(state[name]) for name in ("pass", "shard", "row", "taken"))
        counts: Counter[str] = Counter(state["counts"])
        ended: list[tuple[int, dict[str, int]]] = []
        chosen: list[Any] = []
        # parts of shards that were read since the last row to train on, and in how many passes
        barren, empty = set[tuple[int, int, int]](), 0

        def item() -> Item:
            first = f"{self.seed}-{number}-{self.rank}-{stream}-{counts['used'] - len(chosen)}"
            columns, cut = self.reading.encode(chosen)
            counts.update(cut)
            place = {"pass": number, "shard": at, "row": row, "taken": taken, "counts": dict(counts)}
            found = Item(stream, self._collated(columns, len(chosen), first), place, [*ended])
            chosen.clear()
            ended.clear()
            return found

        while True:
            own = self._own(self.shards, number, stream)
            rows_left = part_rows(self.shards, own, at, row)
            while at < len(own):
                block = list(islice(rows_left, self.buffer))
                last = block[-1] if len(block) == self.buffer else None
                order = np.random.RandomState([self.seed, number, own[at][0], row % 2**32]).permutation(len(block))
                while taken < len(block):
                    some = [block[i] for i in order[taken : taken + self.batch_size - len(chosen)]]
                    taken += len(some)
                    rows, found = self.reading.select([parse_row(self.shards[i], *item) for _, i, *item in some])
                    counts.update(found)
                    chosen += rows
                    if len(chosen) == self.batch_size:
                        yield item()
                at, row, taken = (len(own), 0, 0) if last is None else (last[0], last[2] + 1, 0)
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
            number, at, row, counts = number + 1, 0, 0, Counter()

    def _collated(self, columns: Mapping[str, list[Any]], count: int, key: str) -> TaskBatch:
        rows: list[TokenRow] = [{name: of[i] for name, of in columns.items()} | {"index": i} for i in range(count)]
        draw = random.Random(key)  # noqa: S311 - no secret
        for row in rows:
            for task in self.reading.sampled:
                draw_targets(row, task, draw)
        return self.reading.collate(rows)


def check_endless(trainer: Any) -> None:
    """Raise a ``UserError`` if a trainer needs to know the end of training rows that are streamed."""
    if trainer.max_steps == -1:
        raise UserError("max_steps: must be given with streaming, whose training rows have no end")
    check_unlimited(trainer)


def check_unlimited(trainer: Any) -> None:
    """Raise a ``UserError`` if a trainer limits the batches of an epoch, which a stream does not have."""
    limit = trainer.limit_train_batches
    if (limit != 1.0 or isinstance(limit, int)) and not trainer.fast_dev_run:
        raise UserError("limit_train_batches: not with streaming, which knows no epochs; give max_steps")


class StreamLoader:
    """Loads the batches of a `Stream`, and keeps where each of its streams is.

    Args:
        stream: the batches; its streams are as many as the loader's processes, or one.
        num_workers: loader processes; 0 loads in this one.
        on_pass: called with a pass's number and its counts when this rank has seen all of its rows.
        counts: filled with the counts of all rows that this rank has seen so far.
    """

    def __init__(
        self,
        stream: Stream,
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
        place = {"setup": self.stream.setup, "streams": list(self._states), "next": self._next}
        return {**place, "passes": passes, "ended": self._ended}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there at the next pass. Raises a ``UserError`` if it is of other shards or settings."""
        # a checkpoint of several ranks has those of all
        state = state["ranks"][self.stream.rank] if self.stream.rank < len(state.get("ranks", ())) else state
        now, before = self.stream.setup, state.get("setup")
        if not isinstance(before, Mapping):
            raise UserError("ckpt_path: training rows cannot go on where they were: an earlier version read them")
        if differing := [name for name in {**now, **before} if now.get(name) != before.get(name)]:
            raise UserError(
                f"ckpt_path: training rows cannot go on where they were: {' and '.join(differing)} must be as in the"
                " checkpoint"
            )
        self._states, self._next = list(state["streams"]), state["next"]
        self._ended = dict(state["ended"])
        self._passes = {int(number): (count, dict(counts)) for number, (count, counts) in state["passes"].items()}


def _unchanged(item: Any) -> Any:
    return item
