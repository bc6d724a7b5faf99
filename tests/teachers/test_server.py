"""A teacher behind a server: what it sends, what it makes of answers, and of servers that misbehave."""

import asyncio
import gzip
import json
import logging
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_distill.errors import UserError
from lit_distill.questions import Message, Question, Reply, Sampling
from lit_distill.teachers import server as module
from lit_distill.teachers.base import Teacher, TeacherBusy, TeacherError
from lit_distill.teachers.server import OpenAITeacher
from tests.teachers.models import make_talker
from tests.teachers.servers import (
    Act,
    Behaviour,
    Request,
    answer_to,
    ask_all,
    completion,
    fail,
    lists_models,
    serving,
)

KEY = "sk-0123456789-abcdefghijklmnopqrstuvwxyz"
SCHEMA = {"type": "object", "properties": {"label": {"type": "string"}}, "required": ["label"]}


@pytest.fixture(autouse=True)
def quick_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits that nobody asked for are short, and nothing of the environment counts."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    for name in [name for name in os.environ if name.startswith("OPENAI_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


def chat(text: str = "Why?", **changes: Any) -> Question:
    return replace(Question((Message("user", text),), Sampling()), **changes)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    return path


def text(prompt: str = "Q: why? A:", **changes: Any) -> Question:
    return replace(Question(prompt, Sampling()), **changes)


def ask(teacher: Teacher, question: Question | None = None) -> Reply:
    """The answer to one question, or the error that it ends in."""
    found: Reply | BaseException = ask_all(teacher, [question or chat()])[0]
    if isinstance(found, BaseException):
        raise found
    return found


def answered(act: Act | Sequence[Act], question: Question | None = None, **arguments: Any) -> Reply:
    """The answer of a server that acts so."""
    with serving([act] if isinstance(act, Act) else act) as server:
        return ask(OpenAITeacher("tiny", server.url, **arguments), question)


def sent(question: Question, **arguments: Any) -> Request:
    """The request that a question becomes."""
    with serving() as server:
        ask(OpenAITeacher("tiny", server.url, **arguments), question)
    (request,) = server.requests
    return request


def says(body: dict[str, Any], **changes: Any) -> Act:
    """A choice of one's own."""
    return Act(body={"choices": [body], **changes})


def test_a_chat_goes_out_as_messages(key_file: Path) -> None:
    prompt = (
        Message("system", "Be brief."),
        Message("user", "Why?"),
        Message("assistant", "So."),
        Message("user", "No"),
    )
    question = Question(prompt, Sampling(temperature=0.5, top_p=0.9, max_new_tokens=7, seed=3), stop=("\n\n", "Q:"))
    request = sent(question, api_key_file=key_file)
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.body == {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "So."},
            {"role": "user", "content": "No"},
        ],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 7,
        "seed": 3,
        "stop": ["\n\n", "Q:"],
    }


def test_the_environment_gives_address_and_key(monkeypatch: pytest.MonkeyPatch, key_file: Path) -> None:
    with serving() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
        monkeypatch.setenv("OPENAI_ADMIN_KEY", "not-for-questions")
        ask(OpenAITeacher("tiny"))
        monkeypatch.setenv("OPENAI_API_KEY", "another")
        ask(OpenAITeacher("tiny"))
        ask(OpenAITeacher("tiny", api_key_file=str(key_file)))
    keys = [request.headers["authorization"].removeprefix("Bearer ") for request in server.requests]
    assert keys == [KEY, "another", KEY]


def test_a_schema_goes_out_as_the_form_of_the_answer() -> None:
    body = sent(chat(schema=SCHEMA)).body
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
    }
    OpenAITeacher("tiny").check_schema()


def test_a_completion_follows_no_schema() -> None:
    with pytest.raises(UserError, match=r"^layout must be chat where answers follow a schema, got 'completion'$"):
        OpenAITeacher("tiny", layout="completion").check_schema()


def test_the_limit_has_the_name_that_the_server_knows() -> None:
    body = sent(chat(), token_limit="max_completion_tokens").body
    assert body["max_completion_tokens"] == 256
    assert "max_tokens" not in body


