"""A teacher behind an OpenAI-compatible server: vLLM, `transformers serve`, Ollama, llama.cpp, or a hosted one."""

import asyncio
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from contextlib import aclosing
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from pydantic import AliasChoices, BaseModel, Field, WrapValidator

from lit_distill import checks
from lit_distill.errors import UserError
from lit_distill.questions import Layout, Question, Reply, turns
from lit_distill.secrets import INSTEAD, secret_names
from lit_distill.teachers.base import Teacher, TeacherBusy, TeacherError

if TYPE_CHECKING:
    import httpx2
    import openai

HOSTED = "https://api.openai.com/v1"
"""Default address."""

_LIST_TIMEOUT = 5.0  # seconds, for the optional list of models
_CONNECT_TIMEOUT = 30.0  # seconds; generous, as hundreds of connections may be opened at once
_MOST_STOPS = 4  # stop texts that OpenAI and TGI accept; others are applied here
_MOST_BYTES = 16 << 20  # of a response; the longest answers with all their log-probabilities have a tenth of it
_LONGEST_KEY = 4096
_OWN_FIELDS = ("model", "messages", "prompt", "stream", "n")
_NO_MODEL = re.compile(
    r"\bmodels?\b.*(not found|not exist|n't exist|no such|unknown|not available|not loaded|not served)"
    r"|(not found|no such|unknown|find)\b.*\bmodel\b",
    re.IGNORECASE | re.DOTALL,
)


