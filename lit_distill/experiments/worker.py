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
from typing import Any, Self

from filelock import Timeout

from lit_distill.errors import UserError
from lit_distill.experiments.cells import FAILED, LOG, cell_lock, check_record, record_of, write_failure

BUSY = 75
"""The exit code where another process runs the cell: try again later."""

INTERRUPTED = 130
"""The exit code after a signal to stop."""

STOPPED = "--- stopped by"
"""The beginning of a log's last line if a signal stopped the run."""


def run_cell(folder: str | Path, arguments: Sequence[str]) -> int:
    """Run a cell to its end.

    SIGINT and SIGTERM, and SIGUSR1 and SIGUSR2 where they are handled (submitit queues a job again at one of them), end
    the run with a SIGTERM, at which it saves.

    Args:
        folder: the cell's.
        arguments: the command line.

    Returns:
        0 where the cell is done, `BUSY`, `INTERRUPTED`, or the run's exit code (1 where it ended well and left no
        record); of a run that a signal ended, 128 and the signal's number.
    """
    with _Signals() as signals:
        code = _run_locked(Path(folder), arguments, signals)
    if code == INTERRUPTED:
        signals.call_earlier_handler()
    return code


class _Signals:
    """Hands the first signal on to the run, also where it came before the run was started."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.run: subprocess.Popen[bytes] | None = None
        self._told = False
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in (signal.SIGUSR1, signal.SIGUSR2) if callable(signal.getsignal(number))]
            for number in (signal.SIGINT, signal.SIGTERM, *handled):
                self._earlier[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        self.hand_on()

    def hand_on(self) -> None:
        """Tell the run, once, if there is something to tell."""
        if self.received and self.run is not None and not self._told:
            self._told = True
            self.run.terminate()

    def call_earlier_handler(self) -> None:
        """Now that the run has saved, what was there before for a signal that is not one to end: submitit's."""
        if self.received in (signal.SIGUSR1, signal.SIGUSR2):
            self._earlier[self.received](self.received, None)


def _run_locked(folder: Path, arguments: Sequence[str], signals: _Signals) -> int:
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
        # the run holds the lock too: a worker that is killed leaves it to the run that goes on
        descriptor = lock._context.lock_file_fd
        code = _run(folder / LOG, arguments, () if descriptor is None else (descriptor,), signals)
        if record_of(folder) is not None:
            return 0
        if signals.received:
            with (folder / LOG).open("a", encoding="utf-8") as output:
                output.write(f"{STOPPED} {signal.Signals(signals.received).name}\n")
            return INTERRUPTED
        write_failure(folder, code, _reason(code))
        return 128 - code if code < 0 else code or 1
    finally:
        if signals.run is not None and signals.run.poll() is None and (descriptor := lock._context.lock_file_fd):
            # closed and not released: releasing would free the run's lock too
            os.close(descriptor)
            lock._context.lock_file_fd = None
        lock.release()


def _run(log: Path, arguments: Sequence[str], descriptors: Sequence[int], signals: _Signals) -> int:
    """The exit code; `INTERRUPTED` where it was not started."""
    with log.open("ab") as output:
        output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(arguments)}\n".encode())
        output.flush()
        if signals.received:
            return INTERRUPTED
        # a cluster sends these to all processes of a job, and they would end the run, which is told by its worker
        earlier = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGUSR2))
        try:
            signals.run = subprocess.Popen(  # noqa: S603 - our own program
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=descriptors,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        except OSError as error:
            output.write(f"{error}\n".encode())
            return 127
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, earlier)
    signals.hand_on()
    try:
        return signals.run.wait()
    except BaseException:
        # another's handler ends this process: the run saves first
        signals.received = signals.received or signal.SIGTERM
        signals.hand_on()
        signals.run.wait()
        raise


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
