"""A corpus: its documents as they stand in files, and which of them are trained on."""

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Literal

from lit_distill.data.streaming import LONGEST, Content, placed, shard_rows
from lit_distill.errors import UserError
from lit_distill.reading import parse_json
from lit_distill.remote import AnyPath, format_of

FORMATS = (".txt", ".jsonl", ".json", ".parquet")

HELD_OUT = 100
"""One document in so many is held out for validation."""

WORDS = 5
"""The fewest words of a line that tell that a document and a test set have it in common."""

_END = re.compile(
    # punctuation, but not in a word or a number
    r"(?!(?<=\w)['\u2019\u2010\u2011/&-]\w)(?!(?<=\d),\d)[^\w\s]|(?<![^\W_])_|_(?![^\W_])"
    # tabs, and what comes before a label such as ``Hypothesis:``
    r"|\t|\s(?=[^\W\d]\w*(?: \d+)?\s?[:\uff1a](?![/:]))"
)

_RESERVED = re.compile(r"<extra_id_\d+>|<pad>")
"""What a T5's tokenizer would take for a sentinel or padding."""

Kind = Literal["documents", "blank", "held_out", "overlapping"]


def normal(text: str) -> str:
    """The words of a text: letters and digits alone, in lower case, with single spaces."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def parse(path: AnyPath, number: int, content: Content) -> tuple[str, Any]:
    """The place of a row of `shard_rows`, and its text, or the JSON value in it."""
    place, content = placed(path, number, content)
    if isinstance(content, dict):
        return place, content
    try:
        return place, content.decode() if format_of(path) == ".txt" else parse_json(content)
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error


def document(path: AnyPath, number: int, content: Content, column: str) -> str:
    """The text of a row: of a line, a JSON string, or a column, without sentinels and padding.

    Raises a ``UserError`` that names its place.
    """
    place, found = parse(path, number, content)
    if isinstance(found, dict):
        if column not in found:
            raise UserError(f"{place}: no column {column!r}; there are {', '.join(found) or 'none'}")
        place, found = f"{place}: {column!r}", found[column]
    if not isinstance(found, str):
        raise UserError(f"{place} must be a text, got {found!r:.100}")
    if len(found) > LONGEST:
        raise UserError(f"{place} has more than {LONGEST >> 20} million characters; cut it into several")
    return _RESERVED.sub(" ", found).strip()


def tested_lines(paths: Sequence[AnyPath]) -> dict[str, str]:
    """The lines of test sets of at least `WORDS` words, normalised, and where each is; of objects all texts.

    Raises a ``UserError`` for a file that has none: no document could be told by it.
    """
    found: dict[str, str] = {}
    for path in paths:
        none = True
        for row in shard_rows(path, name="test_sets"):
            place, value = parse(path, *row)
            for line in _lines(value):
                none = False
                found.setdefault(line, place)
        if none:
            raise UserError(
                f"test_sets: {path} has no line of at least {WORDS} words, parted by spaces, by which a document could"
                " be told; leave it out"
            )
    return found


def _lines(value: Any) -> Iterator[str]:
    """The normalised lines of all texts in a JSON value that have enough words.

    Also what comes after a line's first colon, as in ``Premise: ...``.
    """
    if isinstance(value, str):
        lines = value.splitlines()
        parts = chain(lines, (line.partition(": ")[2] for line in lines if ": " in line))
        yield from (line for line in map(normal, parts) if line.count(" ") >= WORDS - 1)
    elif isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _lines(one)


def _parts(line: str) -> Iterator[str]:
    """A line cut where a sentence, a clause or a field may end."""
    start = 0
    for end in _END.finditer(line):
        # to `re`, vowel signs and accents that combine are no part of a word
        if unicodedata.category(end[0]) not in ("Mn", "Mc"):
            yield line[start : end.start()]
            start = end.end()
    yield line[start:]


def rows_of(shards: Iterable[AnyPath], name: str = "train") -> Iterator[tuple[AnyPath, int, Content]]:
    """The rows of files: file, number and content."""
    return ((path, *row) for path in shards for row in shard_rows(path, name=name))


def _number(text: str) -> int:
    """A number of a text's words."""
    return int.from_bytes(hashlib.blake2b(normal(text).encode("utf-8", "surrogatepass"), digest_size=8).digest())


@dataclass(frozen=True)
class Sorting:
    """Which documents are trained on."""

    column: str  # of a document's text in rows
    holds_out: bool = True  # whether one in `HELD_OUT` is for validation
    tested: Mapping[str, str] = field(default_factory=dict)  # lines that no document may have, see `tested_lines`
    refuses: bool = False  # whether a document that has one is an error

    def sorted(self, rows: Iterable[tuple[AnyPath, int, Content]]) -> Iterator[tuple[str, Kind]]:
        """Documents, and what becomes of each; the same wherever one occurs.

        Raises a ``UserError`` for a row without a text, and for a document that has a line of a test set and may not.
        """
        for path, number, content in rows:
            text = document(path, number, content, self.column)
            if not text:
                yield text, "blank"
            elif self.tested and (line := self._common(text)):
                if self.refuses:
                    place, _ = placed(path, number, content)
                    raise UserError(
                        f"train: {place} has a line of a test set ({self.tested[line]}: {line!r:.80}); overlap: drop"
                        " leaves such documents out"
                    )
                yield text, "overlapping"
            elif self.holds_out and _number(text) % HELD_OUT == 0:
                yield text, "held_out"
            else:
                yield text, "documents"

    def _common(self, text: str) -> str | None:
        """A line of a test set that a text has: a line of it, or parts of one that follow each other."""
        for line in text.splitlines():
            words: list[str] = []
            ends = {0: None}  # of parts, in order
            for part in _parts(line):
                words += normal(part).split()
                ends[len(words)] = None
            for start in ends:
                for known in self._starts.get(tuple(words[start : start + WORDS]), ()):
                    if start + len(known) in ends and words[start : start + len(known)] == known:
                        return " ".join(known)
        return None

    @cached_property
    def _starts(self) -> Mapping[tuple[str, ...], list[list[str]]]:
        """The words of the lines of test sets, by the first of them."""
        found: defaultdict[tuple[str, ...], list[list[str]]] = defaultdict(list)
        for line in self.tested:
            words = line.split()
            found[tuple(words[:WORDS])].append(words)
        return found
