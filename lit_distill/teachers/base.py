"""What every teacher has in common: a question is answered, or it is told why it is not."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, ClassVar, TypeVar

from lit_distill import checks
from lit_distill.errors import UserError
from lit_distill.questions import Layout, Prompt, Question, Reply, count_tokens

T = TypeVar("T")


class TeacherError(Exception):
    """This question will not be answered however often it is asked; the others may be."""


class TeacherBusy(Exception):
    """This question was not answered now, after all that was tried; at another time it may be."""


class Teacher(ABC):
    """Answers questions, many at a time.

    A teacher is made without being reached or loaded: that is for `open`. What would fail for every question alike (a
    wrong key, no server, no such model) is raised as a ``UserError``, by `open` or by the first answer, and ends
    the whole job.

    Args:
        model: the model's name as the teacher knows it.
        name: what its rows are told apart by; if not given, the last part of ``model``.
        layout: prompts as the turns of a ``chat`` or as a text for ``completion``.
        input_price: US dollars for a million tokens of prompts; if not given, cost is not counted.
        output_price: US dollars for a million tokens of answers.
    """

    follows_schema: ClassVar[bool] = False
    """Whether answers can be held to a JSON schema."""

    has_answered: bool = False
    """Whether it has answered anything, in this job or an earlier start of it: what it refuses then is refused for the
    question's sake."""

    def __init__(
        self,
        model: str,
        name: str | None = None,
        layout: Layout = "chat",
        input_price: float | None = None,
        output_price: float | None = None,
    ) -> None:
        self.model = checks.check_text("model", model)
        self.name = checks.check_text("name", name) if name is not None else model.rstrip("/").rpartition("/")[2]
        self.layout: Layout = checks.check_choice("layout", layout, ("chat", "completion"))
        checks.check_range("input_price", input_price, at_least=0)
        checks.check_range("output_price", output_price, at_least=0)
        self.input_price, self.output_price = input_price, output_price
        self.more_to_come: Callable[[], bool] = lambda: False
        """Whether more questions are about to be asked, without waiting for an answer."""

    @property
    def concurrency(self) -> int:
        """Questions that it takes at a time, where the user says nothing of it."""
        return 16

    @property
    def settings(self) -> dict[str, Any]:
        """What its answers depend on beside the question, in plain values: no key, no address, no price."""
        return {"class": type(self).__name__, "model": self.model, "layout": self.layout}

    def cost(self, input_tokens: int, output_tokens: int) -> float | None:
        """US dollars for so many tokens; ``None`` where no price is known."""
        if self.input_price is None and self.output_price is None:
            return None
        return (input_tokens * (self.input_price or 0.0) + output_tokens * (self.output_price or 0.0)) / 1e6

    def check_schema(self) -> None:
        """See that answers can be held to a JSON schema.

        Raises:
            UserError: they cannot.
        """
        if not self.follows_schema:
            raise UserError(f"structured: {type(self).__name__} cannot be held to a JSON schema")

    def count_tokens(self, prompt: Prompt) -> int:
        """Tokens of a prompt; about, where a teacher has no tokenizer of its own."""
        return count_tokens(prompt)

    async def open(self) -> None:  # noqa: B027 - there may be nothing to do
        """Get ready, before the first question.

        Raises:
            UserError: it is unavailable.
        """

    @abstractmethod
    async def answer(self, question: Question) -> Reply:
        """Answer one question; called for many at the same time.

        Raises:
            TeacherError: this question cannot be answered.
            TeacherBusy: it could not be answered now.
            UserError: no question can.
        """

    async def close(self) -> None:  # noqa: B027 - there may be nothing to do
        """Let go of what `open` took."""


