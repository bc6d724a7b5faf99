"""The contract between prompts and teachers: what a teacher is asked, and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Layout = Literal["chat", "completion"]
"""A prompt is the turns of a chat, or one text to be continued."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


Prompt = str | tuple[Message, ...]
"""A text to continue, or a chat that ends with the user's turn."""


def turns(prompt: Prompt) -> list[dict[str, str]]:
    """The turns of a chat as OpenAI's API writes them; none for a text."""
    return [{"role": one.role, "content": one.content} for one in prompt if isinstance(one, Message)]


def count_tokens(prompt: Prompt) -> int:
    """Estimated tokens of a prompt: one for four bytes of UTF-8, and four for each turn."""
    texts = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) // 4 + 4 * len(texts)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a teacher draws its tokens; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """One request for one sample."""

    prompt: Prompt
    sampling: Sampling
    """With the seed of this sample."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""
    schema: Mapping[str, Any] | None = None
    """JSON schema that the answer has to follow."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A teacher's answer; what the teacher does not report is ``None``."""

    text: str
    finish: str | None = None
    """``stop``, or ``length`` where the answer was cut at the limit."""
    input_tokens: int | None = None
    output_tokens: int | None = None
    logprob: float | None = None
    """Mean log-probability (natural logarithm) of the answer's tokens."""
