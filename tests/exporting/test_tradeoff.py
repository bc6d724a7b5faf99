"""What a point of the accuracy-speed curve is: its student, its operations and its accuracy."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_distill.exporting import speed
from lit_distill.exporting.engine import Engine, TransformersEngine
from lit_distill.exporting.parity import Rows
from lit_distill.exporting.predictor import Predictor
from lit_distill.exporting.tradeoff import Point, count_flops, measure_tradeoff
from lit_distill.students import Student, load
from lit_distill.students.fast import products
from lit_distill.tasks import tasks_from
from tests.students import WORDS, add_weights, make_causal_folder, make_causal_tokenizer, make_student_folder

TASKS = tasks_from({"label": {"prefix": "predict: ", "max_new_tokens": 4}})
INPUTS = [" ".join(WORDS[5 + (3 * i + j) % 25] for j in range(4 + i)) for i in range(8)]


def predictor(engine: Engine) -> Predictor:
    return Predictor(engine, TASKS)


def rows(right: Callable[[str, str], bool]) -> Rows:
    return Rows(INPUTS, ["cat"] * len(INPUTS), right, {})


@pytest.fixture(params=["t5", "llama"])
def student(request: pytest.FixtureRequest, tmp_path: Path) -> Student:
    if request.param == "t5":
        made = add_weights(make_student_folder(tmp_path, num_layers=3, num_decoder_layers=3))
    else:
        made = add_weights(make_causal_folder(tmp_path, num_hidden_layers=3), make_causal_tokenizer())
    return load(made).eval()


def test_points(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SINGLES", 1)
    monkeypatch.setattr(speed, "ROUNDS", 1)
    shares = (1.0, 0.5) if student.tokens.family == "seq2seq" else (1.0,)
    points = [Point(3, 1.0), *(Point(layer, keep) for keep in shares for layer in (1, 3) if (layer, keep) != (3, 1.0))]
    told: dict[Point, list[str]] = {}
    for point in points:
        with student.exit_at(point.exit), student.drop_tokens(1, point.keep):
            told[point] = predictor(TransformersEngine(student)).generate(INPUTS, "label")
    weights = {name: weight.clone() for name, weight in student.state_dict().items()}
    # right is what the whole student says
    seen: list[str] = []

    def right(prediction: str, label: str) -> bool:
        seen.append(prediction)
        return prediction == told[points[0]][(len(seen) - 1) % len(INPUTS)]

    found = measure_tradeoff(student, points, 1, predictor, rows(right))
    assert [Point(one["exit"], one["keep"]) for one in found] == points
    assert seen == [text for point in points for text in told[point]]
    for point, one in zip(points, found, strict=True):
        equal = [own == whole for own, whole in zip(told[point], told[points[0]], strict=True)]
        assert one["accuracy"] == sum(equal) / len(equal)
        assert one["difference"] == pytest.approx(one["accuracy"] - 1)
        assert one["low"] <= one["accuracy"] <= one["high"]
        assert one["rows_a_second"] > 0
        assert one["flops"] < 1 or point == points[0]
    assert (found[0]["flops"], found[0]["speedup"]) == (1, 1)
    assert len(student.state_dict()) == len(weights)
    assert all(torch.equal(weight, weights[name]) for name, weight in student.state_dict().items())


def test_operations_are_those_that_torch_counts(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    own = predictor(TransformersEngine(student))
    found = []
    for onednn in (False, True):
        monkeypatch.setattr(products, "onednn_is_faster", lambda onednn=onednn: onednn)
        found.append(count_flops(own, INPUTS))
    assert found[0] == found[1]
    own = predictor(TransformersEngine(student, plain=True))
    found = [count_flops(own, INPUTS)]
    # all of its products are counted by torch
    student.network.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        own.generate(INPUTS, "label")
    assert found == [counter.get_total_flops()]
