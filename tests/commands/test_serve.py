"""``serve``: what it refuses before anything is loaded, and one server from its start to SIGTERM."""

import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest

from lit_distill.exporting.predictor import load_predictor
from tests.runs import refusal
from tests.students import add_weights, make_student_folder

pytestmark = pytest.mark.usefixtures("here")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "student: one must be given, as in `lit-distill serve STUDENT --port 8000`"),
        (["a", "b"], "student: one must be given"),
        (["{student}", "--port=70000"], "port must be an integer in [1, 65535], got 70000"),
        (["{student}", "--port=http"], "port: got http; allowed is int"),
        (["{student}", "--workers=0"], "workers must be an integer in [1, 10000], got 0"),
        (["{student}", "--timeout=0"], "timeout must be above 0 and at most 86400, got 0"),
        (["{student}", "--batch_timeout=31"], "batch_timeout must be at least 0 and at most 30, got 31"),
        (["{student}", "--host=no.such.host.invalid"], "host: 'no.such.host.invalid' is no address of this machine"),
        (["{student}", "--engine=onnx"], "engine: got onnx; allowed is one of 'transformers', 'ctranslate2'"),
        (["{student}", "--engine=ctranslate2"], "engine: '{student}' holds no CTranslate2 model"),
    ],
)
def test_what_it_refuses(
    arguments: list[str], line: str, weights_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.format(student=weights_folder) for word in arguments]
    assert line.format(student=weights_folder) in refusal(capsys, "serve", given)


def test_a_port_in_use_is_told_before_anything_is_loaded(
    weights_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lit_distill.serving.server", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refusal(capsys, "serve", weights_folder, "--port", port)
    assert line == f"port: {port} of 127.0.0.1 cannot be used: Address already in use; give another as --port"


def test_packages_that_are_missing(
    weights_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_distill.commands.serve.find_spec", lambda name: None)
    line = refusal(capsys, "serve", weights_folder)
    assert line == 'litserve is not installed: pip install "lit_distill[serve]"'


def ask(url: str, **request: Any) -> Any:
    given = urllib.request.Request(  # noqa: S310 - our own server
        f"{url}/predict", json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(given, timeout=60) as answer:  # noqa: S310
        return json.loads(answer.read())["predictions"]


def wait_for(url: str) -> bytes:
    end = time.monotonic() + 180
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health") as answer:  # noqa: S310
                return answer.read()  # type: ignore[no-any-return]
        except URLError:
            assert time.monotonic() < end
            time.sleep(0.05)


def children_of(process: int) -> list[int]:
    files = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def is_running(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    # ended, and not yet waited for
    return status.rpartition(")")[2].split()[0] != "Z"


def test_a_server_answers_until_sigterm_and_leaves_nothing_behind(here: Path) -> None:
    student = add_weights(make_student_folder(here / "student"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, last = f"http://127.0.0.1:{port}", list[Any]()
    command = [sys.executable, "-m", "lit_distill", "serve", str(student), "--port", str(port), "--cpu_threads=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # noqa: S603
    try:
        assert wait_for(url) == b"ok"
        first, children = ask(url, inputs=["the cat ?", "a red dog"]), children_of(process.pid)
        in_flight = threading.Thread(target=lambda: last.extend(ask(url, inputs=["a cat"] * 20)))
        in_flight.start()
        time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        in_flight.join()
        told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert told == (f"Serving at {url} (/docs, /health, /metrics); Ctrl-C ends it.\n", "")
    predictor = load_predictor(student)
    texts = predictor.generate(["the cat ?", "a red dog"], "label")
    assert [one["label"] for one in first] == texts
    scores = predictor.likelihoods(["the cat ?", "a red dog"], texts, "label")
    expected = [math.exp(scores[0][0]), math.exp(scores[1][1])]
    assert [one["likelihood"] for one in first] == pytest.approx(expected, rel=1e-3)
    assert len(last) == 20
    assert children
    end = time.monotonic() + 30
    # the tracker of shared resources ends when it sees that the server has
    while (left := [child for child in children if is_running(child)]) and time.monotonic() < end:
        time.sleep(0.05)
    assert left == []
