"""A small server that speaks the OpenAI API on loopback, as well or as badly as a test tells it to; how it is asked."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from lit_distill.questions import Question
from lit_distill.teachers.base import Teacher

MODELS = ("tiny", "other")


def ask_all(teacher: Teacher, questions: Sequence[Question]) -> list[Any]:
    """A teacher's answers to questions that are asked at once, or the errors that they end in."""

    async def run() -> list[Any]:
        await teacher.open()
        try:
            return await asyncio.gather(*map(teacher.answer, questions), return_exceptions=True)
        finally:
            await teacher.close()

    return asyncio.run(run())


@dataclass(frozen=True)
class Request:
    """What came in."""

    number: int
    """From 0 on, among the questions; those for the list of models are not counted."""
    method: str
    path: str
    headers: Mapping[str, str]
    """With names in lower case."""
    body: dict[str, Any]

    @property
    def prompt(self) -> str:
        """The last turn of a chat, or the whole text of a completion."""
        messages = self.body.get("messages")
        return str(messages[-1]["content"] if messages else self.body.get("prompt", ""))


@dataclass(frozen=True)
class Act:
    """What the server does with a request; as it stands, it answers at once and well."""

    status: int = 200
    body: Any = None
    """JSON, or the very bytes; if not given, `completion` of `answer_to` for a question, the models for a list."""
    headers: Mapping[str, str] = field(default_factory=dict)
    until: Callable[[], bool] | None = None
    """Asked again and again before the first byte, which waits for it to be true."""
    delay: float = 0.0
    """Seconds before the first byte, after that."""
    drip: float = 0.0
    """Seconds between tenths of the body."""
    cut: bool = False
    """Close the connection in the middle of the body."""


Behaviour = Callable[[Request], Act]


def answer_to(prompt: str) -> str:
    """What the server answers a prompt."""
    return f"answer to <{prompt}>"


def completion(request: Request, text: str | None = None, **choice: Any) -> dict[str, Any]:
    """The body of a good response; its tokens are words.

    Args:
        request: what is answered.
        text: the answer, if it is not `answer_to` the prompt.
        **choice: fields of its one choice, beside or instead of the usual ones.
    """
    text = answer_to(request.prompt) if text is None else text
    chat = "messages" in request.body
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    usage = {"prompt_tokens": len(request.prompt.split()), "completion_tokens": len(text.split())}
    return {
        "id": f"answer-{request.number}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": request.body.get("model", ""),
        "choices": [{"index": 0, "finish_reason": "stop", "logprobs": None, **said, **choice}],
        "usage": {**usage, "total_tokens": sum(usage.values())},
    }


def fail(status: int, message: str = "no", code: str | None = None, **act: Any) -> Act:
    """An error in OpenAI's form."""
    return Act(status, {"error": {"message": message, "type": "trouble", "param": None, "code": code}}, **act)


class Server:
    """What a test sees of the server."""

    def __init__(self, behave: Behaviour) -> None:
        self._behave = behave
        self.port = 0
        self.requests: list[Request] = []
        """The questions, in the order in which they came."""
        self.others: list[Request] = []
        """What else came."""
        self.running, self.peak = 0, 0
        """Questions being answered: now, and at most so far."""
        self.connections = 0
        """Connections that were made."""

    @property
    def url(self) -> str:
        """What goes into a teacher's ``base_url``."""
        return f"http://127.0.0.1:{self.port}/v1"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one connection's requests, one after the other."""
        self.connections += 1
        try:
            while await self._serve_one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        start, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = start.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        asks = path in ("/v1/chat/completions", "/v1/completions")
        seen = self.requests if asks else self.others
        request = Request(len(seen), method, path, headers, json.loads(content) if content else {})
        seen.append(request)
        if not asks:
            return await self._send(writer, request, self._behave(request))
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            return await self._send(writer, request, self._behave(request))
        finally:
            self.running -= 1

    async def _send(self, writer: asyncio.StreamWriter, request: Request, act: Act) -> bool:
        while act.until is not None and not act.until():
            await asyncio.sleep(0.01)
        if act.delay:
            await asyncio.sleep(act.delay)
        body = act.body
        if body is None and act.status == 200:
            models = {"object": "list", "data": [{"id": name, "object": "model"} for name in MODELS]}
            body = models if request.path == "/v1/models" else completion(request)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json", **act.headers, "content-length": str(len(content))}
        lines = [f"HTTP/1.1 {act.status} {HTTPStatus(act.status).phrase}", *(f"{k}: {v}" for k, v in headers.items())]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        if act.cut:
            writer.write(head + content[: len(content) // 2])
            await writer.drain()
            return False
        if act.drip:
            writer.write(head)
            step = max(len(content) // 10, 1)
            for first in range(0, len(content), step):
                await asyncio.sleep(act.drip)
                writer.write(content[first : first + step])
                await writer.drain()
            return True
        writer.write(head + content)
        await writer.drain()
        return True


def lists_models(behave: Behaviour) -> Behaviour:
    """A behaviour for the questions alone; the list of models is given as ever."""
    return lambda request: behave(request) if request.path != "/v1/models" else Act()


def in_turn(acts: Sequence[Act]) -> Behaviour:
    """One act for each question in the order in which they come; what comes after them is answered well."""
    return lists_models(lambda request: acts[request.number] if request.number < len(acts) else Act())


@contextmanager
def serving(behaviour: Behaviour | Sequence[Act] = ()) -> Iterator[Server]:
    """A server in a thread of its own, for as long as the block runs.

    Args:
        behaviour: what it does with a request; a sequence of acts is for the questions `in_turn`.
    """
    server = Server(behaviour if callable(behaviour) else in_turn(behaviour))
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def run() -> None:
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, backlog=1024)
        server.port = listener.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        listener.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def work() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(run())

    thread = threading.Thread(target=work, name="teacher-server", daemon=True)
    thread.start()
    try:
        if not ready.wait(10):
            raise RuntimeError("the server did not start")
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
