"""The folder of samples: appended to durably, read to skip answered questions, and put in order at the end of a job."""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from filelock import FileLock, Timeout
from jinja2 import Template

from lit_distill import __version__
from lit_distill.annotation.record import COLUMNS, Agree, Annotation, from_row, to_line, with_distinct, with_votes
from lit_distill.errors import UserError
from lit_distill.files import atomic_write, write_text
from lit_distill.reading import json_lines, json_object, parse_json
from lit_distill.tables import one_line

FILE = "rationales.jsonl"  # one JSON object a sample
PARQUET = "rationales.parquet"  # the same samples, written at the end of a job
METADATA = "metadata.json"  # teachers, prompts and settings of the jobs
CARD = "README.md"

_SYNC_SECONDS = 5.0
_CHUNK = 10_000  # rows of a Parquet row group
_UNMATCHED = 1 << 62  # places from here on are of rows that a job does not know
_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
_SCHEMA = pa.schema([(name, _TYPES[kind]) for name, kind in COLUMNS.items()])


class AnnotationStore:
    """A folder of samples, locked by one process.

    Each sample is one appended write: a killed process leaves at most one incomplete line at the end, which the next
    one removes. `finish` replaces the file. No texts are held in memory. Raises a ``UserError`` if another process uses
    the folder, or its file is damaged before its end.

    Args:
        folder: created if absent.
        on_sample: called with each sample, first those in the file.
        ask_failed: ask failed questions again.
        read: recomputes the columns that follow from a sample's text, as gold labels may have changed.
    """

    def __init__(
        self,
        folder: str | Path,
        on_sample: Callable[[Annotation], None] = lambda sample: None,
        *,
        ask_failed: bool = False,
        read: Callable[[Annotation], Annotation] = lambda sample: sample,
    ) -> None:
        self.folder = Path(folder)
        self.path = self.folder / FILE
        # keys of questions not to ask again: does the answer agree with the gold label
        self.answered: dict[str, bool] = {}
        self.jobs: list[Mapping[str, Any]] = []  # as noted in the metadata
        self._on_sample, self._ask_failed, self._read = on_sample, ask_failed, read
        self._synced = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            used = f"another process writes {str(folder)!r}; let it end, or take another folder"
            raise UserError(f"out: {used}") from error
        try:
            self._end_last_line()
            for _, sample in self._samples():
                self._count(read(sample))
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> "AnnotationStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def append(self, sample: Annotation) -> None:
        """Append a sample durably."""
        line = to_line(sample)
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if os.write(file.fileno(), line) != len(line):
                    # disk full: keep the next line separate
                    file.truncate(size)
                    raise OSError(None, "no room for a whole line")
                if time.monotonic() - self._synced > _SYNC_SECONDS:
                    os.fsync(file.fileno())
                    self._synced = time.monotonic()
            except OSError as error:
                # the error of a full disk names no file
                error.filename = str(self.path)
                raise
        self._count(sample)

    def finish(self, place: Callable[[Annotation], int | None], agree: Agree) -> None:
        """Rewrite the file, sorted and with the columns that need all samples of a row, and write it as Parquet.

        ``place`` is the position of a sample's row; ``None`` for an unknown row or another input, which come last.
        """
        samples = self._in_order(place, agree)
        with (
            atomic_write(self.path, "wb") as lines,
            atomic_write(self.folder / PARQUET, "wb") as table,
            pq.ParquetWriter(table, _SCHEMA) as parquet,
        ):
            while chunk := list(islice(samples, _CHUNK)):
                columns = {name: [getattr(sample, name) for sample, _ in chunk] for name in COLUMNS}
                parquet.write_table(pa.table(columns, schema=_SCHEMA))
                lines.writelines(to_line(sample, others) for sample, others in chunk)

    def note(self, job: Mapping[str, Any]) -> None:
        """Write what a teacher is asked to the metadata, in place of what was written when the job started."""
        path = self.folder / METADATA
        empty: dict[str, Any] = {"format": 1, "jobs": []}
        found = json_object(path.read_bytes(), str(path), surrogates=True) if path.exists() else empty
        jobs = found.get("jobs")
        if not isinstance(jobs, list) or not all(isinstance(one, dict) for one in jobs):
            raise UserError(f"{path}: jobs must be a list of objects")
        same = ("started", "teacher", "kind")
        self.jobs = [*(one for one in jobs if any(one.get(name) != job.get(name) for name in same)), job]
        write_text(path, json.dumps(found | {"jobs": self.jobs}, indent=2) + "\n")

    def write_card(self) -> None:
        """Write the dataset card of the finished samples, unless a user has edited it."""
        # slow to import
        import pandas as pd  # type: ignore[import-untyped]

        path, mark = self.folder / CARD, "<!-- written by lit_distill annotate, "
        if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace"):
            return
        names = ["split", "teacher", "kind", "error", "parsed", "agrees", "contains_label", "distinct"]
        samples = pd.read_parquet(self.folder / PARQUET, columns=names)
        flags = samples[names[4:]].eq(True).assign(samples=True, errors=samples.error.notna())
        by = [samples.split.fillna("any"), samples.teacher.fillna("unknown"), samples.kind]
        text = Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8")).render(
            counts=flags.groupby(by, sort=False).sum().reset_index().to_dict("records"),
            jobs=self.jobs,
            cell=one_line,
            folder=self.folder.name,
            parquet=PARQUET,
            version=__version__,
        )
        with atomic_write(path, "wb") as file:
            file.write(f"{text}\n".encode("utf-8", "backslashreplace"))

    def _end_last_line(self) -> None:
        """Remove an incomplete last line, or add the newline that it lacks."""
        with self.path.open("a+b") as file:
            file.seek(0)
            last = deque(file, maxlen=1)
            if last and not last[0].endswith(b"\n"):
                try:
                    parse_json(last[0], surrogates=True)
                    file.write(b"\n")
                except ValueError:
                    file.truncate(file.tell() - len(last[0]))

    def _samples(self) -> Iterator[tuple[int, Annotation]]:
        """Offset in the file and content of each line."""
        offset = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield offset, _parse(line, f"{self.path}:{number}")[0]
                offset += len(line)

    def _in_order(
        self, place: Callable[[Annotation], int | None], agree: Agree
    ) -> Iterator[tuple[Annotation, dict[str, Any]]]:
        """Each sample and a user's own columns, by row, teacher and number, with the columns that need all of a row."""
        unmatched: dict[Any, int] = {}
        # in the order in which they were asked for; answers come in any
        groups: dict[Any, int] = {}
        for job in self.jobs:
            own = job.get("teacher"), job.get("prompt"), job.get("settings"), job.get("kind", "rationale")
            groups.setdefault(own, len(groups))
        entries: list[tuple[int, int, int, int]] = []
        for offset, found in self._samples():
            if (at := place(found)) is None:
                at = unmatched.setdefault((found.split, found.id, found.input), _UNMATCHED + len(unmatched))
            group = groups.setdefault((found.teacher, found.prompt, found.settings, found.kind), len(groups))
            entries.append((at, group, found.sample, offset))
        with self.path.open("rb") as file:
            for _, of_row in groupby(sorted(entries), key=itemgetter(0)):
                # if a question was asked again, the last answer counts
                kept: dict[str | int, tuple[Annotation, dict[str, Any]]] = {}
                for *_, offset in of_row:
                    file.seek(offset)
                    sample, row = _parse(file.readline(), str(self.path))
                    others = {name: value for name, value in row.items() if name not in COLUMNS}
                    kept[sample.key or offset] = self._read(sample), others
                samples = with_distinct(with_votes([sample for sample, _ in kept.values()], agree), agree)
                yield from zip(samples, (others for _, others in kept.values()), strict=True)

    def _count(self, sample: Annotation) -> None:
        if sample.key is not None and (sample.text is not None or not self._ask_failed):
            self.answered[sample.key] = bool(sample.agrees)
        self._on_sample(sample)


def read_rows(path: Path, on_torn: Callable[[str], None] | None = None) -> Iterator[tuple[Annotation, dict[str, Any]]]:
    """The samples of a JSON lines or Parquet file, each with its raw row, which may have more columns.

    ``on_torn`` is called with the place of an incomplete last line, which a running or killed job leaves. Raises a
    ``UserError`` if a row is not a sample.
    """
    if path.suffix != ".parquet":
        for place, row in json_lines(path, surrogates=True, on_torn=on_torn):
            yield from_row(row, place), row
        return
    try:
        with pq.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows):
                yield from_row(row, f"{path}, row {number}"), row
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file ({error})") from error


def _parse(line: bytes, place: str) -> tuple[Annotation, dict[str, Any]]:
    row = json_object(line, place, surrogates=True)
    return from_row(row, place), row
