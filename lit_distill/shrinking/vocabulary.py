"""Which pieces of a vocabulary a corpus uses, and a tokenizer of these alone."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lit_distill.errors import UserError
from lit_distill.students import Tokens

Corpus = Callable[[Tokens], Iterator[Sequence[int]]]
"""Texts as ids, by whichever tokenizer."""

MULTIPLE = 8
"""The number of pieces is one of it: a product of a matrix and a vector rounds the last few rows in another way than
those in full blocks, and logits are to be the same to the bit; and GPUs multiply in such blocks."""

_LINES = 10_000
_WHOLE = 10**9
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_SENTINEL = re.compile(r"<extra_id_\d+>")
_ALPHABET = set(ByteLevel.alphabet())


def lines_of(paths: Sequence[str]) -> Corpus:
    """The lines of text files, each as an input and as a target. Raises a ``UserError`` if one cannot be read."""
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"vocabulary: no file {path!r}; allowed are text files in UTF-8, and train")

    def read(tokens: Tokens) -> Iterator[Sequence[int]]:
        for path in paths:
            try:
                with Path(path).open(encoding="utf-8") as file:
                    while texts := [line.rstrip("\n") for line in islice(file, _LINES)]:
                        yield from texts_of(texts)(tokens)
            except UnicodeDecodeError as error:
                raise UserError(f"vocabulary: {path!r} is not UTF-8 ({error.reason} at byte {error.start})") from error

    return read


def texts_of(texts: Sequence[str]) -> Corpus:
    """Some texts, each as an input and as a target."""

    def read(tokens: Tokens) -> Iterator[Sequence[int]]:
        yield from tokens.sources(texts, _WHOLE).ids
        yield from tokens.targets(texts, _WHOLE).ids

    return read


def used_pieces(tokens: Tokens, corpora: Iterable[Corpus], *, sentinels: bool) -> list[int]:
    """The ids to keep, rising, after Abdaoui et al. 2020 (2010.05609), which keeps what occurs often enough.

    Kept are the pieces that the corpora use and, of byte pair encoding, all that these are merged from; special and
    added tokens, without T5's ``sentinels`` unless they are asked for; single characters of ASCII, such as digits; the
    pieces of single bytes; and what else is needed for each text of the corpora to stay in the same pieces. The first
    of the rest fill up a multiple of `MULTIPLE`.

    Raises:
        UserError: the corpora use no piece besides those that are always kept, or the tokenizer has no rules to change.
    """
    tokenizer = tokens.tokenizer
    rules = _rules(tokenizer)
    pieces: dict[str, int] = tokenizer.get_vocab()
    always = {number for piece, number in pieces.items() if _is_small(piece)} | set(tokenizer.all_special_ids)
    always |= {pieces[added["content"]] for added in rules["added_tokens"]}
    unwanted = set() if sentinels else {number for piece, number in pieces.items() if _SENTINEL.fullmatch(piece)}
    always -= unwanted
    if rules["model"]["type"] == "Unigram":
        # unknown characters cost a constant more than the rarest piece
        always.add(pieces[min(rules["model"]["vocab"], key=lambda entry: entry[1])[0]])
    used = {number for corpus in corpora for ids in corpus(tokens) for number in ids}
    if not used - always:
        raise UserError(
            f"vocabulary: the corpus uses no piece besides the {len(always)} that are always kept; give a larger one"
        )
    kept = always | used
    if rules["model"]["type"] == "BPE":
        kept |= _parts(rules["model"], pieces, kept)
    rest = sorted(set(pieces.values()) - kept - unwanted)
    return sorted(kept.union(rest[: -len(kept) % MULTIPLE]))


def _is_small(piece: str) -> bool:
    """Whether a piece is a character of ASCII, the mark of a word's beginning, or a byte."""
    return piece in _ALPHABET or piece == "▁" or (len(piece) == 1 and piece.isascii()) or bool(_BYTE.fullmatch(piece))


