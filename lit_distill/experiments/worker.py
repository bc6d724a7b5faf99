"""A process of its own for each cell: it holds the cell's lock, runs it, and keeps how it failed.

It goes on where whoever started it is killed, and it imports nothing that is slow.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from filelock import Timeout

from lit_distill.errors import UserError
from lit_distill.experiments.cells import FAILED, LOG, cell_lock, check_record, record_of, write_failure

BUSY = 75
"""The exit code where another process runs the cell: try again later."""

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""

METRICS = "metrics.csv"
"""What Lightning's logger replaces at each start."""


def run_cell(folder: str | Path, arguments: Sequence[str]) -> int:
    """Run a cell to its end.

    Args:
        folder: the cell's.
        arguments: the command line.

    Returns:
        0 where the cell is done, `BUSY`, `INTERRUPTED`, or the run's exit code (1 where it ended well and left no
        record); of a run that a signal ended, 128 and the signal's number.
    """
    folder = Path(folder)
    lock = cell_lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return BUSY
    try:
        if record_of(folder) is not None:
            # another process was faster
            return 0
        try:
            check_record(folder)
        except UserError as error:
            write_failure(folder, 1, str(error))
            return 1
        (folder / FAILED).unlink(missing_ok=True)
        _keep_metrics(folder)
        # the child holds the lock too: a worker that is killed leaves it to the run that goes on
        descriptor = lock._context.lock_file_fd
        code, stopped = _run(folder / LOG, arguments, () if descriptor is None else (descriptor,))
        if record_of(folder) is not None:
            return 0
        if stopped:
            return INTERRUPTED
        write_failure(folder, code, _reason(code))
        return 128 - code if code < 0 else code or 1
    finally:
        lock.release()


def _run(log: Path, arguments: Sequence[str], descriptors: Sequence[int]) -> tuple[int, bool]:
    """The exit code, and whether this process was told to stop meanwhile."""
    stopped = threading.Event()
    child: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        # Ctrl-C reaches the whole group; what is sent to this process alone is handed on
        first = not stopped.is_set()
        stopped.set()
        if first and number == signal.SIGTERM and child is not None and child.poll() is None:
            child.send_signal(signal.SIGINT)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with log.open("ab") as output:
            output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(arguments)}\n".encode())
            output.flush()
            try:
                child = subprocess.Popen(  # noqa: S603 - our own program
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=descriptors,
                    env={**os.environ, "PYTHONUNBUFFERED": "1"},
                )
            except OSError as error:
                output.write(f"{error}\n".encode())
                return 127, stopped.is_set()
            return child.wait(), stopped.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _keep_metrics(folder: Path) -> None:
    """The metrics of an earlier try stay beside those of the next one."""
    if (folder / METRICS).exists():
        number = 1
        while (folder / f"metrics.{number}.csv").exists():
            number += 1
        (folder / METRICS).rename(folder / f"metrics.{number}.csv")


def _reason(code: int) -> str:
    if code == 0:
        return "it ended without a record of its run"
    if code < 0:
        try:
            return f"ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"ended by signal {-code}"
    return f"exit code {code}"


if __name__ == "__main__":
    sys.exit(run_cell(sys.argv[1], sys.argv[2:]))
