"""Finding runs: what is one, what is none, and what is said of the latter."""

import json
from pathlib import Path

import numpy as np
import pytest

from lit_distill.comparison.comparing import compare_runs
from lit_distill.comparison.report import to_markdown
from lit_distill.comparison.runs import Run, find_runs
from lit_distill.errors import UserError
from lit_distill.records import PREDICTIONS, RECORD, read_predictions_file, write_predictions_file
from tests.comparison.runs import edit, write_run


def reasons(root: Path) -> dict[str, str]:
    """What is skipped below a folder, and why."""
    return {Path(source).name: reason for source, reason in find_runs([root])[1].items()}


def answers_of(run: Run) -> list[float | None]:
    assert run.correct is not None
    return [None if np.isnan(one) else float(one) for one in run.correct]


def test_runs_are_found_however_deep_and_once(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "version_0", seed=0)
    write_run(tmp_path / "a" / "version_1", seed=1)
    write_run(tmp_path / "b", method="StepByStep")
    (tmp_path / "link").symlink_to(tmp_path / "a", target_is_directory=True)
    runs, skipped = find_runs([tmp_path / "a", tmp_path, tmp_path / "b"])
    assert [Path(run.source).relative_to(tmp_path).as_posix() for run in runs] == [
        "a/version_0",
        "a/version_1",
        "b",
    ]
    assert skipped == {}
    assert find_runs([tmp_path / "b"])[0][0].record.method == "StepByStep"


def test_answers_are_in_the_order_of_their_ids(tmp_path: Path) -> None:
    write_run(tmp_path / "a", correct=[True, False, True])
    write_run(tmp_path / "b", correct=[False, False, True])
    # in another order they are the same rows
    write_predictions_file(tmp_path / "b", read_predictions_file(tmp_path / "b")[::-1])
    first, second = find_runs([tmp_path])[0]
    assert answers_of(first) == [1, 0, 1]
    assert answers_of(second) == [0, 0, 1]


