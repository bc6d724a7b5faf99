"""A teacher behind a server that speaks the OpenAI API: vLLM, `transformers serve`, Ollama, llama.cpp, a hosted one."""

import asyncio
import json
import math
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import urlsplit

from lit_distill import checks
from lit_distill.errors import UserError
from lit_distill.questions import Layout, Question, Reply, turns
from lit_distill.secrets import INSTEAD, secret_names
from lit_distill.teachers.base import Teacher, TeacherBusy, TeacherError

if TYPE_CHECKING:
    import httpx2
    import openai

TokenLimit = Literal["max_tokens", "max_completion_tokens"]
"""What a server calls the limit of an answer's length."""

HOSTED = "https://api.openai.com/v1"
"""Where questions go when no address is given."""

LONGEST_WAIT = 600.0
"""Seconds that a server is waited for at most, however many it asks for."""

_CLIENT_WAITS = 120.0
"""Seconds of a Retry-After up to which the client waits by itself; what asks for more it gives up at once."""

_FIRST_WAIT, _LAST_WAIT = 0.5, 8.0
"""Seconds between tries after a malformed answer, doubled each time: as the client does after other failures."""

_LIST_TIMEOUT = 5.0
"""Seconds for a list of the models that are there, which nothing depends on."""

_CONNECT_TIMEOUT = 30.0
"""Seconds to be let in; generous, as hundreds of connections may be opened at once."""

_MOST_STOPS = 4
"""Stop texts that OpenAI and TGI take; the others are seen to here."""

_MOST_BYTES = 16 << 20
"""Of a response; the longest answers with all their log-probabilities have a tenth of it."""

_CHUNK_BYTES = 1 << 16

_MOST_CONNECTIONS = 1000
"""Far above any concurrency that is of use; all are kept for the next question."""

_LONGEST_KEY = 4096
"""Characters; servers take no longer headers."""

_PLACEHOLDER_KEY = "none"
"""Sent where no key is given: the client wants one, local servers do not look at it."""

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
"""What of the environment leads elsewhere."""

_OWN_FIELDS = ("model", "messages", "prompt", "stream", "n")
"""What is not for `extra_body` to say."""

_FINISHES = {"eos_token": "stop", "stop_sequence": "stop"}
"""What older versions of TGI say instead of the usual words."""

_NO_MODEL = re.compile(
    r"\bmodels?\b.*(not found|not exist|n't exist|no such|unknown|not available|not loaded|not served)"
    r"|(not found|no such|unknown|find)\b.*\bmodel\b",
    re.IGNORECASE | re.DOTALL,
)

Failure = TeacherError | TeacherBusy | UserError


class _TooLarge(Exception):
    """A response that is not read to its end."""


@dataclass(frozen=True)
class _Refused:
    """An error in a response of 200, as servers that pass questions on to others give it."""

    status: int
    code: str | None
    said: str


