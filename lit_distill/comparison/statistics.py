r"""What may be said of accuracies that a few seeds gave on one set of test rows.

Two things vary: the seed (initialisation, order, subset), and which rows happen to be in test. A standard error over
seeds measures the first with the test rows fixed; the paired bootstrap measures the second with the trained students
fixed. Neither contains the other.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lit_distill.comparison.runs import Predictions

CONFIDENCE: Final = 0.95
"""Of the intervals."""

FEW: Final = 10
"""Rows on which two settings differ, below which a bootstrap is too sure of itself."""

_BLOCK: Final = 2**20
"""Counts drawn at once: 8 MiB, whatever the number of rows and resamples."""


@dataclass(frozen=True)
class Summary:
    """A metric over the seeds of a setting."""

    values: tuple[float, ...]
    """One a run."""
    pooled: float | None
    """The part of all seeds' answers that is right; ``None`` where a run has no predictions."""

    @property
    def n(self) -> int:
        """Runs."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Over runs."""
        return math.fsum(self.values) / self.n

    @property
    def standard_error(self) -> float | None:
        """Of the mean; ``None`` for a single run."""
        return standard_error(self.values)


def standard_error(values: Sequence[float]) -> float | None:
    r"""Standard error of a mean.

    .. math:: \sqrt{\frac{1}{n (n - 1)} \sum_i (x_i - \bar x)^2}

    ``None`` for fewer than two values.
    """
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def summarize(values: Sequence[float], predictions: Sequence[Predictions | None]) -> Summary:
    """A metric over runs.

    Args:
        values: one a run.
        predictions: of each run.
    """
    known = [one.correct for one in predictions if one is not None]
    whole = len(known) == len(predictions) > 0
    pooled = sum(int(one.sum()) for one in known) / sum(len(one) for one in known) if whole else None
    return Summary(tuple(values), pooled)


@dataclass(frozen=True)
class ExampleDifference:
    """How far two settings are apart on the same test rows."""

    difference: float
    """Of their accuracies, each the mean over seeds."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end."""
    p_value: float
    """Two-sided."""
    examples: int
    """Test rows."""
    differing: int
    """Test rows on which the two were not right equally often."""


def paired_bootstrap(
    own: NDArray[np.bool_], baseline: NDArray[np.bool_], *, resamples: int = 10_000, seed: int = 0
) -> ExampleDifference:
    r"""Paired bootstrap over test rows of the difference of two accuracies.

    Each row :math:`i` has a difference :math:`d_i = \bar a_i - \bar b_i`, with :math:`\bar a_i` and :math:`\bar b_i`
    the parts of the seeds that had it right. Rows are drawn with replacement, as many as there are; the interval is
    of the percentiles of the means of :math:`d`, and

    .. math:: p = \min\left(1, 2\,\frac{1 + \min(\#\{\bar d^* \le 0\}, \#\{\bar d^* \ge 0\})}{1 + B}\right)

    with :math:`B` resamples; Efron and Tibshirani (1993), chapter 13, Koehn (2004), https://aclanthology.org/W04-3250.
    A resample's mean depends only on how often each distinct :math:`d` was drawn, which is multinomial: those counts
    are drawn in place of rows, which is the same distribution at a fraction of the work. The students are held fixed:
    the interval says what other test rows would have given, not what other seeds would have.

    Args:
        own: ``(seeds, examples)``, whether each row was right.
        baseline: ``(seeds of its own, examples)``, the same rows in the same order.
        resamples: how often to draw.
        seed: of the draws.

    Raises:
        ValueError: the rows are not as many, or there are none.
    """
    if own.shape[1] != baseline.shape[1] or not own.size or not baseline.size:
        raise ValueError(f"cannot pair {own.shape} with {baseline.shape}")
    examples = own.shape[1]
    # in whole numbers, so that a difference of nothing is exactly 0
    scaled = own.sum(axis=0, dtype=np.int64) * len(baseline) - baseline.sum(axis=0, dtype=np.int64) * len(own)
    scale = len(own) * len(baseline) * examples
    totals = np.concatenate(list(_totals(scaled, resamples, seed)))
    low, high = np.quantile(totals, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    beyond = min(int((totals <= 0).sum()), int((totals >= 0).sum()))
    return ExampleDifference(
        difference=int(scaled.sum()) / scale,
        low=float(low) / scale,
        high=float(high) / scale,
        p_value=min(1.0, 2 * (1 + beyond) / (1 + resamples)),
        examples=examples,
        differing=int((scaled != 0).sum()),
    )


def _totals(values: NDArray[np.int64], resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Sums of values drawn with replacement, as many as there are."""
    distinct, counts = np.unique(values, return_counts=True)
    generator = np.random.default_rng(seed)
    at_once = max(1, _BLOCK // len(distinct))
    for start in range(0, resamples, at_once):
        drawn = generator.multinomial(len(values), counts / len(values), size=min(at_once, resamples - start))
        yield drawn @ distinct


@dataclass(frozen=True)
class SeedDifference:
    """How far two settings are apart, seed by seed."""

    differences: tuple[float, ...]
    """One a seed that both have."""

    @property
    def n(self) -> int:
        """Seeds that both have."""
        return len(self.differences)

    @property
    def mean(self) -> float:
        """Over those."""
        return math.fsum(self.differences) / self.n

    @property
    def standard_error(self) -> float | None:
        """Of the mean; ``None`` for a single seed."""
        return standard_error(self.differences)


def paired_by_seed(
    own: Mapping[tuple[int, int], float], baseline: Mapping[tuple[int, int], float]
) -> SeedDifference | None:
    """The differences of a metric between runs with the same seeds; ``None`` where no seeds match.

    Args:
        own: seeds -> metric.
        baseline: seeds -> its metric.
    """
    both = sorted(own.keys() & baseline.keys())
    return SeedDifference(tuple(own[seeds] - baseline[seeds] for seeds in both)) if both else None
