"""Does `serve` lose no request of many clients, how long does an answer take, and is its memory flat?

    python benchmarks/serve_load.py --student RUN --clients 200 --seconds 60

Starts `lit-distill serve` on this machine and asks it from as many connections, each of which sends its next request
when it has the answer to the last: 1 to 4 inputs of the toy, a tenth of the requests with rationales. A request is lost
if it has another answer than 200 with a label of each input. Memory is that of all of the server's processes which no
other process shares, at start, in the middle and at the end. At the end the server gets SIGTERM, with the last requests
in flight. The last line is a JSON object. Exits with 1 if a request is lost or a process is left behind.
"""

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
from options import OneLineParser, one_line_errors

from lit_distill.data.toy import toy_example
from lit_distill.errors import UserError


@dataclass
class Found:
    """What the clients see."""

    seconds: list[float] = field(default_factory=list)  # of each request
    rows: int = 0
    lost: dict[str, int] = field(default_factory=dict)  # by reason
    ended: bool = False  # no request is to be sent any more

    def lose(self, reason: str) -> None:
        """Count a lost request."""
        self.lost[reason] = self.lost.get(reason, 0) + 1


async def client(number: int, port: int, found: Found) -> None:
    """Ask until it is ended; a connection that breaks loses its request."""
    draw = random.Random(number)  # noqa: S311 - no secret
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with closing(writer):
            while not found.ended:
                await ask(reader, writer, draw, found)
    except (OSError, EOFError) as error:
        found.lose(type(error).__name__)


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, draw: random.Random, found: Found) -> None:
    """Send a request, and read its answer."""
    started = time.monotonic()
    inputs = [toy_example(1, "test", draw.randrange(500)).input for _ in range(draw.randint(1, 4))]
    body = json.dumps({"inputs": inputs, "rationale": draw.random() < 0.1}).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    writer.write(head.encode() + b"\r\n\r\n" + body)
    answered = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    [length] = [line.split()[1] for line in answered.split("\r\n") if line.startswith("content-length:")]
    content = json.loads(await reader.readexactly(int(length)))
    status = answered.split()[1]
    if status != "200":
        found.lose(f"status {status}: {content['detail']}")
    elif len(content["predictions"]) != len(inputs) or not all(one["label"] for one in content["predictions"]):
        found.lose("no label")
    else:
        found.seconds.append(time.monotonic() - started)
        found.rows += len(inputs)


def megabytes(process: psutil.Process) -> float:
    """Of a process and its children, without what they share."""
    return sum(one.memory_full_info().uss for one in [process, *process.children(recursive=True)]) / 1e6


async def load(port: int, clients: int, seconds: float, server: psutil.Process) -> tuple[Found, list[float]]:
    """All clients at once, with the server's memory after the first seconds, in the middle and just before the end."""
    found, memory = Found(), []
    end = time.monotonic() + seconds
    asking = [asyncio.create_task(client(number, port, found)) for number in range(clients)]
    for share in (0.1, 0.5, 0.95):
        await asyncio.sleep(max(end - seconds * (1 - share) - time.monotonic(), 0))
        memory.append(megabytes(server))
    await asyncio.sleep(max(end - time.monotonic(), 0))
    # each client waits for its last answer
    found.ended = True
    server.terminate()
    await asyncio.gather(*asking)
    return found, memory


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``argv`` are its arguments, by default the process's."""
    parser = OneLineParser(prog="serve_load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="what serve takes")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("options", nargs="*", help="more options of serve, after --")
    asked = parser.parse_args(argv)
    with one_line_errors(parser.prog):
        if asked.clients < 1 or not 0 < asked.seconds < 1e5:
            raise UserError("clients must be at least 1 and seconds above 0")
        found = run(asked.student, asked.clients, asked.seconds, asked.options)
    print(json.dumps({"benchmark": "serve_load", **found}))
    if found["lost"] or found["left_behind"] or found["code"] != 0:
        raise SystemExit(1)


def run(student: str, clients: int, seconds: float, options: Sequence[str]) -> dict[str, Any]:
    """Serve, ask, and tell."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lit_distill", "serve", student, "--port", str(port), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:  # noqa: S603 - our own program
        if server.stdout is None or not server.stdout.readline().startswith("Serving"):
            raise UserError(f"serve ended with code {server.wait()}")
        watched = psutil.Process(server.pid)
        processes = [watched, *watched.children(recursive=True)]
        answered, memory = asyncio.run(load(port, clients, seconds, watched))
        code = server.wait(timeout=60)
    p50, p99 = np.percentile(answered.seconds or [np.nan], [50, 99]) * 1000
    print(f"requests       {len(answered.seconds):,}, lost {sum(answered.lost.values())} {answered.lost or ''}")
    print(f"a second       {len(answered.seconds) / seconds:,.1f} requests, {answered.rows / seconds:,.1f} rows")
    print(f"milliseconds   p50 {p50:,.0f}, p99 {p99:,.0f}")
    print(f"megabytes      {', '.join(f'{one:,.1f}' for one in memory)}, of {len(processes)} processes")
    return {
        "student": student, "clients": clients, "seconds": seconds, "options": list(options),
        "requests": len(answered.seconds), "lost": answered.lost, "rows_a_second": answered.rows / seconds,
        "p50_ms": p50, "p99_ms": p99, "megabytes": memory, "code": code,
        "left_behind": len(psutil.wait_procs(processes, timeout=5)[1]),
    }  # fmt: skip


if __name__ == "__main__":
    main()
