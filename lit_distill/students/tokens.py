"""A student's tokenizer, and its family's format of sources and targets."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, cast

import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

Family = Literal["seq2seq", "causal"]


@dataclass(frozen=True)
class Encoded:
    """Texts as token ids."""

    ids: list[list[int]]  # truncated to the maximum length
    lengths: list[int]  # numbers of tokens before truncation


class Tokens:
    """A tokenizer with its family's format.

    Args:
        tokenizer: with an end-of-sequence and a padding token.
        family: of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, family: Family = "seq2seq") -> None:
        self.tokenizer = tokenizer
        self.family = family

    def sources(self, texts: Sequence[str], max_length: int) -> Encoded:
        """Inputs with the special tokens of the tokenizer; truncation keeps end-of-sequence."""
        return self._cut(self._ids(texts), max_length)

    def targets(self, texts: Sequence[str], max_length: int) -> Encoded:
        """Targets, always ending in end-of-sequence."""
        eos = self.tokenizer.eos_token_id
        return self._cut([ids if ids and ids[-1] == eos else [*ids, eos] for ids in self._ids(texts)], max_length)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Token ids to text, without special tokens and padding."""
        safe = [[token for token in row if token >= 0] for row in ids]
        texts = self.tokenizer.batch_decode(safe, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]

    @property
    def fingerprint(self) -> str:
        """A hash of all that affects tokenisation: class, special tokens, vocabulary, rules, family, chat template."""
        tokenizer = self.tokenizer
        content: dict[str, Any] = {
            "family": self.family,
            "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
            "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
            "special_ids": tokenizer.all_special_ids,
            "vocabulary": sorted(tokenizer.get_vocab().items()),
            "chat_template": getattr(tokenizer, "chat_template", None),
            # the library's rules may change between releases
            "versions": [transformers.__version__, tokenizers.__version__],
        }
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            rules = json.loads(backend.to_str())
            # state of the last call, reset by each call
            content["rules"] = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # `verbose=False`: a text beyond the tokenizer's own limit needs no warning here, cuts are counted
        ids: list[list[int]] = self.tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
        return ids

    def _cut(self, ids: list[list[int]], max_length: int) -> Encoded:
        eos = self.tokenizer.eos_token_id

        def cut(row: list[int]) -> list[int]:
            if len(row) <= max_length:
                return row
            return [*row[: max_length - 1], eos] if row[-1] == eos else row[:max_length]

        return Encoded([cut(row) for row in ids], [len(row) for row in ids])


class CausalTokens(Tokens):
    """The tokens of a decoder-only model.

    A source is a prompt: the text as the user's turn in the chat template; without a template the text and a newline,
    after the beginning-of-sequence token if the tokenizer adds one. It has no end-of-sequence token, and truncation
    keeps its end.

    Args:
        tokenizer: with an end-of-sequence token, which also pads if there is no padding token. Padding is told by
            length, not by id, so end-of-sequence is still learned.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, "causal")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        empty, other = self._prompts(["", "x"])
        same = next((i for i, (a, b) in enumerate(zip(empty, other, strict=False)) if a != b), len(empty))
        self._ending = empty[same:]

    def sources(self, texts: Sequence[str], max_length: int) -> Encoded:
        """Prompts; truncation cuts the end of the text, not the template."""
        ending = self._ending[-max_length:]

        def cut(row: list[int]) -> list[int]:
            return row if len(row) <= max_length else [*row[: max_length - len(ending)], *ending]

        ids = self._prompts(texts)
        return Encoded([cut(row) for row in ids], [len(row) for row in ids])

    def _prompts(self, texts: Sequence[str]) -> list[list[int]]:
        if self.tokenizer.chat_template is None:
            eos = self.tokenizer.eos_token_id
            rows = super()._ids([f"{text}\n" for text in texts])
            return [row[:-1] if row and row[-1] == eos else row for row in rows]
        turns = [[{"role": "user", "content": text}] for text in texts]
        rendered = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self._ids(cast(list[str], rendered))

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without special tokens."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return ids
