"""Ask a teacher very many questions: a bounded number at a time, within a budget, until it is interrupted."""

import asyncio
import queue
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar

from lit_distill.errors import UserError
from lit_distill.questions import Question, Reply, count_tokens
from lit_distill.teachers.base import DaemonThreads, Teacher, TeacherBusy, TeacherError

Tag = TypeVar("Tag")
"""What a question is known by to whoever asks it."""

Rounds = Iterator[list[tuple[Tag, Question]]]
"""The questions about one row; a further round, where there is one, is asked for when the one before is answered."""

GRACE_SECONDS = 10.0
"""How long questions in flight may take once no other can be answered."""

LEAVE_SECONDS = 1.0
"""How long a teacher that is left at once has to close."""

_LOOK_SECONDS = 0.2
"""Between two looks at whether anything was interrupted."""

_HELPERS = 32
"""Threads at most for what a teacher hands to one (names of hosts are looked up there, too)."""

_AHEAD = 8
"""Rows whose questions are written before one of those in flight is answered."""

_PATIENCE = 20
"""Questions in a row that are not answered, beside those in flight, before a teacher counts as gone."""


class Budget:
    """What a job may use. A question is asked only where there is room for its prompt and its longest answer.

    Args:
        max_tokens: of prompts and answers together.
        max_cost: in US dollars.
        tokens: used already.
        cost: used already.
    """

    def __init__(
        self, max_tokens: int | None = None, max_cost: float | None = None, tokens: int = 0, cost: float = 0.0
    ) -> None:
        self.max_tokens, self.max_cost = max_tokens, max_cost
        self.tokens, self.cost = tokens, cost
        self._reserved_tokens, self._reserved_cost = 0, 0.0

    def use(self, tokens: int, cost: float) -> None:
        """Count what an answer used."""
        self.tokens, self.cost = self.tokens + tokens, self.cost + cost

    def reserve(self, tokens: int, cost: float) -> None:
        """Set apart what a question may use; negative once it is answered."""
        self._reserved_tokens, self._reserved_cost = self._reserved_tokens + tokens, self._reserved_cost + cost

    def exhausted(self, tokens: int, cost: float) -> str | None:
        """Which limit a question that may use so much would break, with those in flight; ``None`` where none."""
        needed = "{} used, and the next question may take {}"
        if self.max_tokens is not None and self.tokens + self._reserved_tokens + tokens > self.max_tokens:
            return f"max_tokens {self.max_tokens:,} reached: " + needed.format(f"{self.tokens:,}", f"{tokens:,}")
        # what is added and taken off again leaves a rounding error
        if self.max_cost is not None and self.cost + self._reserved_cost + cost > self.max_cost * (1 + 1e-9):
            return f"max_cost {self.max_cost:g} reached: " + needed.format(f"{self.cost:.4g}", f"{cost:.4g}")
        return None


class Interrupts:
    """Ctrl-C, and SIGTERM as schedulers send it, are noted for as long as the block runs, and interrupt nothing.

    Only a process's first thread can be told so; in another, the block changes nothing.
    """

    def __init__(self) -> None:
        # a handler may put into one whatever the thread was about
        self.noted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        def note(number: int, frame: FrameType | None) -> None:
            self.noted.put(True)

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # one that is ignored, as under nohup, stays so
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)


