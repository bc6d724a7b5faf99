"""Rows in Arrow files that are mapped into memory, and sequences that read them."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from functools import lru_cache
from hashlib import blake2b
from itertools import chain, groupby, islice
from operator import eq
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from lit_distill.progress import ticker
from lit_distill.tasks import Row

CHUNK = 2000  # rows that are read, tokenised and written together
PACKED = pa.binary()  # of `of_json`

Array = np.ndarray[Any, Any]
T = TypeVar("T")
U = TypeVar("U")
V = TypeVar("V", bound=Sized)


class Stored:
    """The record batches of an Arrow file, of ``CHUNK`` rows each but the last, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        # an open batch takes kilobytes
        self.batch = lru_cache(maxsize=256)(self._file.get_batch)
        count = self._file.num_record_batches
        self.rows = count and (count - 1) * CHUNK + self.batch(count - 1).num_rows

    def __reduce__(self) -> Any:
        return type(self), (self._path,)

    def table(self) -> pa.Table:
        """All rows."""
        return self._file.read_all()

    def row(self, position: int) -> dict[str, Any]:
        """All columns at a position."""
        batch, place = self.batch(position // CHUNK), position % CHUNK
        return {name: values[place].as_py() for name, values in zip(batch.schema.names, batch.columns, strict=True)}

    def values(self, column: str, positions: Array) -> list[Any]:
        """The values of a column at these positions."""
        found: list[Any] = []
        for number, group in groupby(positions.tolist(), key=lambda position: position // CHUNK):
            places = [position % CHUNK for position in group]
            values, first = self.batch(number).column(column), places[0]
            if places == list(range(first, first + len(places))):
                found += values.slice(first, len(places)).to_pylist()
            else:
                found += [values[place].as_py() for place in places]
        return found


class Lazy(Sequence[T]):
    """A sequence whose values are made as they are read: ``read(positions)`` gives those at some positions."""

    def __init__(self, count: int, read: Callable[[Array], list[T]]) -> None:
        self._count, self.read = count, read

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> list[T]: ...
    def __getitem__(self, at: int | slice) -> T | list[T]:
        positions = range(self._count)[at]
        if isinstance(positions, range):
            return self.read(np.arange(positions.start, positions.stop, positions.step))
        return self.read(np.array([positions]))[0]

    def __iter__(self) -> Iterator[T]:
        for positions in chunks(self._count):
            yield from self.read(positions)

    def __eq__(self, other: object) -> bool:
        """As a list's."""
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # as of a list


class Rows(Lazy[Row]):
    """Rows of the cache.

    Args:
        key: of their content, if known.
        tally: how many of them have which flags (`selection.flags_of`).
        inputs: hashes of their inputs.
        flags: of each.
    """

    def __init__(
        self,
        count: int,
        read: Callable[[Array], list[Row]],
        key: str | None,
        tally: dict[int, int],
        inputs: Callable[[], Array],
        flags: Callable[[], Array],
    ) -> None:
        super().__init__(count, read)
        self.key, self.tally, self.inputs, self.flags = key, tally, inputs, flags

    def part(self, at: Array, key: str | None, tally: dict[int, int]) -> "Rows":
        """The rows at some positions."""
        inputs, flags = lambda: self.inputs()[at], lambda: self.flags()[at]
        return Rows(len(at), lambda places: self.read(at[places]), key, tally, inputs, flags)


def of_each(rows: Sequence[T], value: Callable[[T], U]) -> Lazy[U]:
    """A value of each row, made as it is read."""
    return Lazy(len(rows), lambda at: [value(row) for row in read(rows, at)])


def chunks(count: int) -> Iterator[Array]:
    """Positions, ``CHUNK`` at a time."""
    for start in range(0, count, CHUNK):
        yield np.arange(start, min(start + CHUNK, count))


def cut(values: Iterable[T]) -> Iterator[list[T]]:
    """Values, ``CHUNK`` at a time."""
    values = iter(values)
    while some := list(islice(values, CHUNK)):
        yield some


def numbered(parts: Iterable[V]) -> Iterator[tuple[int, V]]:
    """Parts with the position of their first value."""
    start = 0
    for part in parts:
        yield start, part
        start += len(part)


# pyarrow's own conversions import pandas, a tenth of a start


def of_json(values: Iterable[Any]) -> pa.Array:
    """A column of values as JSON; what JSON has no form for becomes text. Lone surrogates stay."""
    packed = [json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass") for value in values]
    parts = [pa.py_buffer(_offsets(packed)), pa.py_buffer(b"".join(packed))]
    return pa.Array.from_buffers(PACKED, len(packed), [None, *parts])


def of_lists(values: Sequence[Sequence[Any]], of_items: Callable[[list[Any]], pa.Array]) -> pa.Array:
    """A column of lists, whose items ``of_items`` makes a column of."""
    items = of_items(list(chain.from_iterable(values)))
    kind = pa.list_(items.type)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(_offsets(values))], children=[items])


def of_ints(values: Sequence[int]) -> pa.Array:
    """A column of 32-bit integers."""
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(np.array(values, np.int32))])


def _offsets(values: Sequence[Sized]) -> Array:
    return np.cumsum([0, *map(len, values)], dtype=np.int32)


def written(
    path: Path, columns: Mapping[str, Any], parts: Iterable[tuple[list[Any], T]], title: str, total: int | None = None
) -> Iterator[T]:
    """Write an Arrow file of columns of such types, ``CHUNK`` rows a part; gives what else is known of each part."""
    schema = pa.schema(list(columns.items()))
    with ticker(title, total) as advance, pa.ipc.new_file(str(path), schema) as writer:
        for values, known in parts:
            writer.write_batch(pa.record_batch(values, schema=schema))
            advance(len(values[0]))
            yield known


def read(values: Sequence[T], positions: Array) -> list[T]:
    """The values at some positions."""
    return values.read(positions) if isinstance(values, Lazy) else [values[position] for position in positions]


def unpack(packed: bytes) -> Any:
    """A value of `of_json`."""
    return json.loads(packed.decode("utf-8", "surrogatepass"))


def hashes(texts: Iterable[str]) -> Array:
    """64-bit hashes of texts, the same in each process."""
    digests = [blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(digests), np.uint64)
