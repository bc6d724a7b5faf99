"""A teacher behind an OpenAI-compatible server: vLLM, `transformers serve`, Ollama, llama.cpp, or a hosted one."""

import asyncio
import json
import os
import re
from collections.abc import Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal, cast
from urllib.request import getproxies

from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from lit_distill import checks
from lit_distill.errors import UserError
from lit_distill.questions import Question, Reply, cut_at, turns
from lit_distill.secrets import INSTEAD, secret_names
from lit_distill.teachers.base import Teacher, TeacherBusy, TeacherError

_HOSTED = "https://api.openai.com/v1"
_LIST_TIMEOUT = 5.0  # seconds, for the optional list of models
_MOST_STOPS = 4  # stop texts that OpenAI and TGI accept; others are applied here
_MOST_BYTES = 16 << 20  # of a response; the longest answers with all their log-probabilities have a tenth of it
_LONGEST_KEY = 4096
_OWN_FIELDS = ("model", "messages", "prompt", "stream", "n")
_URL = re.compile(r"https?://([^\s/?#@:\[\]]+|\[[\da-f:.]+\])(:\d{1,5})?(/[^\s?#@]*)?", re.IGNORECASE)


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
        timeout: seconds for one try of a question, including its whole answer.
        max_retries: retries of a question.
        logprobs: ask for log-probabilities of tokens, if the server has them.
        extra_body: fields to add to the request or replace in it, such as ``{top_k: 20}``; null omits a field, as in
            ``{temperature: null, top_p: null}`` for a reasoning model, or ``{top_p: null}`` for TGI, which refuses 1.
        token_limit: the field that limits an answer's length: ``max_tokens``, or ``max_completion_tokens`` for OpenAI's
            reasoning models.
        **kwargs: as in `Teacher`.
    """

    concurrency = 32  # enough for one GPU, within the limits of hosted APIs

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_file: str | Path | None = None,
        timeout: float = 120.0,
        max_retries: int = 6,
        logprobs: bool = False,
        extra_body: dict[str, Any] | None = None,
        token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",  # noqa: S107 - no password
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.base_url = _check_url("base_url", base_url) if base_url is not None else None
        self._key = "" if api_key_file is None else _read_key(api_key_file)
        checks.check_range("timeout", timeout, above=0)
        self.timeout = timeout
        self.max_retries = checks.check_int("max_retries", max_retries, 0)
        self.logprobs = logprobs
        self.extra_body = _check_extra(extra_body)
        self.token_limit = token_limit
        self._client: Any = None
        self._models = ""

    @property
    def settings(self) -> dict[str, Any]:
        """With ``extra_body``, and whether log-probabilities are asked for."""
        return super().settings | {"logprobs": self.logprobs, "extra_body": self.extra_body}

    def check_schema(self) -> None:
        """Raise a ``UserError`` unless the layout supports a schema."""
        if self.layout == "completion":
            raise UserError("layout must be chat where answers follow a schema, got 'completion'")

    async def open(self) -> None:
        """Make the client. Raises a ``UserError`` without a server, or without a key for OpenAI."""
        import openai  # slow

        url = self.base_url or os.environ.get("OPENAI_BASE_URL", "").strip()
        if not self._key and (key := os.environ.get("OPENAI_API_KEY", "").strip()):
            self._key = _check_key("OPENAI_API_KEY", key)
        if not self._key and not url:
            own = "or base_url, for your own server"
            raise UserError(f"a key must be given, as OPENAI_API_KEY or in api_key_file; {own}")
        self._url = _check_url("base_url (OPENAI_BASE_URL)", url or _HOSTED)
        try:
            self._client = openai.AsyncOpenAI(
                # the client needs a key, local servers ignore it
                api_key=self._key or "none",
                base_url=self._url,
                max_retries=self.max_retries,
                timeout=self.timeout,
                http_client=_make_http_client(self.timeout),
            )
        except Exception as error:  # of several libraries
            places = "HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE and OPENAI_*"
            line = self._line(f"teacher: the client cannot be made ({error}); look at {places} in the environment")
            raise UserError(line) from error
        self._models = await self._list_models()

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()

    async def answer(self, question: Question) -> Reply:
        """Answer one question."""
        import httpx2
        import openai

        path = "/completions" if isinstance(question.prompt, str) else "/chat/completions"
        try:
            # the plain method: validating messages would dominate the run time
            response = await self._client.post(path, cast_to=httpx2.Response, body=self._body(question))
        except openai.APIStatusError as error:
            raise self._explain(error) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__
            kind = TeacherError if isinstance(cause, httpx2.DecodingError) else TeacherBusy
            raise kind(self._line(f"{self.max_retries + 1} times {str(cause) or type(cause).__name__}")) from None
        except UnicodeEncodeError:
            raise TeacherError("the prompt is not Unicode: it holds half a surrogate pair") from None
        return _reply(response.extensions["completion"], question.stop)

    def _body(self, question: Question) -> dict[str, Any]:
        sampling, prompt = question.sampling, question.prompt
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
            schema = {"name": "answer", "schema": dict(question.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {field: value for field, value in (body | self.extra_body).items() if value is not None}

    async def _list_models(self) -> str:
        """Some models of the server, if it lists them. Raises a ``UserError`` if there is no server."""
        import httpx2

        quick = self._client.with_options(max_retries=0, timeout=min(self.timeout, _LIST_TIMEOUT))
        try:
            response = await quick.get("/models", cast_to=httpx2.Response)
            return ", ".join(sorted(str(model["id"]) for model in json.loads(response.content)["data"])[:10])
        except Exception as error:  # noqa: BLE001 - the list is optional
            if not isinstance(error.__cause__, httpx2.ConnectError):
                return ""
            proxies = "".join(f", through {name.upper()}_PROXY" for name in getproxies() if name != "no")
            line = self._line(f"base_url: no server answers at {self._url} ({error.__cause__}{proxies})")
        raise UserError(line)

    def _explain(self, error: Any) -> Exception:
        """The exception for a 4xx or 5xx response: for this question, for now, or for all questions."""
        status, broke = error.status_code, error.code == "insufficient_quota" or error.status_code == 402
        line = f"{status}: {_error_text(error.body) or error.response.text or error.response.reason_phrase}"
        if (status in (408, 409, 429) or status >= 500) and not broke:
            return TeacherBusy(self._line(line))
        if broke:
            problem = "api_key: its account has nothing left to spend"
        elif self.has_answered and status in (403, 404, 405):
            # key and model work: a filter or a region concerns this question alone
            return TeacherError(self._line(line))
        elif status in (401, 403):
            problem = f"api_key: the server {'refuses it' if self._key else 'wants one, and none was given'}"
        elif status in (404, 405):
            problem = f"model or base_url: {self._url} has no {self.model!r}{self._models and f', but {self._models}'}"
        else:
            return TeacherError(self._line(line))
        return UserError(self._line(f"{problem} ({line})"))

    def _line(self, text: str) -> str:
        """One printable line of at most 500 characters, with the key masked."""
        if self._key:
            text = text.replace(self._key, "<api_key>")
        text = " ".join(text.encode("utf-8", "backslashreplace").decode().split())
        return text if len(text) <= 500 else f"{text[:497]}..."


def _make_http_client(timeout: float) -> Any:
    """An HTTP client with a total timeout and a size limit, which refuses bodies that are no completion.

    The client of ``openai`` tries all that again.
    """
    import httpx2
    import openai

    class Client(openai.DefaultAsyncHttpxClient):
        async def send(self, request: httpx2.Request, **kwargs: Any) -> httpx2.Response:
            content = bytearray()
            try:
                async with asyncio.timeout(timeout):
                    response = await super().send(request, **{**kwargs, "stream": True})
                    # decompressed in pieces: a few bytes may expand to very many
                    async with aclosing(response):
                        async for part in response.aiter_bytes(1 << 16):
                            content += part
                            if len(content) > _MOST_BYTES:
                                raise httpx2.DecodingError(f"the server's answer is larger than {_MOST_BYTES:,} bytes")
                asked = response.is_success and request.method == "POST"
                extensions = {"completion": _Completion.model_validate_json(content)} if asked else {}
            except TimeoutError as error:
                raise httpx2.ReadTimeout(f"no whole answer within {timeout:g} s") from error
            except ValueError:
                # more than is shown: a key is masked before the line is cut
                message = content[: 1 << 16].decode(errors="replace")
                raise httpx2.DecodingError(f"the server's answer is no completion: {message}") from None
            headers = [(name, value) for name, value in response.headers.items() if name != "content-encoding"]
            return httpx2.Response(
                response.status_code, headers=headers, content=bytes(content), request=request, extensions=extensions
            )

    # keep all connections alive
    return Client(limits=httpx2.Limits(max_connections=1000, max_keepalive_connections=1000))


def _check_url(name: str, value: Any) -> str:
    url = str(value).strip()
    if not _URL.fullmatch(url):
        # do not show possible secrets
        shown = "" if re.search("[@?#]", url) else f", got {value!r}"
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
        extra: dict[str, Any] = dict(json.loads(json.dumps(value or {}, allow_nan=False)))
    except (TypeError, ValueError, RecursionError):
        raise UserError("extra_body must map names to values that JSON knows, as in {top_k: 20}") from None
    if own := [field for field in _OWN_FIELDS if field in extra]:
        raise UserError(f"extra_body must not hold {', '.join(_OWN_FIELDS)}, got {own[0]}")
    return extra


class _Part(BaseModel):
    type: str
    text: str = ""


class _Message(BaseModel):
    """The message of a chat, or the choice of a completion."""

    content: str | list[_Part] | None = Field(None, validation_alias=AliasChoices("content", "text"))
    reasoning: Any = None
    reasoning_content: Any = None


class _Token(BaseModel):
    logprob: float | None = None  # minus infinity, to llama.cpp


class _Completion(BaseModel):
    """The first choice of a completion, and its length; servers leave out what they do not know."""

    message: _Message = Field(
        validation_alias=AliasChoices(AliasPath("choices", 0, "message"), AliasPath("choices", 0))
    )
    finish: str | None = Field(None, validation_alias=AliasPath("choices", 0, "finish_reason"))
    # log-probabilities of a chat, or of a completion
    tokens: list[_Token] | None = Field(None, validation_alias=AliasPath("choices", 0, "logprobs", "content"))
    logprobs: list[float | None] | None = Field(
        None, validation_alias=AliasPath("choices", 0, "logprobs", "token_logprobs")
    )
    input_tokens: int | None = Field(None, validation_alias=AliasPath("usage", "prompt_tokens"))
    output_tokens: int | None = Field(None, validation_alias=AliasPath("usage", "completion_tokens"))

    @field_validator("input_tokens", "output_tokens", mode="wrap")
    @classmethod
    def _count(cls, value: Any, read: ValidatorFunctionWrapHandler) -> int | None:
        try:
            return cast(int | None, read(value))
        except ValidationError:
            # the answer itself is good
            return None


def _reply(found: _Completion, stop: tuple[str, ...]) -> Reply:
    message, whole = found.message, found.message.content or ""
    if isinstance(whole, list):
        # the parts of Mistral's reasoning models, without the thinking
        whole = "".join(part.text for part in whole if part.type == "text")
    # further stop texts, or those that `transformers serve` leaves in
    text = cut_at(whole, stop)
    known = [value for value in found.logprobs or [token.logprob for token in found.tokens or ()] if value is not None]
    # log-probabilities include the tokens of thinking
    thinks = bool(message.reasoning_content or message.reasoning)
    return Reply(
        text=text,
        finish=found.finish if text == whole else "stop",
        input_tokens=found.input_tokens,
        output_tokens=found.output_tokens,
        logprob=sum(known) / len(known) if known and not thinks else None,
    )


def _error_text(body: object) -> str:
    """The message of an error body of OpenAI, vLLM, llama.cpp, FastAPI or TGI; else empty."""
    while isinstance(body, Mapping) and (key := next(filter(body.get, ("message", "detail", "error")), None)):
        body = body[key]
    return body if isinstance(body, str) else ""