class RequestRunner(Generic[Tag]):
    """Asks one teacher a job's questions.

    Args:
        teacher: who is asked; it is opened and closed here.
        concurrency: questions in flight at most; few more rows than that are in memory.
        on_result: takes each answer, or why there is none for good, as soon as it is there; never once `run` has
            returned. What a teacher refuses is told once it has answered anything, now or earlier.
        budget: bounds what is used and ends the job; ``on_result`` counts what each answer used.
    """

    def __init__(
        self,
        teacher: Teacher,
        concurrency: int,
        on_result: Callable[[Tag, Reply | TeacherError], None],
        budget: Budget | None = None,
    ) -> None:
        self._teacher, self._concurrency, self._on_result = teacher, concurrency, on_result
        self._budget = budget or Budget()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opening: asyncio.Future[None] | None = None
        self._opened = False
        self._in_flight = self._unasked = 0
        self._more_rows, self._waits_for_room = True, False
        self._busy_in_a_row = 0
        self._refused: list[tuple[Tag, TeacherError]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._given_up = False
        self._telling = threading.Lock()
        self._over = False
        self.stopped: str | None = None
        """Why no more is asked; ``None`` where everything was."""
        self.busy: Counter[str] = Counter()
        """Why questions were not answered now, which are left for another start, and how many."""

    def run(self, rows: Iterator[Rounds[Tag]], interrupts: Interrupts | None = None) -> None:
        """Ask everything there is to ask.

        The first Ctrl-C (or SIGTERM) waits for what is in flight, a second one for nothing; while the teacher opens,
        the first one does not either. Runs in a thread of its own, so that it can be called where an event loop runs,
        as in a notebook; where a teacher does not let go of it, the thread is left behind, and tells nothing any more.

        Args:
            rows: each row's questions; read as they are needed.
            interrupts: what was interrupted; its block may be longer than the asking.

        Raises:
            UserError: the teacher cannot answer any question.
        """
        if interrupts is None:
            with Interrupts() as interrupts:
                return self.run(rows, interrupts)
        failures: list[BaseException] = []
        noted = interrupts.noted

        def work() -> None:
            try:
                asyncio.run(self._run(rows))
            except BaseException as error:  # noqa: BLE001 - it is raised in the caller's thread
                failures.append(error)
            finally:
                noted.put(False)

        thread = threading.Thread(target=work, name="asking", daemon=True)
        thread.start()
        interrupted = False
        deadline: float | None = None
        while deadline is None or time.monotonic() < deadline:
            try:
                # for a moment each time: a signal that the system gives to another thread wakes nobody here
                if not noted.get(timeout=_LOOK_SECONDS):
                    break
            except queue.Empty:
                continue
            self._stop("interrupted")
            if self._opened and not interrupted:
                print("interrupted: what is in flight is waited for, after a second interruption not", file=sys.stderr)
            else:
                if self._loop is not None:
                    # it may have ended meanwhile
                    with suppress(RuntimeError):
                        self._loop.call_soon_threadsafe(self._give_up)
                deadline = deadline or time.monotonic() + LEAVE_SECONDS
            interrupted = True
        with self._telling:
            self._over = True
        if failures and not isinstance(failures[0], asyncio.CancelledError):
            raise failures[0]
        return None

    async def _run(self, rows: Iterator[Rounds[Tag]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(DaemonThreads(_HELPERS))
        self._slots = asyncio.Semaphore(self._concurrency)
        self._gate, self._answered = asyncio.Lock(), asyncio.Event()
        try:
            if not await self._open():
                return
            self._teacher.more_to_come = self._more_to_come
            for number, row in enumerate(rows):
                if number % 256 == 0:
                    # rows that have nothing to ask are passed over without any wait; others go on meanwhile
                    await asyncio.sleep(0)
                if self.stopped is not None:
                    break
                first = next(row, None)
                if first is None:
                    continue
                await self._wait_for_fewer_than(self._concurrency + _AHEAD)
                if self.stopped is not None:
                    break
                task = asyncio.create_task(self._row(row, first))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            self._more_rows = False
            await self._wait_for_fewer_than(1)
            if self._failure is None:
                self._tell_refused()
        finally:
            self._more_rows = False
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._teacher.close()
        if self._failure is not None:
            raise self._failure

    async def _open(self) -> bool:
        """Open the teacher; whether anything is to be asked then."""
        self._opening = asyncio.ensure_future(self._teacher.open())
        if self.stopped is not None:
            self._opening.cancel()
        try:
            await self._opening
        except asyncio.CancelledError:
            if self.stopped is None:
                raise
        self._opened = True
        return self.stopped is None

    async def _wait_for_fewer_than(self, rows: int) -> None:
        """Until fewer rows are in flight; once no question can be answered, not much longer."""
        while len(self._tasks) >= rows and self._failure is None:
            await asyncio.wait(self._tasks, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
        if self._failure is not None and self._tasks:
            await asyncio.wait(self._tasks, timeout=GRACE_SECONDS)
            self._cancel()

    async def _row(self, row: Rounds[Tag], asked: list[tuple[Tag, Question]] | None) -> None:
        try:
            while asked and self.stopped is None:
                self._unasked += len(asked)
                await asyncio.gather(*(self._one(tag, question) for tag, question in asked))
                asked = next(row, None)
        except Exception as error:  # noqa: BLE001 - it is raised by `_run`, and ends the job
            self._fail(error)

    async def _one(self, tag: Tag, question: Question) -> None:
        """Ask a question; what goes wrong for good ends the job, but not the row's other questions in flight."""
        try:
            async with self._slots:
                await self._ask(tag, question)
        except asyncio.CancelledError:
            if self._given_up or self._failure is not None:
                raise
            self._fail(RuntimeError(f"{type(self._teacher).__name__} cancelled a question that nobody gave up"))
        except Exception as error:  # noqa: BLE001 - it is raised by `_run`, too
            self._fail(error)

    async def _ask(self, tag: Tag, question: Question) -> None:
        # one question after the other looks whether there is room for it
        async with self._gate:
            tokens, cost = self._most(question)
            while self.stopped is None and (limit := self._budget.exhausted(tokens, cost)) is not None:
                if not self._in_flight:
                    self._stop(limit)
                    break
                # those in flight seldom use all that was set apart for them
                self._waits_for_room = True
                await self._answered.wait()
                self._waits_for_room = False
            if self.stopped is not None:
                return
            self._budget.reserve(tokens, cost)
            self._in_flight += 1
            self._unasked -= 1
        try:
            said: Reply | TeacherError = await self._teacher.answer(question)
        except TeacherError as error:
            said = error
        except TeacherBusy as error:
            self.busy[" ".join(str(error).split())] += 1
            self._busy_in_a_row += 1
            if self._busy_in_a_row >= _PATIENCE + self._concurrency:
                self._fail(UserError(f"teacher: {self._teacher.name} does not answer any more ({error})"))
            return
        finally:
            self._in_flight -= 1
            self._budget.reserve(-tokens, -cost)
            self._answered.set()
            self._answered = asyncio.Event()
        self._busy_in_a_row = 0
        if isinstance(said, TeacherError) and not self._teacher.has_answered:
            # what is wrong with all of them is not wrong with each
            self._refused.append((tag, said))
            if len(self._refused) >= _PATIENCE:
                refused = f"the first {len(self._refused)} questions were all refused ({said})"
                self._fail(UserError(f"teacher: {refused}; none of them is kept as failed"))
            return
        if isinstance(said, Reply):
            self._teacher.has_answered = True
            self._tell_refused()
        self._tell_unless_over(tag, said)

    def _more_to_come(self) -> bool:
        """Whether more questions are about to be asked, without waiting for an answer."""
        return (
            (self._more_rows or self._unasked > 0)
            and self._in_flight < self._concurrency
            and not self._waits_for_room
            and self.stopped is None
        )

    def _most(self, question: Question) -> tuple[int, float]:
        """Tokens and US dollars that a question may use, about."""
        read, written = count_tokens(question.prompt), question.sampling.max_new_tokens
        return read + written, self._teacher.cost(read, written) or 0.0

    def _tell_refused(self) -> None:
        while self._refused:
            self._tell_unless_over(*self._refused.pop(0))

    def _tell_unless_over(self, tag: Tag, said: Reply | TeacherError) -> None:
        with self._telling:
            if not self._over:
                self._on_result(tag, said)

    def _stop(self, reason: str) -> None:
        self.stopped = self.stopped or reason

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._stop("failed")

    def _give_up(self) -> None:
        self._given_up = True
        if self._opening is not None:
            self._opening.cancel()
        self._cancel()

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
