"""Whatever stops a job of asking, nothing that was answered is lost, and nothing of it is asked again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.commands.forked import Forked, forking
from tests.runs import read_lines, write_lines
from tests.teachers.servers import Act, Request, Server, completion, lists_models, serving

CONCURRENCY = 8


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    with forking() as process:
        yield process


@pytest.fixture
def server() -> Iterator[Server]:
    """Answers after a moment; every answer tells which request it answers, so that none can be taken for another."""

    def behave(request: Request) -> Act:
        text = f"Because of {request.number}. So the answer is {request.prompt.split()[-1]}."
        return Act(body=completion(request, text), delay=0.004)

    with serving(lists_models(behave)) as found:
        yield found


def job(folder: Path, server: Server, rows: int, *more: str) -> list[str]:
    data = write_lines(
        folder / "rows.jsonl", [{"id": f"r{i}", "input": f"what is {i}", "label": f"{i}"} for i in range(rows)]
    )
    return [
        "annotate", "--data=JSONLDataModule", f"--data.train={data}", "--teacher=OpenAITeacher",
        f"--teacher.base_url={server.url}", "--teacher.model=tiny", f"--concurrency={CONCURRENCY}",
        f"--out={folder / 'out'}", *more,
    ]  # fmt: skip


def whole_lines(path: Path) -> dict[str, dict[str, Any]]:
    """The samples by id, a torn last line left aside."""
    if not path.exists():
        return {}
    lines = path.read_bytes().split(b"\n")[:-1]
    return {row["id"]: row for row in map(json.loads, lines)}


def wait_for(there: Callable[[], bool]) -> None:
    """Until it is there, for a minute at most."""
    deadline = time.monotonic() + 60
    while not there() and time.monotonic() < deadline:
        time.sleep(0.002)


def kill_at_random(forked: Forked, server: Server, folder: Path, *, rows: int, kills: int, longest: float) -> None:
    arguments, path = job(folder, server, rows), folder / "out" / "rationales.jsonl"
    draw = random.Random(0)  # noqa: S311 - no secret
    kept: dict[str, dict[str, Any]] = {}
    in_work = 0
    for number in range(kills):
        before = len(server.requests)
        child = forked.start(arguments, str(folder / "log"))
        if number % 4:
            # while it works; the others come at any time from its start on
            wait_for(lambda before=before: len(server.requests) > before)  # type: ignore[misc]
        time.sleep(draw.uniform(0.0, longest))
        # it may have ended by itself
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        killed = forked.wait() == -signal.SIGKILL
        in_work += killed and len(server.requests) > before and len(whole_lines(path)) < rows
        if number % 5 == 4 and path.exists():
            # as a machine that stops leaves a file: the last line is not whole
            size = path.stat().st_size
            if size and len(whole_lines(path)) < rows:
                with path.open("rb+") as file:
                    last = list(whole_lines(path))[-1]
                    file.truncate(size - draw.randint(1, 20))
                kept.pop(last, None)
        found = whole_lines(path)
        # what was there before is there as it was
        assert {name: found.get(name, {}).get("text") for name in kept} == {n: row["text"] for n, row in kept.items()}
        asked = {request.prompt for request in server.requests[before:]}
        assert not asked & {f"what is {name[1:]}" for name in kept}
        kept = found
    before = len(server.requests)
    forked.start(arguments, str(folder / "log"))
    assert forked.wait() == 0, (folder / "log").read_text()
    assert not {request.prompt for request in server.requests[before:]} & {f"what is {name[1:]}" for name in kept}
    rows_at_end = read_lines(path)
    assert [row["id"] for row in rows_at_end] == [f"r{i}" for i in range(rows)]
    texts = {row["id"]: row["text"] for row in rows_at_end}
    assert {name: texts[name] for name in kept} == {name: row["text"] for name, row in kept.items()}
    # an answer is of the request that it says, and that request was of this row
    for row in rows_at_end:
        asked_as = server.requests[int(row["text"].split()[2].rstrip("."))].prompt
        assert asked_as == f"what is {row['id'][1:]}"
        assert row["agrees"] is True
    # only what was under way, or was torn off here, was asked twice
    times = Counter(request.prompt for request in server.requests)
    assert sum(times.values()) <= rows + kills * CONCURRENCY + kills
    assert in_work >= kills // 3, "too few of the kills came while the job worked"


def test_kills_at_random_instants_lose_nothing(forked: Forked, server: Server, tmp_path: Path) -> None:
    kill_at_random(forked, server, tmp_path, rows=1000, kills=5, longest=0.3)


@pytest.mark.slow
def test_fifty_kills_at_random_instants_lose_nothing(forked: Forked, server: Server, tmp_path: Path) -> None:
    kill_at_random(forked, server, tmp_path, rows=12_000, kills=50, longest=0.6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_finishes_what_is_under_way(
    number: signal.Signals, forked: Forked, server: Server, tmp_path: Path
) -> None:
    path = tmp_path / "out" / "rationales.jsonl"
    child = forked.start(job(tmp_path, server, 2000), str(tmp_path / "log"))
    wait_for(lambda: len(server.requests) >= 50)
    os.kill(child, number)
    assert forked.wait() == 130
    rows = read_lines(path)
    # all that was asked is there, in the data's order, with the columns that need all samples
    assert len(rows) == len(server.requests) < 2000
    assert [row["id"] for row in rows] == sorted((row["id"] for row in rows), key=lambda name: int(name[1:]))
    assert {row["vote_share"] for row in rows} == {1.0}
    assert "interrupted" in (tmp_path / "log").read_text()
    assert json.loads((tmp_path / "out" / "metadata.json").read_text())["jobs"][0]["stopped"] == "interrupted"
    asked = len(server.requests)
    forked.start(job(tmp_path, server, 2000, "--limit", str(len(rows))), str(tmp_path / "log"))
    assert forked.wait() == 0
    assert len(server.requests) == asked


@pytest.mark.parametrize("asked", [50, 350])
def test_an_interruption_of_several_teachers(asked: int, forked: Forked, server: Server, tmp_path: Path) -> None:
    """While the first is asked, or the second: nothing is lost, and nothing is asked twice."""
    path = tmp_path / "out" / "rationales.jsonl"
    second = {"class_path": "OpenAITeacher", "init_args": {"base_url": server.url, "model": "second"}}
    arguments = job(tmp_path, server, 300, f"--more_teachers={json.dumps([second])}")
    child = forked.start(arguments, str(tmp_path / "log"))
    wait_for(lambda: len(server.requests) >= asked)
    os.kill(child, signal.SIGINT)
    assert forked.wait() == 130
    before = read_lines(path)
    assert len(before) == len(server.requests) < 600
    assert {row["teacher"] for row in before} == ({"tiny", "second"} if asked > 300 else {"tiny"})
    jobs = json.loads((tmp_path / "out" / "metadata.json").read_text())["jobs"]
    assert [(job["teacher"], job["stopped"]) for job in jobs] == [("tiny", "interrupted"), ("second", "interrupted")]
    forked.start(arguments, str(tmp_path / "log"))
    assert forked.wait() == 0
    rows = read_lines(path)
    assert len(rows) == len({row["key"] for row in rows}) == len(server.requests) == 600
    assert {row["key"]: row["text"] for row in before}.items() <= {row["key"]: row["text"] for row in rows}.items()


def test_two_interruptions_at_once_keep_what_was_answered(forked: Forked, server: Server, tmp_path: Path) -> None:
    path = tmp_path / "out" / "rationales.jsonl"
    for _ in range(3):
        before, asked = whole_lines(path), len(server.requests)
        child = forked.start(job(tmp_path, server, 4000), str(tmp_path / "log"))
        wait_for(lambda asked=asked: len(server.requests) >= asked + 30)  # type: ignore[misc]
        found = whole_lines(path)
        os.kill(child, signal.SIGINT)
        time.sleep(0.0005)
        os.kill(child, signal.SIGINT)
        assert forked.wait() == 130
        assert "Traceback" not in (tmp_path / "log").read_text()
        rows = whole_lines(path)
        assert rows.keys() >= found.keys() | before.keys()
        assert len(server.requests) - asked - CONCURRENCY <= len(rows) - len(before) <= len(server.requests) - asked
        # it was finished
        assert {row["vote_share"] for row in rows.values()} == {1.0}
        assert json.loads((tmp_path / "out" / "metadata.json").read_text())["jobs"][-1]["stopped"] == "interrupted"


@pytest.mark.slow
def test_an_interruption_while_a_teacher_loads_ends_at_once(forked: Forked, server: Server, tmp_path: Path) -> None:
    (tmp_path / "slow_teacher.py").write_text(
        "import time, pathlib\n"
        "from lit_distill.teachers import BatchTeacher\n"
        "class Slow(BatchTeacher):\n"
        "    def load(self):\n"
        f"        pathlib.Path({str(tmp_path / 'loading')!r}).touch()\n"
        "        time.sleep(300)\n"
        "    def answer_batch(self, questions):\n"
        "        return []\n"
    )
    rows = [argument for argument in job(tmp_path, server, 3) if not argument.startswith("--teacher")]
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from lit_distill.cli import main; main(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", code, *rows, "--teacher=slow_teacher.Slow", "--teacher.model=m"])  # noqa: S603
    try:
        wait_for((tmp_path / "loading").exists)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        # to the end of the process
        assert process.wait(60) == 130
        assert time.monotonic() - began < 30
    finally:
        process.kill()
    assert (tmp_path / "out" / "rationales.parquet").exists()
