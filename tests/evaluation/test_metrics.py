import math
import re
import time
from typing import cast, get_args

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

from lit_distill.errors import UserError
from lit_distill.evaluation.metrics import (
    MetricName,
    bootstrap_interval,
    ends_in,
    equations_agree,
    exact_match,
    judge,
    macro_f1,
    rouge_l,
    wilson_interval,
)

METRICS: tuple[MetricName, ...] = get_args(MetricName)

# The first example imports the oracle or the package under test, and a shared machine stalls.
untimed = settings(deadline=None)


@pytest.mark.parametrize(
    ("prediction", "label", "right"),
    [
        ("neutral", "neutral", True),
        (" neutral\n", "neutral", True),
        ("neutral", "neutral ", True),
        ("Neutral", "neutral", False),
        ("neutral.", "neutral", False),
        ("math  problem", "math problem", False),
        ("", "neutral", False),
        ("", "", True),
    ],
)
def test_exact_match(prediction: str, label: str, right: bool) -> None:
    assert exact_match(prediction, label) is right


@pytest.mark.parametrize(
    ("prediction", "label", "right"),
    [
        ("(84 / 2)", "( 84.0 / 2.0 )", True),
        ("42", "( 84.0 / 2.0 )", True),
        ("2 * 3 + 1", "( 1.0 + ( 3.0 * 2.0 ) )", True),
        ("(2 - 84)", "( 84.0 - 2.0 )", False),
        ("0.3333333", "1 / 3", True),
        ("0.33333", "1 / 3", False),
        ("1000000.9", "1000000", True),
        ("1000002", "1000000", False),
        ("0.1 + 0.2 - 0.3", "0", True),
        ("0.000001", "0", False),
        ("-5", "5", False),
        ("( 84.0 / 2.0", "( 84.0 / 2.0 )", False),
        ("", "1", False),
        # a gold label without a value is never matched, a copy of it included
        ("x - 9", "x - 9", False),
        ("1 / 0", "1 / 0", False),
        ("9", "x - 9", False),
    ],
)
def test_equations_agree(prediction: str, label: str, right: bool) -> None:
    assert equations_agree(prediction, label) is right


def test_judge_by_name() -> None:
    assert judge("exact_match")("42", "84 / 2") is False
    assert judge("equation")("42", "84 / 2") is True
    with pytest.raises(UserError, match=r"metric: unknown metric 'bleu'; allowed are exact_match, equation"):
        judge(cast(MetricName, "bleu"))


def f1(predictions: list[str], labels: list[str], label_set: list[str]) -> float:
    return macro_f1(predictions, labels, label_set)(np.arange(len(labels)))


def test_macro_f1_by_hand() -> None:
    # a: 1 true positive, 1 false positive, 1 false negative: 2 / 4. b: 1, 0, 1: 2 / 3. c is nowhere: 0.
    assert f1(["a", "a", "b", "?"], ["a", "b", "b", "a"], ["a", "b", "c"]) == pytest.approx((1 / 2 + 2 / 3) / 3)
    assert f1([" a\n"], ["a"], ["a"]) == 1.0
    assert f1([], [], ["a", "b"]) == 0.0


ANSWERS = st.sampled_from(["entailment", "neutral", "contradiction", "maybe", ""])


@untimed
@given(st.lists(st.tuples(ANSWERS, ANSWERS), min_size=1, max_size=40), st.integers(1, 3))
def test_macro_f1_is_scikit_learns(rows: list[tuple[str, str]], classes: int) -> None:
    from sklearn.metrics import f1_score  # type: ignore[import-untyped]

    label_set = ["entailment", "neutral", "contradiction"][:classes]
    predictions, labels = [p for p, _ in rows], [y for _, y in rows]
    if not set(labels) & set(label_set):
        labels[0] = label_set[0]  # scikit-learn refuses labels that the gold answers lack altogether
    expected = f1_score(labels, predictions, labels=label_set, average="macro", zero_division=0)
    assert f1(predictions, labels, label_set) == pytest.approx(expected)


def plain_rouge_l(prediction: str, reference: str) -> float:
    p, r = (re.findall("[a-z0-9]+", text.lower()) for text in (prediction, reference))
    lcs = [[0] * (len(r) + 1) for _ in range(len(p) + 1)]
    for i, a in enumerate(p, 1):
        for j, b in enumerate(r, 1):
            lcs[i][j] = lcs[i - 1][j - 1] + 1 if a == b else max(lcs[i - 1][j], lcs[i][j - 1])
    common = lcs[-1][-1]
    return 2 * common / (len(p) + len(r)) if common else 0.0


