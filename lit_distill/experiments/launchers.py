"""What starts cells, and this machine as the first that does."""

import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lit_distill.checks import check_int
from lit_distill.experiments.cells import LOG, Cell

PACKAGE = Path(__file__).parents[2]
"""Where this package lies."""


class Job(ABC):
    """A cell that was started."""

    @abstractmethod
    def poll(self) -> int | None:
        """The worker's exit code; ``None`` as long as it runs."""

    @abstractmethod
    def interrupt(self) -> None:
        """Ask it to stop, with time to save."""

    @abstractmethod
    def kill(self) -> None:
        """Stop it at once."""


class Launcher(ABC):
    """Starts cells."""

    slots: int | None
    """How many at a time; ``None``: all."""
    again = False
    """Whether a cell that was interrupted by others than this process is started again."""

    @abstractmethod
    def start(self, cell: Cell) -> Job:
        """Start a cell's worker."""


class Local(Launcher):
    """Processes on this machine.

    Args:
        jobs: how many at a time. Several share the accelerators, each on one of them by turns, and the cores.
        devices: the accelerators' numbers, as ``CUDA_VISIBLE_DEVICES`` has them.
    """

    def __init__(self, jobs: int = 1, devices: Sequence[str] = ()) -> None:
        self.slots = check_int("jobs", jobs, 1)
        self._devices = devices
        self._jobs: list[_Process | None] = [None] * jobs

    def start(self, cell: Cell) -> Job:
        """In a session of its own, so that Ctrl-C in the terminal is handed on once."""
        slot = next(i for i, job in enumerate(self._jobs) if job is None or job.poll() is not None)
        with (cell.folder / LOG).open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-m", "lit_distill.experiments.worker", str(cell.folder), *cell.arguments],
                env=self.environment(slot),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._jobs[slot] = job = _Process(process)
        return job

    def environment(self, slot: int) -> dict[str, str]:
        """What the processes of a slot are given."""
        environment = dict(os.environ)
        # found as it is here, also where it is not installed
        found = [str(PACKAGE), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(found)
        jobs = len(self._jobs)
        if jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // jobs)))
            if self._devices:
                environment["CUDA_VISIBLE_DEVICES"] = self._devices[slot % len(self._devices)]
        return environment


class _Process(Job):
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def poll(self) -> int | None:
        return self._process.poll()

    def interrupt(self) -> None:
        # the worker hands it on to its run
        self._process.terminate()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            # the worker, the run, and what the run has started
            os.killpg(self._process.pid, signal.SIGKILL)


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
