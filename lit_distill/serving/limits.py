"""Limits of size and time around all requests, which also counts them."""

import asyncio
import time

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lit_distill.serving.metrics import Metrics


class Limits:
    """Refuses a body that is too large as soon as this is known, and one that does not arrive in time.

    Args:
        app: what answers.
        max_bytes: of a body, whether its length is announced or it comes in chunks.
        timeout: seconds in which the body must arrive.
        metrics: counts.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout: float, metrics: Metrics) -> None:
        self.app, self.max_bytes, self.timeout, self.metrics = app, max_bytes, timeout, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body bounded, and count the response."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, size, whole = time.monotonic(), 0, False
        announced = dict(scope["headers"]).get(b"content-length", b"0")

        async def bounded() -> Message:
            nonlocal size, whole
            if whole:
                # waits for the client to leave
                return await receive()
            if int(announced) > self.max_bytes:
                raise self._too_large()
            try:
                message = await asyncio.wait_for(receive(), started + self.timeout - time.monotonic())
            except TimeoutError:
                raise HTTPException(408, f"body: must arrive within {self.timeout:g} seconds") from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self.max_bytes:
                raise self._too_large()
            return message

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.count(scope["path"], message["status"], time.monotonic() - started)
            await send(message)

        await self.app(scope, bounded, counted)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"body: at most {self.max_bytes:,} bytes are allowed", {"Connection": "close"})
