"""The file of a teacher's samples: written as they come, never lost, read back as what need not be asked again."""

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
"""One object a sample."""

CARD = "README.md"
PARQUET = "rationales.parquet"
"""The same samples, written at the end of a job."""

METADATA = "metadata.json"
"""Which teachers were asked what, and how."""

_SYNC_SECONDS = 5.0
_CHUNK = 10_000  # rows of a piece of the Parquet file
_UNMATCHED = 1 << 62  # places from here on are of rows that a job does not know

_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
_SCHEMA = pa.schema([(name, _TYPES[kind]) for name, kind in KINDS.items()])


class AnnotationStore:
    r"""A folder of samples, open for one process.

    A line is one write to a file that is only appended to: a process that is killed loses only what it had not written,
    and leaves at most one torn line at the end, which the next one removes. When a job ends, the file is replaced by
    the same samples in the data's order, with the columns that need all samples of a row. No texts are kept in memory.

    Args:
        folder: made if it is absent.
        on_sample: is given each sample, those in the file first, then each that is appended.
        ask_failed: questions without an answer are to be asked again.
        read: fills in the columns that follow from a sample's text again: a gold label may have changed since.

    Raises:
        UserError: another process has it open, or its file is damaged elsewhere than at its end.
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
        """Bytes of a torn line that was removed."""
        self.settled: set[bytes] = set()
        """Keys of the questions that are not asked again."""
        self.agreeing: set[bytes] = set()
        """Keys of the answers that agree with the gold label."""
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
        """Keep a sample; it is in the file when this returns."""
        line = to_line(annotation)
        with self._writing(self.path):
            size = os.fstat(self._file).st_size
            written = os.write(self._file, line)
            if written != len(line):
                # a full disk: the next line must not be glued to this one
                os.ftruncate(self._file, size)
                raise OSError(None, f"{written} of {len(line)} bytes were written")
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
        self._note(annotation)

    def finish(
        self, read: Callable[[Annotation], Annotation], place: Callable[[Annotation], int | None], agree: Agree
    ) -> None:
        """Rewrite the file: in order, each question once, with the columns that need all samples of a row.

        Args:
            read: as the constructor's.
            place: the position of a sample's row; ``None`` for samples of no row, or of another input than their row
                has now, which come last, in the order in which they came.
            agree: which labels are one answer.
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
                # of a question that failed and was asked again, the last answer counts
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
        """What is known of the jobs that wrote here."""
        return read_metadata(self.folder)

    def write_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Replace the metadata."""
        with self._replacing(METADATA) as out:
            out.write((json.dumps(metadata, indent=2, ensure_ascii=False) + "\n").encode())

    def write_parquet(self) -> None:
        """Write all samples as Parquet too, known columns alone, with the metadata in the file's own."""
        schema = _SCHEMA.with_metadata({"lit_distill": json.dumps(self.read_metadata(), ensure_ascii=False)})
        with self._replacing(PARQUET) as out, pq.ParquetWriter(out, schema) as writer:
            rows = iter(self)
            while chunk := list(islice(rows, _CHUNK)):
                writer.write_table(pa.Table.from_pylist([asdict(row) for row in chunk], schema=_SCHEMA))

    def write_card(self) -> bool:
        """Write the hub's card of the folder, unless somebody's own words stand there; whether it was written."""
        path = self.folder / CARD
        if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
            return False
        with self._replacing(CARD) as out:
            text = write_card(self.read_metadata().get("jobs", []), self, PARQUET, self.folder.name)
            out.write(text.encode("utf-8", "backslashreplace"))
        return True

    def close(self) -> None:
        """Let another process have it."""
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
        """Remove a torn line at the end; a whole line that lacks only its end is given one."""
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
    """What is known of the jobs that wrote to a folder; empty if nothing is.

    Raises:
        UserError: the file is damaged.
    """
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
    """The samples of a JSON lines or Parquet file, each with its row as it stands, which may hold more.

    Args:
        path: the file.
        on_torn: called with the place of a torn last line, as a running or a killed job leaves one.

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


def _sample(row: Any, where: str) -> tuple[Annotation, dict[str, Any]]:  # noqa: ANN401 - whatever JSON holds
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
    """The samples of a row by one teacher, with the columns that need all of them."""
    answers = [one.label for one in samples if one.text is not None or one.label is not None]
    if not answers:
        return samples
    winner, share = vote(answers, agree)

    def agreeing(label: str | None) -> bool | None:
        return None if label is None or winner is None else same_answer(label, winner, agree)

    columns: dict[str, Any] = {"votes": len(answers), "majority_label": winner, "vote_share": share}
    return [replace(one, **columns, in_majority=agreeing(one.label)) for one in samples]