def test_rouge_l_by_hand() -> None:
    # Lin (2004), section 3.1: "police kill the gunman" against "police killed the gunman" has the sequence police the
    # gunman, 3 of 4 words on both sides; "the gunman kill police" has a sequence of 2.
    assert rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(3 / 4)
    assert rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(1 / 2)
    assert rouge_l("The Gunman!", "the gunman") == 1.0
    assert rouge_l("", "the gunman") == rouge_l("the gunman", "") == rouge_l("", "") == 0.0
    # words keep their endings: no stemming
    assert rouge_l("kills", "killing") == 0.0


WORDS = st.lists(st.sampled_from(["So", "he", "ate", "5", "cakes", "cake.", "He,"]), max_size=12).map(" ".join)


@untimed
@given(WORDS, WORDS)
def test_rouge_l_is_the_longest_common_subsequence(prediction: str, reference: str) -> None:
    assert rouge_l(prediction, reference) == pytest.approx(plain_rouge_l(prediction, reference))


@untimed
@given(st.text(max_size=40), st.text(max_size=40))
@example("İstanbul don't x_y", "i stanbul DON t x y")
def test_rouge_l_is_that_of_the_usual_package(prediction: str, reference: str) -> None:
    expected = RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
    assert rouge_l(prediction, reference) == pytest.approx(expected)


def test_rouge_l_of_long_texts_is_exact_and_quick() -> None:
    began = time.monotonic()
    numbers = range(20_000)
    # each third number is left out, the others are in order
    some = " ".join(str(number) for number in numbers if number % 3)
    assert rouge_l(some, " ".join(map(str, numbers))) == pytest.approx(2 * 13_333 / (13_333 + 20_000))
    assert rouge_l("a " * 20_000, "b a " * 10_000) == pytest.approx(2 * 10_000 / 40_000)
    # a table of 20,000 times 20,000 takes minutes
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("rationale", "label", "ends"),
    [
        ("A stays in B. So the answer is neutral.", "neutral", True),
        ('the answer is "Neutral"!\n', "neutral", True),
        ("the answer must be something used for cooking (Frying Pan).", "frying pan", True),
        ("the answer must be a math\n problem", "math problem", True),
        ("is it neutral?", "Neutral.", True),
        ("neutral", "neutral", True),
        ("it is non-neutral.", "neutral", False),
        ("it is unneutral.", "neutral", False),
        ("neutral it is.", "neutral", False),
        ("it is a problem", "math problem", False),
        ("costs c++", "c++", True),
        ("costs ccc", "c+", False),
        ("the answer is neutral.", "", False),
        ("the answer is neutral.", " . ", False),
        ("", "neutral", False),
        ("", "", False),
    ],
)
def test_ends_in_words(rationale: str, label: str, ends: bool) -> None:
    assert ends_in(rationale, label, "exact_match") is ends


@pytest.mark.parametrize(
    ("rationale", "label", "ends"),
    [
        # the released rationales' own ways to end
        ("So he scored 84 points in 2 rounds. 84 / 2 = 42.", "(84 / 2)", True),
        ("So they planted 10 * 45 seeds. 10 * 45 is 450.", "( 10.0 * 45.0 )", True),
        ("So they planted 10 * 45 seeds.", "( 10.0 * 45.0 )", True),
        ("So they had 79 - 53 = 26 more bottles.", "(79 - 53)", True),
        ("So she ate 10 - 7 = 3 cups. Mary needs 2 cups of sugar.", "(10 - 7)", True),
        ("So she ate 10 - 7 = 3 cups. Mary needs 2 cups of sugar.", "2", True),
        ("So she ate 10 - 7 = 3 cups. Mary needs 2 cups of sugar.", "10", False),
        ("he had 13 - 91 = -78 cakes", "(13 - 91)", True),
        ("he had 13 - 91 = -78 cakes", "(91 - 13)", False),
        ("he received 10 - (3 + 6) emails", "(10 - (3 + 6))", True),
        ("45 - (-1) = 46", "(45 - (-1))", True),
        ("He has 102 * 11 = 1,122 students", "(102 * 11)", True),
        # the prose around an expression
        ("(so 5 + 3)", "8", True),
        ("(5 + 3 cakes)", "8", True),
        ("- 84 / 2", "42", True),
        ("- 84 / 2", "-42", False),
        ("that is 84 / 2 -", "42", True),
        ("17 % of them", "17", True),
        ("1 / 3 = 0.3333333", "0.3333333", True),
        ("he ate .5 of it", "1 / 2", True),
        ("he ate 3.5", "5", False),
        ("so ...42", "42", True),
        # a minus between two numbers is no sign
        ("it is 57 -5", "-5", False),
        ("it is 57-5", "52", True),
        ("covid-19", "-19", False),
        ("covid-19", "19", True),
        ("vitamin B12", "12", False),
        ("vitamin B12", "2", False),
        ("a loss of -5", "-5", True),
        # an expression without a value is passed over
        ("2 + 2 and then 5 / 0", "4", True),
        ("no number at all", "1", False),
        ("84 / 2 = 42", "", False),
        ("84 / 2 = 42", "x", False),
        ("", "1", False),
        ("9" * 400, "1", False),
    ],
)
def test_ends_in_value(rationale: str, label: str, ends: bool) -> None:
    assert ends_in(rationale, label, "equation") is ends


