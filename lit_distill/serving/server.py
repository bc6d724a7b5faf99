"""A LitServe server for a student: endpoint, limits, metrics, and its life from the port to the last answer."""

import asyncio
import logging
import math
import reprlib
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from socket import socket
from typing import Any, cast

import uvicorn
from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from litserve import LitServer  # type: ignore[import-untyped]
from litserve.utils import (  # type: ignore[import-untyped]
    LitAPIStatus,
    ResponseBufferItem,
    WorkerSetupStatus,
    configure_logging,
    wrap_litserve_start,
)
from starlette.exceptions import HTTPException as StarletteError
from starlette.requests import Request as HTTPRequest

from lit_distill import __version__
from lit_distill.interrupts import handling
from lit_distill.serving.answers import Question
from lit_distill.serving.connection import Connection
from lit_distill.serving.limits import Limits
from lit_distill.serving.metrics import Metrics
from lit_distill.serving.schema import Prediction, Refusal, Request, Response
from lit_distill.serving.worker import PATH, StudentAPI

WAITING = 10_000
"""Rows that may wait; requests beyond are refused at once."""


@dataclass(frozen=True)
class Settings:
    """Limits of requests.

    Args:
        max_inputs: in a request.
        max_characters: of an input.
        timeout: seconds for a body to arrive, and for a request to be answered.
    """

    max_inputs: int = 64
    max_characters: int = 10_000
    timeout: float = 30.0

    @property
    def max_bytes(self) -> int:
        """Of a body: JSON may write a character as 12."""
        return self.max_inputs * (12 * self.max_characters + 4) + 1000


def make_server(api: StudentAPI, settings: Settings, *, workers: int = 1, writes: bool = True) -> LitServer:
    """The server, not started; ``writes`` says whether the student writes rationales."""
    metrics = Metrics()
    limits = {"max_bytes": settings.max_bytes, "timeout": settings.timeout, "metrics": metrics}
    server = LitServer(
        api,
        accelerator="cpu",
        workers_per_device=workers,
        timeout=settings.timeout,
        middlewares=[(Limits, limits)],
        model_metadata={"student": api.student},
        restart_workers=True,
    )
    queue, app = _RowQueue(server, metrics, settings.timeout), server.app
    app.title, app.version = "lit_distill", __version__
    app.description = (
        f"At most {settings.max_inputs} inputs a request, {settings.max_characters:,} characters an input and"
        f" {settings.timeout:g} seconds."
    )

    async def predict(request: Request) -> Response:
        """Label each input, with the label's likelihood and, on request, a rationale."""
        _check(request, settings, writes)
        return Response(predictions=await queue.ask([Question(text, request.rationale) for text in request.inputs]))

    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": Refusal, "description": text}
        for status, text in {
            400: "The body is not JSON.", 408: "The body did not arrive in time.", 413: "The body is too large.",
            422: "An argument is invalid.", 500: "The student failed.", 503: "Too much is waiting, or a worker died.",
            504: "There was no answer in time.",
        }.items()
    }  # fmt: skip
    app.add_api_route(PATH, predict, methods=["POST"], responses=refusals)

    async def metrics_text() -> PlainTextResponse:
        """Counts in Prometheus' text format."""
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    app.add_api_route("/metrics", metrics_text, methods=["GET"], response_class=PlainTextResponse)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StarletteError, _refused)
    return server


def run_server(server: LitServer, listener: socket, timeout: float) -> None:
    """Start the workers, serve until SIGINT or SIGTERM, answer what is in flight, and end the workers.

    Raises:
        SystemExit: if a worker cannot load the student; it has said why.
    """
    host, port = listener.getsockname()[:2]
    configure_logging(logging.WARNING, stream=sys.stderr)
    server.monitor_internal = 0.2
    with wrap_litserve_start(server, worker_monitor=True), _unwatched_end(server):
        _wait_for_workers(server)
        config = uvicorn.Config(
            server.app,
            http=cast(Any, partial(Connection, timeout=timeout)),
            # uvloop raises what is sent to a client that has left, if it sent several requests at once
            loop="asyncio",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=math.ceil(timeout),
        )
        # uvicorn sends itself the signal again when it is done, and then the workers are still to be ended
        with handling(lambda number: None):
            _Announced(config, f"Serving at http://{host}:{port} (/docs, /health, /metrics); Ctrl-C ends it.").run(
                [listener]
            )


@contextmanager
def _unwatched_end(server: LitServer) -> Iterator[None]:
    """At the block's end LitServe's monitor ends, which would start ended workers again."""
    try:
        yield
    finally:
        server._shutdown_event.set()
        for thread in threading.enumerate():
            if thread.name == "litserve-monitoring":
                thread.join()


class _Announced(uvicorn.Server):
    """Prints a line when it accepts requests."""

    def __init__(self, config: uvicorn.Config, line: str) -> None:
        super().__init__(config)
        self.line = line

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.line, flush=True)


