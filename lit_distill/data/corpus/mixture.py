"""Documents of several sources, as a stream of packed sequences."""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, tee
from typing import Any

import numpy as np

from lit_distill.batch import TaskBatch
from lit_distill.data.corpus.corruption import Array
from lit_distill.data.corpus.documents import Sorting
from lit_distill.data.streaming import EMPTY, Content, Item, State, Stream, part_rows
from lit_distill.data.tokenize import TokenRow
from lit_distill.errors import UserError
from lit_distill.remote import AnyPath
from lit_distill.students import Tokens

TOGETHER = 1_000  # documents that are tokenised at once

Place = tuple[int, str, int]
"""A document's source, file and row."""


@dataclass(frozen=True)
class Source:
    """Files of a corpus."""

    name: str
    shards: Sequence[AnyPath]
    share: float  # of all documents that are read


@dataclass(frozen=True)
class Packing:
    """How documents become training examples."""

    tokens: Tokens
    length: int  # tokens of a sequence
    pair: Callable[[Array, Sequence[int]], tuple[list[int], list[int]]]
    """Source and target of a sequence, with the words of the seed of its random numbers."""
    collate: Callable[[Sequence[TokenRow]], TaskBatch]

    def sequences(self, texts: Sequence[str]) -> Iterator[tuple[Array, slice]]:
        """The documents one after another, each with end-of-sequence, cut into sequences ``(length,)``.

        With each are the documents that it has tokens of. The last is shorter, and left out if it is a lone
        end-of-sequence.
        """
        rest, ends, done = np.empty(0, np.int32), [0], 0  # ends of documents, and of the sequences so far

        def placed(sequence: Array, start: int) -> tuple[Array, slice]:
            return sequence, slice(bisect_right(ends, start) - 1, bisect_left(ends, start + len(sequence)))

        for start in range(0, len(texts), TOGETHER):
            ids = self.tokens.targets(texts[start : start + TOGETHER], 2**62).ids
            flat = np.concatenate([rest, *(np.array(own, np.int32) for own in ids)])
            ends += (ends[-1] + np.cumsum([len(own) for own in ids])).tolist()
            whole = len(flat) // self.length * self.length
            for at in range(0, whole, self.length):
                yield placed(flat[at : at + self.length], done + at)
            rest, done = flat[whole:], done + whole
        if len(rest) > 1:
            yield placed(rest, done)

    def row(self, sequence: Array, index: int, words: Sequence[int]) -> TokenRow:
        """A sequence as a row for `collate`."""
        source, target = self.pair(sequence, words)
        return {"index": index, "text.input_ids": [source], "text.labels": [target]}


class _Cursor:
    """Where a stream is in a source, whose passes have no end.

    Attributes:
        place: pass, place among the stream's parts of shards, and row.
    """

    def __init__(self, stream: "DocumentStream", number: int, source: Source, place: Sequence[int]) -> None:
        self.stream, self.number, self.source, self.place = stream, number, source, list(place)
        self._rows = self._open()

    def _open(self) -> Iterator[tuple[int, int, int, Content]]:
        passed, at, row = self.place
        shards = self.source.shards
        return part_rows(shards, self.stream._own(shards, passed, self.number), at, row)

    def take(self, count: int, *, within_pass: bool) -> Iterator[tuple[AnyPath, int, Content]]:
        """The next rows, possibly fewer if they must be of one pass. Raises a ``UserError`` if there are none."""
        empty = 0
        while count:
            found = list(islice(self._rows, count))
            yield from ((self.source.shards[shard], number, content) for _, shard, number, content in found)
            count -= len(found)
            if found:
                self.place[1:] = found[-1][0], found[-1][2] + 1
            if count:
                empty = 0 if found else empty + 1
                if empty == EMPTY:
                    raise UserError(
                        f"train: {self.source.name} has no document for one of the loader processes; take fewer, or"
                        " fewer devices"
                    )
                self.place = [self.place[0] + 1, 0, 0]
                self._rows = self._open()
                if found and within_pass:
                    return


