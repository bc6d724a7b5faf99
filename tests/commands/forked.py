"""Commands in processes of their own that start at once: a process that has imported everything forks for each."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_WORK = """
import faulthandler, json, os, resource, signal, sys
from lit_distill.commands import dispatch
from lit_distill.cli import main
import lit_distill.commands.annotate, openai, datasets, matplotlib.pyplot
print("ready", flush=True)
for line in sys.stdin:
    arguments, out, folder, seconds, file_size = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 0
        log = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if folder is not None:
            os.chdir(folder)
        if seconds is not None:
            # of the processor, whoever else uses it; a minute more by the clock for what waits
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
            faulthandler.register(signal.SIGXCPU, chain=True)
            signal.alarm(3 * seconds)
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, used + 2**32))
        if file_size is not None:
            # the log is a file too
            keep = os.dup(1)
            pipe_out, pipe_in = os.pipe()
            reader = os.fork()
            if reader == 0:
                os.close(pipe_in)
                while chunk := os.read(pipe_out, 65536):
                    os.write(keep, chunk)
                os._exit(0)
            os.dup2(pipe_in, 1)
            os.dup2(pipe_in, 2)
            os.close(pipe_in)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        try:
            main(arguments)
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 0
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 70
        sys.stdout.flush()
        sys.stderr.flush()
        if file_size is not None:
            # until what was said is in the log
            os.close(1)
            os.close(2)
            os.waitpid(reader, 0)
        os._exit(code)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Forked:
    """Starts commands, one at a time."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def start(
        self,
        arguments: list[str],
        output: str,
        folder: str | None = None,
        seconds: int | None = None,
        file_size: int | None = None,
    ) -> int:
        """Start a command; its output goes to a file.

        Args:
            arguments: the command and its arguments.
            output: the file.
            folder: where it works.
            seconds: of the processor that it may take; its memory is bounded too.
            file_size: bytes that a file of its may hold, as on a full disk.

        Returns:
            Its process's number.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([arguments, output, folder, seconds, file_size]) + "\n")
        self._process.stdin.flush()
        return int(self._read())

    def wait(self) -> int:
        """Wait for it.

        Returns:
            Its exit code; below zero the signal that ended it.
        """
        return int(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that starts others has ended"
        return line


@contextmanager
def forking() -> Iterator[Forked]:
    """A process that starts commands, for as long as the block runs."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", _WORK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Forked(process)
    finally:
        process.kill()
        process.communicate()