class OpenAITeacher(Teacher):
    """A teacher behind an OpenAI-compatible server.

    The client retries transient errors with exponential backoff, or as the server asks (up to two minutes): refused
    connections, timeouts, 408, 409, 429, 5xx, and bodies that break off or are no completion.

    Args:
        model: the model's name on the server.
        base_url: address with version, such as ``http://localhost:8000/v1``; by default ``OPENAI_BASE_URL``, else
            OpenAI.
        api_key_file: file that contains only the server's key; by default ``OPENAI_API_KEY``. The key is sent to the
            server and stored nowhere. Servers that need none get a placeholder.
        layout: prompts are the turns of a ``chat`` or a text for ``completion``.
        timeout: seconds for one try of a question, including its whole answer.
        max_retries: retries of a question.
        logprobs: ask for log-probabilities of tokens, if the server has them.
        extra_body: fields to add to the request or replace in it, such as ``{top_k: 20}``; null omits a field, as in
            ``{temperature: null, top_p: null}`` for a reasoning model, or ``{top_p: null}`` for TGI, which refuses 1.
        token_limit: the field that limits an answer's length: ``max_tokens``, or ``max_completion_tokens`` for OpenAI's
            reasoning models.
        **kwargs: as in `Teacher`.
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
        token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",  # noqa: S107 - no password
        **kwargs: Any,
    ) -> None:
        super().__init__(model, layout=layout, **kwargs)
        self.base_url = _check_url("base_url", base_url) if base_url is not None else None
        self._given_key = None if api_key_file is None else _read_key(api_key_file)
        checks.check_range("timeout", timeout, above=0)
        self.timeout = timeout
        self.max_retries = checks.check_int("max_retries", max_retries, 0)
        self.logprobs = logprobs
        self.extra_body = _check_extra(extra_body)
        self.token_limit = token_limit
        self._client: openai.AsyncOpenAI | None = None
        self._key = ""

    @property
    def concurrency(self) -> int:
        """Enough for one GPU, within the limits of hosted APIs."""
        return 32

    @property
    def settings(self) -> dict[str, Any]:
        """With ``extra_body``, and whether log-probabilities are asked for."""
        return super().settings | {"logprobs": self.logprobs, "extra_body": deepcopy(self.extra_body)}

    def check_schema(self) -> None:
        """Raise a ``UserError`` unless the layout supports a schema."""
        if self.layout == "completion":
            raise UserError("layout must be chat where answers follow a schema, got 'completion'")

    async def open(self) -> None:
        """Make the client. Raises a ``UserError`` without a server, or without a key for OpenAI."""
        # slow to import
        import httpx2
        import openai

        if self._client is not None:
            return
        url, key = self.base_url, self._given_key
        if url is None and os.environ.get("OPENAI_BASE_URL", "").strip():
            url = _check_url("base_url (OPENAI_BASE_URL)", os.environ["OPENAI_BASE_URL"])
        if key is None and os.environ.get("OPENAI_API_KEY", "").strip():
            key = _check_key("OPENAI_API_KEY", os.environ["OPENAI_API_KEY"])
        if key is None and url is None:
            raise UserError(
                "a key must be given, as OPENAI_API_KEY or in api_key_file; or base_url, for your own server"
            )
        self._key = key or ""
        self._url = url or HOSTED
        try:
            self._client = openai.AsyncOpenAI(
                # the client needs a key, local servers ignore it
                api_key=key or "none",
                base_url=self._url,
                max_retries=self.max_retries,
                timeout=httpx2.Timeout(self.timeout, connect=min(self.timeout, _CONNECT_TIMEOUT)),
                http_client=_make_http_client(self.timeout),
            )
            await self._list_models(self._client)
        except UserError:
            await self.close()
            raise
        except (ValueError, ImportError, OSError, TypeError, httpx2.InvalidURL, openai.OpenAIError) as error:
            places = "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE and OPENAI_*"
            line = self._line(f"teacher: the client cannot be made ({error}); look at {places} in the environment")
            raise UserError(line) from error

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

    async def answer(self, question: Question) -> Reply:
        """Answer one question."""
        import httpx2
        import openai

        failure: Exception
        try:
            return _reply(_Completion.model_validate_json(await self._ask(question)), question.stop)
        except openai.APIStatusError as error:
            message = _error_text(error.body) or error.response.text or error.response.reason_phrase
            failure = await self._explain(error.status_code, error.code or error.type, message)
        except openai.APITimeoutError:
            failure = TeacherBusy(f"no answer within {self.timeout:g} s, {self.max_retries + 1} times")
        except openai.APIConnectionError as error:
            cause = error.__cause__
            if isinstance(cause, httpx2.DecodingError):
                failure = TeacherError(self._line(f"{self.max_retries + 1} times {cause}"))
            else:
                failure = TeacherBusy(self._line(f"no connection: {str(cause) or type(cause).__name__}"))
        except _TooLarge as error:
            failure = TeacherError(str(error))
        except UnicodeEncodeError:
            failure = TeacherError("the prompt is not Unicode: it holds half a surrogate pair")
        # outside the handlers: the cause in a traceback may contain the key
        raise failure

    async def _ask(self, question: Question) -> bytes:
        """The body of a good response."""
        import httpx2

        if self._client is None:
            raise RuntimeError("a teacher has to be opened before it is asked")
        path = "/completions" if isinstance(question.prompt, str) else "/chat/completions"
        # the plain method: validating messages would dominate the run time
        return (await self._client.post(path, cast_to=httpx2.Response, body=self._body(question))).content

    def _body(self, question: Question) -> dict[str, Any]:
        sampling = question.sampling
        prompt = question.prompt
        # even OpenAI's defaults: vLLM would use those of generation_config.json
        body: dict[str, Any] = {
            "model": self.model,
            **({"prompt": prompt} if isinstance(prompt, str) else {"messages": turns(prompt)}),
            "temperature": sampling.temperature,
            self.token_limit: sampling.max_new_tokens,
            "seed": sampling.seed,
        }
        # TGI refuses a 1
        if sampling.temperature > 0:
            body["top_p"] = sampling.top_p
        if question.stop:
            body["stop"] = list(question.stop[:_MOST_STOPS])
        if self.logprobs:
            # number of alternatives; llama.cpp takes 0 as none at all
            body["logprobs"] = True if self.layout == "chat" else 1
        if question.schema is not None:
            self.check_schema()
            schema = {"name": "answer", "schema": dict(question.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {field: value for field, value in (body | self.extra_body).items() if value is not None}

    async def _list_models(self, client: "openai.AsyncOpenAI") -> str:
        """Some models of the server, if it lists them. Raises a ``UserError`` if there is no server."""
        import httpx2
        import openai

        quick = client.with_options(max_retries=0, timeout=min(self.timeout, _LIST_TIMEOUT))
        try:
            response = await quick.get("/models", cast_to=httpx2.Response)
            names = sorted(str(model["id"]) for model in json.loads(response.content)["data"])
        except openai.APIConnectionError as error:
            if not isinstance(error.__cause__, httpx2.ConnectError):
                return ""
            proxies = "".join(f", through {name.upper()}_PROXY" for name in getproxies() if name != "no")
            refused = f"base_url: no server answers at {self._url} ({error.__cause__}{proxies})"
            raise UserError(self._line(refused)) from None
        except (openai.APIStatusError, _TooLarge, ValueError, LookupError, TypeError, RecursionError):
            # the list is optional
            return ""
        return ", ".join(names[:10])

    async def _explain(self, status: int, code: str | None, message: str) -> Exception:
        """The exception for a 4xx or 5xx response: for this question, for now, or for all questions."""
        line = self._line(f"{status}: {message}")
        if self.has_answered and status in (403, 404, 405):
            # key and model work: a filter or a region concerns this question alone
            return TeacherError(line)
        if (status in (408, 409, 429) and code != "insufficient_quota") or status >= 500:
            return TeacherBusy(line)
        if code == "model_not_found" or (status == 404 and _NO_MODEL.search(message)):
            listed = await self._list_models(self._client) if self._client is not None else ""
            problem = f"model: the server has no {self.model!r}{', but ' if listed else ''}{listed} ({line})"
        elif status in (401, 403):
            problem = f"api_key: the server {'refuses it' if self._key else 'wants one, and none was given'} ({line})"
        elif status == 402 or code == "insufficient_quota":
            problem = f"api_key: its account has nothing left to spend ({line})"
        elif status in (404, 405):
            problem = f"base_url: {line} (is its end, as /v1, right?)"
        elif code in ("unsupported_parameter", "unsupported_value"):
            problem = f"extra_body: {line} (FIELD: null leaves a field out)"
        else:
            return TeacherError(line)
        return UserError(self._line(problem))

    def _line(self, text: str) -> str:
        """One printable line of at most 500 characters, with the key masked."""
        if self._key:
            text = text.replace(self._key, "<api_key>")
        text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
        return text if len(text) <= 500 else f"{text[:497]}..."


class _TooLarge(Exception):
    """A response too large to read or retry."""


def _make_http_client(timeout: float) -> "httpx2.AsyncClient":
    """An HTTP client with a total timeout and a size limit.

    A body that is no completion raises a ``DecodingError``, and an error inside a 200 response (as proxies send)
    becomes the response's status, so that the client retries both.
    """
    import httpx2
    import openai

    class Client(openai.DefaultAsyncHttpxClient):
        async def send(self, request: "httpx2.Request", **kwargs: Any) -> "httpx2.Response":
            try:
                async with asyncio.timeout(timeout):
                    response = await super().send(request, **{**kwargs, "stream": True})
                    content = bytearray()
                    # decompressed in pieces: a few bytes may expand to very many
                    async with aclosing(response):
                        async for part in response.aiter_bytes(1 << 16):
                            content += part
                            if len(content) > _MOST_BYTES:
                                raise _TooLarge(f"the server's answer is larger than {_MOST_BYTES:,} bytes")
            except TimeoutError as error:
                raise httpx2.ReadTimeout(f"no whole answer within {timeout:g} s", request=request) from error
            status, body = response.status_code, bytes(content)
            if status == 200 and request.method == "POST":
                try:
                    _Completion.model_validate_json(body)
                except ValueError:
                    status = _inner_status(body)
                if status == 0:
                    # more than is shown: a key is masked before the line is cut
                    message = body[: 1 << 16].decode(errors="replace")
                    raise httpx2.DecodingError(f"the server's answer is no completion: {message}", request=request)
            headers = [(name, value) for name, value in response.headers.items() if name != "content-encoding"]
            return httpx2.Response(status, headers=headers, content=body, request=request)

    # keep all connections alive
    return Client(limits=httpx2.Limits(max_connections=1000, max_keepalive_connections=1000))


def _check_url(name: str, value: Any) -> str:
    url = value.strip() if isinstance(value, str) else ""
    # do not show possible secrets
    shown = "" if re.search("[@?#]", url) else f", got {value!r}"
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or not shown:
        raise UserError(f"{name} must be http://host:port/v1, without user, password, query or fragment{shown}")
    return url


def _read_key(path: str | Path) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            # a wrong path may lead to a huge file
            key = file.read(_LONGEST_KEY + 1)
    except (OSError, TypeError, ValueError) as error:
        # do not show a key given in place of its file
        reason = getattr(error, "strerror", None) or "not a path"
        raise UserError(f"api_key_file: the file cannot be read ({reason})") from None
    return _check_key(f"api_key_file: {path}", key)


def _check_key(name: str, value: str) -> str:
    """Check that a key fits into a header, without showing it."""
    key = value.strip()
    if not 0 < len(key) <= _LONGEST_KEY or not all("!" <= character <= "~" for character in key):
        raise UserError(f"{name} must hold a key of ASCII letters, digits and signs, and holds something else")
    return key


def _check_extra(value: dict[str, Any] | None) -> dict[str, Any]:
    # do not show the value: it may be a key
    if found := next(secret_names(value), None):
        raise UserError(f"extra_body.{found}: {INSTEAD}")
    try:
        extra: dict[str, Any] = json.loads(json.dumps(value or {}, allow_nan=False))
        own = [field for field in _OWN_FIELDS if field in extra.keys()]  # noqa: SIM118 - a list has none
    except (TypeError, ValueError, RecursionError, AttributeError):
        raise UserError("extra_body must map names to values that JSON knows, as in {top_k: 20}") from None
    if own:
        raise UserError(f"extra_body must not hold {', '.join(_OWN_FIELDS)}, got {own[0]}")
    return extra


T = TypeVar("T")


def _or_none(value: Any, read: Callable[[Any], Any]) -> Any:
    try:
        return read(value)
    except ValueError:
        return None


_Lenient = Annotated[T | None, WrapValidator(_or_none)]
"""Values of a wrong type are unknown, not errors."""


class _Part(BaseModel):
    type: str
    text: str


class _Message(BaseModel):
    content: str | list[_Lenient[_Part]] | None = None
    reasoning: Any = None
    reasoning_content: Any = None


class _Token(BaseModel):
    logprob: Annotated[float, Field(ge=-1e9, le=1)] | None = None


class _Logprobs(BaseModel):
    """Of a chat or a completion: servers mix the forms."""

    content: _Lenient[list[_Token]] = None
    token_logprobs: _Lenient[list[Annotated[float, Field(ge=-1e9, le=1)] | None]] = None


class _Choice(BaseModel):
    message: _Message | None = None
    text: str | None = None
    finish_reason: _Lenient[str] = None
    logprobs: _Lenient[_Logprobs] = None


class _Usage(BaseModel):
    prompt_tokens: _Lenient[Annotated[int, Field(ge=0, lt=2**63)]] = None
    completion_tokens: _Lenient[Annotated[int, Field(ge=0, lt=2**63)]] = None


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Lenient[_Usage] = None

    def model_post_init(self, _: Any) -> None:
        if self.choices[0].message is None and "text" not in self.choices[0].model_fields_set:
            raise ValueError("the first choice has no text")


class _InnerError(BaseModel):
    status: Annotated[int, Field(ge=400, lt=600, validation_alias=AliasChoices("code", "status"))]


class _ErrorBody(BaseModel):
    error: _InnerError


def _inner_status(content: bytes) -> int:
    """Status of an error inside a 200 response; 0 if there is none."""
    try:
        return _ErrorBody.model_validate_json(content).error.status
    except ValueError:
        return 0


def _error_text(body: object) -> str:
    """The message of an error body of OpenAI, vLLM, llama.cpp, FastAPI or TGI; else empty."""
    while isinstance(body, Mapping) and (key := next(filter(body.get, ("message", "detail", "error")), None)):
        body = body[key]
    return body if isinstance(body, str) else ""


def _reply(found: _Completion, stops: tuple[str, ...]) -> Reply:
    choice, usage, message = found.choices[0], found.usage or _Usage(), found.choices[0].message
    text = message.content if message is not None else choice.text
    if isinstance(text, list):
        # the parts of Mistral's reasoning models, without the thinking
        text = "".join(part.text for part in text if part is not None and part.type == "text")
    text, finish = text or "", choice.finish_reason
    # further stop texts, or those that `transformers serve` leaves in
    if ends := [end for stop in stops if (end := text.find(stop)) >= 0]:
        text, finish = text[: min(ends)], "stop"
    logprobs = choice.logprobs or _Logprobs()
    values = logprobs.token_logprobs or [token.logprob for token in logprobs.content or ()]
    known = [value for value in values if value is not None]
    # log-probabilities include the tokens of thinking
    thinks = message is not None and bool(message.reasoning_content or message.reasoning)
    return Reply(
        text=text,
        finish=finish,
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        logprob=math.fsum(known) / len(known) if known and not thinks else None,
    )
