"""What all teachers have in common: each answers a question, or raises why it does not."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, ClassVar, TypeVar

from lit_distill import checks
from lit_distill.errors import UserError
from lit_distill.questions import Layout, Prompt, Question, Reply, count_tokens

T = TypeVar("T")


class TeacherError(Exception):
    """This question will not be answered however often it is asked; others may be."""


class TeacherBusy(Exception):
    """This question was not answered after all retries; at another time it may be."""


class Teacher(ABC):
    """Answers questions, many at a time.

    The constructor neither connects nor loads anything: that is for `open`. What would fail for every question (a wrong
    key, no server, no such model) is raised as a ``UserError`` by `open` or by an answer, and ends the whole job.

    Args:
        model: the model's name as the teacher knows it.
        name: the teacher's name in the rows that it wrote; by default the last part of ``model``.
        layout: prompts are the turns of a ``chat`` or a text for ``completion``.
        input_price: US dollars for a million tokens of prompts; without a price, cost is not counted.
        output_price: US dollars for a million tokens of answers.
    """

    follows_schema: ClassVar[bool] = False
    """Whether answers can be made to follow a JSON schema."""

    has_answered: bool = False
    """Whether it has answered anything, in this job or an earlier start of it: later refusals concern one question."""

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
        """Questions in flight at a time, unless the user sets it."""
        return 16

    @property
    def settings(self) -> dict[str, Any]:
        """What the answers depend on beside the question, in plain values: no key, no address, no price."""
        return {"class": type(self).__name__, "model": self.model, "layout": self.layout}

    def cost(self, input_tokens: int, output_tokens: int) -> float | None:
        """US dollars for so many tokens; ``None`` where no price is known."""
        if self.input_price is None and self.output_price is None:
            return None
        return (input_tokens * (self.input_price or 0.0) + output_tokens * (self.output_price or 0.0)) / 1e6

    def check_schema(self) -> None:
        """Raise a ``UserError`` if answers cannot be made to follow a JSON schema."""
        if not self.follows_schema:
            raise UserError(f"structured: {type(self).__name__} cannot follow a JSON schema")

    def count_tokens(self, prompt: Prompt) -> int:
        """Tokens of a prompt; an estimate for a teacher without a tokenizer of its own."""
        return count_tokens(prompt)

    async def open(self) -> None:  # noqa: B027 - there may be nothing to do
        """Get ready before the first question; raises a ``UserError`` if the teacher is unavailable."""

    @abstractmethod
    async def answer(self, question: Question) -> Reply:
        """Answer one question; called for many at the same time.

        Raises:
            TeacherError: this question cannot be answered.
            TeacherBusy: it could not be answered now.
            UserError: no question can.
        """

    async def close(self) -> None:  # noqa: B027 - there may be nothing to do
        """Release what `open` took."""


_Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]
_Asked = tuple[Question, asyncio.Future[Reply]]
"""A question and the future of its answer."""


class BatchTeacher(Teacher):
    """A teacher that answers batches, as a model in this process does.

    Waiting questions are taken together, sorted by length, and answered batch by batch, the longest first: batches hold
    little padding, and memory that does not suffice shows at once. Ties are sorted by prompt and seed, so that a window
    makes the same batches in whatever order it was asked. Loading and batches run in one daemon thread, which never
    keeps the process alive.

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
        self._calls: SimpleQueue[_Call | None] | None = None

    @property
    def concurrency(self) -> int:
        """As many questions as are sorted together."""
        return self.windows * self.batch_size

    def load(self) -> None:
        """Get ready, in the thread of the batches; raises a ``UserError`` if the teacher is unavailable."""

    @abstractmethod
    def answer_batch(self, questions: Sequence[Question]) -> list[Reply | TeacherError]:
        """Answer a batch in its order, in the thread; raises a ``UserError`` if no question can be answered."""

    def unload(self) -> None:
        """Release what `load` took, in the thread."""

    async def open(self) -> None:
        """Load what answers."""
        await self._in_thread(self.load)

    async def answer(self, question: Question) -> Reply:
        """Answer one question, together with others that wait."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._answer_waiting())
        return await future

    async def close(self) -> None:
        """Wait for the batch in flight, and release what answered."""
        if self._pump is not None and not self._pump.done():
            await asyncio.wait([self._pump])
        await self._in_thread(self.unload)
        if self._calls is not None:
            self._calls.put(None)
            self._calls = None

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        if self._calls is None:
            self._calls = SimpleQueue()
            Thread(target=_work, args=(self._calls,), name="teacher", daemon=True).start()
        future: Future[T] = Future()
        self._calls.put((future, function, arguments))
        return await asyncio.wrap_future(future)

    async def _answer_waiting(self) -> None:
        while self._waiting:
            # a window that is not full wastes the device: wait for questions that are about to come
            await asyncio.sleep(0.01)
            while self.more_to_come() and len(self._waiting) < self.concurrency:
                await asyncio.sleep(0.01)
            window, self._waiting = sorted(self._waiting, key=_longest_first), []
            for start in range(0, len(window), self.batch_size):
                # those that were given up are done
                batch = [asked for asked in window[start : start + self.batch_size] if not asked[1].done()]
                outcomes = await self._outcomes([question for question, _ in batch]) if batch else []
                for (_, future), outcome in zip(batch, outcomes, strict=True):
                    if future.done():
                        continue
                    if isinstance(outcome, Reply):
                        future.set_result(outcome)
                    else:
                        future.set_exception(outcome)

    async def _outcomes(self, questions: list[Question]) -> Sequence[Reply | Exception]:
        try:
            replies = await self._in_thread(self.answer_batch, questions)
            if len(replies) != len(questions):
                raise RuntimeError(f"{type(self).__name__} answered {len(replies)} of {len(questions)} questions")
        except Exception as error:  # noqa: BLE001 - raised where the answers are awaited
            return [error] * len(questions)
        return replies


def _longest_first(asked: _Asked) -> tuple[int, str, int]:
    written = repr(asked[0].prompt)
    return -len(written), written, asked[0].sampling.seed


def _work(calls: "SimpleQueue[_Call | None]") -> None:
    while (call := calls.get()) is not None:
        future, function, arguments = call
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*arguments))
            except StopIteration as error:
                # no asyncio future can hold it
                future.set_exception(RuntimeError(f"{function.__qualname__} raised {error!r}"))
            except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
                future.set_exception(error)
        # a waiting thread must not hold on to tensors
        del call, future, function, arguments
