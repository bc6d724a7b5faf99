"""The file of samples: appended to durably, and read to skip answered questions."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from filelock import FileLock, Timeout

from lit_distill.annotation.card import MARK, write_card
from lit_distill.annotation.record import COLUMNS, KINDS, Agree, Annotation, from_row, same_answer, to_line, vote
from lit_distill.errors import UserError
from lit_distill.files import atomic_write
from lit_distill.reading import parse_json

FILE = "rationales.jsonl"
"""One JSON object per sample."""

CARD = "README.md"
PARQUET = "rationales.parquet"
"""The same samples, written at the end of a job."""

METADATA = "metadata.json"
"""Teachers, prompts and settings of the jobs."""

_SYNC_SECONDS = 5.0
_CHUNK = 10_000  # rows of a Parquet row group
_UNMATCHED = 1 << 62  # places from here on are of rows that a job does not know

_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
_SCHEMA = pa.schema([(name, _TYPES[kind]) for name, kind in KINDS.items()])


class AnnotationStore:
    r"""A folder of samples, locked by one process.

    Each sample is one appended write: a killed process leaves at most one incomplete line at the end, which the next
    one removes. At the end of a job the file is replaced, sorted in the data's order and with the columns that need all
    samples of a row. No texts are held in memory.

    Args:
        folder: created if absent.
        on_sample: called with each sample, first those in the file.
        ask_failed: ask failed questions again.
        read: recomputes the columns that follow from a sample's text, as gold labels may have changed.

    Raises:
        UserError: another process uses the folder, or its file is damaged before its end.
    """

    def __init__(
        self,
        folder: str | Path,
        on_sample: Callable[[Annotation], None] = lambda annotation: None,
        *,
        ask_failed: bool = False,
        read: Callable[[Annotation], Annotation] = lambda annotation: annotation,
    ) -> None:
        self.folder = Path(folder)
        self.path = self.folder / FILE
        self._on_sample, self._ask_failed = on_sample, ask_failed
        self.torn = 0
        """Bytes of an incomplete line that was removed."""
        self.settled: set[bytes] = set()
        """Keys of questions not to ask again."""
        self.agreeing: set[bytes] = set()
        """Keys of answers that agree with the gold label."""
        self._file = -1
        self._synced = time.monotonic()
        with self._writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / ".lock")
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                used = f"another process writes {str(folder)!r}; let it end, or take another folder"
                raise UserError(f"out: {used}") from error
        try:
            with self._writing(self.path):
                self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
                self._mend()
            for annotation in self:
                self._note(read(annotation))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "AnnotationStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Annotation]:
        """The samples in the file's order."""
        if self.path.exists():
            for annotation, _ in read_rows(self.path):
                yield annotation

    def append(self, annotation: Annotation) -> None:
        """Append a sample durably."""
        line = to_line(annotation)
        with self._writing(self.path):
            size = os.fstat(self._file).st_size
            written = os.write(self._file, line)
            if written != len(line):
                # disk full: keep the next line separate
                os.ftruncate(self._file, size)
                raise OSError(None, f"{written} of {len(line)} bytes were written")
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
        self._note(annotation)

    def finish(
        self, read: Callable[[Annotation], Annotation], place: Callable[[Annotation], int | None], agree: Agree
    ) -> None:
        """Rewrite the file: sorted, each question once, with the columns that need all samples of a row.

        Args:
            read: as in the constructor.
            place: position of a sample's row; ``None`` for an unknown row or another input, which come last.
            agree: whether labels are the same answer.
        """
        unmatched: dict[Any, int] = {}
        groups: dict[Any, int] = {}
        entries: list[tuple[int, int, int, int]] = []
        with self._replacing(FILE) as out, self.path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                if line.strip():
                    found, _ = _parse(line, f"{self.path}:{number}")
                    if (at := place(found)) is None:
                        own = (found.split, found.id, found.input)
                        at = unmatched.setdefault(own, _UNMATCHED + len(unmatched))
                    group = groups.setdefault((found.teacher, found.prompt, found.settings, found.kind), len(groups))
                    entries.append((at, group, found.sample, offset))
                offset += len(line)
            for _, of_row in groupby(sorted(entries), key=itemgetter(0, 1)):
                # if a question was asked again, the last answer counts
                kept: dict[str | int, tuple[Annotation, dict[str, Any]]] = {}
                for *_, start in of_row:
                    file.seek(start)
                    sample, row = _parse(file.readline(), str(self.path))
                    kept[sample.key or start] = read(sample), row
                for sample, (_, row) in zip(
                    _voted([one for one, _ in kept.values()], agree), kept.values(), strict=True
                ):
                    out.write(to_line(sample, {name: row[name] for name in row if name not in COLUMNS}))
        os.close(self._file)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND)

    def read_metadata(self) -> dict[str, Any]:
        """The metadata of earlier jobs."""
        return read_metadata(self.folder)

    def write_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Replace the metadata."""
        with self._replacing(METADATA) as out:
            out.write((json.dumps(metadata, indent=2, ensure_ascii=False) + "\n").encode())

    def write_parquet(self) -> None:
        """Write the known columns of all samples as Parquet, with the metadata inside."""
        schema = _SCHEMA.with_metadata({"lit_distill": json.dumps(self.read_metadata(), ensure_ascii=False)})
        with self._replacing(PARQUET) as out, pq.ParquetWriter(out, schema) as writer:
            rows = iter(self)
            while chunk := list(islice(rows, _CHUNK)):
                writer.write_table(pa.Table.from_pylist([asdict(row) for row in chunk], schema=_SCHEMA))

    def write_card(self) -> bool:
        """Write the dataset card, unless a user has edited it; whether it was written."""
        path = self.folder / CARD
        if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
            return False
        with self._replacing(CARD) as out:
            text = write_card(self.read_metadata().get("jobs", []), self, PARQUET, self.folder.name)
            out.write(text.encode("utf-8", "backslashreplace"))
        return True

    def close(self) -> None:
        """Release the lock."""
        file, self._file = self._file, -1
        try:
            if file >= 0:
                try:
                    os.fsync(file)
                finally:
                    os.close(file)
        finally:
            self._lock.release()

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"out: {str(path)!r} cannot be written ({error.strerror or error})") from error

    @contextmanager
    def _replacing(self, name: str) -> Iterator[IO[bytes]]:
        with self._writing(self.folder / name), atomic_write(self.folder / name, "wb") as out:
            yield out

    def _mend(self) -> None:
        """Remove an incomplete last line, or add its missing newline."""
        offset, last = 0, b"\n"
        with self.path.open("rb") as file:
            for last in file:
                offset += len(last)
        if last.endswith(b"\n"):
            return
        try:
            parse_json(last, surrogates=True)
        except ValueError:
            self.torn = len(last)
            os.ftruncate(self._file, offset - len(last))
        else:
            os.write(self._file, b"\n")

    def _note(self, annotation: Annotation) -> None:
        if annotation.key is not None:
            key = bytes.fromhex(annotation.key)
            if annotation.text is not None or not self._ask_failed:
                self.settled.add(key)
            if annotation.agrees:
                self.agreeing.add(key)
        self._on_sample(annotation)


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of a folder; empty if absent. Raises a ``UserError`` if the file is damaged."""
    try:
        found: Any = parse_json((folder / METADATA).read_bytes(), surrogates=True)
        jobs = found.get("jobs", []) if isinstance(found, dict) else None
        if not isinstance(jobs, list) or not all(isinstance(job, dict) for job in jobs):
            raise ValueError("not an object whose jobs are a list of objects")
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise UserError(f"{folder / METADATA} cannot be read ({error})") from error
    return dict(found)


