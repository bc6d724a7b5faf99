"""The server's answers, limits and counts in this process, with a thread in place of LitServe's workers."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import pytest
from fastapi.testclient import TestClient
from litserve.callbacks import CallbackRunner  # type: ignore[import-untyped]
from litserve.transport.process_transport import MPQueueTransport  # type: ignore[import-untyped]

from lit_distill.serving import server as serving
from lit_distill.serving import worker
from lit_distill.serving.answers import Question
from lit_distill.serving.schema import Prediction
from lit_distill.serving.server import Settings, make_server
from lit_distill.serving.worker import PATH, StudentAPI


class Served:
    """A server whose worker is a thread; rows are answered by their own text."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[Question]] = []
        self.go = threading.Event()
        self.go.set()
        monkeypatch.setattr(worker, "answer", self.answer)
        monkeypatch.setenv("LITSERVE_WORKER_ID", "0")
        api = StudentAPI("student", None, 1, batch_size=8, batch_timeout=0.0)
        api.__dict__["_predictor"] = None
        self.server = make_server(api, Settings(max_inputs=5, max_characters=30, timeout=0.5), writes=True)
        queue: Queue[Any] = Queue()
        self.transport = MPQueueTransport(None, [Queue()])
        self.server._transport, self.server.litapi_request_queues = self.transport, {PATH: queue}
        self.server.workers_setup_status, self.server.app.response_queue_id = {"predict_0": "ready"}, 0
        api.loop._restart_workers = True
        arguments: tuple[Any, ...] = (api, "cpu", 0, queue, self.transport, {}, CallbackRunner())
        threading.Thread(target=api.loop, args=arguments, daemon=True).start()

    def answer(self, predictor: None, rows: list[Question]) -> list[Prediction]:
        self.batches.append(list(rows))
        assert self.go.wait(10)
        if any(row.input == "fail" for row in rows):
            raise ZeroDivisionError("no student")
        return [
            Prediction(label=row.input[:3], likelihood=0.5, rationale="so" if row.rationale else None) for row in rows
        ]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    return Served(monkeypatch)


@pytest.fixture
def client(served: Served) -> Iterator[TestClient]:
    with TestClient(served.server.app) as client:
        yield client
        # its reader would wait for a second
        served.transport.close()


def test_inputs_are_answered_in_order_and_counted(client: TestClient) -> None:
    found = client.post(PATH, json={"inputs": ["cat is", "dog is"]})
    assert found.json() == {
        "predictions": [
            {"label": "cat", "likelihood": 0.5, "rationale": None},
            {"label": "dog", "likelihood": 0.5, "rationale": None},
        ]
    }
    assert client.post(PATH, json={"inputs": ["cat"], "rationale": True}).json()["predictions"][0]["rationale"] == "so"
    assert client.post(PATH, json={"inputs": []}).status_code == 422
    assert client.get("/nowhere").status_code == client.get("/elsewhere").status_code == 404
    assert (client.get("/health").status_code, client.get("/docs").status_code) == (200, 200)
    counts = dict(re.findall(r"^lit_distill_(\S+) (\S+)$", client.get("/metrics").text, flags=re.MULTILINE))
    assert (counts["rows_total"], counts["rows_waiting"], counts["predict_seconds_count"]) == ("3.0", "0.0", "3.0")
    assert counts['requests_total{path="/predict",status="200"}'] == "2.0"
    assert counts['requests_total{path="/predict",status="422"}'] == "1.0"
    assert counts['requests_total{path="other",status="404"}'] == "2.0"


def test_the_page_tells_types_examples_and_refusals(client: TestClient) -> None:
    page = client.get("/openapi.json").json()
    described = page["paths"][PATH]["post"]
    assert {"200", "400", "408", "413", "422", "500", "503", "504"} == set(described["responses"])
    assert described["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Request"}
    example = page["components"]["schemas"]["Request"]["properties"]["inputs"]["examples"][0]
    assert client.post(PATH, json={"inputs": [example[0][:30]]}).status_code == 200
    assert "At most 5 inputs a request, 30 characters an input" in page["info"]["description"]


def test_rows_of_several_requests_make_a_batch(served: Served, client: TestClient) -> None:
    served.go.clear()
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(client.post, PATH, json={"inputs": ["first"]})
        until(lambda: len(served.batches) == 1)
        others = [pool.submit(client.post, PATH, json={"inputs": [f"{i} a", f"{i} b"]}) for i in range(3)]
        until(lambda: len(served.server.response_buffer) == 7)
        served.go.set()
        labels = [[one["label"] for one in other.result().json()["predictions"]] for other in others]
        assert first.result().status_code == 200
    assert labels == [["0 a", "0 b"], ["1 a", "1 b"], ["2 a", "2 b"]]
    assert [len(batch) for batch in served.batches] == [1, 6]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def body(**changes: Any) -> bytes:
    return json.dumps({"inputs": ["a cat"]} | changes).encode()


