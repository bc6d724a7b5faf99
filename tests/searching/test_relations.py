"""Scores against plain loops, and the head's gradient against autograd."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_distill.batch import TaskBatch, pad_rows
from lit_distill.searching.relations import class_features, row_features, scores, similarity
from lit_distill.students import Student, load
from tests.students import add_weights, make_causal_folder, make_causal_tokenizer, make_student_folder

SOURCES, TARGETS = [[3, 17, 1], [4, 18, 19, 1], [3, 9, 10, 11, 1]], [[7, 1], [8, 9, 1], [7, 9, 1]]


@pytest.fixture(params=["t5", "llama"])
def student(request: pytest.FixtureRequest, tmp_path: Path) -> Student:
    if request.param == "t5":
        return load(add_weights(make_student_folder(tmp_path))).eval()
    return load(add_weights(make_causal_folder(tmp_path), make_causal_tokenizer())).eval()


@pytest.fixture
def batch() -> TaskBatch:
    return {"label": pad_rows(SOURCES, TARGETS), "rationale": pad_rows([], [])}


def by_loop(one: Any, other: Any) -> float:
    total, number = 0.0, len(one)
    for i in range(number):
        rows = []
        for features in (one, other):
            row = np.array(
                [sum(features[i, k] * features[j, k] for k in range(features.shape[1])) for j in range(number)]
            )
            rows.append(row / np.sqrt((row**2).sum()))
        total += ((rows[0] - rows[1]) ** 2).sum()
    return -float(total) / number**2


def test_similarity_is_a_plain_loops() -> None:
    draw = np.random.default_rng(0)
    teacher, student = draw.normal(size=(5, 7)), draw.normal(size=(5, 3))
    found = similarity(torch.tensor(teacher), torch.tensor(student))
    assert found == pytest.approx(by_loop(teacher, student), rel=1e-12)
    assert found < similarity(torch.tensor(teacher), torch.tensor(2 * teacher)) == pytest.approx(0, abs=1e-30)


def test_features_of_rows_are_means_over_their_tokens(student: Student, batch: TaskBatch) -> None:
    found = row_features(student(batch), "label")
    for row, ids in enumerate(SOURCES):
        network: Any = student.network
        # alone, without padding
        reads = network.encoder if student.tokens.family == "seq2seq" else network.model
        with torch.no_grad():
            states = reads(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(found[row].detach(), states.mean(dim=0), rtol=0, atol=1e-5)


def test_features_of_classes_are_the_gradient_of_the_heads_weights(student: Student, batch: TaskBatch) -> None:
    made = student(batch)
    head = student.network.get_output_embeddings().weight
    (gradient,) = torch.autograd.grad(made.loss("label"), head)
    found = class_features(student(batch), "label")
    torch.testing.assert_close(found, gradient[sorted({token for row in TARGETS for token in row})], rtol=0, atol=1e-6)


def test_scores_are_means_over_random_students(student: Student, batch: TaskBatch) -> None:
    def make(seed: int) -> Student:
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in student.parameters():
                weight.uniform_(-0.1, 0.1)
        return student

    with torch.no_grad():
        teacher = student(batch)
        for features in (row_features, class_features):
            features(teacher, "label")
        expected = []
        for seed in (0, 1):
            made = make(seed)(batch)
            expected += [
                by_loop(of(teacher, "label").double().numpy(), of(made, "label").double().numpy())
                for of in (class_features, row_features)
            ]
    found = scores(teacher, make, range(2), batch)
    assert found["of_classes"] == pytest.approx((expected[0] + expected[2]) / 2, rel=1e-4)
    assert found["of_rows"] == pytest.approx((expected[1] + expected[3]) / 2, rel=1e-4)
    assert found["relations"] == found["of_classes"] + found["of_rows"]