def test_extra_fields_are_added_replace_and_leave_out() -> None:
    extra = {"top_k": 5, "max_tokens": 9, "temperature": None, "chat_template_kwargs": {"enable_thinking": False}}
    body = sent(chat(), extra_body=extra).body
    assert body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Why?"}],
        "seed": 0,
        "max_tokens": 9,
        "top_k": 5,
        "chat_template_kwargs": {"enable_thinking": False},
    }


def test_no_more_stops_are_sent_than_openai_takes_and_all_are_kept() -> None:
    question = chat(stop=("1", "2", "3", "4", "5"))
    with serving([says({"message": {"content": "a b 5 c 4 d"}, "finish_reason": "length"})]) as server:
        reply = ask(OpenAITeacher("tiny", server.url), question)
    assert server.requests[0].body["stop"] == ["1", "2", "3", "4"]
    assert (reply.text, reply.finish) == ("a b ", "stop")


@pytest.mark.parametrize(("layout", "question"), [("chat", chat("two words")), ("completion", text("two words"))])
def test_an_answer_has_text_finish_and_counts(layout: str, question: Question) -> None:
    reply = answered(Act(), question, layout=layout)
    assert reply == Reply("answer to <two words>", finish="stop", input_tokens=2, output_tokens=4)


def test_what_a_server_does_not_say_is_not_known() -> None:
    assert answered(says({"message": {"role": "assistant", "content": "yes"}})) == Reply("yes")
    assert answered(says({"text": "yes"}, usage=None), text(), layout="completion") == Reply("yes")


@pytest.mark.parametrize("said", [{"content": None}, {"content": ""}, {}])
def test_an_answer_that_was_only_thought_is_empty(said: dict[str, Any]) -> None:
    message = {"role": "assistant", "reasoning_content": "Let me think.", **said}
    reply = answered(says({"message": message, "finish_reason": "length"}))
    assert reply == Reply("", finish="length")


def test_thoughts_are_no_part_of_an_answer() -> None:
    message = {"content": "B", "reasoning_content": "A? No.", "reasoning": "A? No."}
    logprobs = {"content": [{"token": "A", "logprob": -9.0}, {"token": "B", "logprob": -1.0}]}
    # the tokens are those of the thoughts as well: their mean would be another
    assert answered(says({"message": message, "logprobs": logprobs}), logprobs=True) == Reply("B")


def test_parts_of_an_answer_are_joined_without_the_thinking() -> None:
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "A? No."}]}
    parts = [thinking, {"type": "text", "text": "So "}, {"type": "text", "text": "B."}]
    assert answered(says({"message": {"content": parts}, "finish_reason": "stop"})) == Reply("So B.", finish="stop")


