"""The file of a teacher's samples: written as they come, never lost, read back as what has not to be asked again."""

import json
import os
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from filelock import FileLock, Timeout

from lit_distill.annotation.card import MARK, write_card
from lit_distill.annotation.record import COLUMNS, KINDS, Agree, Annotation, from_row, same_answer, to_line, vote
from lit_distill.errors import UserError
from lit_distill.files import atomic_write
from lit_distill.reading import parse_json

FILE = "rationales.jsonl"
"""One object a sample."""

CARD = "README.md"
"""What the hub shows of a folder."""

PARQUET = "rationales.parquet"
"""The same, written at the end of a job."""

METADATA = "metadata.json"
"""Which teachers were asked what, and how."""

_SYNC_SECONDS = 5.0
_CHUNK = 10_000
"""Rows that are in memory at a time where all are gone through."""

_UNMATCHED = 1 << 62
"""Places from here on are of rows that a job does not know."""

_TYPES = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
}
_SCHEMA = pa.schema([(name, _TYPES[kind]) for name, kind in KINDS.items()])


class AnnotationStore:
    r"""A folder of samples, open for one process.

    A line is one write to a file that is only appended to: a process that is killed at any instant loses what it had
    not written, and leaves at most one torn line at the end, which the next one takes off. When a job ends, the
    file is replaced as a whole by the same samples in the data's order, with the columns that need all samples of a
    row. Memory holds 16 bytes of hash and a few Python objects a sample, no texts.

    Args:
        folder: made if it is absent.
        see: is shown each sample, those in the file first, then each that is appended.
        ask_failed: questions without an answer are to be asked again.
        read: the columns that follow from a sample's text, read again: a gold label may have changed since.

    Raises:
        UserError: another process has it, or its file is damaged elsewhere than at its end.
    """

    def __init__(
        self,
        folder: str | Path,
        see: Callable[[Annotation], None] | None = None,
        *,
        ask_failed: bool = False,
        read: Callable[[Annotation], Annotation] = lambda annotation: annotation,
    ) -> None:
        self.folder = Path(folder)
        self._see, self._ask_failed = see, ask_failed
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"out: another process writes {str(folder)!r}; let it end, or take another folder"
            ) from error
        except OSError as error:
            raise UserError(f"out: {str(folder)!r} cannot be written ({error.strerror})") from error
        self.path = self.folder / FILE
        self.torn = 0
        """Bytes of a torn line that was taken off."""
        self.settled: set[bytes] = set()
        """Keys of the questions that are not asked again."""
        self.agreeing: set[bytes] = set()
        """Keys of the answers that agree with the gold label."""
        self.tokens, self.cost = 0, 0.0
        """What the answers used: tokens, and US dollars as far as prices are known."""
        self._file = -1
        try:
            self._repair()
            for annotation in self:
                self._note(read(annotation))
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            self._lock.release()
            raise UserError(f"out: {self.path} cannot be written ({error.strerror})") from error
        except BaseException:
            self._lock.release()
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> "AnnotationStore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Annotation]:
        """The samples in the file's order."""
        if self.path.exists():
            for annotation, _ in read_rows(self.path):
                yield annotation

    def append(self, annotation: Annotation) -> None:
        """Keep a sample; it is in the file when this returns.

        Raises:
            UserError: it cannot be written.
        """
        line = to_line(annotation)
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written != len(line):
                # a full disk; others that are answered yet must not be glued to it
                os.ftruncate(self._file, size)
                raise OSError(None, f"{written} of {len(line)} bytes were written")
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            raise UserError(f"out: {self.path} cannot be written ({error.strerror})") from error
        self._note(annotation)

    def finish(
        self, read: Callable[[Annotation], Annotation], place: Callable[[Annotation], int | None], agree: Agree
    ) -> None:
        """Rewrite the file: in order, each question once, with the columns that need all samples of a row.

        Args:
            read: the columns that follow from a sample's text, read again.
            place: where a sample's row stands among the rows; ``None`` for samples of no row, or of another input
                than their row has now, which come after them, as they came.
            agree: which labels are one answer.

        Raises:
            UserError: it cannot be written; the file is as it was.
        """
        unmatched: dict[tuple[str | None, str, str | None], int] = {}
        groups: dict[tuple[Any, ...], int] = {}
        # four numbers a sample: all that is held of it
        entries = array("q")
        with self._replacing(FILE) as out, self.path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    found = _from_line(line, self.path, number)
                    at = place(found)
                    if at is None:
                        name = (found.split, found.id, found.input)
                        at = unmatched.setdefault(name, _UNMATCHED + len(unmatched))
                    group = groups.setdefault((found.teacher, found.prompt, found.settings), len(groups))
                    entries.extend((at, group, found.sample, offset))
                offset += len(line)
            table = np.array(entries, dtype=np.int64).reshape(-1, 4)
            ordered = table[np.lexsort(table.T[::-1])]
            # as Python's numbers a few at a time, which take ten times the room
            chunks = (ordered[start : start + _CHUNK].tolist() for start in range(0, len(ordered), _CHUNK))
            for _, of_row in groupby(chain.from_iterable(chunks), key=itemgetter(0, 1)):
                rows = _last_of_each(_parse(_line_at(file, start), str(self.path)) for *_, start in of_row)
                said = [read(_sample(row, str(self.path))) for row in rows]
                answers = [one for one in said if one.text is not None or one.label is not None]
                votes = (len(answers), *vote([one.label for one in answers], agree))
                for one, row in zip(said, rows, strict=True):
                    others = {name: row[name] for name in row if name not in COLUMNS}
                    out.write(to_line(_with_votes(one, votes, agree), others))
        os.close(self._file)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND, 0o644)

    def read_metadata(self) -> dict[str, Any]:
        """What is known of the jobs that wrote here."""
        return read_metadata(self.folder)

    def write_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Replace it.

        Raises:
            UserError: it cannot be written.
        """
        with self._replacing(METADATA) as out:
            out.write((json.dumps(metadata, indent=2, ensure_ascii=False) + "\n").encode())

    def close(self) -> None:
        """Let another process have it."""
        try:
            if self._file >= 0:
                file, self._file = self._file, -1
                try:
                    os.fsync(file)
                finally:
                    os.close(file)
        finally:
            self._lock.release()

    @contextmanager
    def _replacing(self, name: str) -> Iterator[IO[bytes]]:
        """A file that takes another's place when the block ends well."""
        try:
            with atomic_write(self.folder / name, "wb") as out:
                yield out
        except OSError as error:
            raise UserError(f"out: {self.folder / name} cannot be written ({error.strerror or error})") from error

    def _note(self, annotation: Annotation) -> None:
        self.tokens += (annotation.input_tokens or 0) + (annotation.output_tokens or 0)
        self.cost += annotation.cost or 0.0
        if annotation.key is not None:
            key = bytes.fromhex(annotation.key)
            if annotation.text is not None or not self._ask_failed:
                self.settled.add(key)
            if annotation.agrees:
                self.agreeing.add(key)
        if self._see is not None:
            self._see(annotation)

    def _repair(self) -> None:
        """Take a torn line off the end; a whole line that lacks only its end is given one."""
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            start = size
            tail = b""
            while start > 0 and b"\n" not in tail:
                step = min(start, 1 << 16)
                start -= step
                file.seek(start)
                tail = file.read(step) + tail
            torn = tail[tail.rfind(b"\n") + 1 :]
            if not torn:
                return
            try:
                _parse(torn, "")
            except UserError:
                self.torn = len(torn)
                file.truncate(size - len(torn))
            else:
                file.seek(0, os.SEEK_END)
                file.write(b"\n")

    def write_parquet(self) -> None:
        """Write all samples as Parquet too, with the metadata in the file's own; it has the known columns alone.

        Raises:
            UserError: it cannot be written.
        """
        told = json.dumps(self.read_metadata(), ensure_ascii=False)
        schema = _SCHEMA.with_metadata({"lit_distill": told})
        with self._replacing(PARQUET) as out, pq.ParquetWriter(out, schema) as writer:
            rows = iter(self)
            while chunk := list(islice(rows, _CHUNK)):
                writer.write_table(pa.Table.from_pylist([_whole(asdict(row)) for row in chunk], schema=_SCHEMA))

    def write_card(self) -> bool:
        """Write what the hub shows of the folder, unless somebody's own words stand there; whether it was written.

        Raises:
            UserError: it cannot be written.
        """
        path = self.folder / CARD
        if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
            return False
        with self._replacing(CARD) as out:
            text = write_card(self.read_metadata().get("jobs", []), self, PARQUET, self.folder.name)
            out.write(text.encode("utf-8", "backslashreplace"))
        return True


