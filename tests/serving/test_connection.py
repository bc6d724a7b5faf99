"""Heads of requests that are too large or too slow, sent to uvicorn over a socket."""

import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import pytest
import uvicorn

from lit_distill.serving.connection import MAX_HEAD, Connection

Address = tuple[str, int]
TIMEOUT = 0.3
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"
OK = b"HTTP/1.1 200 OK\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer when the body is there, or the client is gone."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    listener = socket.create_server(("127.0.0.1", 0))
    protocol = cast(Any, partial(Connection, timeout=TIMEOUT))
    server = uvicorn.Server(uvicorn.Config(app, http=protocol, lifespan="off", log_level="warning", loop="asyncio"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield listener.getsockname()
    server.should_exit = True
    thread.join()


def answer(address: Address, *parts: bytes, pause: float = 0.0) -> bytes:
    """What comes before the server closes the connection, or after it is asked to."""
    with socket.create_connection(address, timeout=5) as client:
        for part in parts:
            try:
                client.sendall(part)
            except ConnectionError:
                break
            time.sleep(pause)
        found = b""
        try:
            while got := client.recv(4096):
                found += got
        except ConnectionResetError:
            pass
        return found


def test_a_head_that_does_not_end_closes_the_connection(address: Address) -> None:
    started = time.monotonic()
    assert answer(address, HEAD) == b""
    assert answer(address) == b""
    assert 2 * TIMEOUT <= time.monotonic() - started < 4
    # a byte now and then, and after a first request whose connection stays open
    assert answer(address, *[b"\r\n"] * 8, HEAD, b"\r\n", pause=TIMEOUT / 5) == b""
    first = HEAD + b"Content-Length: 0\r\n\r\n"
    assert answer(address, first, HEAD).count(OK) == 1


def test_a_body_may_take_longer(address: Address) -> None:
    head = HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\n"
    assert answer(address, head, b"a", b"b", pause=TIMEOUT).startswith(OK)


def test_a_head_that_is_too_large_is_refused(address: Address) -> None:
    close = b"Connection: close\r\nContent-Length: 0\r\n\r\n"
    assert answer(address, HEAD + b"X: " + b"a" * (MAX_HEAD // 2) + b"\r\n" + close).startswith(OK)
    found = answer(address, HEAD, *[b"X: " + b"a" * 10_000 + b"\r\n"] * 9, close)
    # all but the answer may be lost where the client still writes
    assert found == b"" or b"400 Bad Request" in found
    assert OK not in found