@pytest.mark.parametrize(
    ("found", "mean"),
    [
        ({"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.5}]}, -1.0),
        ({"tokens": ["a", "b"], "token_logprobs": [-0.25, -0.75], "top_logprobs": None}, -0.5),
        ({"tokens": ["a", "b"], "token_logprobs": [None, -0.75]}, -0.75),
        ({"content": [{"token": "a", "logprob": None}, {"token": "b", "logprob": -1.5}]}, -1.5),
        ({"content": []}, None),
        ({"content": None, "refusal": None}, None),
        ([], None),
        (None, None),
    ],
)
def test_log_probabilities_come_in_two_forms(found: object, mean: float | None) -> None:
    for layout, question in (("chat", chat()), ("completion", text())):
        act = Act(body={"choices": [{"message": {"content": "a b"}, "text": "a b", "logprobs": found}]})
        assert answered(act, question, layout=layout, logprobs=True).logprob == mean


def test_a_text_goes_out_as_a_prompt() -> None:
    assert sent(chat(), logprobs=True).body["logprobs"] is True
    request = sent(text("Q: why?\nA:", stop=("\nQ:",)), layout="completion", logprobs=True)
    assert request.path == "/v1/completions"
    assert request.headers["authorization"] == "Bearer none", "a server of one's own needs no key"
    assert request.body == {
        "model": "tiny",
        "prompt": "Q: why?\nA:",
        "temperature": 0.0,
        "max_tokens": 256,
        "seed": 0,
        "stop": ["\nQ:"],
        "logprobs": 1,
    }


@pytest.mark.parametrize("layout", ["chat", "completion"])
def test_each_of_many_answers_is_its_questions(layout: str) -> None:
    many = 150
    questions = [chat(f"number {n}") if layout == "chat" else text(f"number {n}") for n in range(many)]

    def behave(request: Request) -> Act:
        # some fail once; no other is answered before all are there, and the later it came, the sooner
        if request.number % 10 == 9:
            return fail(500)
        return Act(until=lambda: server.peak == many, delay=0.3 - request.number / 1000)

    with serving(lists_models(behave)) as server:
        teacher = OpenAITeacher("tiny", server.url, layout="chat" if layout == "chat" else "completion")
        replies = ask_all(teacher, questions)
    assert [reply.text if isinstance(reply, Reply) else reply for reply in replies] == [
        answer_to(f"number {n}") for n in range(many)
    ]
    assert teacher.concurrency == 32


def test_connections_are_used_again() -> None:
    async def run(teacher: OpenAITeacher) -> None:
        await teacher.open()
        for _ in range(3):
            await asyncio.gather(*(teacher.answer(chat()) for _ in range(120)))
        await teacher.close()

    def behave(request: Request) -> Act:
        return Act(until=lambda: len(server.requests) >= 120 * (request.number // 120 + 1))

    with serving(lists_models(behave)) as server:
        asyncio.run(run(OpenAITeacher("tiny", server.url)))
    assert len(server.requests) == 360
    # by default the client keeps 100 of them
    assert server.connections <= 125


WRONG_BODIES = [
    b"",
    b"<html>Bad gateway</html>",
    b'{"choices": [{"message": {"content": "yes"}',
    b"\xff\xfe\xfd",
    b"[" * 100_000,
    b"[]",
    b"null",
    b"{}",
    b'{"choices": null}',
    b'{"choices": []}',
    b'{"choices": ["yes"]}',
    b'{"choices": [{"message": null}]}',
    b'{"choices": [{"message": {"content": "yes"}, "logprobs": {"content": "what?"}}]}',
    b'{"choices": [{"message": {"content": 5}}]}',
    b'{"error": {"message": "the provider is down", "code": 502}}',
]


@pytest.mark.parametrize(
    "acts",
    [
        [fail(408)],
        [fail(409)],
        [fail(429)],
        [fail(429, headers={"retry-after": "soon"})],
        [fail(500), fail(502), Act(503, b"<html>\n</html>"), fail(504)],
        [Act(cut=True)],
        [Act(delay=60)],
        [Act(drip=60)],
        [Act(body=body) for body in WRONG_BODIES[:5]],
        [Act(body=body, headers={"content-type": "text/html"}) for body in WRONG_BODIES[5:10]],
        [Act(body=body) for body in WRONG_BODIES[10:]],
        [fail(429), Act(body=b"{}"), Act(cut=True), fail(500)],
    ],
    ids=lambda acts: "-".join(
        "cut" if act.cut else "slow" if act.delay or act.drip else str(act.status) for act in acts
    ),
)
def test_what_passes_is_tried_again(acts: list[Act]) -> None:
    with serving(acts) as server:
        reply = ask(OpenAITeacher("tiny", server.url, timeout=1.0))
    assert reply.text == "answer to <Why?>"
    assert len(server.requests) >= len(acts) + 1
    # the same again
    assert all(request.body == server.requests[0].body for request in server.requests)


HOSTILE: list[Act] = [
    Act(body=b'{"choices":[{"message":{"content":"a","x":%b1%b}}]}' % (b"[" * 100_000, b"]" * 100_000)),
    Act(body=b'{"choices":[{"message":{"content":"a"}}],"usage":{"prompt_tokens":%b}}' % (b"9" * 6000)),
    Act(400, b'{"error":{"message":%b1%b}}' % (b'{"a":' * 5000, b"}" * 5000)),
    Act(400, b'{"error":{"message":"half \\ud800 of a character"}}'),
    Act(body=b'{"choices":[{"message":{"content":"' + b"a" * (17 << 20) + b'"}}]}'),
    Act(body=gzip.compress(b" " * (64 << 20)), headers={"content-encoding": "gzip"}),
    Act(500, b" " * (17 << 20)),
]


@pytest.mark.parametrize("act", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_answer_is_an_error_of_its_question(act: Act) -> None:
    with pytest.raises(TeacherError) as raised:
        answered([act, act], max_retries=1)
    str(raised.value).encode()
    assert len(str(raised.value)) <= 500
    if len(act.body) > 16 << 20 or "content-encoding" in act.headers:
        assert str(raised.value) == "2 times the server's answer is larger than 16,777,216 bytes"


def test_a_packed_answer_is_unpacked() -> None:
    body = json.dumps({"choices": [{"message": {"content": "packed " * 1000}}]}).encode()
    assert answered(Act(body=gzip.compress(body), headers={"content-encoding": "gzip"})).text == "packed " * 1000


def test_an_answer_that_comes_for_ever_is_given_up_in_time() -> None:
    # a byte comes again and again, so that no wait for the next one is long
    with (
        serving(lists_models(lambda _: Act(drip=0.2))) as server,
        pytest.raises(TeacherBusy, match=r"^2 times no whole answer within 0\.5 s"),
    ):
        ask(OpenAITeacher("tiny", server.url, timeout=0.5, max_retries=1))
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "act", [fail(403, "flagged"), fail(404, "model not found for this region"), fail(403, "no", "model_not_found")]
)
def test_what_one_question_meets_after_an_answer_is_its_own(act: Act) -> None:
    def behave(request: Request) -> Act:
        return act if "bad" in request.prompt else Act()

    with serving(lists_models(behave)) as server:
        teacher = OpenAITeacher("tiny", server.url)
        teacher.has_answered = True
        with pytest.raises(TeacherError, match=rf"^{act.status}: "):
            ask(teacher, chat("bad"))


def test_a_key_that_ends_is_everyone_s() -> None:
    with serving([Act(), fail(401, "expired")]) as server:
        teacher = OpenAITeacher("tiny", server.url)
        ask(teacher)
        with pytest.raises(UserError, match=r"^api_key: "):
            ask(teacher)


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": "12", "completion_tokens": 5.0}, (12, 5)),
        ({"prompt_tokens": -1.5, "completion_tokens": ["a"]}, (None, None)),
        (None, (None, None)),
    ],
)
def test_tokens_are_read_as_they_are_written(
    usage: dict[str, Any] | None, counted: tuple[int | None, int | None]
) -> None:
    with serving(lists_models(lambda request: Act(body=completion(request) | {"usage": usage}))) as server:
        reply = ask(OpenAITeacher("tiny", server.url))
    assert (reply.input_tokens, reply.output_tokens) == counted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_PROXY", "http://127.0.0.1:9"),
        ("HTTPS_PROXY", "ftp://x"),
        ("SSL_CERT_FILE", "/nope"),
    ],
)
def test_an_environment_that_does_not_suit_is_one_line(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=name) as raised:
        asyncio.run(OpenAITeacher("tiny", "http://teacher.invalid/v1").open())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("act", "error", "line"),
    [
        (fail(429, "slow\ndown"), TeacherBusy, "429: slow down"),
        (Act(503, b""), TeacherBusy, "503: Service Unavailable"),
        (Act(502, b"<html>\n <b>bad</b>\n</html>"), TeacherBusy, "502: <html> <b>bad</b> </html>"),
        (Act(delay=60), TeacherBusy, "3 times no whole answer within 0.3 s"),
        (Act(cut=True), TeacherBusy, "3 times peer closed connection"),
        (Act(body=b"{}"), TeacherError, "3 times the server's answer is no completion: {}"),
        (Act(body=b"no JSON"), TeacherError, "3 times the server's answer is no completion: no JSON"),
        (Act(body={"choices": []}), TeacherError, "3 times the server's answer is no completion: "),
        (Act(body={"error": {"message": "down"}}), TeacherError, "3 times the server's answer is no completion: "),
    ],
)
def test_what_does_not_pass_ends_in_one_line(act: Act, error: type[Exception], line: str) -> None:
    with serving(lists_models(lambda _: act)) as server, pytest.raises(error) as raised:
        ask(OpenAITeacher("tiny", server.url, timeout=0.3, max_retries=2))
    assert type(raised.value) is error
    assert str(raised.value).startswith(line)
    assert "\n" not in str(raised.value)
    assert len(server.requests) == 3