def _whole(row: dict[str, Any]) -> dict[str, Any]:
    """Halves of characters, which Parquet cannot hold, as JSON writes them."""
    return {
        name: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
        for name, value in row.items()
    }


def read_metadata(folder: Path) -> dict[str, Any]:
    """What is known of the jobs that wrote to a folder; empty where nothing is.

    Raises:
        UserError: the file is damaged.
    """
    try:
        found: Any = parse_json((folder / METADATA).read_bytes(), surrogates=True)
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / METADATA} cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{folder / METADATA} cannot be read (not an object but {type(found).__name__})")
    jobs = found.get("jobs", [])
    if not isinstance(jobs, list) or not all(isinstance(job, dict) for job in jobs):
        raise UserError(f"{folder / METADATA} cannot be read (jobs must be a list of objects)")
    return found


def read_rows(
    path: Path, on_torn: Callable[[str], None] = lambda where: None
) -> Iterator[tuple[Annotation, dict[str, Any]]]:
    """The samples of a JSON lines or Parquet file, each with its row as it stands, which may hold more.

    Args:
        path: the file.
        on_torn: is told where a last line is torn, as one is while a job writes or when it was killed.

    Raises:
        UserError: a row is not a sample.
    """
    if path.suffix == ".parquet":
        try:
            with pq.ParquetFile(path) as file:
                rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
                for number, row in enumerate(rows):
                    row = _with_new_names(row)
                    yield _sample(row, f"{path}, row {number}"), row
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a Parquet file ({error})") from error
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = _parse(line, f"{path}:{number}")
            except UserError:
                if line.endswith(b"\n"):
                    raise
                return on_torn(f"{path}:{number}")
            yield _sample(row, f"{path}:{number}"), row


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = parse_json(line, surrogates=True)
    except ValueError as error:
        raise UserError(f"{where}: not a sample: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a sample: not an object but {type(row).__name__}")
    return _with_new_names(row)


