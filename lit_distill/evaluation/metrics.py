"""Metrics of answers and rationales, and their confidence intervals: pure functions."""

import math
import re
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from lit_distill.equations import evaluate
from lit_distill.errors import UserError

MetricName = Literal["exact_match", "equation"]
"""How answers are compared: as exact strings, or as equations by their values."""


def exact_match(prediction: str, label: str) -> bool:
    """Whether two answers are the same string once surrounding whitespace is stripped.

    The exact string match of Hsieh et al. (2023), https://arxiv.org/abs/2305.02301: case and punctuation count.
    """
    return prediction.strip() == label.strip()


def equations_agree(prediction: str, label: str) -> bool:
    r"""Whether two equations have the same value.

    .. math:: |p - y| \le \max(10^{-6} \max(|p|, |y|), 10^{-9})

    with :math:`p` the value of the prediction and :math:`y` that of the label; the equation metric of Hsieh et al.
    (2023). An equation that does not parse is wrong, on either side.
    """
    predicted, gold = evaluate(prediction), evaluate(label)
    return predicted is not None and gold is not None and _values_agree(predicted, gold)


def _values_agree(left: float, right: float) -> bool:
    # near 0 a relative tolerance is too strict: `0.1 + 0.2 - 0.3` is 5.6e-17
    return math.isclose(left, right, rel_tol=1e-6, abs_tol=1e-9)


_JUDGES: Final[dict[str, Callable[[str, str], bool]]] = {"exact_match": exact_match, "equation": equations_agree}


def judge(metric: MetricName) -> Callable[[str, str], bool]:
    """The function ``(prediction, label) -> right`` of a metric. Raises a ``UserError`` for unknown names."""
    if metric not in _JUDGES:
        raise UserError(f"metric: unknown metric {metric!r}; allowed are {', '.join(_JUDGES)}")
    return _JUDGES[metric]


def macro_f1(
    predictions: Sequence[str], labels: Sequence[str], label_set: Sequence[str]
) -> Callable[[NDArray[np.intp]], float]:
    r"""Macro-averaged F1, as a function of row numbers, ``(rows,)`` with repetitions, for the bootstrap.

    .. math:: \frac{1}{|C|} \sum_{c \in C} \frac{2\,TP_c}{2\,TP_c + FP_c + FN_c}

    with :math:`C` the label set. A prediction outside the set is a false negative of its gold class and a false
    positive of none. A class without gold labels and predictions scores 0 (scikit-learn's ``zero_division=0``).
    """
    codes = {label.strip(): code for code, label in enumerate(label_set)}
    classes = len(codes)
    predicted, gold = (
        np.array([codes.get(answer.strip(), classes) for answer in answers], dtype=np.intp)
        for answers in (predictions, labels)
    )

    def counts(of_rows: NDArray[np.intp]) -> NDArray[np.intp]:
        # the last bin is for answers outside the label set
        return np.bincount(of_rows, minlength=classes + 1)[:classes]

    def of(rows: NDArray[np.intp]) -> float:
        p, y = predicted[rows], gold[rows]
        # 0 / 0 of an absent class counts as 0
        return float(np.mean(2 * counts(y[y == p]) / np.maximum(counts(p) + counts(y), 1)))

    return of


def rouge_l(prediction: str, reference: str) -> float:
    r"""ROUGE-L F-measure of two texts, from their longest common subsequence (LCS) of words.

    .. math:: F = \frac{2PR}{P + R}, \quad P = \frac{LCS(p, r)}{|p|}, \quad R = \frac{LCS(p, r)}{|r|}

    with :math:`p` and :math:`r` the lower-cased words (letters a to z and digits, no stemming) of prediction and
    reference; Lin (2004), https://aclanthology.org/W04-1013, with :math:`\beta = 1`. 0 where a text has no words.
    The LCS has bit-parallel rows (Hyyrö 2004), since a table of long texts is slow.
    """
    words, others = (re.findall("[a-z0-9]+", text.lower()) for text in (prediction, reference))
    places: dict[str, int] = {}  # word -> its positions, as bits
    for place, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << place
    row = everything = (1 << len(words)) - 1
    for word in others:
        found = row & places.get(word, 0)
        row = (row + found | row - found) & everything
    return 2 * (len(words) - row.bit_count()) / max(len(words) + len(others), 1)


