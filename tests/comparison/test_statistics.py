"""Against scipy, a plain loop, and distributions that are known in closed form."""

import math
import time
import tracemalloc

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from lit_distill.comparison.statistics import paired_bootstrap, standard_error


def rows(*texts: str) -> NDArray[np.float64]:
    """One text a seed: 1 for each row that is right."""
    return np.array([[float(sign) for sign in text] for text in texts])


def test_standard_errors_are_those_of_scipy() -> None:
    values = (0.62, 0.655, 0.59, 0.641)
    assert standard_error(values) == pytest.approx(stats.sem(values))
    assert standard_error([0.5]) is None


def test_a_difference_of_zeros_and_ones_is_binomial() -> None:
    # 12 of 200 rows are right in one alone: a resample's sum is binomial
    own, base = rows("1" * 112 + "0" * 88), rows("1" * 100 + "0" * 100)
    found = paired_bootstrap(own, base, resamples=40_000)
    binomial = stats.binom(200, 12 / 200)
    assert found.difference == pytest.approx(0.06)
    assert (found.low, found.high) == pytest.approx((binomial.ppf(0.025) / 200, binomial.ppf(0.975) / 200), abs=1e-9)
    assert found.differing == 12
    # never 0, and about 2 * 0.94 ** 200 = 8e-6, which 40,000 draws cannot tell from their least
    assert found.p_value == pytest.approx(2 / 40_001, abs=6e-5)


def test_few_differing_rows_give_the_p_value_of_drawing_none_of_them() -> None:
    own, base = rows("1" * 53 + "0" * 47), rows("1" * 50 + "0" * 50)
    found = paired_bootstrap(own, base, resamples=40_000)
    assert found.p_value == pytest.approx(2 * 0.97**100, rel=0.05)
    assert found.differing == 3


def test_it_is_the_paired_bootstrap_of_scipy() -> None:
    generator = np.random.default_rng(3)
    hard = generator.random(300)
    own, base = generator.random((3, 300)) > 0.8 * hard, generator.random((2, 300)) > 0.9 * hard
    found = paired_bootstrap(own.astype(float), base.astype(float), resamples=20_000)
    scipys = stats.bootstrap(
        (own.mean(axis=0), base.mean(axis=0)),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(99),
    )
    interval, means = scipys.confidence_interval, scipys.bootstrap_distribution
    assert found.difference == pytest.approx(own.mean() - base.mean())
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=2e-3)
    assert found.p_value == pytest.approx(2 * min((means <= 0).mean(), (means >= 0).mean()), abs=0.015)


def test_p_is_close_to_an_exact_test_of_the_rows_that_differ() -> None:
    # McNemar's: of 100 rows that differ, 62 against 38
    own = rows("1" * 62 + "0" * 38 + "1" * 500)
    base = rows("0" * 62 + "1" * 38 + "1" * 500)
    exact = stats.binomtest(62, 100).pvalue
    assert paired_bootstrap(own, base, resamples=40_000).p_value == pytest.approx(exact, abs=0.012)


def test_under_the_null_p_is_about_uniform() -> None:
    generator = np.random.default_rng(5)
    found = []
    for trial in range(400):
        hard = generator.random(150)
        own, base = (generator.random((2, 2, 150)) > hard).astype(float)
        found.append(paired_bootstrap(own, base, resamples=400, seed=trial).p_value)
    # four standard errors of a share of 400 around what it should be
    for level in (0.05, 0.2, 0.5, 0.8):
        assert np.mean(np.array(found) < level) == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 400))


def test_nothing_apart_is_exactly_nothing() -> None:
    # thirds: 1/3 + 1/3 - 2/3 in floating point is not 0
    own, base = rows("110", "011", "101"), rows("111", "111", "000")
    found = paired_bootstrap(own, base, resamples=500)
    assert (found.difference, found.low, found.high, found.p_value, found.differing) == (0, 0, 0, 1, 0)


def test_ten_thousand_rows_take_little_room_and_time() -> None:
    generator = np.random.default_rng(0)
    # of 7 and 11 seeds: 100 and more distinct differences
    own = (generator.random((7, 10_000)) > 0.4).astype(float)
    base = (generator.random((11, 10_000)) > 0.45).astype(float)
    tracemalloc.start()
    started = time.perf_counter()
    paired_bootstrap(own, base, resamples=10_000)
    seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * 2**20
    assert seconds < 20


def test_rows_have_to_be_as_many() -> None:
    with pytest.raises(ValueError, match="cannot pair"):
        paired_bootstrap(rows("110"), rows("11"))
    with pytest.raises(ValueError, match="cannot pair"):
        paired_bootstrap(np.zeros((0, 3)), rows("110"))
