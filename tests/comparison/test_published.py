"""The published numbers, against the paper's table as it is printed."""

import re
from pathlib import Path
from typing import Any

import pytest

from lit_distill.comparison.published import ROWS, TEACHER, TEST_ROWS, published_row
from lit_distill.comparison.runs import find_runs
from tests.comparison.runs import write_run

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
    assert set(TEST_ROWS) == set(TEACHER) == set(order)
    assert [round(100 * TEACHER[dataset], 2) for dataset in order] == [72.99, 65.6, 77.23, 74.0]


AS_PUBLISHED: dict[str, Any] = {"dataset": "svamp", "method": "StepByStep", "correct": [True] * 200, "train_rows": 720}


@pytest.mark.parametrize("student", ["t5-v1_1-base", "google/t5-v1_1-base"])
def test_a_student_is_known_with_and_without_its_owner(tmp_path: Path, student: str) -> None:
    write_run(tmp_path, **AS_PUBLISHED, model={"student": student})
    [run] = find_runs([tmp_path])[0]
    assert published_row(run) == "step-by-step, PaLM 540B rationales"


def test_rows_without_a_rationale_may_be_missing(tmp_path: Path) -> None:
    # single task trains on these of SVAMP's 720
    write_run(tmp_path, **AS_PUBLISHED | {"method": "SingleTask", "train_rows": 708})
    [run] = find_runs([tmp_path])[0]
    assert published_row(run) == "single task: rationale and label"


@pytest.mark.parametrize(
    "how",
    [
        {"correct": [True, False]},
        {"student": "t5-v1_1-large"},
        {"model": {"student": "/home/me/runs/t5-v1_1-base"}},
        {"parameters": 6_612_352},
        {"parameters": 0},
        {"train_rows": 320},
        {"train_rows": 0},
        {"train_fraction": 0.5},
        {"label_source": "teacher"},
        {"rationales": "shuffled"},
        {"dataset": "toy"},
        {"method": "Mixed"},
        {"method": "SingleTask", "model": {"order": "label_first"}},
        {"model": {"rationale_weight": 0.5}},
        {"model": {"from_scratch": True}},
        {"model": {"tasks": {"program": {"prefix": "program: "}}}},
        {"model": {"objectives": [{"class_path": "mine.KL"}]}},
        {"model": {"adapter": {"r": 8}}},
        {"data": {"rationales": "annotations"}},
        {"data": {"rationale_filter": "label_agrees"}},
    ],
)
def test_nothing_was_published_of_other_kinds(tmp_path: Path, how: dict[str, Any]) -> None:
    write_run(tmp_path, **AS_PUBLISHED | how)
    [run] = find_runs([tmp_path])[0]
    assert published_row(run) is None
