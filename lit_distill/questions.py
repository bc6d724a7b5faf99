"""The contract between prompts and teachers: questions and replies."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Layout = Literal["chat", "completion"]
"""A chat of turns, or one text to continue."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


Prompt = str | tuple[Message, ...]
"""A text to continue, or a chat that ends with a user turn."""


def turns(prompt: Prompt) -> list[dict[str, str]]:
    """The turns of a chat in OpenAI's format; empty for a text."""
    return [{"role": one.role, "content": one.content} for one in prompt if isinstance(one, Message)]


def count_tokens(prompt: Prompt) -> int:
    """Estimated tokens of a prompt: one per four bytes of UTF-8, and four per turn."""
    texts = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) // 4 + 4 * len(texts)


def cut_at(text: str, stop: Iterable[str]) -> str:
    """A text up to the first of its stop texts."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling settings of a teacher; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """A request for one sample."""

    prompt: Prompt
    sampling: Sampling  # with this sample's seed
    stop: tuple[str, ...] = ()  # the answer ends before the first of these texts
    schema: Mapping[str, Any] | None = None  # JSON schema of the answer


@dataclass(frozen=True, slots=True)
class Reply:
    """A teacher's answer; ``None`` for what it does not report."""

    text: str
    finish: str | None = None  # `stop`, or `length` if the answer was cut
    input_tokens: int | None = None
    output_tokens: int | None = None
    logprob: float | None = None  # mean log-probability (natural logarithm) of the answer's tokens
