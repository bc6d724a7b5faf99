"""``serve``: answer HTTP requests by a student."""

import os
import socket
from importlib.util import find_spec

from lit_distill.checks import check_int, check_range
from lit_distill.errors import UserError
from lit_distill.exporting.engine import EngineName, check_engine
from lit_distill.exporting.predictor import own_tasks
from lit_distill.interrupts import interruptible
from lit_distill.students import StudentFiles
from lit_distill.tasks import answer_task, rationale_task


def serve(
    student: list[str],
    port: int = 8000,
    host: str = "127.0.0.1",
    engine: EngineName | None = None,
    workers: int = 1,
    batch_size: int = 32,
    batch_timeout: float = 0.0,
    max_inputs: int = 64,
    max_characters: int = 10_000,
    timeout: float = 30.0,
    cpu_threads: int | None = None,
) -> None:
    """Serve a student until Ctrl-C or SIGTERM; requests in flight are answered.

    Args:
        student: an export, run, folder, checkpoint or hub name.
        port: of ``POST /predict``, ``/docs``, ``/health`` and ``/metrics``.
        host: address to listen on; ``0.0.0.0`` for all of this machine.
        engine: what computes; by default ctranslate2 for its export, transformers for others.
        workers: processes that each load the student.
        batch_size: rows that are answered together, of one request or several.
        batch_timeout: seconds to wait for more rows than have come while the last batch was computed.
        max_inputs: maximum inputs of a request.
        max_characters: maximum characters of an input.
        timeout: seconds for a body to arrive and for a request to be answered.
        cpu_threads: threads of each worker; by default its share of the cores.
    """
    if len(student) != 1:
        raise UserError("student: one must be given, as in `lit-distill serve STUDENT --port 8000`")
    check_int("port", port, 1, 65_535)
    for name, value in (("workers", workers), ("batch_size", batch_size), ("max_inputs", max_inputs)):
        check_int(name, value, 1, 10_000)
    check_int("max_characters", max_characters, 1, 10_000_000)
    check_range("timeout", timeout, above=0, at_most=86_400)
    check_range("batch_timeout", batch_timeout, at_least=0, at_most=timeout)
    if cpu_threads is not None:
        check_int("cpu_threads", cpu_threads, 1, 1024)
    if missing := [name for name in ("litserve", "prometheus_client") if find_spec(name) is None]:
        raise UserError(f'{missing[0]} is not installed: pip install "lit_distill[serve]"')
    [name] = student
    # what can be told before a worker has loaded the student
    files = StudentFiles(name)
    tasks = own_tasks(files.config)[0]
    answer_task(tasks)
    check_engine(name, engine)
    with interruptible(), _listen(host, port) as listener:
        from lit_distill.serving.server import Settings, make_server, run_server
        from lit_distill.serving.worker import StudentAPI

        threads = cpu_threads or max((os.cpu_count() or 1) // workers, 1)
        api = StudentAPI(name, engine, threads, batch_size=batch_size, batch_timeout=batch_timeout)
        settings = Settings(max_inputs, max_characters, timeout)
        server = make_server(api, settings, workers=workers, writes=rationale_task(tasks) is not None)
        run_server(server, listener, timeout)


def _listen(host: str, port: int) -> socket.socket:
    """The port, taken before anything is loaded. Raises a ``UserError`` if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UserError(f"host: {host!r} is no address of this machine, as 127.0.0.1 or 0.0.0.0") from error
    listener = socket.socket(family, kind, protocol)
    # a port whose last server has just ended is free
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UserError(f"port: {port} of {host} cannot be used: {error.strerror}; give another as --port") from error
    return listener
