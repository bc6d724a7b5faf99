"""Jobs of the benchmark of `annotate`, each in a process of its own."""

import contextlib
import gc
import io
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from measure import Memory, MemoryProbe
from report import machine
from waiting import PROMPT_TOKENS, TOKENS
from workers import Turn

from lit_distill.commands.annotate import annotate
from lit_distill.data import ToyDataModule
from lit_distill.data.toy import KINDS
from lit_distill.evaluation.answers import Split
from lit_distill.questions import Question, Reply
from lit_distill.tasks import Row
from lit_distill.teachers import OpenAITeacher, Teacher

_KIND = {word: kind for kind, words in KINDS.items() for word in words}


class Timed(OpenAITeacher):
    """Knows when it was ready, and when it was asked no more."""

    opened = closed = 0.0

    async def open(self) -> None:
        """Make the client."""
        await super().open()
        self.opened = time.perf_counter()

    async def close(self) -> None:
        """Close the connections."""
        self.closed = time.perf_counter()
        await super().close()


class AtOnce(Teacher):
    """Knows the toy, and answers before anybody could wait.

    Args:
        probe: is read when nothing is asked any more.
    """

    def __init__(self, probe: MemoryProbe) -> None:
        super().__init__("at-once")
        self._probe = probe
        self.asking: Memory | None = None

    async def answer(self, question: Question) -> Reply:
        """The right answer."""
        words = question.prompt[-1].content.split()[6:-1:2]  # type: ignore[union-attr] # the last turn of a chat
        kinds = [_KIND[word] for word in words]
        (label,) = (word for word, kind in zip(words, kinds, strict=True) if kinds.count(kind) == 1)
        steps = " ".join(f"{kind} : {word} ." for word, kind in zip(words, kinds, strict=True))
        return Reply(f"{steps} So the answer is {label} .", "stop", PROMPT_TOKENS, TOKENS)

    async def close(self) -> None:
        """Look at the memory that asking took."""
        self.asking = self._probe.read()


class LoadedToy(ToyDataModule):
    """The toy with rows that are there before the job begins.

    Args:
        train_size: rows of train.
    """

    def __init__(self, train_size: int) -> None:
        super().__init__(train_size=train_size)
        self.loaded = super().rows_to_ask("train")

    def rows_to_ask(self, split: Split) -> Sequence[Row] | None:
        """The rows of train."""
        return self.loaded


def ask_server(turn: Turn, port: int, rows: int, concurrency: int) -> None:
    """One job against the server, from its call to its return, when told to."""
    turn.answer(machine("cpu") | {"openai": version("openai")})
    turn.wait()
    teacher = Timed("waiting", base_url=f"http://127.0.0.1:{port}/v1")
    with _silent(), tempfile.TemporaryDirectory() as folder:
        used, began = time.process_time(), time.perf_counter()
        summary = annotate(ToyDataModule(train_size=rows), teacher, out=folder, concurrency=concurrency)
        ended = time.perf_counter()
        used = time.process_time() - used
    turn.answer(
        {
            "seconds": ended - began,
            "asking": teacher.closed - teacher.opened,
            "cpu_seconds": used,
            "answers": summary["answers"],
        }
    )


def ask_at_once(turn: Turn, rows: int, concurrency: int) -> None:
    """One job with a teacher that takes no time, and its peak memory above the rows'."""
    data = LoadedToy(rows)
    gc.collect()
    with _silent(), tempfile.TemporaryDirectory() as folder:
        probe = MemoryProbe("cpu")
        teacher, began = AtOnce(probe), time.perf_counter()
        summary = annotate(data, teacher, out=folder, concurrency=concurrency)
        seconds = time.perf_counter() - began
        memory = probe.read()
        size = (Path(folder) / "rationales.jsonl").stat().st_size / 2**20
    turn.answer(
        {
            "rows": rows,
            "answers": summary["answers"],
            "agree": summary["agree with gold"],
            "seconds": seconds,
            "file": size,
            "before": memory["before"],
            "asking": teacher.asking and teacher.asking["growth"],
            "growth": memory["growth"],
        }
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the summary and the progress."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