def _with_new_names(row: dict[str, Any]) -> dict[str, Any]:
    """A row with earlier versions' column names replaced."""
    if isinstance(row.get("leaks"), bool) or ("leaks" in row and row["leaks"] is None):
        row.setdefault("contains_label", row.pop("leaks"))
    return row


def _sample(row: Mapping[str, Any], where: str) -> Annotation:
    try:
        return from_row(row)
    except KeyError as error:
        raise UserError(f"{where}: not a sample: no key {error}") from error
    except TypeError as error:
        raise UserError(f"{where}: not a sample: {error}") from error


def _from_line(line: bytes, path: Path, number: int) -> Annotation:
    return _sample(_parse(line, f"{path}:{number}"), f"{path}:{number}")


def _line_at(file: BinaryIO, start: int) -> bytes:
    file.seek(start)
    return file.readline()


def _last_of_each(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a question that failed and was asked again, the last answer counts."""
    kept: dict[str | int, dict[str, Any]] = {}
    for position, row in enumerate(rows):
        kept[row.get("key") or position] = row
    return list(kept.values())


def _with_votes(found: Annotation, votes: tuple[int, str | None, float], agree: Agree) -> Annotation:
    count, winner, share = votes
    if not count:
        return found
    inside = None if found.label is None or winner is None else same_answer(found.label, winner, agree)
    return replace(found, votes=count, majority_label=winner, vote_share=share, in_majority=inside)