class DaemonThreads(ThreadPoolExecutor):
    """Threads that nobody waits for: a process ends though one of them is stuck.

    Args:
        most: threads at most.
    """

    def __init__(self, most: int) -> None:
        # it starts no thread by itself
        super().__init__(most)
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._most, self._started = most, 0

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        """As the base class's."""
        future: Future[T] = Future()
        self._calls.put((future, partial(fn, *args, **kwargs)))
        if self._started < self._most:
            self._started += 1
            Thread(target=_call_all, args=(self._calls,), name="teacher", daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end once they have done what was given to them; does not wait for it."""
        for _ in range(self._started):
            self._calls.put(None)
        self._started = 0


def _call_all(calls: "SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]") -> None:
    while (call := calls.get()) is not None:
        future, function = call
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is waited for
            future.set_exception(_raisable(error))
        # what a thread that waits would hold on to
        del call, future, function


def _raisable(error: BaseException) -> BaseException:
    """An exception as one that a future can hold: a ``StopIteration`` would leave whoever waits for it waiting."""
    if not isinstance(error, StopIteration):
        return error
    raisable = RuntimeError("a teacher's function raised StopIteration")
    raisable.__cause__ = error
    return raisable


class BatchTeacher(Teacher):
    """A teacher that answers batches, as a model in this process does.

    The questions that wait are taken together, sorted by length, and answered batch by batch, the longest first: a
    batch then holds little padding, and memory that does not suffice shows at once. Questions of one length go by
    their prompts and seeds, so that a window makes the same batches in whatever order it was asked.

    Whatever is slow or holds a device runs in one thread, always the same, which the process does not wait for at its
    end.

    Args:
        model: the model's name.
        batch_size: questions in a batch.
        **kwargs: the arguments of `Teacher`.
    """

    windows: ClassVar[int] = 16
    """Batches that are sorted together."""

    def __init__(self, model: str, batch_size: int = 8, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.batch_size = checks.check_int("batch_size", batch_size, 1)
        self._waiting: list[_Asked] = []
        self._pump: asyncio.Task[None] | None = None
        self._thread: DaemonThreads | None = None

    @property
    def concurrency(self) -> int:
        """As many questions as are sorted together."""
        return self.windows * self.batch_size

    def load(self) -> None:
        """Get ready; runs in the thread of the batches.

        Raises:
            UserError: it is unavailable.
        """

    @abstractmethod
    def answer_batch(self, questions: Sequence[Question]) -> list[Reply | TeacherError]:
        """Answer a batch, in its order; runs in the thread.

        Raises:
            UserError: no question can be answered.
        """

    def unload(self) -> None:
        """Let go of what `load` took; runs in the thread."""

    async def open(self) -> None:
        """Load what answers.

        Raises:
            UserError: it is unavailable.
        """
        await self._in_thread(self.load)

    async def answer(self, question: Question) -> Reply:
        """Answer one question, with others that wait."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._answer_waiting())
        return await future

    async def close(self) -> None:
        """Wait for the batch in flight, and let go of what answered."""
        if self._pump is not None and not self._pump.done():
            await asyncio.wait([self._pump])
        await self._in_thread(self.unload)
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        if self._thread is None:
            self._thread = DaemonThreads(1)
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def _answer_waiting(self) -> None:
        while self._waiting:
            # a window that is not full wastes the device: let whoever is about to ask do so
            await asyncio.sleep(0.01)
            while self.more_to_come() and len(self._waiting) < self.concurrency:
                await asyncio.sleep(0.01)
            window, self._waiting = self._waiting, []
            try:
                window = await self._sort(window)
            except Exception as error:  # noqa: BLE001 - it is raised where the answers are waited for
                for asked in window:
                    _settle(asked, error)
                continue
            for start in range(0, len(window), self.batch_size):
                # nobody waits for what was given up
                batch = [asked for asked in window[start : start + self.batch_size] if not asked[1].done()]
                if batch:
                    await self._answer_one_batch(batch)

    async def _sort(self, window: list["_Asked"]) -> list["_Asked"]:
        """Those that can be measured, the longest first; the others are told."""
        measured = []
        for asked, size in zip(window, await self._in_thread(self._measure, window), strict=True):
            if isinstance(size, int):
                question = asked[0]
                measured.append(((-size, repr(question.prompt), question.sampling.seed), asked))
            else:
                _settle(asked, size)
        return [asked for _, asked in sorted(measured, key=lambda pair: pair[0])]

    def _measure(self, window: list["_Asked"]) -> list[int | Exception]:
        sizes: list[int | Exception] = []
        for question, _ in window:
            try:
                sizes.append(self.count_tokens(question.prompt))
            except Exception as error:  # noqa: BLE001 - it is raised where the answer is waited for
                sizes.append(error)
        return sizes

    async def _answer_one_batch(self, batch: list["_Asked"]) -> None:
        try:
            replies = await self._in_thread(self.answer_batch, [question for question, _ in batch])
            if len(replies) != len(batch):
                raise RuntimeError(f"{type(self).__name__} answered {len(replies)} of {len(batch)} questions")
        except Exception as error:  # noqa: BLE001 - it is raised where the answers are waited for
            for asked in batch:
                _settle(asked, error)
            return
        for asked, reply in zip(batch, replies, strict=True):
            _settle(asked, reply)


_Asked = tuple[Question, asyncio.Future[Reply]]
"""A question and whoever waits for the answer."""


def _settle(asked: _Asked, outcome: Reply | Exception) -> None:
    _, future = asked
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(_raisable(outcome))
    else:
        future.set_result(outcome)
