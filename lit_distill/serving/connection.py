"""Limits on the head of a request, which uvicorn reads before any of our code sees it."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 2**16
"""Bytes of a request's line and headers."""


class Connection(HttpToolsProtocol):
    """A connection that is closed if the head of a request is too large, or is not there in time.

    uvicorn itself waits without end, also for a client that sends a byte a minute on each of many connections.

    Args:
        timeout: seconds for the head of a request.
        **kwargs: what uvicorn gives its connections.
    """

    def __init__(self, *, timeout: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._timeout = timeout
        self._deadline: asyncio.TimerHandle | None = None
        self._size = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._deadline is None and not self._is_busy():
            self._await_head()
        super().data_received(data)
        if self._is_busy():
            self._stop()
        elif (size := self._size + len(data)) > MAX_HEAD and not self.transport.is_closing():
            self.send_400_response(f"headers: at most {MAX_HEAD:,} bytes are allowed")
        else:
            self._size = size

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._stop()
        super().connection_lost(exc)

    def _is_busy(self) -> bool:
        """Whether a request is being answered, or its body is read."""
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._size, self._deadline = 0, self.loop.call_later(self._timeout, self.timeout_keep_alive_handler)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