HOSTILE: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 422, "body: Field required"),
    "text": (b"cat", 400, "body: not JSON (Expecting value at character 0)"),
    "cut": (body()[:-3], 400, "body: not JSON (Unterminated string"),
    "binary": (bytes(range(128, 256)), 400, "body: not JSON in UTF-8, or too deep"),
    "deep": (b"[" * 900, 400, "body: not JSON"),
    "very deep": (b'{"inputs":' * 150, 400, "body: not JSON"),
    "deep and closed": (
        b'{"inputs":' + b"[" * 400 + b"]" * 400 + b"}",
        422,
        "inputs.0: Input should be a valid string",
    ),
    "long number": (b'{"inputs": ' + b"9" * 1500 + b"}", 422, "inputs: Input should be a valid list"),
    "list": (b'["a"]', 422, "body: Input should be a valid dictionary"),
    "null": (b"null", 422, "body: Input should be a valid dictionary"),
    "NaN": (b'{"inputs": [NaN]}', 422, "inputs.0: Input should be a valid string, got nan"),
    "infinite": (b'{"inputs": ["a"], "rationale": Infinity}', 422, "rationale: Input should be a valid boolean"),
    "number": (body(inputs=3), 422, "inputs: Input should be a valid list, got 3"),
    "one text": (body(inputs="a cat"), 422, "inputs: Input should be a valid list, got 'a cat'"),
    "numbers": (body(inputs=[*range(300)]), 422, "inputs.0: Input should be a valid string, got 0"),
    "yes": (body(rationale="yes"), 422, "rationale: Input should be a valid boolean, got 'yes'"),
    "typo": (body(rational=True), 422, "body: 'rational' is no argument; allowed are inputs, rationale"),
    "many keys": (body(**dict.fromkeys(map(str, range(90)), 0)), 422, "body: '0' is no argument; allowed are inputs"),
    "empty": (body(inputs=[]), 422, "inputs: 1 to 5 are allowed, got 0"),
    "too many": (body(inputs=["a"] * 6), 422, "inputs: 1 to 5 are allowed, got 6"),
    "too long": (body(inputs=["a", "b" * 31]), 422, "inputs.1: 30 characters are allowed, got 31"),
    "blank": (body(inputs=["a", "\n "]), 422, "inputs.1: must be a text, got '\\n '"),
    "half a pair": (b'{"inputs": ["\\ud800"]}', 422, "inputs.0: must be Unicode, without half of"),
    "huge": (body(inputs=["b" * 3000]), 413, "body: at most 2,820 bytes are allowed"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_body_is_refused_in_one_line(name: str, client: TestClient) -> None:
    content, status, line = HOSTILE[name]
    found = client.post(PATH, content=content, headers={"Content-Type": "application/json"})
    assert (found.status_code, list(found.json())) == (status, ["detail"])
    told = found.json()["detail"]
    assert told.startswith(line)
    assert "\n" not in told
    assert len(told) < 300


def test_wrong_kinds_of_requests_are_refused(served: Served, client: TestClient) -> None:
    found = client.post(PATH, content=body(), headers={"Content-Type": "text/plain"})
    assert (found.status_code, found.json()["detail"][:40]) == (422, "body: must be JSON, with the header Cont")
    for method in ("GET", "PUT", "DELETE"):
        found = client.request(method, PATH)
        assert (found.status_code, found.json()["detail"]) == (405, f"{method} /predict: allowed is POST")
    assert client.get("/x").json()["detail"].startswith("/x: no such page; allowed are POST /predict, GET /health")

    def chunks() -> Iterator[bytes]:
        yield b'{"inputs": ["'
        for _ in range(40):
            yield b"b" * 100

    # without a length
    found = client.post(PATH, content=chunks(), headers={"Content-Type": "application/json"})
    assert (found.status_code, found.json()["detail"]) == (413, "body: at most 2,820 bytes are allowed")
    assert served.batches == []


def test_what_is_too_slow_is_refused_and_forgotten(served: Served, client: TestClient) -> None:
    served.go.clear()
    slow = client.post(PATH, json={"inputs": ["a", "b"]})
    assert (slow.status_code, slow.json()["detail"]) == (504, "inputs: not answered within 0.5 seconds; send fewer")
    assert served.server.response_buffer == {}
    # waits behind it for so long that no student is asked
    late = client.post(PATH, json={"inputs": ["late"]})
    assert late.status_code == 504
    time.sleep(0.1)
    served.go.set()
    assert client.post(PATH, json={"inputs": ["cat"]}).status_code == 200
    assert "late" not in [row.input for batch in served.batches for row in batch]


def test_faults_of_the_student_and_its_worker(
    served: Served, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = client.post(PATH, json={"inputs": ["fail"]})
    assert (found.status_code, found.json()["detail"][:27]) == (500, "inputs: the student failed;")
    assert client.post(PATH, json={"inputs": ["cat"]}).status_code == 200
    monkeypatch.setattr(serving, "WAITING", 2)
    found = client.post(PATH, json={"inputs": ["a", "b", "c"]})
    assert (found.status_code, found.headers["retry-after"]) == (503, "1")
    served.go.clear()

    def die() -> None:
        # as LitServe's monitor does
        until(lambda: any(one.worker_id == 0 for one in served.server.response_buffer.values()))
        for one in served.server.response_buffer.values():
            one.response = (None, "ERROR")
            one.event.set()

    killer = threading.Thread(target=die)
    killer.start()
    found = client.post(PATH, json={"inputs": ["a"]})
    killer.join()
    assert (found.status_code, found.json()["detail"]) == (
        503, "inputs: the worker that had them died; send them again",
    )  # fmt: skip
    served.go.set()


def test_a_body_that_does_not_arrive_and_a_rationale_that_no_task_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    api = StudentAPI("student", None, 1, batch_size=8, batch_timeout=0.0)
    app = make_server(api, Settings(timeout=0.05), writes=False).app
    client = TestClient(app)
    found = client.post(PATH, json={"inputs": ["a"], "rationale": True})
    assert (found.status_code, found.json()["detail"]) == (
        422, "rationale: this student writes none; allowed is false",
    )  # fmt: skip
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(10)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": PATH, "raw_path": PATH.encode(), "query_string": b"", "root_path": "",
        "headers": [(b"content-type", b"application/json")], "scheme": "http", "http_version": "1.1",
        "server": ("test", 80), "client": ("test", 1),
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"]) == {"detail": "body: must arrive within 0.05 seconds"}
