"""What is prepared of a split once: folders in the cache, rows mapped from them, and work on many rows."""

import ast
import gc
import inspect
import json
import multiprocessing
import os
import shutil
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import blake2b, file_digest, sha256
from importlib.util import find_spec, resolve_name
from itertools import chain, groupby, islice
from operator import eq
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from filelock import FileLock

from lit_distill.errors import UserError
from lit_distill.files import atomic_folder, cache_folder
from lit_distill.progress import ticker
from lit_distill.remote import AnyPath, version_of
from lit_distill.tasks import Row

FORMAT = 4  # version of the files
CHUNK = 2000  # rows that are read, tokenised and written together
META = "meta.json"
PACKED = pa.binary()  # of `of_json`
TICK = 1.0  # seconds in which two versions of a file may have the same time

_PACKAGE = Path(__file__).parents[1]
_MAX_WORKERS = 8
_PARALLEL = 8  # chunks that are worth processes of their own

Array = np.ndarray[Any, Any]
T = TypeVar("T")
U = TypeVar("U")
V = TypeVar("V", bound=Sized)


@dataclass(frozen=True)
class Prepared:
    """A folder of the cache."""

    folder: Path
    key: str  # of its content
    meta: dict[str, Any]

    def array(self, name: str) -> Array:
        """A mapped array."""
        found: Array = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        # indexing the subclass is slow
        return found.view(np.ndarray)


def key_of(*parts: Any) -> str | None:
    """A name for all that decides a content; ``None`` if a part is ``None``, which is unknown."""
    return None if None in parts else sha256(json.dumps([FORMAT, package_hash(), *parts]).encode()).hexdigest()[:32]


@cache
def package_hash() -> str:
    """A hash of this package's code, which decides how rows are read."""
    found = sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def code_of(code: Any) -> list[str] | None:
    """Hashes of the files that a function, or a class and its bases, are defined in, and of those that these import.

    Without this package's, and installed ones that are imported. ``None`` if there is no file, as in a notebook, or if
    a function has variables of one that it is within.
    """
    if not inspect.isclass(code) and not inspect.isfunction(code):
        return None
    found = []
    for one in code.__mro__ if inspect.isclass(code) else (code,):
        top = one.__module__.partition(".")[0]
        if top in ("builtins", "lightning", "typing", "abc", "torch", _PACKAGE.name):
            continue
        try:
            path = inspect.getsourcefile(one)
        except TypeError:
            path = None
        functions = filter(inspect.isfunction, vars(one).values() if inspect.isclass(one) else [one])
        # `super()` makes a variable of the class
        if (
            path is None
            or not Path(path).is_file()
            or any({*f.__code__.co_freevars} - {"__class__"} for f in functions)
        ):
            return None
        files = {one.__module__: path} | _imported(one.__module__)
        found.append(" ".join([one.__qualname__, *(_code_content(*file) for file in files.items())]))
    return found


_code_hashes: dict[str, tuple[Any, str]] = {}  # path -> how its module was loaded, and a hash


def _code_content(name: str, path: str) -> str:
    """A hash of a module's file; of one that is loaded as it was at first, as that is what runs."""
    if (module := sys.modules.get(name)) is None:
        return _content(Path(path))
    # made anew by a reload
    spec = module.__spec__
    if path not in _code_hashes or _code_hashes[path][0] is not spec:
        _code_hashes[path] = spec, _content(Path(path))
    return _code_hashes[path][1]