def _parts(model: Mapping[str, Any], pieces: Mapping[str, int], kept: set[int]) -> set[int]:
    """What the kept pieces are merged from, step by step, as byte pair encoding merges them."""
    prefix = model.get("continuing_subword_prefix") or ""
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    names = {number: piece for piece, number in pieces.items()}
    found: set[int] = set()
    for number in kept:
        parts = list(names[number])
        while True:
            found |= {pieces[part] for part in parts if part in pieces}
            places = [place for place in range(len(parts) - 1) if (parts[place], parts[place + 1]) in ranks]
            if not places:
                break
            place = min(places, key=lambda place: ranks[parts[place], parts[place + 1]])
            parts[place : place + 2] = [parts[place] + parts[place + 1].removeprefix(prefix)]
    return found


def trim(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> PreTrainedTokenizerBase:
    """A tokenizer of some pieces alone, numbered anew in their order.

    Its class is the general one: a SentencePiece model, which T5's own could have, is no part of it.
    """
    rules, names = _rules(tokenizer), {number: piece for piece, number in tokenizer.get_vocab().items()}
    places = {names[number]: place for place, number in enumerate(kept)}
    model = rules["model"]
    if isinstance(model["vocab"], list):
        unknown = model["vocab"][model["unk_id"]][0] if model.get("unk_id") is not None else None
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in places]
        model["unk_id"] = None if unknown is None else places[unknown]
    else:
        model["vocab"] = {piece: places[piece] for piece in model["vocab"] if piece in places}
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [[a, b] for a, b in model["merges"] if {a, b, a + b.removeprefix(prefix)} <= places.keys()]
    rules["added_tokens"] = [
        {**added, "id": places[added["content"]]} for added in rules["added_tokens"] if added["content"] in places
    ]
    rules["post_processor"] = _renumbered(rules["post_processor"], places)
    rules["truncation"] = rules["padding"] = None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    names_of = ("model_max_length", "padding_side", "truncation_side", "chat_template", "clean_up_tokenization_spaces")
    found = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(rules)),
        model_input_names=["input_ids", "attention_mask"],
        **special,
        **{name: getattr(tokenizer, name) for name in names_of if getattr(tokenizer, name, None) is not None},
    )
    if found.get_vocab() != places:
        raise UserError(f"vocabulary: the rules of a {type(tokenizer).__name__} cannot be trimmed")
    return found


def _renumbered(rules: Any, places: Mapping[str, int]) -> Any:
    """Rules of a post-processor with the new ids of its special tokens."""
    if isinstance(rules, list):
        if len(rules) == 2 and isinstance(rules[0], str) and isinstance(rules[1], int):
            return [rules[0], places[rules[0]]]
        return [_renumbered(one, places) for one in rules]
    if not isinstance(rules, dict):
        return rules
    found = {name: _renumbered(value, places) for name, value in rules.items()}
    if "ids" in rules and "tokens" in rules:
        found["ids"] = [places[token] for token in rules["tokens"]]
    return found


def check_same(old: Tokens, new: Tokens, kept: Sequence[int], corpora: Iterable[Corpus]) -> None:
    """Check that the corpora are in the same pieces as before. Raises a ``UserError`` with the first that is not."""
    places = {number: place for place, number in enumerate(kept)}
    for corpus in corpora:
        for before, after in zip(corpus(old), corpus(new), strict=True):
            if [places.get(number) for number in before] != list(after):
                text = old.tokenizer.decode(list(before))
                raise UserError(f"vocabulary: without the other pieces, {text!r:.100} would be other pieces")


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of ``tokenizer.json``. Raises a ``UserError`` for a tokenizer that has none, as ByT5's."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"vocabulary: a {type(tokenizer).__name__} has no pieces that could be left out")
    rules: dict[str, Any] = json.loads(backend.to_str())
    return rules
