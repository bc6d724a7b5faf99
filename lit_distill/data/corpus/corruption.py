"""Span corruption (Raffel et al. 2020, 1910.10683, section 3.1.4): a text with gaps, and what was in them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lit_distill.errors import UserError
from lit_distill.students import Tokens

Array = np.ndarray[Any, Any]


def span_counts(length: int, density: float, mean_length: float) -> tuple[int, int]:
    """How many of a sequence's tokens are noise, and in how many spans; at least one, and never all."""
    noise = min(max(round(length * density), 1), length - 1)
    # before each span is a token that stays
    return noise, min(max(round(noise / mean_length), 1), length - noise)


def corrupted_lengths(length: int, density: float, mean_length: float) -> tuple[int, int]:
    """Source and target tokens of a corrupted sequence, with a sentinel for each span and end-of-sequence."""
    noise, spans = span_counts(length, density, mean_length)
    return length - noise + spans + 1, noise + spans + 1


def raw_length(source_length: int, density: float, mean_length: float) -> int:
    """The longest sequence whose corrupted source has at most ``source_length`` tokens, as T5's 568 of 512."""
    # a token more makes a source that is as long, or longer by up to one
    length = max(source_length - 1, 2)
    while corrupted_lengths(length + 1, density, mean_length)[0] <= source_length:
        length += 1
    return length


def noise_mask(length: int, density: float, mean_length: float, random: np.random.Generator) -> Array:
    """Which tokens of a sequence of at least two are noise, ``(length,)``.

    Spans that stay and spans of noise alternate, and the last is noise. All ways to cut both kinds into as many spans
    are equally likely.
    """
    noise, spans = span_counts(length, density, mean_length)

    def lengths(tokens: int) -> Array:
        starts = random.permutation(np.arange(tokens - 1) < spans - 1)
        return np.diff(np.flatnonzero(np.concatenate([[True], starts, [True]])))

    alternating = np.stack([lengths(length - noise), lengths(noise)], axis=1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, alternating)


def corrupt(ids: Array, mask: Array, sentinels: Array, eos: int) -> tuple[list[int], list[int]]:
    """Source and target of a sequence ``(length,)`` and its `noise_mask`.

    The source has the next of the ``sentinels`` in place of each span of noise, the target each sentinel and its span.
    Both end in end-of-sequence; as in T5's code, no last sentinel comes before it.
    """
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    marked = ids.copy()
    marked[starts] = sentinels[: starts.sum()]
    target = np.insert(ids[mask], np.flatnonzero(starts[mask]), sentinels[: starts.sum()])
    return [*marked[~mask | starts].tolist(), eos], [*target.tolist(), eos]


def sentinel_ids(tokens: Tokens, length: int, density: float, mean_length: float) -> Array:
    """The ids of ``<extra_id_0>``, ``<extra_id_1>``, ... for sequences of so many tokens.

    Raises a ``UserError`` if the vocabulary has too few.
    """
    vocabulary, name = tokens.tokenizer.get_vocab(), tokens.tokenizer.name_or_path
    needed = max(span_counts(one, density, mean_length)[1] for one in range(2, length + 1))
    found: list[int] = []
    # mT5's are ordinary pieces
    while (token := next(_known(vocabulary, len(found)), None)) is not None and len(found) < needed:
        found.append(token)
    if len(found) < needed:
        raise UserError(
            f"tokenizer: {name!r} has {len(found)} sentinels (<extra_id_0>, ...), and sequences of {length} tokens need"
            f" {needed}: lower max_length, or add them by tokenizer.add_tokens before the student's weights are made"
        )
    return np.array(found, np.int32)


def _known(vocabulary: dict[str, int], number: int) -> Any:
    names: Sequence[str] = (f"<extra_id_{number}>", f"▁<extra_id_{number}>")
    return (vocabulary[name] for name in names if name in vocabulary)
