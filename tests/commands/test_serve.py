"""``serve``: what it refuses before anything is loaded, and one server from its start to SIGTERM."""

import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest

from lit_distill.exporting.predictor import load_predictor
from tests.runs import refusal, run
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


class Client(threading.Thread):
    """Waits for the server of this process, asks it, and ends it while it answers."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.url = f"http://127.0.0.1:{port}"
        self.found: dict[str, Any] = {}
        self.start()

    def ask(self, **request: Any) -> Any:
        given = urllib.request.Request(  # noqa: S310 - our own server
            f"{self.url}/predict", json.dumps(request).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(given, timeout=20) as answer:  # noqa: S310
            return json.loads(answer.read())["predictions"]

    def run(self) -> None:
        try:
            end = time.monotonic() + 60
            while "health" not in self.found and time.monotonic() < end:
                try:
                    with urllib.request.urlopen(f"{self.url}/health") as answer:  # noqa: S310
                        self.found["health"] = answer.read()
                except URLError:
                    time.sleep(0.05)
            self.found["first"] = self.ask(inputs=["the cat ?", "a red dog"])
            self.found["children"] = [one.pid for one in multiprocessing.active_children()]
            last = threading.Thread(target=lambda: self.found.update(last=self.ask(inputs=["a cat"] * 20)))
            last.start()
            time.sleep(0.02)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
        last.join()


def test_a_server_answers_until_sigterm_and_leaves_nothing_behind(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    student = add_weights(make_student_folder(here / "student"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = Client(port)
    run("serve", student, "--port", port, "--cpu_threads=1")
    client.join()
    told = capfd.readouterr()
    assert told.out.splitlines() == [f"Serving at http://127.0.0.1:{port} (/docs, /health, /metrics); Ctrl-C ends it."]
    assert told.err == ""
    assert client.found["health"] == b"ok"
    predictor = load_predictor(student)
    texts = predictor.generate(["the cat ?", "a red dog"], "label")
    assert [one["label"] for one in client.found["first"]] == texts
    scores = predictor.likelihoods(["the cat ?", "a red dog"], texts, "label")
    expected = [math.exp(scores[0][0]), math.exp(scores[1][1])]
    assert [one["likelihood"] for one in client.found["first"]] == pytest.approx(expected, rel=1e-3)
    assert len(client.found["last"]) == 20
    assert client.found["children"]
    assert multiprocessing.active_children() == []
    for process in client.found["children"]:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