class DocumentStream(Stream):
    """Batches of packed sequences of documents.

    Each block takes from every source its share of ``buffer`` documents, packs them in their order, and shuffles the
    sequences: what stands together, such as texts on one picture, is read together, from which a student learns to
    compare texts (Shi et al. 2024, 2310.10638). A source that ends starts its next pass: of several in the same block,
    a single one in the next, so that each document is read before any is read again. A state has the ``sources``
    (pass, place and row of each) where the ``block`` begins, how many of its sequences are ``taken``, and the
    ``counts`` of the documents of first passes: of ``documents`` those that the sequences so far have tokens of.

    Args:
        sources: what is read.
        sorting: which documents are trained on.
        packing: how they become training examples.
        setup: what a position depends on besides, as in `Stream.setup`.
        **kwargs: as in `Stream`.
    """

    def __init__(
        self, sources: Sequence[Source], sorting: Sorting, packing: Packing, setup: Mapping[str, Any], **kwargs: Any
    ) -> None:
        start = {"sources": [[0, 0, 0] for _ in sources], "block": 0, "taken": 0, "counts": {}}
        super().__init__([shard for source in sources for shard in source.shards], start, **kwargs)
        self.sources, self.sorting, self.packing = sources, sorting, packing
        self.setup |= {**setup, "weights of train": [source.share for source in sources]}

    def _items(self, stream: int, state: State) -> Iterator[Item]:
        block, taken = int(state["block"]), int(state["taken"])
        counts: Counter[str] = Counter(state["counts"])
        places = [list(place) for place in state["sources"]]
        cursors = [_Cursor(self, stream, source, place) for source, place in zip(self.sources, places, strict=True)]
        rows: list[TokenRow] = []
        own, barren = self.rank * len(self.states) + stream, 0
        while True:
            texts, places_of, uncounted, found = self._block(cursors, block)
            if not taken:
                # one that is read again on resuming is counted
                counts.update(found)
            sequences = list(self.packing.sequences(texts))
            order = np.random.RandomState([self.seed, own, block]).permutation(len(sequences)).tolist()
            for number, position in enumerate(order):
                sequence, documents = sequences[position]
                seen = uncounted & set(places_of[documents])
                uncounted -= seen
                if number < taken:
                    continue
                counts["documents"] += len(seen)
                rows.append(self.packing.row(sequence, len(rows), (self.seed, 1, own, block, number)))
                if len(rows) == self.batch_size:
                    place = {"sources": places, "block": block, "taken": number + 1, "counts": dict(counts)}
                    yield Item(stream, self.packing.collate(rows), place, [])
                    rows = []
            barren = 0 if sequences else barren + 1
            if barren == EMPTY:
                raise UserError(f"train: no text to train on in {EMPTY} blocks of documents ({dict(counts)})")
            block, taken, places = block + 1, 0, [list(cursor.place) for cursor in cursors]

    def _block(self, cursors: Sequence[_Cursor], block: int) -> tuple[list[str], list[Place], set[Place], Counter[str]]:
        """The texts to train on of a block, in the order of their sources, and what became of all others.

        Between them, where each text is from, and which of these places are read for the first time; the others are
        counted if they are.
        """
        texts: list[str] = []
        places: list[Place] = []
        first: set[Place] = set()
        counts: Counter[str] = Counter()
        for source, cursor in enumerate(cursors):
            share = cursor.source.share * self.buffer
            # so that shares are met in the long run
            count = int((block + 1) * share) - int(block * share)
            rows, same = tee(cursor.take(count, within_pass=len(cursors) == 1))
            for (path, number, _), (text, kind) in zip(same, self.sorting.sorted(rows), strict=True):
                # lazily: the cursor is at this row's pass
                is_first = cursor.place[0] == 0
                if kind == "documents":
                    texts.append(text)
                    # a small source may be in a block several times, and a later copy read first
                    places.append((source, str(path), number))
                    if is_first:
                        first.add(places[-1])
                else:
                    counts[kind] += is_first
        return texts, places, first, counts
