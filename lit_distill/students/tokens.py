"""A student's tokenizer: its family's format of sources and targets, and its files."""

import json
import tempfile
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import tokenizers
import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

Family = Literal["seq2seq", "causal"]

WORDS = 50_000
"""Words whose tokens are kept: a process prepares many texts of few words."""


@dataclass(frozen=True)
class Encoded:
    """Texts as token ids."""

    ids: list[list[int]]  # truncated to the maximum length
    lengths: list[int]  # numbers of tokens before truncation


class Tokens:
    """A tokenizer, which has an end-of-sequence and a padding token, with its family's format."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, family: Family = "seq2seq") -> None:
        self.tokenizer = tokenizer
        self.family = family
        self._words: dict[str, list[int]] = {}  # ids of words, where a word's depend on nothing else

    def sources(self, texts: Sequence[str], max_length: int) -> Encoded:
        """Inputs with the special tokens of the tokenizer; truncation keeps end-of-sequence."""
        return self._cut(self._ids(texts, special=True), max_length)

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after a text."""
        (bare,), (whole,) = (self._encode(["a"], special=special) for special in (False, True))
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]

    @cached_property
    def _splits_words(self) -> bool:
        """Whether the tokens of a word depend on nothing else, as T5's."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if self.family != "seq2seq" or backend is None:
            return False
        # T5's normalizer makes "▁" of an added token a space
        normalize = str if backend.normalizer is None else backend.normalizer.normalize_str
        if any(" " in one or " " in normalize(one) for one in self.tokenizer.get_added_vocab()):
            return False
        splits, *others = _steps(backend.pre_tokenizer, "pretokenizers")
        kinds = {one["type"] for one in _steps(backend.normalizer, "normalizers")}
        alone = all(one["type"] == "Metaspace" and one["prepend_scheme"] == "always" for one in others)
        return splits["type"] == "WhitespaceSplit" and alone and kinds <= {"None", "Precompiled", "NFKC", "Lowercase"}

    def targets(self, texts: Sequence[str], max_length: int) -> Encoded:
        """Targets, always ending in end-of-sequence."""
        eos, ids = self.tokenizer.eos_token_id, self._ids(texts, special=self.family == "seq2seq")
        return self._cut([row if row and row[-1] == eos else [*row, eos] for row in ids], max_length)

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

    def _ids(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        found: dict[str, list[int]] = {}
        # labels are few
        rest = list(dict.fromkeys(texts))
        if self._splits_words:
            # nothing in such a text is normalised into a space, or away
            plain = [text for text in rest if text.isascii() and text.isprintable()]
            begin, end = self._frame if special else ([], [])
            ids_of = self._of_words(set(chain.from_iterable(text.split(" ") for text in plain))).__getitem__
            found = {text: [*begin, *chain.from_iterable(map(ids_of, text.split(" "))), *end] for text in plain}
            rest = [text for text in rest if text not in found]
        found |= zip(rest, self._encode(rest, special=special), strict=True)
        return [found[text] for text in texts]

    def _of_words(self, words: set[str]) -> dict[str, list[int]]:
        """The ids of these words at least, each tokenised once."""
        known = self._words
        if missing := [word for word in words if word not in known]:
            if len(known) > WORDS:
                known = self._words = {word: known[word] for word in words if word in known}
            known |= zip(missing, self._encode(missing, special=False), strict=True)
        return known

    def _encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        if not texts:
            return []
        # `verbose=False`: a text beyond the tokenizer's own limit needs no warning here, cuts are counted
        encoded = self.tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)
        return cast(list[list[int]], encoded["input_ids"])

    def _cut(self, ids: list[list[int]], max_length: int) -> Encoded:
        eos = self.tokenizer.eos_token_id

        def cut(row: list[int]) -> list[int]:
            if len(row) <= max_length:
                return row
            return [*row[: max_length - 1], eos] if row[-1] == eos else row[:max_length]

        return Encoded([cut(row) for row in ids], [len(row) for row in ids])


def end_tokens(config: GenerationConfig) -> set[int]:
    """The ids of end-of-sequence."""
    eos: Any = config.eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def until(ends: Container[int], tokens: list[int]) -> list[int]:
    """The tokens up to the first of these, which is included."""
    first = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: first + 1]


def _steps(component: Any, several: str) -> list[dict[str, Any]]:
    """The steps of a tokenizer's normalizer or pre-tokenizer, which may be a sequence."""
    found = {"type": "None"} if component is None else json.loads(component.__getstate__())
    return cast(list[dict[str, Any]], found[several] if found["type"] == "Sequence" else [found])


class CausalTokens(Tokens):
    """The tokens of a decoder-only model.

    A source is a prompt: the text as the user's turn in the chat template; without a template the text and a newline,
    after the beginning-of-sequence token if the tokenizer adds one. It has no end-of-sequence token, and truncation
    keeps its end. Without a padding token end-of-sequence pads; padding is told by length, so it is still learned.
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
            rows = self._ids([f"{text}\n" for text in texts], special=True)
            return [row[:-1] if row and row[-1] == eos else row for row in rows]
        turns = [[{"role": "user", "content": text}] for text in texts]
        rendered = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self._ids(cast(list[str], rendered), special=False)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer for transformers 4 and 5.

    Version 5 writes names that 4 does not know, but reads those of 4; it also drops the SentencePiece model, which slow
    tokenizers of 4 and other programs need.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):
        content.pop(name, None)
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    # in version 4 a generic tokenizer would also give `token_type_ids`, which these models refuse
    content["model_input_names"] = ["input_ids", "attention_mask"]
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    _keep_sentencepiece(tokenizer)
    if (sentencepiece := getattr(tokenizer, "_sentencepiece", None)) is not None:
        (folder / "spiece.model").write_bytes(sentencepiece)


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """The tokenizer's files, for a checkpoint: name -> content as bytes, ``(size,)``."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, Path(folder))
        return {
            path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            for path in sorted(Path(folder).iterdir())
            if path.is_file() and path.stat().st_size
        }


def restore_tokenizer(files: Mapping[str, Tensor]) -> PreTrainedTokenizerBase:
    """The tokenizer from its files."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            # checkpoints are untrusted: a name must not leave the folder
            (Path(folder) / Path(name).name).write_bytes(content.numpy().tobytes())
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        _keep_sentencepiece(tokenizer)
        return tokenizer


def _keep_sentencepiece(tokenizer: PreTrainedTokenizerBase) -> None:
    """Load a tokenizer's SentencePiece model into memory, as its folder may disappear."""
    path = Path(getattr(tokenizer, "vocab_file", None) or "")
    if path.name == "spiece.model" and path.is_file():
        tokenizer._sentencepiece = path.read_bytes()
