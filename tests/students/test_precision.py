"""What a run on a CPU says of bfloat16."""

import logging
import warnings
from typing import Any

import pytest
import torch

from lit_distill.students import precision
from lit_distill.students.precision import bfloat16_gain, report_precision
from tests.students.fast.examples import as_student, make_student


@pytest.fixture
def student(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(precision, "SMALLEST", 0)
    return as_student(make_student())


@pytest.mark.parametrize(
    ("setting", "gain", "told"),
    [("32-true", 2.04, "2.0 times"), ("32-true", 1.19, ""), ("32-true", 0.2, ""), ("bf16-mixed", 0.2, "5.0 times"),
     ("bf16-true", 0.5, "2.0 times"), ("bf16-mixed", 0.9, ""), ("bf16-mixed", 2.0, ""), ("64-true", 3.0, "")],
)  # fmt: skip
def test_one_line_where_it_is_worth_it(
    setting: str,
    gain: float,
    told: str,
    student: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(precision, "bfloat16_gain", lambda student: gain)
    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        report_precision(student, setting)
    lines = [*(record.getMessage() for record in caplog.records), *(str(one.message) for one in warned)]
    assert len(lines) == bool(told)
    if told:
        assert told in lines[0]
        assert "--trainer.precision " + ("32-true" if gain < 1 else "bf16-mixed") in lines[0]
        assert "\n" not in lines[0]


def test_a_measurement_draws_nothing(student: Any) -> None:
    before = torch.get_rng_state()
    gain = bfloat16_gain(student)
    assert gain is not None
    assert gain > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_small_student_is_not_measured() -> None:
    assert bfloat16_gain(as_student(make_student())) is None