def test_a_server_that_goes_away_makes_a_teacher_busy() -> None:
    async def run() -> None:
        with serving() as server:
            teacher = OpenAITeacher("tiny", server.url, max_retries=1)
            await teacher.open()
        try:
            with pytest.raises(TeacherBusy, match=r"^2 times "):
                await teacher.answer(chat())
        finally:
            await teacher.close()

    asyncio.run(run())


def waited(acts: list[Act]) -> float:
    """Seconds until the answer, which is not the first."""
    with serving(acts) as server:
        start = time.monotonic()
        assert ask(OpenAITeacher("tiny", server.url)).text == "answer to <Why?>"
        took = time.monotonic() - start
    assert len(server.requests) == len(acts) + 1
    return took


def test_a_server_is_waited_for_as_it_asks() -> None:
    assert waited([fail(429, headers={"retry-after": "0.4"}), fail(503, headers={"retry-after-ms": "300"})]) >= 0.7


@pytest.mark.parametrize(
    ("act", "error", "line"),
    [
        (fail(400, "too\nlong: 5000 tokens"), TeacherError, "400: too long: 5000 tokens"),
        (fail(413, "too large"), TeacherError, "413: too large"),
        (Act(422, {"detail": [{"loc": ["body", "stop"], "msg": "odd"}]}), TeacherError, "422: "),
        (Act(422, {"error": "`top_p` must be < 1", "error_type": "validation"}), TeacherError, "422: `top_p` must be"),
        (Act(404, {"detail": "Not Found"}), UserError, "model or base_url: http://127.0.0.1:"),
        (fail(400, "x" * 1000), TeacherError, "400: " + "x" * 492 + "..."),
        (fail(401, "bad key"), UserError, "api_key: the server wants one, and none was given (401: bad key)"),
        (fail(403, "no"), UserError, "api_key: the server wants one, and none was given (403: no)"),
        (fail(402, "Insufficient Balance"), UserError, "api_key: its account has nothing left to spend (402: Insuff"),
        (
            fail(429, "You exceeded your quota", "insufficient_quota"),
            UserError,
            "api_key: its account has nothing left to spend (429: You exceeded your quota)",
        ),
    ],
)
def test_an_error_that_lasts_says_whose_it_is(act: Act, error: type[Exception], line: str) -> None:
    with serving(lists_models(lambda _: act)) as server, pytest.raises(error) as raised:
        ask(OpenAITeacher("tiny", server.url, max_retries=1))
    assert type(raised.value) is error
    assert str(raised.value).startswith(line)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 500
    assert len(server.requests) == (2 if act.status == 429 else 1)


