"""Runs cells: as many at a time as the launcher takes, each once, whatever becomes of the others."""

import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from lit_distill.experiments.cells import Cell, State, failure_of, is_busy, record_of, write_failure
from lit_distill.experiments.launchers import Job, Launcher
from lit_distill.experiments.worker import BUSY, INTERRUPTED

GRACE = 120.0
"""Seconds in which interrupted runs may save."""

_KILLED = 10.0
"""Seconds in which a killed process is gone."""


@dataclass
class Board:
    """Where each cell stands."""

    cells: Sequence[Cell]
    states: dict[str, State] = field(default_factory=dict)
    since: dict[str, float] = field(default_factory=dict)
    """Running cell -> when it was started, on the monotonic clock."""
    began: float = field(default_factory=time.monotonic)

    def count(self, state: State) -> int:
        """Cells in a state."""
        return sum(self.states.get(cell.name, State.PENDING) is state for cell in self.cells)


class Watcher:
    """Is shown what happens; this one looks away."""

    def changed(self, board: Board, cell: Cell) -> None:
        """A cell has another state."""

    def tick(self, board: Board) -> None:
        """Some time has passed."""


def look(cells: Sequence[Cell], *, retry_failed: bool = False) -> Board:
    """Where the cells stand before anything is started."""
    board = Board(cells)
    for cell in cells:
        board.states[cell.name] = _standing(cell, retry_failed=retry_failed)
    return board


def run_cells(
    board: Board,
    launcher: Launcher,
    watcher: Watcher | None = None,
    *,
    pause: float = 0.2,
    elsewhere_pause: float = 2.0,
    grace: float = GRACE,
) -> bool:
    """Run the cells that are left; waits for those that another process runs.

    Args:
        board: as `look` gives it; it is kept up to date.
        launcher: starts them.
        watcher: is shown what happens.
        pause: seconds between two looks at what runs.
        elsewhere_pause: seconds between two looks at what runs elsewhere.
        grace: seconds in which interrupted runs may save.

    Returns:
        Whether it came to its end; ``False`` after Ctrl-C or a ``SIGTERM``, once all that was running has stopped.
    """
    schedule = _Schedule(board, launcher, watcher or Watcher(), elsewhere_pause)
    with _terminated_as_interrupted():
        try:
            while schedule.step():
                time.sleep(pause)
        except KeyboardInterrupt:
            schedule.stop(grace)
            return False
        except BaseException:
            schedule.stop(grace)
            raise
    return True


class _Schedule:
    def __init__(self, board: Board, launcher: Launcher, watcher: Watcher, elsewhere_pause: float) -> None:
        self.board, self.launcher, self.watcher = board, launcher, watcher
        self.waiting = deque(cell for cell in board.cells if board.states[cell.name] is State.PENDING)
        self.running: list[tuple[Cell, Job]] = []
        self.elsewhere: list[Cell] = []
        self.elsewhere_pause, self.looked = elsewhere_pause, 0.0
        # a try that failed before is tried again, but not one that fails elsewhere in the meantime
        self.retried = {cell.name for cell in self.waiting if failure_of(cell.folder) is not None}

    def step(self) -> bool:
        """One look at all; whether there is anything left to wait for."""
        for cell, job in list(self.running):
            code = job.poll()
            if code is not None:
                self.running.remove((cell, job))
                self._ended(cell, code)
        self._look_elsewhere()
        while self.waiting and (self.launcher.slots is None or len(self.running) < self.launcher.slots):
            self._start(self.waiting.popleft())
        self.watcher.tick(self.board)
        return bool(self.waiting or self.running or self.elsewhere)

    def _start(self, cell: Cell) -> None:
        if is_busy(cell.folder):
            self._is_elsewhere(cell)
            return
        state = _standing(cell, retry_failed=cell.name in self.retried)
        if state is not State.PENDING:
            self._set(cell, state)
            return
        job = self.launcher.start(cell)
        self.running.append((cell, job))
        self.board.since[cell.name] = time.monotonic()
        self._set(cell, State.RUNNING)

    def _ended(self, cell: Cell, code: int) -> None:
        self.retried.discard(cell.name)
        if record_of(cell.folder) is not None:
            self._set(cell, State.DONE)
        elif code == BUSY or is_busy(cell.folder):
            # the latter where the worker was killed, and its run goes on
            self._is_elsewhere(cell)
        elif failure_of(cell.folder) is not None:
            self._set(cell, State.FAILED)
        elif code in (INTERRUPTED, -signal.SIGINT, -signal.SIGTERM):
            # the latter two if the signal came before its handler was set
            if self.launcher.again:
                self.waiting.append(cell)
            self._set(cell, State.PENDING if self.launcher.again else State.STOPPED)
        else:
            write_failure(cell.folder, code, "its worker was ended")
            self._set(cell, State.FAILED)

    def _is_elsewhere(self, cell: Cell) -> None:
        self.retried.discard(cell.name)
        self.elsewhere.append(cell)
        self._set(cell, State.RUNNING_ELSEWHERE)

    def _look_elsewhere(self) -> None:
        if not self.elsewhere or time.monotonic() - self.looked < self.elsewhere_pause:
            return
        self.looked = time.monotonic()
        for cell in list(self.elsewhere):
            if not is_busy(cell.folder):
                self.elsewhere.remove(cell)
                self.waiting.append(cell)
                self._set(cell, State.PENDING)

    def _set(self, cell: Cell, state: State) -> None:
        if state is not State.RUNNING:
            self.board.since.pop(cell.name, None)
        if self.board.states.get(cell.name) is not state:
            self.board.states[cell.name] = state
            self.watcher.changed(self.board, cell)

    def stop(self, grace: float) -> None:
        """Interrupt all that runs, and wait for it; what does not stop in time, or after a second Ctrl-C, is killed."""
        for _, job in self.running:
            job.interrupt()
        try:
            self._await(grace)
        except KeyboardInterrupt:
            self.watcher.tick(self.board)
        for _, job in self.running:
            if job.poll() is None:
                job.kill()
        self._await(_KILLED)
        for cell, _ in self.running:
            self._set(cell, State.DONE if record_of(cell.folder) is not None else State.STOPPED)
        self.running.clear()

    def _await(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while any(job.poll() is None for _, job in self.running) and time.monotonic() < ends:
            self.watcher.tick(self.board)
            time.sleep(0.1)


def _standing(cell: Cell, *, retry_failed: bool) -> State:
    if record_of(cell.folder) is not None:
        return State.DONE
    if not retry_failed and failure_of(cell.folder) is not None:
        return State.FAILED
    return State.PENDING


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """``SIGTERM``, as schedulers send it, stops what runs as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
