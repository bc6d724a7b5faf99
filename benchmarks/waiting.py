"""A server that speaks as much of the OpenAI API as is asked for here, and only waits."""

import asyncio
import json
import time
from typing import Any

from workers import Turn

# nothing here imports the package: the server is there at once
ANSWER = "bird : owl . tool : saw . bird : crow . bird : eagle . So the answer is saw ."
"""Of the toy's form and length; right for hardly any row, which makes no difference to the work."""

PROMPT_TOKENS, TOKENS = 480, 27
"""About what a model's tokenizer makes of the toy's prompt and of an answer."""


def serve(turn: Turn, delay: float) -> None:
    """Answer each question with the same text, so many seconds after the last byte of it came.

    Says its port first; each time that it is told something, its processor's seconds so far.
    """
    asyncio.run(_serve(turn, delay))


async def _serve(turn: Turn, delay: float) -> None:
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: _Connection(delay), "127.0.0.1", 0, backlog=1024)
    turn.answer(listener.sockets[0].getsockname()[1])
    while True:
        await loop.run_in_executor(None, turn.wait)
        turn.answer(time.process_time())


class _Connection(asyncio.Protocol):
    """Does as little as a server can: it finds where a request ends, and looks at nothing in it."""

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._held = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - for the type checker
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._held += data
        while (end := self._held.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._held[:end]).lower()
            _, found, rest = head.partition(b"\r\ncontent-length:")
            size = int(rest.partition(b"\r\n")[0]) if found else 0
            if len(self._held) < end + 4 + size:
                return
            del self._held[: end + 4 + size]
            if head.startswith(b"get "):
                self._transport.write(_MODELS)
            elif self._delay:
                asyncio.get_running_loop().call_later(self._delay, self._transport.write, _COMPLETION)
            else:
                self._transport.write(_COMPLETION)


def _response(content: dict[str, Any]) -> bytes:
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


_MODELS = _response({"object": "list", "data": [{"id": "waiting", "object": "model"}]})
_COMPLETION = _response(
    {
        "id": "answer",
        "object": "chat.completion",
        "created": 0,
        "model": "waiting",
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "logprobs": None,
                "message": {"role": "assistant", "content": ANSWER},
            }
        ],
        "usage": {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": TOKENS,
            "total_tokens": PROMPT_TOKENS + TOKENS,
        },
    }
)