def read_rows(
    path: Path, on_torn: Callable[[str], None] = lambda where: None
) -> Iterator[tuple[Annotation, dict[str, Any]]]:
    """The samples of a JSON lines or Parquet file, each with its raw row, which may have more columns.

    Args:
        path: the file.
        on_torn: called with the place of an incomplete last line, which a running or killed job leaves.

    Raises:
        UserError: a row is not a sample.
    """
    if path.suffix == ".parquet":
        try:
            with pq.ParquetFile(path) as file:
                rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
                for number, row in enumerate(rows):
                    yield _sample(row, f"{path}, row {number}")
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: not a Parquet file ({error})") from error
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield _parse(line, f"{path}:{number}")
                except UserError:
                    if line.endswith(b"\n"):
                        raise
                    on_torn(f"{path}:{number}")


def _parse(line: bytes, where: str) -> tuple[Annotation, dict[str, Any]]:
    try:
        row = parse_json(line, surrogates=True)
    except ValueError as error:
        raise UserError(f"{where}: not a sample: {error}") from error
    return _sample(row, where)


def _sample(row: Any, where: str) -> tuple[Annotation, dict[str, Any]]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a sample: not an object but {type(row).__name__}")
    if "leaks" in row and isinstance(row["leaks"], bool | None):
        # the name of an earlier version
        row.setdefault("contains_label", row.pop("leaks"))
    try:
        return from_row(row), row
    except ValueError as error:
        raise UserError(f"{where}: not a sample: {error}") from error


def _voted(samples: list[Annotation], agree: Agree) -> Iterable[Annotation]:
    """Samples of a row by one teacher, with the columns that need all of them."""
    answers = [one.label for one in samples if one.text is not None or one.label is not None]
    if not answers:
        return samples
    winner, share = vote(answers, agree)

    def agreeing(label: str | None) -> bool | None:
        return None if label is None or winner is None else same_answer(label, winner, agree)

    columns: dict[str, Any] = {"votes": len(answers), "majority_label": winner, "vote_share": share}
    return [replace(one, **columns, in_majority=agreeing(one.label)) for one in samples]