def test_a_model_that_is_not_there_is_told_with_those_that_are() -> None:
    missing = fail(404, "model not found")
    for behave, others in ((lists_models(lambda _: missing), ", but other, tiny"), (lambda _: missing, "")):
        with serving(behave) as server, pytest.raises(UserError) as raised:
            ask(OpenAITeacher("huge", server.url))
        said = f"model or base_url: {server.url} has no 'huge'{others} (404: model not found)"
        assert str(raised.value) == said
        assert len(server.requests) == 1


def test_a_prompt_that_cannot_be_written_is_its_own_error() -> None:
    with serving() as server:
        found = ask_all(OpenAITeacher("tiny", server.url), [chat("\ud800"), chat("good")])
    assert isinstance(found[0], TeacherError)
    assert found[1] == Reply(answer_to("good"), "stop", 1, 3)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_nobody_at_the_address_is_told_at_once() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    teacher = OpenAITeacher("tiny", url, max_retries=100)
    with pytest.raises(UserError, match=rf"^base_url: no server answers at {url} \("):
        asyncio.run(teacher.open())


@pytest.mark.parametrize(
    "models",
    [
        fail(404),
        fail(405),
        fail(501),
        fail(500),
        fail(401),
        fail(429),
        Act(body=b"hello"),
        Act(cut=True),
        Act(delay=60),
    ],
    ids=str,
)
def test_a_server_need_not_list_its_models(models: Act, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LIST_TIMEOUT", 0.3)

    def behave(request: Request) -> Act:
        return models if request.path == "/v1/models" else Act()

    with serving(behave) as server:
        assert ask(OpenAITeacher("tiny", server.url)).text == "answer to <Why?>"
    assert len(server.others) == 1


def test_openai_itself_wants_a_key() -> None:
    with pytest.raises(UserError, match=r"^a key must be given, as OPENAI_API_KEY or in api_key_file; or base_url"):
        asyncio.run(OpenAITeacher("gpt").open())


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "http://host:port/v1", "ftp://host/v1", "", 8000])
def test_an_address_is_one(url: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^base_url must be http://host:port/v1, .*, got "):
        OpenAITeacher("tiny", url)
    if url and isinstance(url, str):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        with pytest.raises(UserError, match=r"^base_url .OPENAI_BASE_URL. must be "):
            asyncio.run(OpenAITeacher("tiny").open())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"model": ""}, r"model must be a text, got ''"),
        ({"timeout": 0}, r"timeout must be above 0, got 0"),
        ({"timeout": float("inf")}, r"timeout must be above 0, got inf"),
        ({"max_retries": -1}, r"max_retries must be an integer >= 0, got -1"),
        ({"max_retries": None}, r"max_retries must be an integer >= 0, got None"),
        ({"layout": "text"}, r"layout must be one of chat, completion, got 'text'"),
        ({"extra_body": ["secret"]}, r"extra_body must map names to values that JSON knows"),
        ({"extra_body": {"a": {2}}}, r"extra_body must map names to values that JSON knows"),
        ({"extra_body": {"a": float("nan")}}, r"extra_body must map names to values that JSON knows"),
        ({"extra_body": {"a": {"Api-Key": "secret"}}}, r"extra_body.a.Api-Key: a key must not stand "),
        ({"extra_body": {"headers": [{"Authorization": "secret"}]}}, r"extra_body.headers.0.Authorization: a key must"),
        ({"extra_body": {"stream": True}}, r"extra_body must not hold model, .*, got stream"),
        ({"input_price": -1}, r"input_price must be at least 0, got -1"),
        ({"base_url": "http://user:secret@host/v1"}, r"base_url must be .*, without user, password, query or fragment"),
        ({"base_url": "http://host/v1?key=secret"}, r"base_url must be .*, without user, password, query or fragment"),
        ({"api_key_file": "sk-secret"}, r"api_key_file: the file cannot be read \(No such file or directory\)"),
        ({"api_key_file": 5_000}, r"api_key_file: the file cannot be read"),
        ({"extra_body": {"accessToken": "secret"}}, r"extra_body.accessToken: a key must not stand "),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=f"^{line}") as raised:
        OpenAITeacher(**{"model": "tiny", **arguments})
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"hush hush", b"hush\x00", b"\xff\xfe", b"hush" * 5000 + b"\xc3\xa9"])
def test_a_key_that_is_none_is_refused_unseen(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("key").write_bytes(content)
    with pytest.raises(UserError, match=r"^api_key_file: key must hold a key of ASCII letters") as raised:
        OpenAITeacher("tiny", api_key_file="key")
    assert "hush" not in str(raised.value)


def test_settings_are_what_answers_depend_on(key_file: Path) -> None:
    extra = {"top_k": 5}
    teacher = OpenAITeacher(
        "org/tiny", "http://host/v1", key_file, extra_body=extra, timeout=3, input_price=2, name="mine"
    )
    expected = {
        "class": "OpenAITeacher",
        "model": "org/tiny",
        "layout": "chat",
        "logprobs": False,
        "extra_body": {"top_k": 5},
    }
    assert teacher.settings == expected
    assert OpenAITeacher("org/tiny").settings["extra_body"] == {}
    assert json.loads(json.dumps(teacher.settings)) == expected


def echo(status: int) -> Behaviour:
    """A server that says whatever it was told, the key first."""

    def behave(request: Request) -> Act:
        told = f"{request.headers['authorization']}\n{'x' * 470}{request.headers['authorization']}"
        if status == 200:
            return Act(body=told.encode())
        return (
            Act(body={"data": [{"id": told}]})
            if request.path == "/v1/models"
            else fail(status, f"model not found {told}")
        )

    return behave


@pytest.mark.parametrize("status", [200, 400, 401, 404, 422, 429, 500])
@pytest.mark.parametrize("source", ["file", "environment"])
def test_a_key_is_told_to_nobody_but_the_server(
    status: int, source: str, key_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx2", "httpcore2", "httpx", "httpcore"):
        caplog.set_level(logging.DEBUG, logger=name)
    if source == "environment":
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(echo(status)) as server:
        teacher = OpenAITeacher("tiny", server.url, key_file if source == "file" else None, max_retries=1)
        with pytest.raises((TeacherError, TeacherBusy, UserError)) as raised:
            ask(teacher)
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    told = "".join(traceback.format_exception(raised.value)) + repr(raised.value)
    assert "<api_key>" in str(raised.value)
    # nor half of it, where a line is cut
    assert KEY[:8] not in told
    assert raised.value.__cause__ is None
    assert KEY[:8] not in repr(teacher) + str(teacher) + json.dumps(teacher.settings)
    assert caplog.records
    assert KEY[:8] not in caplog.text + "".join(str(record.__dict__) for record in caplog.records)


@pytest.mark.parametrize("before", [185, 195, 445, 480])
def test_a_key_is_masked_wherever_a_malformed_answer_has_it(before: int, key_file: Path) -> None:
    def behave(request: Request) -> Act:
        return Act(body=f"{'x' * before}{request.headers['authorization']}".encode())

    with serving(lists_models(behave)) as server, pytest.raises(TeacherError) as raised:
        ask(OpenAITeacher("tiny", server.url, key_file, max_retries=0))
    assert KEY[:4] not in str(raised.value)


@contextmanager
def transformers_serve(model: str, folder: Path) -> Iterator[str]:
    """The address of a `transformers serve` on loopback, once it is there."""
    port, log = free_port(), folder / "log.txt"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "OMP_NUM_THREADS": "1"}
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)  # noqa: S603
    try:
        end = time.monotonic() + 240
        while time.monotonic() < end and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    yield f"http://127.0.0.1:{port}/v1"
                    return
            time.sleep(0.2)
        raise AssertionError(f"no server: {log.read_text()[-2000:]}")
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_transformers_serve_answers(tmp_path: Path) -> None:
    model = str(make_talker(tmp_path / "talker", "So the cat is red .", chat=True))
    with transformers_serve(model, tmp_path) as url:
        chats = [chat("red ?"), chat("red ?", sampling=Sampling(temperature=0.7, max_new_tokens=2, seed=1))]
        replies = ask_all(OpenAITeacher(model, url, logprobs=True), chats)
        completed = ask(OpenAITeacher(model, url, layout="completion"), text("red ?"))
        # it serves one model alone
        with pytest.raises(TeacherError, match=r"^400: Server is pinned to"):
            ask(OpenAITeacher("another", url))
    # the template's "user says red ? <go>"; the end is a token, too; no log-probabilities are to be had
    assert replies == [
        Reply("So the cat is red .", "stop", 5, 7),
        Reply("So the", "length", 5, 2),
    ]
    assert completed == Reply("So the cat is red .", "stop", 3, 7)