@untimed
@given(st.text(max_size=200) | st.text("0123456789.,+-*/%() \na", max_size=200), st.text(max_size=20))
def test_ends_in_takes_any_text(rationale: str, label: str) -> None:
    for metric in METRICS:
        assert ends_in(rationale, label, metric) in (True, False)


def test_ends_in_refuses_an_unknown_metric() -> None:
    with pytest.raises(UserError, match="metric: unknown metric"):
        ends_in("so 1", "1", cast(MetricName, "bleu"))


@pytest.mark.parametrize(
    ("correct", "total", "lower", "upper"),
    [
        # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (8, 10, 0.4902, 0.9433),
    ],
)
def test_wilson_interval_is_the_published_one(correct: int, total: int, lower: float, upper: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((lower, upper), abs=5e-5)


@untimed
@given(st.integers(0, 500), st.integers(1, 500), st.floats(0.01, 0.999))
def test_wilson_interval_solves_the_score_equation(correct: int, wrong: int, confidence: float) -> None:
    from scipy.stats import norm  # type: ignore[import-untyped]

    total = correct + wrong
    lower, upper = wilson_interval(correct, total, confidence)
    assert 0 <= lower <= correct / total <= upper <= 1
    # the ends are the proportions that lie z of their own standard deviations from the observed one
    z = norm.ppf((1 + confidence) / 2)
    for end in (lower, upper):
        assert (correct / total - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / total, rel=1e-6, abs=1e-9)


def test_bootstrap_interval_of_two_values_by_hand() -> None:
    # the mean of two draws from 0 and 1 is 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4
    values = np.array([0.0, 1.0])
    assert bootstrap_interval(lambda rows: values[rows].mean(), 2, confidence=0.95) == (0.0, 1.0)
    assert bootstrap_interval(lambda rows: values[rows].mean(), 2, confidence=0.3) == (0.5, 0.5)


def test_bootstrap_interval_nears_the_normal_one() -> None:
    values = np.random.default_rng(7).normal(3.0, 2.0, size=2000)
    error = values.std() / math.sqrt(len(values))
    expected = (values.mean() - 1.96 * error, values.mean() + 1.96 * error)
    found = bootstrap_interval(lambda rows: values[rows].mean(), 2000, resamples=4000)
    assert found == pytest.approx(expected, abs=0.15 * error)


def test_bootstrap_interval_is_scipys() -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(3).random(40)
    expected = bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    found = bootstrap_interval(lambda rows: values[rows].mean(), 40, resamples=20_000)
    assert found == pytest.approx(tuple(expected), abs=0.005)
    assert bootstrap_interval(lambda rows: values[rows].mean(), 40, seed=1) != bootstrap_interval(
        lambda rows: values[rows].mean(), 40, seed=2
    )


def test_macro_f1_of_drawn_rows_is_that_of_the_rows_written_out() -> None:
    generator = np.random.default_rng(11)
    label_set = ["a", "b", "c"]
    labels = generator.choice(label_set, size=60).tolist()
    predictions = [y if right else "?" for y, right in zip(labels, generator.random(60) < 0.7, strict=True)]
    rows = generator.integers(0, 60, size=60)
    expected = f1([predictions[i] for i in rows], [labels[i] for i in rows], label_set)
    assert macro_f1(predictions, labels, label_set)(rows) == expected
