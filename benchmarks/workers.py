"""Processes that take turns: each does one piece of work when told to, and sleeps while another one works.

What a process changes for itself (how its C library gives memory back, its peak) then reaches no other side.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from lit_distill.errors import UserError

_PATIENCE_S = 5.0
"""How long a process that nobody waits for any more may take to end by itself."""


class WorkerError(Exception):
    """A process failed, or is gone; the message is one line."""


class Turn(Protocol):
    """What a process sees of the one that started it."""

    def wait(self) -> Any:
        """Sleep until told to do something, and return what."""

    def answer(self, value: object) -> None:
        """Say that it is done, with what was found."""


class Worker:
    """A process, seen from the one that starts it.

    Args:
        name: what it is called in messages.
        function: ``module:function`` of what it runs, a function of a `Turn` and the arguments. By name: whoever starts
            a process need not import what that one imports.
        *arguments: its arguments.
    """

    def __init__(self, name: str, function: str, *arguments: object) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, function, arguments), daemon=True)
        self._process.start()
        # with a second holder of that end there would be no end of file when the process dies
        theirs.close()

    def tell(self, command: object = None) -> None:
        """Let it begin with something.

        Raises:
            WorkerError: it is gone.
        """
        try:
            self._connection.send(command)
        except OSError:
            # it may have said why before it ended
            self.answer()
            raise WorkerError(self._ending()) from None

    def answer(self) -> Any:
        """What it says next.

        Raises:
            WorkerError: it failed, or is gone.
        """
        try:
            failed, value = self._connection.recv()
        except (EOFError, OSError):
            raise WorkerError(self._ending()) from None
        if failed:
            raise WorkerError(value)
        return value

    def ask(self, command: object = None) -> Any:
        """Tell it something, and wait for the answer."""
        self.tell(command)
        return self.answer()

    def end(self, patience: float = 0.0) -> None:
        """Be rid of the process, which has so many seconds to end by itself."""
        self._connection.close()
        self._process.join(patience)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ending(self) -> str:
        self._process.join(_PATIENCE_S)
        code = self._process.exitcode
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += ", which the system also sends when memory runs out"
        else:
            how = f"ended too early, with exit code {code}"
        return f"the process of {self.name} {how}"


@contextmanager
def running(functions: dict[str, tuple[Any, ...]]) -> Iterator[dict[str, Worker]]:
    """Processes by name, which end with the block, however it is left.

    Args:
        functions: name -> the arguments of `Worker` after the name.
    """
    workers: dict[str, Worker] = {}
    patience = 0.0
    try:
        for name, arguments in functions.items():
            workers[name] = Worker(name, *arguments)
        yield workers
        patience = _PATIENCE_S
    finally:
        for worker in workers.values():
            worker.end(patience)


class _Gone(Exception):
    """Nobody is there any more to work for."""


class _Turn:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def wait(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            raise _Gone from None

    def answer(self, value: object) -> None:
        try:
            self._connection.send((False, value))
        except OSError:
            raise _Gone from None


def _serve(connection: Connection, function: str, arguments: tuple[Any, ...]) -> None:
    # Ctrl-C reaches all processes of a terminal; the first one ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # standard output belongs to the one that reports
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    module, _, name = function.partition(":")
    try:
        getattr(importlib.import_module(module), name)(_Turn(connection), *arguments)
    except _Gone:
        return
    except Exception as error:  # noqa: BLE001 - all of them go to the one that waits for an answer
        _tell_fault(connection, error)


def _tell_fault(connection: Connection, error: Exception) -> None:
    text = str(error)
    if not isinstance(error, UserError):
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        text = f"{type(error).__name__}: {text}{place}"
    try:
        connection.send((True, text))
    except OSError:
        return