@cache
def _imported(name: str) -> dict[str, str]:
    """The files of a module and of those that it imports, and they in turn, without installed ones."""
    installed, found, todo = Path(sysconfig.get_path("stdlib")), dict[str, str](), [name]
    while todo:
        name = todo.pop()
        path, package = _file_of(name)
        known = path.is_relative_to(_PACKAGE) or path.is_relative_to(installed)
        known |= not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
        if name in found or known or path.suffix != ".py" or not path.is_file():
            continue
        found[name] = str(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = resolve_name("." * node.level + (node.module or ""), package)
                todo += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return dict(sorted(found.items()))


def _file_of(name: str) -> tuple[Path, str]:
    """The file, if any, and the package of a module, which a function may import only when it is called."""
    if (module := sys.modules.get(name)) is not None:
        return Path(getattr(module, "__file__", None) or ""), module.__package__ or ""
    parent = name.rpartition(".")[0]
    try:
        # of a package that is not loaded either, it would be
        spec = find_spec(name) if not parent or parent in sys.modules else None
    except (ImportError, ValueError):
        spec = None
    return (Path(), "") if spec is None else (Path(spec.origin or ""), spec.parent or "")


def prepare(name: str, key: str | None, write: Callable[[Path], dict[str, Any]]) -> Prepared:
    """The folder of a key in the cache, filled by ``write``, which returns its ``meta``, unless it is there.

    Processes that want the same one wait for the first. Without a key it is filled in any case, and named by its
    content. Raises a ``UserError`` if it cannot be kept.
    """
    root = cache_folder()
    folder = root / f"{name}-{key or 'new'}"
    if (found := cached(name, key)) is not None:
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        # a second process waits and reads the folder of the first
        with FileLock(f"{folder}.lock"):
            if (found := cached(name, key)) is None:
                with atomic_folder(folder) as tmp_path:
                    meta = write(tmp_path)
                    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
                    (tmp_path / META).write_text(json.dumps({"sizes": sizes, **meta}))
                if key is None:
                    folder, key = _by_content(folder, name)
                found = cached(name, key)
    except OSError as error:
        raise UserError(f"prepared rows cannot be kept in {str(root)!r} ({error}); set LIT_DISTILL_CACHE") from error
    if found is None:
        raise UserError(f"prepared rows were lost: {folder} is damaged as soon as it is written")
    return found


def _by_content(folder: Path, name: str) -> tuple[Path, str]:
    """Rename a folder by its content."""
    digest = sha256()
    for path in sorted(folder.iterdir()):
        digest.update(_content(path).encode())
    key = digest.hexdigest()[:32]
    target = folder.with_name(f"{name}-{key}")
    if cached(name, key) is None:
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    else:
        shutil.rmtree(folder)
    return target, key


def cached(name: str, key: str | None) -> Prepared | None:
    """A folder of the cache; ``None`` if it is absent, damaged, or of files that changed just after it was made."""
    folder = cache_folder() / f"{name}-{key}"
    try:
        meta = json.loads((folder / META).read_bytes())
        if any(_content(Path(path)) != digest for path, digest in meta.get("young", {}).items()):
            return None
        for name, size in meta["sizes"].items():
            if (folder / name).stat().st_size != size:
                return None
            if name.endswith(".arrow"):
                Stored(folder / name)
            elif name.endswith(".npy"):
                np.load(folder / name, mmap_mode="r")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, pa.ArrowException):
        return None
    return None if key is None else Prepared(folder, key, meta)


def versions(paths: Iterable[AnyPath]) -> list[list[str]] | None:
    """Names, sizes and times of files; ``None`` if one is absent, or its file system tells none."""
    found = []
    for path in paths:
        try:
            version = version_of(path)
        except OSError:
            return None
        if version is None:
            return None
        found.append([str(path.absolute()), *version])
    return found


def young(paths: Iterable[AnyPath]) -> dict[str, str]:
    """Content of the files that are so new that they may change and keep their time."""
    local = (path.absolute() for path in paths if isinstance(path, Path))
    return {str(path): _content(path) for path in local if time.time() - path.stat().st_mtime < TICK}


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


class Stored:
    """The record batches of an Arrow file, of ``CHUNK`` rows each but the last, mapped into memory."""

    def __init__(self, source: Path | pa.Buffer) -> None:
        self._source = source
        self._file = pa.ipc.open_file(pa.memory_map(str(source)) if isinstance(source, Path) else source)
        # an open batch takes kilobytes
        self.batch = lru_cache(maxsize=256)(self._file.get_batch)
        count = self._file.num_record_batches
        self.rows = count and (count - 1) * CHUNK + self.batch(count - 1).num_rows

    def __reduce__(self) -> Any:
        return type(self), (self._source,)

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


def in_order(work: Callable[[T], U], tasks: Iterable[T]) -> Iterator[U]:
    """What ``work`` gives for each task, in order; if there are many, forked processes share them.

    At most two tasks a process are under way, so that memory is bounded. Raises what ``work`` raises.
    """
    tasks = iter(tasks)
    first = list(islice(tasks, _PARALLEL))
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, _MAX_WORKERS)
    if len(first) < _PARALLEL or workers < 2 or multiprocessing.current_process().daemon:
        yield from map(work, chain(first, tasks))
        return
    # each process uses one core
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # forked, as neither a data module nor its tokenizer need be pickled then
    context = multiprocessing.get_context("fork")
    pending: deque[Future[U]] = deque()
    with ProcessPoolExecutor(workers, context, _begin, (work,)) as pool:
        try:
            for task in chain(first, tasks):
                pending.append(pool.submit(_run, task))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError("a process that prepared rows was killed: is there enough memory?") from error
        finally:
            pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any]


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    # looking for garbage among what was imported would copy it, and takes a third of the time
    gc.freeze()


def _run(task: Any) -> Any:
    return _work(task)
