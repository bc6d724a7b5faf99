"""Span corruption beside numbers written by hand, and put together again."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lit_distill.data.corpus.corruption import (
    corrupt,
    corrupted_lengths,
    noise_mask,
    raw_length,
    sentinel_ids,
    span_counts,
)
from lit_distill.errors import UserError
from lit_distill.students import Tokens
from tests.students import make_tokenizer


def test_lengths_are_those_of_t5() -> None:
    # Raffel et al.: 512 tokens of a source are made of 568, with targets of 114
    assert raw_length(512, 0.15, 3.0) == 568
    assert corrupted_lengths(568, 0.15, 3.0) == (512, 114)
    for longest in range(4, 200):
        length = raw_length(longest, 0.15, 3.0)
        assert corrupted_lengths(length, 0.15, 3.0)[0] <= longest < corrupted_lengths(length + 1, 0.15, 3.0)[0]


def test_a_mask_is_the_one_that_its_permutation_means() -> None:
    # 20 tokens, half of them noise in spans of 4: 10 of each kind in 2 spans (10 / 4 = 2.5, to the even); the one start
    # among the 9 places between 10 tokens goes from the first place to the last: spans of 9 and 1
    assert span_counts(20, 0.5, 4.0) == (10, 2)
    expected = [False] * 9 + [True] * 9 + [False] + [True]
    backwards: Any = SimpleNamespace(permutation=lambda starts: starts[::-1])
    assert noise_mask(20, 0.5, 4.0, backwards).tolist() == expected


def test_a_source_and_its_target_by_hand() -> None:
    mask = np.array([False, True, True, False, False, True])
    source, target = corrupt(np.array([10, 11, 12, 13, 14, 15]), mask, np.array([99, 98, 97]), 1)
    assert source == [10, 99, 13, 14, 98, 1]
    assert target == [99, 11, 12, 98, 15, 1]


@pytest.mark.parametrize("length", [2, 3, 30, 141, 568])
def test_source_and_target_put_together_are_the_sequence(length: int) -> None:
    sentinels, random = np.arange(1000, 900, -1), np.random.default_rng(3)
    spans = []
    for _ in range(50):
        ids = random.integers(2, 900, length)
        mask = noise_mask(length, 0.15, 3.0, random)
        assert not mask[0]
        assert mask[-1]
        source, target = corrupt(ids, mask, sentinels, 1)
        assert (len(source), len(target)) == corrupted_lengths(length, 0.15, 3.0)
        gaps: dict[int, list[int]] = {}
        for token in target[:-1]:
            if token > 900:
                gaps[token] = []
            else:
                gaps[next(reversed(gaps))].append(token)
        # the sentinels go down from the first
        assert list(gaps) == sentinels[: len(gaps)].tolist()
        together = [token for mark in source[:-1] for token in gaps.get(mark, [mark])]
        assert together == ids.tolist()
        assert source[-1] == target[-1] == 1
        spans += [len(gap) for gap in gaps.values()]
    if length == 568:
        assert sum(spans) / (50 * length) == pytest.approx(0.15, abs=1e-3)
        assert np.mean(spans) == pytest.approx(3.0, abs=0.05)
        # a span is cut at any place: lengths differ
        assert max(spans) > 8


def test_spans_are_anywhere() -> None:
    random = np.random.default_rng(0)
    often = np.mean([noise_mask(141, 0.15, 3.0, random) for _ in range(4_000)], axis=0)
    # each token but those near the ends is noise as often as any other: 0.15, and 3 standard errors of 0.0056
    assert np.abs(often[20:-20] - often[20:-20].mean()).max() < 0.025
    assert often.mean() == pytest.approx(0.15, abs=0.002)


def test_sentinels_are_found_by_name_and_counted() -> None:
    tokens = Tokens(make_tokenizer(28))
    first = len(tokens.tokenizer) - 1
    assert sentinel_ids(tokens, 568, 0.15, 3.0).tolist() == list(range(first, first - 28, -1))
    with pytest.raises(
        UserError, match=r"^tokenizer: .* has 27 sentinels .*sequences of 568 tokens need 28: lower max"
    ):
        sentinel_ids(Tokens(make_tokenizer(27)), 568, 0.15, 3.0)
    with pytest.raises(UserError, match="has 0 sentinels"):
        sentinel_ids(Tokens(make_tokenizer()), 568, 0.15, 3.0)
