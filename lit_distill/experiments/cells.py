"""A cell: one run of ``fit``, its folder, and what the folder says of it."""

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from lit_distill.errors import UserError
from lit_distill.experiments.keys import without_own
from lit_distill.files import write_text
from lit_distill.reading import parse_json, parse_yaml
from lit_distill.records import RECORD, RunRecord, read_record

CONFIG = "fit.yaml"
"""The cell's config, with which it runs alone."""

FAILED = "failed.json"
"""How a cell's last try failed."""

LOG = "log.txt"
"""What its runs wrote."""

FIT = (sys.executable, "-m", "lit_distill", "fit")
"""How a cell is run."""


class State(StrEnum):
    """Where a cell stands."""

    PENDING = "pending"
    RUNNING = "running"
    RUNNING_ELSEWHERE = "running elsewhere"
    """By another process."""
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    """Interrupted; it goes on from its last checkpoint."""


@dataclass(frozen=True)
class Failure:
    """How a try of a cell failed."""

    exit_code: int
    """As the system has it; below 0, the signal that ended it."""
    reason: str
    lines: list[str] = field(default_factory=list)
    """The last lines of its log."""


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    name: str
    folder: Path
    point: Mapping[str, Any]
    """What varies: canonical key -> value."""
    config: Mapping[str, Any]
    """Its whole config, nested."""
    command: tuple[str, ...] = FIT
    """What is started, before ``--config``."""

    @property
    def arguments(self) -> list[str]:
        """The command line that runs it."""
        return [*self.command, "--config", str(self.folder / CONFIG)]

    @property
    def line(self) -> str:
        """The command line to copy."""
        return shlex.join(["python", *self.arguments[1:]])

    def text(self) -> str:
        """The content of its config file."""
        body = yaml.safe_dump(dict(self.config), sort_keys=False, allow_unicode=True)
        return f"# {self.line}\n{body}"


def record_of(folder: Path) -> RunRecord | None:
    """The record of a run that ended; ``None`` where there is none, or none that can be read."""
    if not (folder / RECORD).exists():
        return None
    try:
        return read_record(folder)
    except UserError:
        return None


def check_record(folder: Path) -> None:
    """Refuse a folder whose record cannot be read: what it holds may be a finished run, and is not run over.

    Raises:
        UserError: there is a record, cut off or of another format; the message names the file.
    """
    if not (folder / RECORD).exists():
        return
    try:
        read_record(folder)
    except UserError as error:
        raise UserError(f"{error}; move it away to run the cell again") from error


def written_config(cell: Cell) -> dict[str, Any] | None:
    """The config in a cell's folder; ``None`` where there is none.

    Raises:
        UserError: it is none.
    """
    path = cell.folder / CONFIG
    try:
        found = parse_yaml(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); move it away") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: no config; move it away")
    return found


def edited(cell: Cell) -> bool:
    """Whether the folder's config is another one; where the folder itself lies does not count."""
    found = written_config(cell)
    return found is not None and without_own(found) != without_own(cell.config)


def failure_of(folder: Path) -> Failure | None:
    """How a cell failed; ``None`` where it did not, a damaged file being a failure too."""
    path = folder / FAILED
    try:
        return Failure(**parse_json(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        return Failure(1, f"{path} cannot be read ({error})")


def write_failure(folder: Path, exit_code: int, reason: str) -> None:
    """Keep how a cell failed, with the end of its log."""
    failure = Failure(exit_code, reason, last_lines(folder / LOG))
    write_text(folder / FAILED, json.dumps(asdict(failure), indent=2, ensure_ascii=False) + "\n")


def last_lines(path: Path, count: int = 20, most: int = 20_000) -> list[str]:
    """The last lines of a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - most))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]


def cell_lock(folder: Path) -> FileLock:
    """The lock that whoever runs a cell holds; it lies beside the folder, which may be moved."""
    place = folder.parent / ".locks"
    place.mkdir(parents=True, exist_ok=True)
    return FileLock(place / f"{folder.name}.lock")


def is_busy(folder: Path) -> bool:
    """Whether some process runs a cell."""
    lock = cell_lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def lay_out(cell: Cell) -> Path | None:
    """Write a cell's config into its folder.

    A try with another config that did not end is moved aside whole, so that its checkpoints are not gone on from.

    Returns:
        Where such a try lies now; ``None`` where there was none.

    Raises:
        UserError: it cannot be written, or another process runs the cell with another config.
    """
    try:
        lock = cell_lock(cell.folder)
        lock.acquire(timeout=0)
    except OSError as error:
        if not isinstance(error, Timeout):
            raise UserError(f"out: {cell.folder} cannot be written ({error.strerror})") from error
        if edited(cell):
            raise UserError(f"{cell.folder}: another process runs it with another config; let it end") from error
        return None
    try:
        aside = _set_aside(cell.folder) if edited(cell) else None
        cell.folder.mkdir(parents=True, exist_ok=True)
        if written_config(cell) != cell.config:
            write_text(cell.folder / CONFIG, cell.text())
    except OSError as error:
        raise UserError(f"out: {cell.folder} cannot be written ({error.strerror})") from error
    finally:
        lock.release()
    return aside


def _set_aside(folder: Path) -> Path:
    place = folder.parent / ".edited"
    place.mkdir(exist_ok=True)
    number = 1
    while (place / f"{folder.name}.{number}").exists():
        number += 1
    return folder.rename(place / f"{folder.name}.{number}")
