"""A cell of a grid: one run of ``fit``, its folder and its state."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import IO, Any

import yaml

from lit_distill.errors import UserError
from lit_distill.experiments.grid import without_location
from lit_distill.files import write_text
from lit_distill.reading import parse_yaml
from lit_distill.records import RECORD

CONFIG = "fit.yaml"
"""The cell's own config."""

FAILED = "failed.txt"
"""Why the last try failed: one line, then the end of the log."""

LOG = "log.txt"
"""Output of the runs."""

FIT = (sys.executable, "-m", "lit_distill", "fit")
"""The command that runs a cell."""

_PACKAGE = Path(__file__).parents[2]
_STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}
"""Exit codes of a run that was interrupted and has saved."""


class State(StrEnum):
    """The state of a cell."""

    PENDING = "pending"
    RUNNING = "running"
    RUNNING_ELSEWHERE = "running elsewhere"
    """In another process."""
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    """Interrupted; resumes from its last checkpoint."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a grid."""

    name: str
    folder: Path
    point: Mapping[str, Any]  # canonical key -> value of what varies
    config: Mapping[str, Any]  # the whole nested config
    command: tuple[str, ...] = FIT  # the command before `--config`

    @property
    def arguments(self) -> list[str]:
        """The command line that runs it."""
        return [*self.command, "--config", str(self.folder / CONFIG)]

    @property
    def line(self) -> str:
        """The command line as text."""
        return shlex.join(["python", *self.arguments[1:]])

    @property
    def state(self) -> State:
        """The state of the folder: done, failed, running elsewhere, or pending."""
        if (self.folder / RECORD).exists():
            return State.DONE
        if (self.folder / FAILED).exists():
            return State.FAILED
        claimed = claim(self) if _lock_path(self).exists() else nullcontext()
        if claimed is None:
            return State.RUNNING_ELSEWHERE
        with claimed:
            return State.PENDING

    @property
    def failure(self) -> str:
        """Why it failed, in one line."""
        return (self.folder / FAILED).read_text(encoding="utf-8", errors="replace").partition("\n")[0]

    def fail(self, reason: str) -> None:
        """Record why it failed, with the end of its log."""
        log = self.folder / LOG
        text = log.read_bytes()[-20_000:].decode(errors="replace") if log.exists() else ""
        lines = [line.rstrip() for line in text.splitlines() if line.strip()][-20:]
        write_text(self.folder / FAILED, "\n".join([": ".join([reason, *lines[-1:]]), "", *lines, ""]))


def config_difference(cell: Cell) -> str | None:
    """The first key in which the config in the cell's folder differs; ``None`` if none does."""
    path = cell.folder / CONFIG
    try:
        found = parse_yaml(path.read_bytes()) if cell.folder.exists() else cell.config
    except FileNotFoundError:
        found = {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); move it away") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a config; move it away")
    there, wanted = without_location(found), without_location(cell.config)
    for key in {**wanted, **there}:
        if there.get(key) != wanted.get(key):
            return f"{key}: {there.get(key)!r} there, {wanted.get(key)!r} wanted"
    return None


def lay_out(cell: Cell, *, retry_failed: bool = False) -> Path | None:
    """Write a cell's config into its folder, unless another process runs the cell.

    A try with another config is moved aside, so that no run resumes from its checkpoints; returns where to, if so.

    Raises:
        UserError: another process runs the cell with another config.
    """
    with claim(cell) or nullcontext() as claimed:
        difference, aside = config_difference(cell), None
        if claimed is None and difference:
            raise UserError(f"{cell.folder}: another process runs it with another config ({difference}); let it end")
        if claimed is None:
            return None
        if difference:
            place = cell.folder.parent / ".edited"
            place.mkdir(exist_ok=True)
            aside = next(path for i in count(1) if not (path := place / f"{cell.name}.{i}").exists())
            cell.folder.rename(aside)
        cell.folder.mkdir(parents=True, exist_ok=True)
        body = yaml.safe_dump(dict(cell.config), sort_keys=False, allow_unicode=True)
        write_text(cell.folder / CONFIG, f"# {cell.line}\n{body}")
        if retry_failed:
            (cell.folder / FAILED).unlink(missing_ok=True)
    return aside


def _lock_path(cell: Cell) -> Path:
    """Beside the folder, which may be moved."""
    return cell.folder.parent / ".locks" / f"{cell.name}.lock"


def claim(cell: Cell) -> IO[bytes] | None:
    """Lock a cell until the file is closed; ``None`` if another process has it.

    Unlike a ``FileLock``, a child process inherits the lock and keeps it if its parent dies.
    """
    import fcntl

    path = _lock_path(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


class Run:
    """A try of a cell: a process that holds the lock as long as it lives, even without this one."""

    def __init__(self, cell: Cell, claimed: IO[bytes], environment: Mapping[str, str]) -> None:
        self._cell, self._claimed, self._killed = cell, claimed, False
        # find this package even if it is not installed
        path = os.pathsep.join([str(_PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
        with (cell.folder / LOG).open("ab") as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {cell.line}\n".encode())
            log.flush()
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                cell.arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[claimed.fileno()],
                env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
                # this process forwards Ctrl-C
                start_new_session=True,
            )

    @classmethod
    def start(cls, cell: Cell, environment: Mapping[str, str] | None = None) -> "Run | None":
        """Start a cell; ``None`` if another process runs it or has just finished it.

        Args:
            cell: with its config written.
            environment: additional variables.
        """
        claimed = claim(cell)
        if claimed is None:
            return None
        if (cell.folder / RECORD).exists() or (cell.folder / FAILED).exists():
            claimed.close()
            return None
        return cls(cell, claimed, environment or {})

    def done(self) -> bool:
        """Whether it has ended; records the failure, if any."""
        code = self._process.poll()
        if code is not None and not self._claimed.closed:
            with self._claimed:
                if not (self._killed or code in _STOPPED or (self._cell.folder / RECORD).exists()):
                    self._cell.fail(_reason(code))
        return code is not None

    def wait(self) -> None:
        """Wait for its end."""
        self._process.wait()
        self.done()

    def stop(self) -> None:
        """Ask it to save and stop."""
        self._process.terminate()

    def stop_and_wait(self) -> None:
        """Stop and wait until it has saved; for signal handlers, which may interrupt `wait`."""
        self.stop()
        with suppress(ChildProcessError):
            # `Popen.wait` would deadlock with the interrupted one
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)

    def kill(self) -> None:
        """Kill it and its children."""
        self._killed = True
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _reason(code: int) -> str:
    if code == 0:
        return "it ended without a record of its run"
    return f"exit code {code}" if code > 0 else f"ended by signal {-code} ({signal.strsignal(-code)})"
