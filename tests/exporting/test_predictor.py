"""A student with its tasks."""

import json
from pathlib import Path

import pytest

from lit_distill.errors import UserError
from lit_distill.exporting.engine import TransformersEngine
from lit_distill.exporting.predictor import (
    Predictor,
    load_predictor,
    record_task,
    recorded_tasks,
)
from lit_distill.students import load
from lit_distill.tasks import Task, tasks_from
from tests.students import add_weights, make_student_folder

OWN = tasks_from(
    {
        "label": {"prefix": "predict: ", "input": "{input} {rationale}", "after": "why", "max_new_tokens": 5},
        "why": {"prefix": "explain: ", "target": "because {rationale}", "max_new_tokens": 3},
    }
)


def test_what_is_recorded_comes_back() -> None:
    found = {name: record_task(task, {"max_new_tokens": 7, "num_beams": 2}) for name, task in OWN.items()}
    assert found["why"] == {
        "prefix": "explain: ", "target": "because {rationale}", "max_new_tokens": 7, "num_beams": 2,
    }  # fmt: skip
    tasks, beams = recorded_tasks(json.loads(json.dumps({"task_specific_params": found})))
    assert beams == {"label": 2, "why": 2}
    assert {name: task.max_new_tokens for name, task in tasks.items()} == {"label": 7, "why": 7}
    assert (tasks["label"].after, tasks["label"].input, tasks["why"].target) == (
        "why", "{input} {rationale}", "because {rationale}",
    )  # fmt: skip
    # as the hub's T5 has them
    theirs = {"summarization": {"early_stopping": True, "max_length": 200, "prefix": "summarize: "}}
    assert recorded_tasks({"task_specific_params": theirs}) == ({}, {})
    assert recorded_tasks({"task_specific_params": None}) == ({}, {})
    with pytest.raises(UserError, match=r"^tasks: label: prefix must be a text, got 3"):
        recorded_tasks({"task_specific_params": {"label": {"prefix": 3}}})


def test_a_task_after_another_reads_its_text(weights_folder: Path) -> None:
    student = load(weights_folder)
    predictor = Predictor(TransformersEngine(student), OWN)
    inputs = ["the cat is red ?", "a dog"]
    engine, tokens = predictor.engine, predictor.tokens
    written = engine.generate(tokens.sources([f"explain: {text}" for text in inputs], 99).ids, max_new_tokens=3)
    said = [text.removeprefix("because").strip() for text in tokens.decode(written)]
    sources = [f"predict: {text} {reason}" for text, reason in zip(inputs, said, strict=True)]
    expected = tokens.decode(engine.generate(tokens.sources(sources, 99).ids, max_new_tokens=5))
    assert predictor.generate(inputs, "label") == expected
    assert predictor.generate(inputs, "why") == tokens.decode(written)


def test_likelihoods_of_labels(tmp_path: Path) -> None:
    folder = add_weights(make_student_folder(tmp_path / "student"))
    config = json.loads((folder / "config.json").read_text())
    config["task_specific_params"] = {"label": {"prefix": "predict: ", "target": "the {label} .", "max_new_tokens": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    predictor = load_predictor(folder)
    assert (predictor.labels, predictor.tasks["label"]) == (
        None,
        Task("label", "predict: ", target="the {label} .", max_new_tokens=4),
    )
    found = predictor.likelihoods(["a cat", "red dog ?"], ["yes", "no", "cat"], "label")
    tokens = predictor.tokens
    for text, scores in zip(["a cat", "red dog ?"], found, strict=True):
        source = tokens.sources([f"predict: {text}"], 99).ids
        for label, score in zip(["yes", "no", "cat"], scores, strict=True):
            [alone] = predictor.engine.score(source, tokens.targets([f"the {label} ."], 99).ids)
            assert score == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 3) for scores in found for score in scores}) == 6
