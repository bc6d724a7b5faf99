"""Labels, likelihoods and rationales, on an engine that answers what it is told."""

import math
from collections.abc import Sequence

import pytest

from lit_distill.exporting.engine import Ids
from lit_distill.exporting.predictor import Predictor
from lit_distill.serving.answers import Question, answer
from lit_distill.students.tokens import Tokens
from lit_distill.tasks import tasks_from
from tests.students import WORDS, make_tokenizer


class Told:
    """An engine that generates by the last word of a source, and scores by a table of targets."""

    def __init__(self, texts: dict[str, str], scores: dict[str, float]) -> None:
        self.tokens = Tokens(make_tokenizer())
        self.texts, self.scores = texts, scores
        self.batches: list[int] = []

    def generate(self, sources: Ids, *, max_new_tokens: int, num_beams: int = 1) -> list[list[int]]:
        self.batches.append(len(sources))
        texts = [self.texts[f"{WORDS[source[0]]} {WORDS[source[-2]]}"] for source in sources]
        return self.tokens.targets(texts, 99).ids

    def score(self, sources: Ids, targets: Ids) -> list[float]:
        assert all(target[-1] == 1 for target in targets)
        return [self.scores[text] for text in self.tokens.decode([list(target) for target in targets])]


TWO = {"label": {"prefix": "predict: "}, "rationale": {"prefix": "explain: "}}
SCORES = {"cat": math.log(0.2), "dog": math.log(0.05), "red blue": math.log(0.7)}


def asked(labels: Sequence[str] | None, *questions: Question) -> tuple[list[tuple[object, ...]], list[int]]:
    texts = {"predict: a": "cat", "predict: b": "dog", "predict: c": "red blue", "explain: b": "because blue"}
    engine = Told(texts, SCORES)
    found = answer(Predictor(engine, tasks_from(TWO), labels=labels), questions)
    return [(one.label, round(one.likelihood, 6), one.rationale) for one in found], engine.batches


def test_likelihoods_are_of_the_closed_set_where_the_label_is_in_it() -> None:
    found, batches = asked(["dog", "cat"], Question("the a"), Question("the b", rationale=True), Question("c"))
    assert found == [("cat", 0.8, None), ("dog", 0.2, "because blue"), ("red blue", 0.7, None)]
    # the labels of all rows, and the rationales of those who want them
    assert batches == [3, 1]


def test_likelihoods_are_of_the_text_where_there_is_no_set() -> None:
    assert asked(None, Question("a"), Question("b"))[0] == [("cat", 0.2, None), ("dog", 0.05, None)]


def test_a_rationale_before_the_label_stays_in_all_that_are_compared() -> None:
    tasks = tasks_from(["rationale_label"])
    scores = {"red So the answer is cat": math.log(0.3), "red So the answer is dog": math.log(0.1)}
    engine = Told({"a a": "red So the answer is cat", "a b": "red So the answer is dog"}, scores)
    predictor = Predictor(engine, tasks, labels=["cat", "dog"])
    first, second = answer(predictor, [Question("a a", rationale=True), Question("a b")])
    assert (first.label, first.rationale, second.label, second.rationale) == ("cat", "red", "dog", None)
    assert (first.likelihood, second.likelihood) == pytest.approx((0.75, 0.25))
    assert engine.batches == [2]