def test_what_was_begun_and_has_not_ended_is_listed(tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "begun" / "config.yaml").write_text("{}")
    # none of these is a run
    (tmp_path / "empty").mkdir()
    (tmp_path / "wandb" / "run-1" / "files").mkdir(parents=True)
    (tmp_path / "wandb" / "run-1" / "files" / "config.yaml").write_text("{}")
    (tmp_path / "good" / "baseline" / "checkpoints").mkdir(parents=True)
    for name in ("planned", "failed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "fit.yaml").write_text("{}")
    (tmp_path / "failed" / "failed.txt").write_text("{}")
    (tmp_path / "failed" / "checkpoints").mkdir()
    assert reasons(tmp_path) == {
        "begun": "no run.json: the run has not ended",
        "planned": "no run.json: not started, or ended early",
        "failed": "no run.json: failed",
    }
    assert len(find_runs([tmp_path])[0]) == 1


def test_a_run_hides_none_below_it(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_run(tmp_path / "sub", seed=1)
    write_run(tmp_path / "sub" / "student", seed=2)
    write_run(tmp_path / "sub" / "checkpoints" / "deep", seed=3)
    assert [run.record.seed for run in find_runs([tmp_path])[0]] == [0, 1]
    # elsewhere these are names like any other
    write_run(tmp_path / "other" / "student", seed=4)
    assert [run.record.seed for run in find_runs([tmp_path / "other"])[0]] == [4]


@pytest.mark.parametrize(
    "odd",
    [
        {"started": 5},
        {"started": None},
        {"steps": 1.5},
        {"steps": 10**30},
        {"seed": 10**400},
        {"rationales": ["own"]},
        {"rationales": {}},
        {"versions": {"torch": None}},
        {"versions": None},
        {"fingerprints": {"test": 5}},
        {"fingerprints": {"test": []}},
        {"git": {"commit": ["a"]}},
        {"metrics": {"test/accuracy": 10**400}},
        {"train_fraction": float("nan")},
        {"train_fraction": 10**400},
        {"dataset": "\ud800"},
        {"student": "\ud800"},
        {"config": {"model": {"init_args": {"rationale_weight": 10**400}}}},
        {"config": {"a": "\ud800"}},
        {"command": "fit"},
        {"data": []},
        {"wall_seconds": "long"},
        {"teacher_accuracy": 10**400},
        {"teacher_accuracy": 1.5},
        {"metrics": {"test/accuracy": float("nan")}},
        {"metrics": {"test/scored_accuracy": 62.5}},
        {"validation": {"val/macro_f1": -0.1}},
        {"metrics": {"test/loss": float("inf")}},
        {"test_rows": -1},
        {"train_rows": 2.5},
        {"seed": True},
        {"wall_seconds": -3.0},
        {"versions": {"torch": 2}},
        {"command": ["fit", 1]},
    ],
)
def test_odd_records_are_listed(tmp_path: Path, odd: dict[str, object]) -> None:
    write_run(tmp_path / "good")
    write_run(tmp_path / "odd")
    edit(tmp_path / "odd", **odd)
    assert list(reasons(tmp_path)) == ["odd"]
    assert compare_runs(*find_runs([tmp_path]), resamples=100).runs


def test_a_record_that_is_nested_too_deep_is_listed(tmp_path: Path) -> None:
    write_run(tmp_path / "odd")
    content = (tmp_path / "odd" / RECORD).read_text()
    deep = "[" * 99999 + "]" * 99999
    (tmp_path / "odd" / RECORD).write_text(content.replace('"config": {', f'"config": {{"a": {deep},', 1))
    assert list(reasons(tmp_path)) == ["odd"]


def test_damaged_records_are_listed(tmp_path: Path) -> None:
    for name in ("torn", "list", "other", "short", "seed", "metric", "config", "teacher", "versions"):
        write_run(tmp_path / name)
    (tmp_path / "torn" / RECORD).write_text('{"format": 1, "data')
    (tmp_path / "list" / RECORD).write_text("[]")
    edit(tmp_path / "other", format=2)
    content = json.loads((tmp_path / "short" / RECORD).read_text())
    del content["metrics"]
    (tmp_path / "short" / RECORD).write_text(json.dumps(content))
    edit(tmp_path / "seed", seed="0")
    edit(tmp_path / "metric", metrics={"test/accuracy": None})
    edit(tmp_path / "config", config=[])
    edit(tmp_path / "teacher", teacher_accuracy="good")
    edit(tmp_path / "versions", versions={"torch": 2})
    found = reasons(tmp_path)
    for name, fault in {
        "torn": "Invalid JSON: EOF",
        "list": "Input should be an object, got []",
        "other": "format: Input should be 1, got 2",
        "short": "metrics: Field required",
        "seed": "seed: Input should be a valid integer, got '0'",
        "metric": "metrics.test/accuracy: Input should be a valid number, got None",
        "config": "config: Input should be an object, got []",
        "teacher": "teacher_accuracy: Input should be a valid number, got 'good'",
        "versions": "versions.torch: Input should be a valid string, got 2",
    }.items():
        assert f"run.json: not the record of a run: {fault}" in found[name]
    assert find_runs([tmp_path])[0] == []


def test_damaged_predictions_are_listed(tmp_path: Path) -> None:
    right = [True, True, False, False]
    for name in ("torn", "rows", "kind", "foreign"):
        write_run(tmp_path / name, correct=right)
    (tmp_path / "torn" / PREDICTIONS).write_text('{"id": "a", "corr')
    rows = read_predictions_file(tmp_path / "rows")
    write_predictions_file(tmp_path / "rows", rows[:3])
    write_predictions_file(tmp_path / "kind", [row | {"correct": 1} for row in rows])
    write_predictions_file(tmp_path / "foreign", [row | {"correct": True} for row in rows])
    found = reasons(tmp_path)
    assert f"{PREDICTIONS}:1: not JSON" in found["torn"]
    assert found["rows"].endswith("3 rows, but run.json says 4")
    assert found["kind"].endswith("correct must be true, false or null")
    assert "its accuracy is 1.0000, but run.json says 0.5000" in found["foreign"]


def test_runs_whose_answers_cannot_be_paired_keep_their_metrics(tmp_path: Path) -> None:
    right = [True, True, False, False]
    write_run(tmp_path / "absent", predictions=False)
    for name in ("twice", "unlabelled", "partly"):
        write_run(tmp_path / name, correct=right)
    rows = read_predictions_file(tmp_path / "twice")
    write_predictions_file(tmp_path / "twice", [row | {"id": "same"} for row in rows])
    write_predictions_file(tmp_path / "unlabelled", [row | {"correct": None} for row in rows])
    write_predictions_file(tmp_path / "partly", [rows[0] | {"correct": None}, *rows[1:]])
    edit(tmp_path / "partly", metrics={"test/accuracy": 1 / 3})
    # of the rows that have a label, the others' answers
    write_run(tmp_path / "lies", correct=right)
    write_predictions_file(tmp_path / "lies", [rows[0] | {"correct": None}, *rows[1:]])
    assert "its accuracy is 0.3333, but run.json says 0.5000" in reasons(tmp_path)["lies"]
    runs = {Path(run.source).name: run for run in find_runs([tmp_path])[0]}
    assert runs["absent"].remark == "no test_predictions.jsonl"
    assert runs["twice"].remark == "the id 'same' occurs more than once in test_predictions.jsonl"
    assert runs["unlabelled"].remark == "no test row has a label"
    assert all(runs[name].correct is None for name in ("absent", "twice", "unlabelled"))
    assert answers_of(runs["partly"]) == [None, 1, 0, 0]


def test_a_folder_that_is_not_there_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^runs: no folder '.*nowhere'$"):
        find_runs([tmp_path / "nowhere"])


def test_runs_without_the_metric_are_skipped(tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    write_run(tmp_path / "untested", metrics={}, test_rows=0, predictions=False, seed=7)
    found = compare_runs(*find_runs([tmp_path]), resamples=100)
    assert [Path(run.source).name for run in found.runs] == ["good"]
    assert found.skipped == {f"{tmp_path}/untested": "no test/accuracy among its metrics"}
    with pytest.raises(UserError, match="no run has 'test/f1'; allowed are test/accuracy, test/loss"):
        compare_runs(*find_runs([tmp_path / "good"]), metric="test/f1")
    with pytest.raises(UserError, match="no run has 'test/accuracy'; allowed are val/accuracy"):
        compare_runs(*find_runs([tmp_path / "untested"]))
    # of tuning, which does not touch test
    [setting] = compare_runs(*find_runs([tmp_path / "untested"]), metric="val/accuracy").settings.to_dict("records")
    assert setting["mean"] == 0.6
    # that it has no predictions is no fault, and tested runs may stand beside it
    both = to_markdown(compare_runs(*find_runs([tmp_path]), metric="val/accuracy"))
    assert "without predictions" not in both
    assert "not tested" in both
    write_run(tmp_path / "unvalidated", metrics={}, test_rows=0, predictions=False, validation={})
    with pytest.raises(UserError, match="no run was tested"):
        compare_runs(*find_runs([tmp_path / "unvalidated"]))
