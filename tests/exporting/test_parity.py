"""The parity gate on engines that answer what they are told."""

from collections.abc import Sequence
from typing import Any

import pytest

from lit_distill.exporting.engine import Ids
from lit_distill.exporting.parity import BOUNDS, Rows, measure
from lit_distill.exporting.predictor import Predictor
from lit_distill.exporting.speed import measure_speed
from lit_distill.students import Tokens
from lit_distill.tasks import tasks_from
from tests.students import WORDS, make_tokenizer

TOKENS = Tokens(make_tokenizer())
TASKS = tasks_from(["label", "rationale"])
WORD = {word: number for number, word in enumerate(WORDS)}


class Parrot:
    """Says for each input the word that it was told, and another one with beams; scores are given, too."""

    tokens = TOKENS

    def __init__(self, said: Sequence[str], scores: Sequence[float]) -> None:
        self.said, self.scores = said, scores

    def generate(self, sources: Ids, *, max_new_tokens: int, num_beams: int = 1) -> list[list[int]]:
        # the input is its number after the prefix
        numbers = [int(TOKENS.decode([source])[0].split()[-1]) for source in sources]
        return [[WORD[self.said[number] if num_beams == 1 else "the"], 1] for number in numbers]

    def score(self, sources: Ids, targets: Ids) -> list[float]:
        return list(self.scores)


ROWS = Rows(
    inputs=[str(number) for number in range(20)],
    labels=["cat"] * 20,
    judge=str.__eq__,
    targets={"label": ([[3], [4]], [[5, 1], [6, 7, 8, 1]]), "rationale": ([], [])},
)


def compare(said: Sequence[str], scores: Sequence[float], kind: str) -> dict[str, Any]:
    student = Predictor(Parrot(["cat"] * 20, [-3.0, -8.0]), TASKS)
    return measure(student, Predictor(Parrot(said, scores), TASKS), ROWS, BOUNDS[kind])


def test_the_same_passes() -> None:
    found = compare(["cat"] * 20, [-3.0005, -8.0], "float32")
    assert (found["passed"], found["faults"]) == (True, [])
    assert found["tasks"]["label"] == pytest.approx(
        {"scored": 2, "score": 0.0005, "token_score": 0.00025, "greedy": 1, "beams": 1}
    )
    assert found["tasks"]["rationale"] == {"scored": 0, "greedy": 1, "beams": 1}
    assert found["accuracy"]["difference"] == 0


def test_each_fault_is_told() -> None:
    found = compare(["dog", "red", *["cat"] * 18], [-3.0, -8.002], "float32")
    assert found["faults"] == [
        "label: score 0.002 apart, allowed is 0.001",
        "label: 90.0% of the texts of greedy are equal, allowed is 100%",
        "rationale: 90.0% of the texts of greedy are equal, allowed is 100%",
    ]
    # two rows of twenty are no proof of a loss
    assert compare(["dog", "red", *["cat"] * 18], [-3.0, -8.002], "int8")["passed"]
    found = compare(["dog"] * 10 + ["cat"] * 10, [-3.0, -8.0 - 4 * 0.6], "int8")
    assert found["faults"][0] == "label: token_score 0.6 apart, allowed is 0.3"
    assert found["faults"][-1] == "accuracy 50.0% lower, allowed is 0.5%"
    assert (found["accuracy"]["student"], found["accuracy"]["exported"]) == (1, 0.5)
    # a NaN is no score
    assert not compare(["cat"] * 20, [float("nan"), -8.0], "int8")["passed"]


def test_a_better_one_passes() -> None:
    student = Predictor(Parrot(["dog", *["cat"] * 19], [-3.0, -8.0]), TASKS)
    better = Predictor(Parrot(["cat"] * 20, [-3.0, -8.0]), TASKS)
    assert measure(student, better, ROWS, BOUNDS["int8"])["passed"]


def test_speeds_are_of_both_sizes() -> None:
    predictor = Predictor(Parrot(["dog"] * 5 + ["cat"] * 15, []), TASKS)
    found = measure_speed({"own": predictor, "other": predictor}, ROWS)["own"]
    assert found["accuracy"] == 0.75
    assert found["rows_a_second"] == pytest.approx(20 * 1000 / found["batch_20_p50_ms"])
    assert 0 < found["batch_1_p50_ms"] <= found["batch_1_p99_ms"]
