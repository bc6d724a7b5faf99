"""THE contract between prompts and teachers: what a teacher is asked, and what it says."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Layout = Literal["chat", "completion"]
"""How a prompt is laid out: as the turns of a chat, or as one text that is to be gone on with."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


Prompt = str | tuple[Message, ...]
"""A text to go on with, or a chat that ends with the user's turn."""


def turns(prompt: Prompt) -> list[dict[str, str]]:
    """The turns of a chat as OpenAI writes them; none of a text."""
    return [{"role": one.role, "content": one.content} for one in prompt if isinstance(one, Message)]


def count_tokens(prompt: Prompt) -> int:
    """Tokens of a prompt, about: four bytes of UTF-8 are one, and a turn has a few of its own."""
    texts = [prompt] if isinstance(prompt, str) else [message.content for message in prompt]
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) // 4 + 4 * len(texts)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a teacher draws its tokens."""

    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that make up this share of the probability."""
    max_new_tokens: int = 256
    """Tokens of an answer at most."""
    seed: int = 0
    """Seed of an input's first sample; the others follow from it."""


@dataclass(frozen=True, slots=True)
class Question:
    """One thing that a teacher is asked once."""

    prompt: Prompt
    sampling: Sampling
    """With the seed of this very sample."""
    stop: tuple[str, ...] = ()
    """Texts at which the answer ends, none of them part of it."""
    schema: Mapping[str, Any] | None = None
    """JSON schema that the answer has to follow, where a teacher can see to that."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a teacher said."""

    text: str
    finish: str | None = None
    """Why it ended: ``stop``, or ``length`` where it was cut at the limit; ``None`` where a teacher does not say."""
    input_tokens: int | None = None
    """Tokens of the prompt, as the teacher counts them; ``None`` where it does not."""
    output_tokens: int | None = None
    """Tokens of the answer, as the teacher counts them."""
    logprob: float | None = None
    """Mean log-probability (natural logarithm) of the answer's tokens; ``None`` where it is not known."""
