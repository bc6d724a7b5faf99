"""The published numbers, against the paper's table as it is printed."""

import re
from typing import Any

import pytest

from lit_distill.comparison.published import GPT_NEOX, ROWS, TEACHER, TEST_ROWS, published

PRINTED = """
| | e-SNLI | ANLI | CQA | SVAMP |
| standard finetuning | 88.38 | 43.58 | 62.19 | 62.63 |
| single-task rationale + label | 88.88 | 43.50 | 61.37 | 63.00 |
| step-by-step, GPT-NeoX 20B rationales | 89.12 | 48.15 | 63.25 | 63.00 |
| step-by-step, PaLM 540B rationales | 89.51 | 49.58 | 63.29 | 65.50 |
"""


def test_the_table_is_the_papers() -> None:
    printed = [[float(number) for number in re.findall(r"\d+\.\d+", line)] for line in PRINTED.strip().splitlines()[1:]]
    order = ("esnli", "anli1", "cqa", "svamp")
    assert [[round(100 * row[dataset], 2) for dataset in order] for row in ROWS.values()] == printed
    assert GPT_NEOX in ROWS
    assert set(TEST_ROWS) == set(TEACHER) == set(order)
    assert [round(100 * TEACHER[dataset], 2) for dataset in order] == [72.99, 65.6, 77.23, 74.0]


@pytest.mark.parametrize("student", ["t5-v1_1-base", "google/t5-v1_1-base"])
def test_a_student_is_known_with_and_without_its_owner(student: str) -> None:
    how: dict[str, Any] = {"dataset": "svamp", "method": "StepByStep", "student": student, "parameters": 247_577_856}
    how |= {"train_rows": 720, "label_source": "gold", "train_fraction": 1, "rationales": "own", "test_rows": 200}
    found = published(**how, config={"model.init_args.rationale_weight": 1.0})
    assert found is not None
    assert (found.row, found.accuracy) == ("step-by-step, PaLM 540B rationales", 0.655)
    assert published(**how | {"train_rows": 715}, config={}) == found
    other_order = {"model.init_args.order": "label_first"}
    assert published(**how | {"method": "SingleTask"}, config=other_order) is None
    # what is not known is no match
    for key in ("test_rows", "train_rows", "parameters"):
        assert published(**how | {key: 0}, config={}) is None
    assert published(**how | {"student": f"mine/{student}"}, config={}) is None
