"""Ask a teacher very many questions: a bounded number at a time, within a budget, until it is told to stop."""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Generic, TypeVar

from lit_distill.errors import UserError
from lit_distill.questions import Question, Reply
from lit_distill.teachers.base import Teacher, TeacherBusy, TeacherError

Tag = TypeVar("Tag")
"""What a question is known by to whoever asks it."""

Rounds = Iterator[list[tuple[Tag, Question]]]
"""The questions about one row; a further round, where there is one, is asked for when the one before is answered."""

GRACE_SECONDS = 10.0
"""How long questions under way may take once no other can be answered."""

_AHEAD = 8
"""Rows whose questions are written before one of those under way is answered."""

_PATIENCE = 20
"""Questions in a row that are not answered, beside those under way, before a teacher counts as gone."""


class Budget:
    """What a job may use; what is under way counts as much as questions did so far.

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
        self._asked, self._tokens_asked, self._cost_asked = 0, 0, 0.0

    def add(self, tokens: int, cost: float) -> None:
        """Count an answer."""
        self.tokens, self.cost = self.tokens + tokens, self.cost + cost
        self._asked += 1
        self._tokens_asked, self._cost_asked = self._tokens_asked + tokens, self._cost_asked + cost

    def exhausted(self, under_way: int) -> str | None:
        """Which limit is reached, with that many questions under way; ``None`` where another can be asked."""
        expected = under_way / self._asked if self._asked else 0.0
        if self.max_tokens is not None and self.tokens + expected * self._tokens_asked >= self.max_tokens:
            return f"max_tokens {self.max_tokens:,} reached"
        if self.max_cost is not None and self.cost + expected * self._cost_asked >= self.max_cost:
            return f"max_cost {self.max_cost:g} reached"
        return None


class Asking(Generic[Tag]):
    """A job of questions to one teacher.

    Args:
        teacher: who is asked; it is opened and closed here.
        concurrency: questions under way at most; few more rows than that are in memory.
        tell: takes each answer, or why there is none for good, as soon as it is there.
        budget: counts what is used and ends the job; ``tell`` adds to it.
    """

    def __init__(
        self,
        teacher: Teacher,
        concurrency: int,
        tell: Callable[[Tag, Reply | TeacherError], None],
        budget: Budget | None = None,
    ) -> None:
        self._teacher, self._concurrency, self._tell = teacher, concurrency, tell
        self._budget = budget or Budget()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._under_way = 0
        self._busy_in_a_row = 0
        self._answered = self._refused = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self.stopped: str | None = None
        """Why no more is asked; ``None`` where everything was."""
        self.busy = 0
        """Questions that were not answered now, and are left for another start."""

    def stop(self, reason: str) -> None:
        """Ask no more; what is under way is waited for. From any thread."""
        if self._loop is not None and self._loop.is_running():
            self._loop.call_soon_threadsafe(self._stop, reason)
        else:
            self._stop(reason)

    def run(self, rows: Iterator[Rounds[Tag]]) -> None:
        """Ask everything there is to ask.

        The first Ctrl-C (or SIGTERM) waits for what is under way, a second one does not. Runs in a thread of its own,
        so that it can be called where an event loop runs, as in a notebook.

        Args:
            rows: each row's questions; read as they are needed.

        Raises:
            UserError: the teacher cannot answer any question.
        """
        failures: list[BaseException] = []
        ended = threading.Event()

        def work() -> None:
            try:
                asyncio.run(self._run(rows))
            except BaseException as error:  # noqa: BLE001 - it is raised in the caller's thread
                failures.append(error)
            finally:
                ended.set()

        thread = threading.Thread(target=work, name="asking", daemon=True)
        with _terminated_as_interrupted():
            thread.start()
            interrupted = False
            # not `join`: interrupted, it takes the thread for ended
            while not ended.is_set():
                try:
                    ended.wait(0.5)
                except KeyboardInterrupt:
                    if interrupted:
                        self._give_up()
                    self.stop("interrupted")
                    interrupted = True
        thread.join()
        if failures and not isinstance(failures[0], asyncio.CancelledError):
            raise failures[0]

    async def _run(self, rows: Iterator[Rounds[Tag]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._slots = asyncio.Semaphore(self._concurrency)
        try:
            await self._teacher.open()
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
            await self._wait_for_fewer_than(1)
        finally:
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._teacher.close()
        if self._failure is not None:
            raise self._failure

    async def _wait_for_fewer_than(self, rows: int) -> None:
        """Until fewer rows are under way; once no question can be answered, not much longer."""
        while len(self._tasks) >= rows and self._failure is None:
            await asyncio.wait(self._tasks, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
        if self._failure is not None and self._tasks:
            await asyncio.wait(self._tasks, timeout=GRACE_SECONDS)
            self._cancel()

    async def _row(self, row: Rounds[Tag], asked: list[tuple[Tag, Question]] | None) -> None:
        try:
            while asked and self.stopped is None:
                await asyncio.gather(*(self._one(tag, question) for tag, question in asked))
                asked = next(row, None)
        except Exception as error:  # noqa: BLE001 - it is raised by `_run`, and ends the job
            self._fail(error)

    async def _one(self, tag: Tag, question: Question) -> None:
        async with self._slots:
            if self.stopped is None and (limit := self._budget.exhausted(self._under_way)) is not None:
                self._stop(limit)
            if self.stopped is not None:
                return
            self._under_way += 1
            try:
                said: Reply | TeacherError = await self._teacher.answer(question)
            except TeacherError as error:
                said = error
                self._refused += 1
            except TeacherBusy as error:
                self.busy += 1
                self._busy_in_a_row += 1
                if self._busy_in_a_row >= _PATIENCE + self._concurrency:
                    self._fail(UserError(f"teacher: {self._teacher.name} does not answer any more ({error})"))
                return
            finally:
                self._under_way -= 1
            self._busy_in_a_row = 0
            self._tell(tag, said)
            if isinstance(said, Reply):
                self._answered += 1
            elif not self._answered and self._refused >= _PATIENCE:
                # what is wrong with all of them is not wrong with each
                self._fail(UserError(f"teacher: the first {self._refused} questions were all refused ({said})"))

    def _stop(self, reason: str) -> None:
        self.stopped = self.stopped or reason

    def _fail(self, error: Exception) -> None:
        self._failure = self._failure or error
        self._stop("failed")

    def _give_up(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()


def _terminated_as_interrupted() -> AbstractContextManager[None]:
    """SIGTERM, as schedulers send it, is taken as Ctrl-C; only a process's first thread can be told so."""

    @contextmanager
    def taken() -> Iterator[None]:
        def interrupt(number: int, frame: FrameType | None) -> None:
            raise KeyboardInterrupt

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    return taken()