def _wait_for_workers(server: LitServer) -> None:
    while any(status != WorkerSetupStatus.READY for status in server.workers_setup_status.values()):
        if ended := [one for one in server.inference_workers if not one.is_alive()]:
            raise SystemExit(ended[0].exitcode or 1)
        time.sleep(0.05)


class _RowQueue:
    """Sends rows to the workers, one by one, so that rows of several requests make a batch."""

    def __init__(self, server: LitServer, metrics: Metrics, timeout: float) -> None:
        self.server, self.metrics, self.timeout = server, metrics, timeout

    async def ask(self, questions: Sequence[Question]) -> list[Prediction]:
        """The answers, in order. Raises an ``HTTPException`` without one."""
        buffer: dict[str, ResponseBufferItem] = self.server.response_buffer
        if len(buffer) + len(questions) > WAITING:
            raise HTTPException(503, f"inputs: {len(buffer):,} rows are waiting; try again later", {"Retry-After": "1"})
        rows = self.server.litapi_request_queues[PATH]
        uids = [uuid.uuid4().hex for _ in questions]
        try:
            for uid, question in zip(uids, questions, strict=True):
                buffer[uid] = ResponseBufferItem(asyncio.Event())
                rows.put((self.server.app.response_queue_id, uid, time.monotonic(), question))
            self.metrics.waiting.set(len(buffer))
            async with asyncio.timeout(self.timeout):
                for uid in uids:
                    await buffer[uid].event.wait()
            found = [buffer[uid].response for uid in uids]
        except TimeoutError:
            raise HTTPException(504, f"inputs: not answered within {self.timeout:g} seconds; send fewer") from None
        finally:
            # an answer that comes later is dropped
            for uid in uids:
                buffer.pop(uid, None)
            self.metrics.waiting.set(len(buffer))
        return [self._prediction(*one) for one in found if one is not None]

    def _prediction(self, answer: Any, status: str) -> Prediction:
        if status != LitAPIStatus.ERROR:
            self.metrics.rows.inc()
            return Prediction(**answer)
        if isinstance(answer, HTTPException):
            # it waited for too long
            raise HTTPException(504, f"inputs: not answered within {self.timeout:g} seconds; send fewer")
        if answer is None:
            raise HTTPException(503, "inputs: the worker that had them died; send them again", {"Retry-After": "1"})
        raise HTTPException(500, "inputs: the student failed; the server's log says why")


def _check(request: Request, settings: Settings, writes: bool) -> None:
    """Raise an ``HTTPException`` with one line for a request beyond the limits."""
    number, longest = len(request.inputs), max(map(len, request.inputs), default=0)
    if not 1 <= number <= settings.max_inputs:
        raise HTTPException(422, f"inputs: 1 to {settings.max_inputs} are allowed, got {number}")
    if longest > settings.max_characters:
        row = [*map(len, request.inputs)].index(longest)
        raise HTTPException(422, f"inputs.{row}: {settings.max_characters} characters are allowed, got {longest}")
    if blank := [row for row, text in enumerate(request.inputs) if not text.strip()]:
        raise HTTPException(422, f"inputs.{blank[0]}: must be a text, got {request.inputs[blank[0]]!r:.100}")
    if request.rationale and not writes:
        raise HTTPException(422, "rationale: this student writes none; allowed is false")


def _refusal(status: int, line: str, headers: Any = None) -> JSONResponse:
    return JSONResponse({"detail": " ".join(line.split())}, status, headers)


async def _invalid(request: HTTPRequest, error: Exception) -> JSONResponse:
    """The first fault of a body as one line."""
    assert isinstance(error, RequestValidationError)  # noqa: S101 - for types
    fault = error.errors()[0]
    if fault["type"] == "json_invalid":
        return _refusal(400, f"body: not JSON ({fault['ctx']['error']} at character {fault['loc'][-1]})")
    if isinstance(fault["input"], bytes):
        return _refusal(422, "body: must be JSON, with the header Content-Type: application/json")
    place = ".".join(map(str, fault["loc"][1:])) or "body"
    if fault["type"] in ("missing", "value_error"):
        return _refusal(422, f"{place}: {fault['msg'].removeprefix('Value error, ')}")
    return _refusal(422, f"{place}: {fault['msg']}, got {reprlib.repr(fault['input'])}")


async def _refused(request: HTTPRequest, error: Exception) -> JSONResponse:
    """Starlette's own refusals, with what is allowed."""
    assert isinstance(error, StarletteError)  # noqa: S101 - for types
    known = {
        400: "body: not JSON in UTF-8, or too deep",
        404: f"{request.url.path:.100}: no such page; allowed are POST {PATH}, GET /health, /metrics, /docs",
        405: f"{request.method:.20} {request.url.path:.100}: allowed is {(error.headers or {}).get('Allow', '')}",
    }
    return _refusal(error.status_code, known.get(error.status_code, str(error.detail)), error.headers)