class OpenAITeacher(Teacher):
    """A teacher behind a server that speaks the OpenAI API.

    What passes (a refused connection, a timeout, 408, 409, 429, 5xx, a body that breaks off or is none) is tried again
    with growing waits, or after the wait that the server asks for.

    Args:
        model: the model's name as the server knows it.
        base_url: where the server is, with the version: ``http://localhost:8000/v1``; if not given, what
            ``OPENAI_BASE_URL`` says, or else OpenAI itself.
        api_key_file: file of the server's key alone; if not given, the key is what ``OPENAI_API_KEY`` says. It goes to
            the server and nowhere else. Servers that want none are given a placeholder.
        layout: prompts as the turns of a ``chat`` or as a text for ``completion``.
        timeout: seconds that one try of a question may take in all, until its answer is there whole; then it is tried
            again.
        max_retries: how often a question is tried again.
        logprobs: ask for the tokens' log-probabilities; a server that has none is asked in vain.
        extra_body: fields of the request beside or instead of the usual ones, as ``{top_k: 20}``; one that is null is
            left out, as in ``{temperature: null, top_p: null}`` for a reasoning model that takes neither, or
            ``{top_p: null}`` for TGI, which takes no 1.
        token_limit: what the server calls the limit of an answer's length: almost all know ``max_tokens``, OpenAI's
            reasoning models want ``max_completion_tokens``.
        **kwargs: the other arguments of `Teacher`.
    """

    follows_schema: ClassVar[bool] = True

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_file: str | Path | None = None,
        layout: Layout = "chat",
        timeout: float = 120.0,
        max_retries: int = 6,
        logprobs: bool = False,
        extra_body: dict[str, Any] | None = None,
        token_limit: TokenLimit = "max_tokens",  # noqa: S107 - no password
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layout=layout, **kwargs)
        self.base_url = _check_url("base_url", base_url) if base_url is not None else None
        self._given_key = None if api_key_file is None else _read_key(api_key_file)
        checks.check_range("timeout", timeout, above=0)
        self.timeout = timeout
        self.max_retries = checks.check_int("max_retries", max_retries, 0)
        self.logprobs = checks.check_bool("logprobs", logprobs)
        self.extra_body = _check_extra(extra_body)
        self.token_limit: TokenLimit = checks.check_choice(
            "token_limit", token_limit, ("max_tokens", "max_completion_tokens")
        )
        self._client: openai.AsyncOpenAI | None = None
        self._key = ""

    @property
    def concurrency(self) -> int:
        """A server batches what it has; enough to keep one GPU busy, little enough for a hosted API's limits."""
        return 32

    @property
    def settings(self) -> dict[str, Any]:
        """With what else is sent, and whether log-probabilities are asked for."""
        return {**super().settings, "logprobs": self.logprobs, "extra_body": json.loads(json.dumps(self.extra_body))}

    def check_schema(self) -> None:
        """See that the layout is one with a field for a schema."""
        if self.layout == "completion":
            raise UserError("layout must be chat where answers follow a schema, got 'completion'")

    async def open(self) -> None:
        """Make the client, and see that somebody listens.

        Raises:
            UserError: there is no key for OpenAI, or nothing at the address.
        """
        # half a second to import, which a command that asks nobody does not spend
        import httpx2
        import openai

        if self._client is not None:
            return
        url = self.base_url
        if url is None and os.environ.get("OPENAI_BASE_URL", "").strip():
            url = _check_url("base_url (OPENAI_BASE_URL)", os.environ["OPENAI_BASE_URL"])
        key = self._given_key
        if key is None and os.environ.get("OPENAI_API_KEY", "").strip():
            key = _check_key("OPENAI_API_KEY", os.environ["OPENAI_API_KEY"])
        if key is None and url is None:
            raise UserError(
                "a key must be given, as OPENAI_API_KEY or in api_key_file; or base_url, for your own server"
            )
        for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
            if not os.environ.get(name, "").isascii():
                raise UserError(f"{name} must be a text of ASCII letters, digits and signs, as it stands in a header")
        self._key = key or ""
        try:
            self._client = client = openai.AsyncOpenAI(
                api_key=key or _PLACEHOLDER_KEY,
                base_url=url or HOSTED,
                max_retries=self.max_retries,
                timeout=httpx2.Timeout(self.timeout, connect=min(self.timeout, _CONNECT_TIMEOUT)),
                http_client=_make_http_client(self.timeout),
            )
        except (ValueError, ImportError, OSError, TypeError, httpx2.InvalidURL, openai.OpenAIError) as error:
            # what it reads beside its arguments
            places = "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE and OPENAI_*"
            line = self._line(f"teacher: the client cannot be made ({error}); look at {places} in the environment")
            raise UserError(line) from error
        refused = ""
        try:
            await self._list_models(client)
        except openai.APIConnectionError as error:
            # any other trouble is not the list's to report: it may be slow, closed to this key, or not there
            if isinstance(error.__cause__, httpx2.ConnectError):
                refused = self._line(str(error.__cause__) or type(error.__cause__).__name__)
        except (openai.APIStatusError, _TooLarge):
            pass
        if refused:
            await self.close()
            names = [name for name in _PROXIES if os.environ.get(name) or os.environ.get(name.lower())]
            way = f", asked by way of {' or '.join(names)}" if names else ""
            raise UserError(f"base_url: no server answers at {url or HOSTED} ({refused}{way})")

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    async def answer(self, question: Question) -> Reply:
        """Answer one question."""
        import openai

        client = self._client
        if client is None:
            raise RuntimeError("a teacher has to be opened before it is asked")
        body = self._body(question)
        failure: Failure
        # raised only behind the handlers: a traceback would show what caused it, which may hold the key
        for tries in range(1, self.max_retries + 2):
            wait = min(_FIRST_WAIT * 2 ** min(tries - 1, 10), _LAST_WAIT) * (1 - 0.25 * random.random())  # noqa: S311
            try:
                content = await self._ask(client, question, body)
            except openai.APIStatusError as error:
                asked = _asked_wait(error.response.headers)
                said = _said(error.body) or error.response.reason_phrase
                failure = await self._explain(client, error.status_code, error.code or error.type, said)
                if not isinstance(failure, TeacherBusy) or asked <= _CLIENT_WAITS:
                    break
                wait = min(asked, LONGEST_WAIT)
            except openai.APITimeoutError:
                failure = TeacherBusy(f"no answer within {self.timeout:g} s, {self.max_retries + 1} times")
                break
            except (openai.APIConnectionError, _TooLarge) as error:
                # some releases of the client raise what its transport raised as it is
                cause = error.__cause__ or error
                if isinstance(cause, _TooLarge):
                    failure = TeacherError(str(cause))
                    break
                failure = TeacherBusy(self._line(f"no connection: {str(cause) or type(cause).__name__}"))
                break
            except UnicodeEncodeError:
                failure = TeacherError("the prompt is no Unicode text: it holds half a surrogate pair")
                break
            else:
                reply = _read(content, question.stop)
                if isinstance(reply, Reply):
                    self.has_answered = True
                    return reply
                if isinstance(reply, _Refused):
                    failure = await self._explain(client, reply.status, reply.code, reply.said)
                    if not isinstance(failure, TeacherBusy):
                        break
                else:
                    failure = TeacherError(self._line(f"{reply}, {tries} times"))
            if tries <= self.max_retries:
                await asyncio.sleep(wait)
        raise failure

    async def _ask(self, client: "openai.AsyncOpenAI", question: Question, body: dict[str, Any]) -> bytes:
        """The body of a good response, as it came: what the client makes of a malformed one is no error to it."""
        if self.layout == "completion":
            if not isinstance(question.prompt, str):
                raise TypeError("a completion is asked for with a text, not with messages")
            text = await client.completions.with_raw_response.create(
                model=self.model, prompt=question.prompt, extra_body=body
            )
            return text.http_response.content
        if isinstance(question.prompt, str):
            raise TypeError("a chat is asked with messages, not with a text")
        # beside the body: the client walks through messages of its own with what takes longer than all else here
        chat = await client.chat.completions.with_raw_response.create(
            model=self.model, messages=[], extra_body={**body, "messages": turns(question.prompt)}
        )
        return chat.http_response.content

    def _body(self, question: Question) -> dict[str, Any]:
        """The request's fields but for the model and the prompt."""
        sampling = question.sampling
        # each field is sent, also where it has OpenAI's default: vLLM's are those of the model's generation_config.json
        body: dict[str, Any] = {
            "temperature": sampling.temperature,
            self.token_limit: sampling.max_new_tokens,
            "seed": sampling.seed,
        }
        # without a draw it says nothing, and TGI would refuse a 1
        if sampling.temperature > 0:
            body["top_p"] = sampling.top_p
        if question.stop:
            body["stop"] = list(question.stop[:_MOST_STOPS])
        if self.logprobs:
            # a number of alternatives for a completion, for which 0 is none at all to llama.cpp
            body["logprobs"] = True if self.layout == "chat" else 1
        if question.schema is not None:
            self.check_schema()
            schema = {"name": "answer", "schema": dict(question.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {field: value for field, value in (body | self.extra_body).items() if value is not None}

    async def _list_models(self, client: "openai.AsyncOpenAI") -> list[str]:
        quick = client.with_options(max_retries=0, timeout=min(self.timeout, _LIST_TIMEOUT))
        response = await quick.models.with_raw_response.list()
        try:
            return [str(model["id"]) for model in json.loads(response.http_response.content)["data"]]
        except (ValueError, LookupError, TypeError):
            return []

    async def _explain(self, client: "openai.AsyncOpenAI", status: int, code: str | None, said: str) -> Failure:
        """What a response of 4xx or 5xx means for the question, or for all of them."""
        line = self._line(f"{status}: {said}")
        if self.has_answered and status in (403, 404, 405):
            # it lets this key in and has this model: a filter, or a region, that this question alone meets
            return TeacherError(line)
        if code == "model_not_found" or (status == 404 and _NO_MODEL.search(said)):
            return UserError(
                self._line(f"model: the server has no {self.model!r}{await self._others(client)} ({line})")
            )
        if status in (401, 403):
            given = "refuses it" if self._key else "wants one, and none was given"
            return UserError(self._line(f"api_key: the server {given} ({line})"))
        if code == "insufficient_quota" or status == 402:
            return UserError(self._line(f"api_key: its account has nothing left to spend ({line})"))
        if status in (408, 409, 429) or status >= 500:
            return TeacherBusy(line)
        if status in (404, 405):
            # what a server answers that does not know the path
            return UserError(self._line(f"base_url: {line} (is its end, as /v1, right?)"))
        if code in ("unsupported_parameter", "unsupported_value"):
            return UserError(self._line(f"extra_body: {line} (FIELD: null leaves a field out)"))
        return TeacherError(line)

    async def _others(self, client: "openai.AsyncOpenAI") -> str:
        import openai

        try:
            found = await self._list_models(client)
        except (openai.APIError, _TooLarge):
            return ""
        few = ", ".join(sorted(found)[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "")
        return f", but {few}" if found else ""

    def _line(self, text: str) -> str:
        """A text as one line of at most 500 characters that does not hold the key and can be printed."""
        if self._key:
            text = text.replace(self._key, "<api_key>")
        text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
        return text if len(text) <= 500 else f"{text[:497]}..."


def _make_http_client(timeout: float) -> "httpx2.AsyncClient":
    """A client whose tries end: a server may send a byte from time to time for ever, or bytes without end."""
    import httpx2
    import openai

    class Client(openai.DefaultAsyncHttpxClient):
        async def send(self, request: "httpx2.Request", **kwargs: Any) -> "httpx2.Response":
            try:
                async with asyncio.timeout(timeout):
                    response = await super().send(request, **{**kwargs, "stream": True})
                    content = bytearray()
                    # as it is unpacked: a few bytes may stand for very many
                    async with aclosing(response):
                        async for part in response.aiter_bytes(_CHUNK_BYTES):
                            content += part
                            if len(content) > _MOST_BYTES:
                                raise _TooLarge(f"the server's answer is larger than {_MOST_BYTES:,} bytes")
            except TimeoutError as error:
                raise httpx2.ReadTimeout(f"no whole answer within {timeout:g} s", request=request) from error
            headers = [(name, value) for name, value in response.headers.items() if name != "content-encoding"]
            return httpx2.Response(response.status_code, headers=headers, content=bytes(content), request=request)

    limits = httpx2.Limits(max_connections=_MOST_CONNECTIONS, max_keepalive_connections=_MOST_CONNECTIONS)
    return Client(limits=limits)


def _check_url(name: str, value: Any) -> str:  # noqa: ANN401 - whatever YAML holds
    url = value.strip() if isinstance(value, str) else ""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if "@" in url or "?" in url or "#" in url:
        # it would be shown in logs; so it is not shown here either
        raise UserError(f"{name} must be http://host:port/v1 or the like, without user, password, query or fragment")
    if not good:
        raise UserError(f"{name} must be http://host:port/v1 or the like, got {value!r}")
    return url


def _read_key(path: str | Path) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            # a key is short, and a wrong path may lead to anything
            key = file.read(_LONGEST_KEY + 1)
    except (OSError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        # a key that was given in its file's place is not shown
        raise UserError(f"api_key_file: what it names cannot be read ({reason})") from None
    return _check_key(f"api_key_file: {path}", key)


def _check_key(name: str, value: str) -> str:
    """A key that can stand in a header; it is not shown where it cannot."""
    key = value.strip()
    if not 0 < len(key) <= _LONGEST_KEY or not all("!" <= character <= "~" for character in key):
        raise UserError(f"{name} must hold a key of ASCII letters, digits and signs, and holds something else")
    return key


def _check_extra(value: Any) -> dict[str, Any]:  # noqa: ANN401
    if value is None:
        return {}
    # a value is not shown, as it may be a key
    if found := next(secret_names(value), None):
        raise UserError(f"extra_body.{found}: {INSTEAD}")
    try:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise TypeError
        extra: dict[str, Any] = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise UserError("extra_body must map names to values that JSON knows, as in {top_k: 20}") from None
    if own := [field for field in _OWN_FIELDS if field in extra]:
        raise UserError(f"extra_body must not hold {', '.join(_OWN_FIELDS)}, got {own[0]}")
    return extra


def _asked_wait(headers: Mapping[str, str]) -> float:
    """Seconds that a response asks to wait, as a number or as a date; 0 where it does not."""
    for header, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            wait = float(headers.get(header, "")) / unit
        except ValueError:
            continue
        return wait if wait > 0 else 0.0
    try:
        return max(parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _said(body: object) -> str:
    """What the body of an error says, wherever a server puts it."""
    # OpenAI's, vLLM's and llama.cpp's; FastAPI's; TGI's
    while isinstance(body, Mapping) and (key := next(filter(body.get, ("message", "detail", "error")), None)):
        body = body[key]
    return body if isinstance(body, str) else "" if body is None else _as_json(body)


def _as_json(value: object) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        # what could just be read may be too deep to be written
        return "(nested too deep to be shown)"


def _read(content: bytes, stops: Sequence[str]) -> Reply | _Refused | str:
    """The reply that a response holds, or what is wrong with it."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return f"the server's answer is not JSON: {content[:200].decode(errors='replace')!r}"
    choices = found.get("choices") if isinstance(found, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        refused = _refused(found.get("error")) if isinstance(found, dict) else None
        if refused is not None:
            return refused
        return f"the server's answer has no choices: {_said(found)[:200]!r}"
    message = choice.get("message")
    text = _text(message.get("content") if isinstance(message, dict) else choice.get("text"))
    if text is None or (message is None and "text" not in choice):
        return f"the server's answer has no text: {_as_json(choice)[:200]!r}"
    finish = choice.get("finish_reason")
    finish = _FINISHES.get(finish, finish) if isinstance(finish, str) else None
    # what was not asked for here, or is part of the text as with `transformers serve`
    ends = [end for end in (text.find(stop) for stop in stops) if end >= 0]
    if ends:
        text, finish = text[: min(ends)], "stop"
    usage = found.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(
        text=text,
        finish=finish,
        input_tokens=_count(usage.get("prompt_tokens")),
        output_tokens=_count(usage.get("completion_tokens")),
        logprob=None if _thinks(message) else _mean_logprob(choice.get("logprobs")),
    )


def _refused(error: Any) -> _Refused | None:  # noqa: ANN401 - whatever JSON holds
    if not isinstance(error, dict):
        return None
    for key in ("code", "status"):
        digits = str(error.get(key))
        if re.fullmatch("[45][0-9][0-9]", digits):
            kind = error.get("type")
            return _Refused(int(digits), kind if isinstance(kind, str) else None, _said(error))
    return None


def _text(content: Any) -> str | None:  # noqa: ANN401 - whatever JSON holds
    """An answer's text; that of a list of parts, as Mistral's reasoning models give it, without the thinking."""
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        return "".join(part["text"] for part in parts if isinstance(part.get("text"), str))
    return content if isinstance(content, str) else None


def _thinks(message: Any) -> bool:  # noqa: ANN401
    """Whether there was thinking before the answer: its tokens are among those that have probabilities."""
    return isinstance(message, dict) and bool(message.get("reasoning_content") or message.get("reasoning"))


def _mean_logprob(found: Any) -> float | None:  # noqa: ANN401
    """The mean over the tokens that the server generated, in a chat's form or a completion's.

    Servers do not keep to the form of their endpoint: llama.cpp gives a chat's for a completion, its Python server the
    other way round.
    """
    if not isinstance(found, dict):
        return None
    values = found.get("token_logprobs")
    if not isinstance(values, list):
        content = found.get("content")
        content = content if isinstance(content, list) else []
        values = [token.get("logprob") for token in content if isinstance(token, dict)]
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    try:
        mean = math.fsum(numbers) / len(numbers) if numbers else math.nan
    except (OverflowError, ValueError):
        # whole numbers beyond all others, or infinities of both signs
        return None
    return mean if math.isfinite(mean) else None


def _count(value: Any) -> int | None:  # noqa: ANN401
    """A number of tokens, as whatever number or text it is written."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value.strip()):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        return None
    return value
