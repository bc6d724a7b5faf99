"""The interface of teachers that answer questions."""

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
    """This question cannot be answered, even by trying again; others may be."""


class TeacherBusy(Exception):
    """This question failed after all retries, but may succeed later."""


class Teacher(ABC):
    """Answers questions concurrently.

    The constructor neither connects nor loads anything; `open` does. Errors that affect every question (a wrong key, no
    server, no such model) are a ``UserError``, from `open` or an answer, and end the job.

    Args:
        model: the model's name as the teacher knows it.
        name: the teacher's name in its samples; by default the last part of ``model``.
        layout: prompts are the turns of a ``chat`` or a text for ``completion``.
        input_price: US dollars per million prompt tokens; without prices, cost is not counted.
        output_price: US dollars per million tokens of answers.
    """

    follows_schema: ClassVar[bool] = False  # whether answers can be constrained to a JSON schema

    has_answered: bool = False
    """Whether it has ever answered in this job, so that later refusals concern single questions."""

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
        """Whether more questions follow without waiting for an answer."""

    @property
    def concurrency(self) -> int:
        """Maximum questions in flight, unless the user sets it."""
        return 16

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that affect answers, in plain values: no key, address or price."""
        return {"class": type(self).__name__, "model": self.model, "layout": self.layout}

    def cost(self, input_tokens: int, output_tokens: int) -> float | None:
        """Cost in US dollars; ``None`` without prices."""
        if self.input_price is None and self.output_price is None:
            return None
        return (input_tokens * (self.input_price or 0.0) + output_tokens * (self.output_price or 0.0)) / 1e6

    def check_schema(self) -> None:
        """Raise a ``UserError`` if answers cannot be constrained to a JSON schema."""
        if not self.follows_schema:
            raise UserError(f"structured: {type(self).__name__} cannot follow a JSON schema")

    def count_tokens(self, prompt: Prompt) -> int:
        """Tokens of a prompt; estimated without a tokenizer."""
        return count_tokens(prompt)

    async def open(self) -> None:  # noqa: B027 - there may be nothing to do
        """Connect or load. Raises a ``UserError`` if the teacher is unavailable."""

    @abstractmethod
    async def answer(self, question: Question) -> Reply:
        """Answer one question; called concurrently.

        Raises:
            TeacherError: this question cannot be answered.
            TeacherBusy: it could not be answered now.
            UserError: no question can.
        """

    async def close(self) -> None:  # noqa: B027 - there may be nothing to do
        """Release what `open` acquired."""


_Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]
_Asked = tuple[Question, asyncio.Future[Reply]]
"""A question and the future of its answer."""


class BatchTeacher(Teacher):
    """A teacher that answers batches, such as a local model.

    Waiting questions are collected, sorted by length and answered in batches, longest first: little padding, and
    out-of-memory errors come early. Ties are sorted by prompt and seed, so that batches do not depend on the order of
    questions. Loading and batches run in one daemon thread, which does not keep the process alive.

    Args:
        model: the model's name.
        batch_size: questions per batch.
        **kwargs: as in `Teacher`.
    """

    windows: ClassVar[int] = 16  # number of batches that are sorted together

    def __init__(self, model: str, batch_size: int = 8, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.batch_size = checks.check_int("batch_size", batch_size, 1)
        self._waiting: list[_Asked] = []
        self._pump: asyncio.Task[None] | None = None
        self._calls: SimpleQueue[_Call | None] | None = None

    @property
    def concurrency(self) -> int:
        """The number of questions that are sorted together."""
        return self.windows * self.batch_size

    def load(self) -> None:
        """Load, in the thread. Raises a ``UserError`` if the teacher is unavailable."""

    @abstractmethod
    def answer_batch(self, questions: Sequence[Question]) -> list[Reply | TeacherError]:
        """Answer a batch in order, in the thread. Raises a ``UserError`` if no question can be answered."""

    def unload(self) -> None:
        """Release what `load` acquired, in the thread."""

    async def open(self) -> None:
        """Start the thread and load."""
        await self._in_thread(self.load)

    async def answer(self, question: Question) -> Reply:
        """Answer one question in a batch with others."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._answer_waiting())
        return await future

    async def close(self) -> None:
        """Wait for the running batch, and unload."""
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
            # wait for questions to come: a partial window wastes the device
            await asyncio.sleep(0.01)
            while self.more_to_come() and len(self._waiting) < self.concurrency:
                await asyncio.sleep(0.01)
            window, self._waiting = sorted(self._waiting, key=_longest_first), []
            for start in range(0, len(window), self.batch_size):
                # cancelled ones are done
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
                # asyncio futures cannot hold it
                future.set_exception(RuntimeError(f"{function.__qualname__} raised {error!r}"))
            except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
                future.set_exception(error)
        # do not keep tensors alive while waiting
        del call, future, function, arguments
