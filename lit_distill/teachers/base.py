"""The interface of teachers that answer questions."""

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

from lit_distill import checks
from lit_distill.errors import UserError
from lit_distill.questions import Layout, Prompt, Question, Reply, count_tokens


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

    concurrency: int = 16  # maximum questions in flight, unless the user sets it
    has_answered: bool = False  # ever in this job, so that later refusals concern single questions

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
        raise UserError(f"structured: {type(self).__name__} cannot follow a JSON schema")

    def count_tokens(self, prompt: Prompt) -> int:
        """Tokens of a prompt; estimated without a tokenizer."""
        return count_tokens(prompt)

    async def open(self) -> None:  # noqa: B027 - there may be nothing to do
        """Connect or load. Raises a ``UserError`` if the teacher is unavailable."""

    @abstractmethod
    async def answer(self, question: Question) -> Reply:
        """Answer one question; called concurrently.

        Raises a `TeacherError` if it cannot be answered, `TeacherBusy` if not now, a ``UserError`` if no question can.
        """

    async def close(self) -> None:  # noqa: B027 - there may be nothing to do
        """Release what `open` acquired."""


_Asked = tuple[Question, asyncio.Future[Reply]]
"""A question and the future of its answer."""


class BatchTeacher(Teacher):
    """A teacher that answers batches, such as a local model.

    Waiting questions are collected, sorted by length and answered in batches, longest first: little padding, and
    out-of-memory errors come early. Ties are sorted by prompt and seed, so that batches do not depend on the order of
    questions. All this runs in one daemon thread, which does not keep the process alive.

    Args:
        model: the model's name.
        batch_size: questions per batch.
        **kwargs: as in `Teacher`.
    """

    windows: ClassVar[int] = 16  # number of batches that are sorted together
    patience: ClassVar[float] = 0.2  # seconds for which a window that is not full waits for another question

    def __init__(self, model: str, batch_size: int = 8, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.batch_size = checks.check_int("batch_size", batch_size, 1)
        self.concurrency = self.windows * self.batch_size  # as many as are sorted together
        self._waiting: SimpleQueue[_Asked | None] = SimpleQueue()  # `None` ends the thread
        self._closed: asyncio.Future[None] | None = None

    def load(self) -> None:
        """Load, in the thread. Raises a ``UserError`` if the teacher is unavailable."""

    @abstractmethod
    def answer_batch(self, questions: Sequence[Question]) -> list[Reply | TeacherError]:
        """Answer a batch in order, in the thread. Raises a ``UserError`` if no question can be answered."""

    def unload(self) -> None:
        """Release what `load` acquired, in the thread."""

    async def open(self) -> None:
        """Start the thread and load."""
        self._loop = asyncio.get_running_loop()
        opened, self._closed = self._loop.create_future(), self._loop.create_future()
        threading.Thread(target=self._work, args=(opened, self._closed), name="teacher", daemon=True).start()
        await opened

    async def answer(self, question: Question) -> Reply:
        """Answer one question in a batch with others."""
        future: asyncio.Future[Reply] = self._loop.create_future()
        self._waiting.put((question, future))
        return await future

    async def close(self) -> None:
        """Wait for the running batch, and unload; the other questions have to be answered or cancelled before."""
        if self._closed is not None:
            self._waiting.put(None)
            await self._closed
            self._closed = None

    def _work(self, opened: asyncio.Future[None], closed: asyncio.Future[None]) -> None:
        """The thread."""
        self._settle([opened], self.load)
        while window := self._next_window():
            for start in range(0, len(window), self.batch_size):
                # cancelled ones are done
                batch = [asked for asked in window[start : start + self.batch_size] if not asked[1].done()]
                if batch:
                    questions, futures = zip(*batch, strict=True)
                    self._settle(futures, self.answer_batch, questions)
        self._settle([closed], self.unload)

    def _next_window(self) -> list[_Asked]:
        """The next questions, longest first; none once the teacher is closed."""
        window: list[_Asked] = []
        with suppress(Empty):
            while len(window) < self.concurrency:
                asked = self._waiting.get(timeout=self.patience if window else None)
                if asked is None:
                    return []
                window.append(asked)
        return sorted(window, key=_longest_first)

    def _settle(self, futures: Sequence[asyncio.Future[Any]], function: Callable[..., Any], *arguments: Any) -> None:
        """Give futures the results of a function, or what it raises, all at once."""
        try:
            result = function(*arguments)
            results = result if isinstance(result, list) else [result]
            if len(results) != len(futures):
                raise RuntimeError(f"{type(self).__name__} answered {len(results)} of {len(futures)} questions")
        except StopIteration as error:
            # asyncio futures cannot hold it
            results = [RuntimeError(repr(error))] * len(futures)
        except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
            results = [error] * len(futures)
        # the loop has ended if nobody waited for this thread
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_set_results, futures, results)


def _set_results(futures: Sequence[asyncio.Future[Any]], results: Sequence[Any]) -> None:
    for future, result in zip(futures, results, strict=True):
        if isinstance(result, BaseException) and not future.done():
            future.set_exception(result)
        elif not future.done():
            future.set_result(result)


def _longest_first(asked: _Asked) -> tuple[int, str, int]:
    written = repr(asked[0].prompt)
    return -len(written), written, asked[0].sampling.seed
