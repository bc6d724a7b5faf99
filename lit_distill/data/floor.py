"""The floor of a dataset: the accuracy of a bag-of-words classifier, which a student that has learned passes."""

import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_distill.data.base import RationaleDataModule
from lit_distill.data.cache import key_of, prepare
from lit_distill.data.paper import SEPARATOR
from lit_distill.evaluation.answers import Split
from lit_distill.evaluation.metrics import judge

TRAIN_ROWS, FEATURES, ITERATIONS = 10_000, 30_000, 300
"""A classifier is fitted to at most so many of the run's training rows, evenly spaced, and to so many of the most
frequent words and pairs, in so many iterations; more take long."""


def floors(data: RationaleDataModule, tested: Mapping[Split, Sequence[int]]) -> dict[Split, dict[str, float]]:
    """Accuracies, in 0..1, of a logistic regression on the words and pairs of words of an input, by split and name.

    It is fitted to the run's training rows and the labels that it trains on, with an L2 penalty (``C`` 0.1, which is no
    worse and faster than scikit-learn's 1 on e-SNLI). ``second_part_words`` reads what follows the last `SEPARATOR`
    alone: the hypothesis of natural language inference, which gives labels away (Gururangan et al. 2018, 1803.02324).
    There are none without a closed label set that all rows share, or of rows without gold labels.

    Args:
        data: the datasets, with a training split.
        tested: split -> positions of its rows that are to be answered.
    """
    if data.label_set is None or data.split_rows("train") is None:
        return {split: {} for split in tested}
    train, splits = data.used_rows("train"), {split: data.used_rows(split) for split in tested}
    places = {split: list(map(int, positions)) for split, positions in tested.items()}

    def write(folder: Path) -> dict[str, Any]:
        at = np.unique(np.linspace(0, len(train.rows) - 1, min(len(train.rows), TRAIN_ROWS)).astype(int))
        known = [(row.input, row.label) for row in (train.rows[int(one)] for one in at) if row.label is not None]
        asked = {
            split: [(used.rows[one].input, gold) for one in places[split] if (gold := used.gold[one]) is not None]
            for split, used in splits.items()
        }
        return _accuracies(known, asked, judge(data.metric))

    keys = [train.key, *(used.key for used in splits.values())]
    found = prepare(f"{data.name}-floors", None if None in keys else key_of("floors", keys, places), write)
    return {split: found.meta[split] for split in tested}


def _accuracies(
    known: Sequence[tuple[str, str]],
    asked: Mapping[Split, Sequence[tuple[str, str]]],
    right: Callable[[str, str], bool],
) -> dict[str, dict[str, float]]:
    """The accuracies on pairs of inputs and labels, of classifiers that are fitted to others."""
    # it takes a second to import, and most runs find their floors in the cache
    from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
    from sklearn.feature_extraction.text import CountVectorizer  # type: ignore[import-untyped]
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    # such as the vowel signs of Hindi, which \w does not match
    marks = "".join(one for one in map(chr, range(2**16)) if unicodedata.category(one)[0] == "M")
    parts: dict[str, Callable[[str], str]] = {"words": lambda text: text.replace(SEPARATOR, " ")}
    if all(SEPARATOR in text for pairs in (known, *asked.values()) for text, _ in pairs):
        parts["second_part_words"] = lambda text: text.rpartition(SEPARATOR)[2]
    found: dict[str, dict[str, float]] = {split: {} for split in asked}
    for name, part in parts.items():
        words = CountVectorizer(ngram_range=(1, 2), token_pattern=rf"\w[\w{marks}]*", max_features=FEATURES)
        texts, labels = [part(text) for text, _ in known], [label for _, label in known]
        if len(set(labels)) < 2 or not any(map(words.build_analyzer(), texts)):
            continue
        model = LogisticRegression(C=0.1, tol=1e-3, max_iter=ITERATIONS)
        with warnings.catch_warnings():
            # one that has not converged is a floor, too
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(words.fit_transform(texts), labels)
        for split, pairs in asked.items():
            if pairs:
                answers = model.predict(words.transform([part(text) for text, _ in pairs]))
                hits = [right(str(answer), label) for answer, (_, label) in zip(answers, pairs, strict=True)]
                found[split][name] = sum(hits) / len(hits)
    return found
