"""How answers and rationales are scored: pure functions, and thin stateful metrics over them."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from lit_distill.answers import MetricName
from lit_distill.equations import evaluate
from lit_distill.errors import UserError

RELATIVE_TOLERANCE: Final = 1e-6
"""Two values agree within this part of the larger: ``1 / 3`` and ``0.3333333`` do, ``1 / 3`` and ``0.33`` do not."""

ABSOLUTE_TOLERANCE: Final = 1e-9
"""Two values this close agree in any case: beside 0 no relative error is small (``0.1 + 0.2 - 0.3`` is 5.6e-17)."""


# --------------------------------------------------------------------------------------------------- answers


def exact_match(prediction: str, label: str) -> bool:
    """Whether two answers are the same string once surrounding whitespace is stripped.

    The exact string match of Hsieh et al. (2023), https://arxiv.org/abs/2305.02301. Only surrounding whitespace is
    forgiven, which decoding can add; case, inner spaces and punctuation count.
    """
    return prediction.strip() == label.strip()


def equations_agree(prediction: str, label: str) -> bool:
    r"""Whether two equations have the same value.

    .. math:: |p - y| \le \max(10^{-6} \max(|p|, |y|), 10^{-9})

    with :math:`p` the prediction's and :math:`y` the label's value. The equation metric of Hsieh et al. (2023),
    https://arxiv.org/abs/2305.02301, where what does not parse is wrong. That holds for the label too: without a value
    there is nothing to be equal to, so such a row counts as wrong whatever is predicted, a copy of it included.

    Args:
        prediction: the predicted equation, any text.
        label: the gold equation.
    """
    predicted, gold = evaluate(prediction), evaluate(label)
    return predicted is not None and gold is not None and _values_agree(predicted, gold)


def _values_agree(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)


_JUDGES: Final[dict[MetricName, Callable[[str, str], bool]]] = {
    "exact_match": exact_match,
    "equation": equations_agree,
}


def judge(metric: MetricName) -> Callable[[str, str], bool]:
    """The function ``(prediction, label) -> right`` of a metric's name.

    Raises:
        UserError: the name is none of the metrics.
    """
    if metric not in _JUDGES:
        raise UserError(f"metric: unknown metric {metric!r}; allowed are {', '.join(_JUDGES)}")
    return _JUDGES[metric]


def _check_lengths(predictions: Sequence[str], labels: Sequence[str]) -> None:
    if len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels")


class _Accuracy(Metric):
    """Fraction of answers that are right; a subclass says which are."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    correct: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Sums, not means: ranks and batches that differ in length then weigh each row the same.
        self.add_state("correct", default=torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", default=torch.tensor(0), dist_reduce_fx="sum")

    @staticmethod
    def _right(prediction: str, label: str) -> bool:
        raise NotImplementedError

    def update(self, predictions: Sequence[str], labels: Sequence[str]) -> None:
        """Count rows.

        Args:
            predictions: the predicted answers.
            labels: their gold answers, as many.

        Raises:
            ValueError: the two differ in length.
        """
        _check_lengths(predictions, labels)
        self.correct += sum(self._right(p, y) for p, y in zip(predictions, labels, strict=True))
        self.total += len(labels)

    def compute(self) -> Tensor:
        """The fraction right between 0 and 1, over all ranks; ``nan`` where no row was counted."""
        return self.correct / self.total


class ExactMatch(_Accuracy):
    """Fraction of predictions that are the label's exact string.

    See ``exact_match`` for what counts as the same. Without any row the value is ``nan``; ``compute`` before the first
    ``update`` also gives torchmetrics' own warning.

    >>> metric = ExactMatch()
    >>> metric.update(["neutral", "entailment"], ["neutral", "contradiction"])
    >>> metric.compute()
    tensor(0.5000)
    """

    _right = staticmethod(exact_match)


class EquationAccuracy(_Accuracy):
    """Fraction of predictions whose value is the gold equation's.

    See ``equations_agree`` for what counts as the same: a text without a value is wrong on either side. Without any row
    the value is ``nan``; ``compute`` before the first ``update`` also gives torchmetrics' own warning.

    >>> metric = EquationAccuracy()
    >>> metric.update(["84 / 2", "84 /"], ["( 2.0 * 21.0 )", "( 84.0 / 2.0 )"])
    >>> metric.compute()
    tensor(0.5000)
    """

    _right = staticmethod(equations_agree)


# --------------------------------------------------------------------------------------------------- macro-F1


def _class_codes(answers: Sequence[str], label_set: Sequence[str]) -> NDArray[np.intp]:
    """Each answer's position in the label set, and ``len(label_set)`` for answers outside it."""
    code = {label.strip(): i for i, label in enumerate(label_set)}
    return np.array([code.get(answer.strip(), len(code)) for answer in answers], dtype=np.intp)


def _macro_f1_of_codes(predicted: NDArray[np.intp], gold: NDArray[np.intp], classes: int) -> float:
    # One bin past the classes takes the answers outside the label set, and is cut off again.
    both = np.bincount(gold[gold == predicted], minlength=classes + 1)[:classes]
    either = (np.bincount(gold, minlength=classes + 1) + np.bincount(predicted, minlength=classes + 1))[:classes]
    # A class that is nowhere has 0 / 0, which is to count as 0.
    return float(np.mean(2 * both / np.maximum(either, 1)))


def _check_label_set(label_set: Sequence[str]) -> None:
    if not label_set or len({label.strip() for label in label_set}) != len(label_set):
        raise UserError(f"label_set: needs at least one label and each only once, not {list(label_set)}")


def macro_f1(predictions: Sequence[str], labels: Sequence[str], label_set: Sequence[str]) -> float:
    r"""Mean of the classes' F1.

    .. math:: \frac{1}{|C|} \sum_{c \in C} \frac{2\,TP_c}{2\,TP_c + FP_c + FN_c}

    with :math:`C` the label set and :math:`TP_c, FP_c, FN_c` the true positives, false positives and false negatives of
    class :math:`c`; the macro average of Sokolova and Lapalme (2009), https://doi.org/10.1016/j.ipm.2009.03.002, taken
    over the classes' F1. A prediction outside the set is a false negative of its gold class and belongs to no class
    itself. A class without gold labels and predictions scores 0, scikit-learn's ``zero_division=0``. Answers are
    compared as in ``exact_match``, without surrounding whitespace.

    Args:
        predictions: the predicted answers.
        labels: their gold answers, as many.
        label_set: the classes to average over.

    Raises:
        ValueError: predictions and labels differ in length.
        UserError: the label set is empty or names a label twice.
    """
    _check_lengths(predictions, labels)
    _check_label_set(label_set)
    return _macro_f1_of_codes(_class_codes(predictions, label_set), _class_codes(labels, label_set), len(label_set))


# --------------------------------------------------------------------------------------------------- rationales


def rouge_l(prediction: str, reference: str) -> float:
    r"""ROUGE-L F-measure of a pair: how long a common subsequence of words the two texts have.

    .. math:: F = \frac{2PR}{P + R}, \quad P = \frac{LCS(p, r)}{|p|}, \quad R = \frac{LCS(p, r)}{|r|}

    with :math:`p` and :math:`r` the lower-cased words of prediction and reference, and :math:`LCS` the length of their
    longest common subsequence; Lin (2004), https://aclanthology.org/W04-1013, with :math:`\beta = 1` and words (letters
    a to z and digits) as in the ``rouge_score`` package. Without stemming; 0 where a text has no words.
    """
    words, others = (re.findall("[a-z0-9]+", text.lower()) for text in (prediction, reference))
    return 2 * _common_subsequence(words, others) / max(len(words) + len(others), 1)


def _common_subsequence(words: Sequence[str], others: Sequence[str]) -> int:
    """Length of the longest common subsequence, exact, by operations on whole rows of bits (Hyyrö 2004).

    The plain table takes minutes for two texts of 20,000 words.
    """
    words, others = sorted((words, others), key=len)
    places: dict[str, int] = {}
    for place, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << place
    row = everything = (1 << len(words)) - 1
    for word in others:
        found = row & places.get(word, 0)
        row = (row + found | row - found) & everything
    return len(words) - row.bit_count()


_TRAILING: Final = " \t\n\r\f\v.!?\"'`\u201d\u2019\u00bb)]}"
"""What may follow the answer at the end of a text: whitespace, a full stop, closing quotes and brackets."""

# `.5`, or digits with an optional fraction; never a part of a word (`B12`) or of a number's fraction.
_NUMBER: Final = r"(?:(?<![\w.])\.[0-9]+|(?<!\w)(?<![0-9]\.)[0-9]+(?:\.[0-9]+)?)"
_NUMBERS: Final = re.compile(_NUMBER)
_ARITHMETIC: Final = re.compile(rf"(?:{_NUMBER}|[-+*/%() \t])+")
_THOUSANDS_COMMA: Final = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_BINARY_MINUS: Final = re.compile(r"(?:[0-9)]\s*|\w)-\Z")
_BINARY_OPERATOR: Final = re.compile(r"[0-9)]\s*[-+*/%]")
_LEADING_OPERATORS: Final = re.compile(r"\A(?:[+*/%]\s*|-\s+)+")


def _last_number(text: str) -> float | None:
    """The last number of a text, with its sign."""
    numbers = list(_NUMBERS.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    before = text[max(0, last.start() - 32) : last.start()]
    negative = before.endswith("-") and not _BINARY_MINUS.search(before)
    return -float(last.group()) if negative else float(last.group())


def _without_stray_parentheses(text: str) -> str:
    """A text without the parentheses that have no partner in it."""
    opened: list[int] = []
    stray: set[int] = set()
    for i, character in enumerate(text):
        if character == "(":
            opened.append(i)
        elif character == ")":
            if opened:
                opened.pop()
            else:
                stray.add(i)
    stray.update(opened)
    return "".join(character for i, character in enumerate(text) if i not in stray)


def _last_expression(text: str) -> float | None:
    """The value of a text's last stretch of arithmetic that has an operator and a value."""
    for match in reversed(list(_ARITHMETIC.finditer(text))):
        # Prose leaves its own marks on the ends: `(so 5 + 3)`, the dash of a list, the sign of `50 %`.
        stretch = _without_stray_parentheses(match.group()).strip().rstrip("-+*/% \t")
        stretch = _LEADING_OPERATORS.sub("", stretch)
        value = evaluate(stretch) if _BINARY_OPERATOR.search(stretch) else None
        if value is not None:
            return value
    return None


def _ends_in_words(rationale: str, label: str) -> bool:
    words, ending = (" ".join(text.casefold().rstrip(_TRAILING).split()) for text in (rationale, label))
    # A hyphen joins: `non-neutral` does not end in `neutral`.
    return bool(ending) and re.search(rf"(?<!\w)(?<!\w-){re.escape(ending)}\Z", words) is not None


def _ends_in_value(rationale: str, label: str) -> bool:
    value = evaluate(label)
    if value is None:
        return False
    # Prose may write thousands with commas, though equations may not.
    text = _THOUSANDS_COMMA.sub("", rationale)
    found = (_last_number(text), _last_expression(text))
    return any(candidate is not None and _values_agree(candidate, value) for candidate in found)


def ends_in(rationale: str, label: str, metric: MetricName) -> bool:
    """Whether a rationale arrives at the label that was predicted with it.

    For ``exact_match``: the rationale, without what closes it (whitespace, ``.``, ``!``, ``?``, quotes, brackets), ends
    with the label as whole words, whatever their case and spacing.

    For ``equation``: the rationale's last number, or its last arithmetic expression, has the equation's value within
    the tolerances of ``equations_agree``. So ``... 84 / 2 = 42.`` ends in ``(84 / 2)``, and so does
    ``... 10 * 45 seeds.`` in ``450``. Words may follow.

    Args:
        rationale: the rationale, any text.
        label: the predicted label. An empty one, or an equation without a value, ends no rationale.
        metric: how labels are judged.

    Raises:
        UserError: ``metric`` is none of the metrics.
    """
    return _ends_in_value(rationale, label) if judge(metric) is equations_agree else _ends_in_words(rationale, label)


# --------------------------------------------------------------------------------------------------- intervals

_BLOCK: Final = 2**20
"""Row numbers drawn at once: 8 MiB, whatever the number of rows."""


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UserError(f"confidence: must lie between 0 and 1, both excluded, not {confidence}")


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    r"""Wilson's score interval of a proportion, such as an accuracy.

    .. math:: \frac{\hat p + \frac{z^2}{2n} \pm z\sqrt{\frac{\hat p(1 - \hat p)}{n} + \frac{z^2}{4n^2}}}
              {1 + \frac{z^2}{n}}

    with :math:`\hat p = k / n`, :math:`k` right of :math:`n`, and :math:`z` the :math:`(1 + confidence) / 2` quantile
    of the standard normal distribution; Wilson (1927), https://doi.org/10.1080/01621459.1927.10502953. Unlike
    :math:`\hat p \pm z\sqrt{\hat p(1 - \hat p) / n}` it stays within 0 and 1 and is not empty at 0 or ``total`` right.

    Args:
        correct: rows that are right.
        total: all rows.
        confidence: coverage, between 0 and 1.

    Returns:
        Lower and upper end as fractions; ``(nan, nan)`` for no rows.

    Raises:
        UserError: ``confidence`` is out of range, or ``correct`` not between 0 and ``total``.
    """
    _check_confidence(confidence)
    if not 0 <= correct <= total:
        raise UserError(f"correct: must lie between 0 and total ({total}), not {correct}")
    if total == 0:
        return math.nan, math.nan
    # From the lower tail: near 1 the upper one rounds to 1, which has no quantile.
    z = -NormalDist().inv_cdf((1 - confidence) / 2)
    p = correct / total
    shrink = 1 + z**2 / total
    centre = (p + z**2 / (2 * total)) / shrink
    half = z * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2)) / shrink
    # Centre and half width meet 0 and 1 exactly, which rounding can miss.
    return 0.0 if correct == 0 else centre - half, 1.0 if correct == total else centre + half