# what may follow the answer at the end of a text: whitespace, a full stop, closing quotes and brackets
_TRAILING: Final = " \t\n\r\f\v.!?\"'`\u201d\u2019\u00bb)]}"
# `.5`, or digits with an optional fraction; never a part of a word (`B12`) or of a number's fraction
_DIGITS: Final = r"(?:(?<![\w.])\.[0-9]+|(?<!\w)(?<![0-9]\.)[0-9]+(?:\.[0-9]+)?)"
# a minus after a number, a word or a parenthesis is no sign
_NUMBER: Final = re.compile(rf"(?:(?<![\w)])(?<![0-9)]\s)-)?{_DIGITS}")
_EXPRESSION: Final = re.compile(rf"[( ]*-?{_DIGITS}[) ]*(?:[-+*/%][( ]*-?{_DIGITS}[) ]*)+")
_THOUSANDS_COMMA: Final = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")


def _last_values(text: str) -> list[float]:
    """The last number of a text with its sign, and the value of its last arithmetic expression that has one."""
    # parentheses may belong to the prose: `(so 5 + 3)`
    expressions = [part for found in _EXPRESSION.findall(text) for part in (found.strip("() "), found.strip())]
    values = (evaluate(expression) for expression in reversed(expressions))
    expression = next((value for value in values if value is not None), None)
    numbers = [float(number) for number in _NUMBER.findall(text)[-1:]]
    return numbers if expression is None else [*numbers, expression]


def ends_in(rationale: str, label: str, metric: MetricName) -> bool:
    """Whether a rationale ends in the label that was predicted with it.

    For ``exact_match``: as whole words, ignoring case, spacing, closing punctuation and quotes. For ``equation``: its
    last number or last arithmetic expression has the label's value, as ``... 84 / 2 = 42.`` has that of ``(84 / 2)``.
    """
    if judge(metric) is equations_agree:
        if (value := evaluate(label)) is None:
            return False
        # prose may write thousands with commas, though equations may not
        return any(_values_agree(each, value) for each in _last_values(_THOUSANDS_COMMA.sub("", rationale)))
    words, ending = (" ".join(text.casefold().rstrip(_TRAILING).split()) for text in (rationale, label))
    # a hyphen joins: `non-neutral` does not end in `neutral`
    return bool(ending) and re.search(rf"(?<!\w)(?<!\w-){re.escape(ending)}\Z", words) is not None


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    r"""Wilson's score interval of a proportion, such as an accuracy.

    .. math:: \frac{\hat p + \frac{z^2}{2n} \pm z\sqrt{\frac{\hat p(1 - \hat p)}{n} + \frac{z^2}{4n^2}}}
        {1 + \frac{z^2}{n}}

    with :math:`\hat p` the proportion of :math:`n > 0` and :math:`z` the :math:`(1 + confidence) / 2` quantile of the
    standard normal distribution; Wilson (1927), https://doi.org/10.1080/01621459.1927.10502953.
    """
    # from the lower tail: near 1 the upper one rounds to 1, which has no quantile
    z = -NormalDist().inv_cdf((1 - confidence) / 2)
    p = correct / total
    centre = p + z**2 / (2 * total)
    half_width = z * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    shrink = 1 + z**2 / total
    # exactly 0 or 1 there, despite rounding
    low, high = (centre - half_width) / shrink, (centre + half_width) / shrink
    return 0.0 if correct == 0 else low, 1.0 if correct == total else high


def bootstrap_interval(
    statistic: Callable[[NDArray[np.intp]], float],
    rows: int,
    *,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    r"""Percentile bootstrap interval of a statistic of row numbers, ``(rows,)``, drawn with repetitions.

    The ends are the :math:`(1 \mp confidence) / 2` quantiles of the statistic over the ``resamples``; Efron (1979),
    https://doi.org/10.1214/aos/1176344552.
    """
    generator = np.random.default_rng(seed)
    drawn = [statistic(generator.integers(0, rows, size=rows, dtype=np.intp)) for _ in range(resamples)]
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