def _resamples(rows: int, seed: int, resamples: int) -> Iterator[NDArray[np.intp]]:
    """Row numbers drawn with replacement, as blocks of ``(resamples in the block, rows)``."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _BLOCK // rows)
    for start in range(0, resamples, at_once):
        yield generator.integers(0, rows, size=(min(at_once, resamples - start), rows), dtype=np.intp)


def _percentiles(statistics: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    lower, upper = np.quantile(statistics, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(lower), float(upper)


def _check_bootstrap(resamples: int, confidence: float) -> None:
    _check_confidence(confidence)
    if resamples < 1:
        raise UserError(f"resamples: must be 1 or more, not {resamples}")


def bootstrap_interval(
    values: Sequence[float], seed: int = 0, resamples: int = 1000, confidence: float = 0.95
) -> tuple[float, float]:
    r"""Percentile bootstrap interval of a mean.

    Rows are drawn with replacement, as many as there are, ``resamples`` times; the ends are the
    :math:`(1 \mp confidence) / 2` quantiles of the means. Efron (1979), https://doi.org/10.1214/aos/1176344552.

    Args:
        values: one value a row.
        seed: of the draws; the same seed draws the same rows here and in ``bootstrap_interval_of``.
        resamples: how often to draw.
        confidence: coverage, between 0 and 1.

    Returns:
        Lower and upper end; ``(nan, nan)`` for no values.

    Raises:
        UserError: ``resamples`` or ``confidence`` is out of range.
    """
    _check_bootstrap(resamples, confidence)
    if len(values) == 0:
        return math.nan, math.nan
    array = np.asarray(values, dtype=np.float64)
    means = [array[block].mean(axis=1) for block in _resamples(len(array), seed, resamples)]
    return _percentiles(np.concatenate(means), confidence)


def bootstrap_interval_of(
    statistic: Callable[[NDArray[np.intp]], float],
    rows: int,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of anything that is computed from rows, as in ``bootstrap_interval``.

    Args:
        statistic: its value on the rows with these numbers, ``(rows,)`` with repetitions.
        rows: number of rows to draw from.
        seed: of the draws.
        resamples: how often to draw.
        confidence: coverage, between 0 and 1.

    Returns:
        Lower and upper end; ``(nan, nan)`` for no rows.

    Raises:
        UserError: ``rows``, ``resamples`` or ``confidence`` is out of range.
    """
    _check_bootstrap(resamples, confidence)
    if rows < 0:
        raise UserError(f"rows: must be 0 or more, not {rows}")
    if rows == 0:
        return math.nan, math.nan
    drawn = [statistic(sample) for block in _resamples(rows, seed, resamples) for sample in block]
    return _percentiles(np.asarray(drawn, dtype=np.float64), confidence)


def macro_f1_interval(
    predictions: Sequence[str],
    labels: Sequence[str],
    label_set: Sequence[str],
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``macro_f1`` over rows.

    Args:
        predictions: the predicted answers.
        labels: their gold answers, as many.
        label_set: the classes to average over.
        seed: of the draws.
        resamples: how often to draw.
        confidence: coverage, between 0 and 1.

    Returns:
        Lower and upper end; ``(nan, nan)`` for no rows.

    Raises:
        ValueError: predictions and labels differ in length.
        UserError: ``label_set``, ``resamples`` or ``confidence`` is out of range.
    """
    _check_lengths(predictions, labels)
    _check_label_set(label_set)
    predicted, gold = _class_codes(predictions, label_set), _class_codes(labels, label_set)
    return bootstrap_interval_of(
        lambda sample: _macro_f1_of_codes(predicted[sample], gold[sample], len(label_set)),
        rows=len(labels),
        seed=seed,
        resamples=resamples,
        confidence=confidence,
    )
