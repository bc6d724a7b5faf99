"""From runs to rows: groups, baselines, tests, what was published."""

from pathlib import Path
from typing import Any

import pytest

from lit_distill.comparison.comparing import Comparison, Row, compare_runs
from lit_distill.comparison.runs import find_runs
from lit_distill.comparison.table import run_rows
from lit_distill.errors import UserError
from tests.comparison.runs import answers, write_run, write_runs


def compared(root: Path, **how: Any) -> Comparison:
    return compare_runs(find_runs([root]), **({"resamples": 200} | how))


def rows_of(comparison: Comparison) -> dict[str, Row]:
    return {row.name: row for section in comparison.sections for row in section.rows}


def test_seeds_are_one_setting(tmp_path: Path) -> None:
    write_runs(tmp_path, [0, 1, 2], 0.6, method="Standard")
    write_runs(tmp_path, [0, 1], 0.65, method="StepByStep")
    found = compared(tmp_path)
    standard, ours = rows_of(found).values()
    assert (standard.name, standard.summary.n, standard.is_baseline) == ("standard finetuning", 3, True)
    assert (standard.baseline, standard.examples, standard.seeds, standard.remark) == (None, None, None, "")
    assert (ours.name, ours.summary.n, ours.baseline) == ("step-by-step", 2, standard.setting)
    assert ours.summary.pooled == pytest.approx(ours.summary.mean)
    assert ours.examples is not None
    assert ours.examples.difference == pytest.approx(ours.summary.mean - standard.summary.mean)
    assert ours.seeds is not None
    assert ours.seeds.n == 2
    own, base = ours.summary.values, standard.summary.values
    assert ours.seeds.mean == pytest.approx((own[0] - base[0] + own[1] - base[1]) / 2)


def test_datasets_and_labels_are_compared_for_themselves(tmp_path: Path) -> None:
    write_run(tmp_path / "1", dataset="svamp")
    write_run(tmp_path / "2", dataset="cqa", method="StepByStep")
    write_run(tmp_path / "3", dataset="cqa", label_source="teacher")
    found = compared(tmp_path)
    assert [section.dataset for section in found.sections] == ["cqa", "svamp"]
    ours = rows_of(found)["step-by-step"]
    assert ours.baseline is None
    assert ours.remark == "no baseline with its student, labels and fraction"


def test_different_test_rows_are_refused_with_their_places(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, fingerprints={"test": "other"})
    write_run(tmp_path / "c", method="StepByStep")
    with pytest.raises(UserError, match="tested on different rows") as refused:
        compared(tmp_path)
    for part in (f"{tmp_path}/a (cqa-test) and 1 more like it, {tmp_path}/b (other);", "--allow_different_tests true"):
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)
    found = compared(tmp_path, allow_different_tests=True)
    ours = rows_of(found)["step-by-step, test rows cqa-test"]
    # of two it might be compared with, the one on the same rows
    assert ours.baseline is not None
    assert dict(ours.baseline.extra) == {"test rows": "cqa-test"}
    assert ours.examples is not None
    assert [row.summary.n for row in found.sections[0].rows] == [1, 1, 1]


def test_no_pairs_across_different_test_rows(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", method="StepByStep", fingerprints={"test": "other"})
    ours = compared(tmp_path, allow_different_tests=True).sections[0].rows[1]
    assert ours.baseline is not None
    assert (ours.examples, ours.seeds, ours.remark) == (None, None, "tested on different rows")


def test_no_pairs_where_ids_differ_or_answers_are_not_known(tmp_path: Path) -> None:
    write_run(tmp_path / "a", correct=[True, False])
    write_run(tmp_path / "b", method="StepByStep", correct=[True, False, True])
    write_run(tmp_path / "c", method="SingleTask", predictions=False)
    rows = rows_of(compared(tmp_path))
    assert rows["step-by-step"].remark == "the ids of the test rows differ"
    single = rows["single task: rationale and label"]
    assert (single.remark, single.examples, single.summary.pooled) == ("without predictions", None, None)
    assert single.seeds is not None


def test_other_metrics_have_no_interval_over_rows(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", method="StepByStep")
    ours = rows_of(compared(tmp_path, metric="test/loss"))["step-by-step"]
    assert (ours.examples, ours.remark) == (None, "predictions say nothing of test/loss")
    assert ours.seeds is not None
    assert ours.summary.mean == 0.25


def test_a_run_that_was_done_again_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "old", started="2026-01-01T00:00:00+00:00")
    write_run(tmp_path / "new", started="2026-02-01T00:00:00+00:00", correct=answers(0.7, 200, 5))
    write_run(tmp_path / "metrics_only", started="2026-03-01T00:00:00+00:00", predictions=False)
    write_run(tmp_path / "other_seed", data_seed=9)
    found = compared(tmp_path)
    new = f"{tmp_path}/new"
    assert found.duplicates == {f"{tmp_path}/old": new, f"{tmp_path}/metrics_only": new}
    assert found.sections[0].rows[0].summary.values == pytest.approx((0.7, 0.62))
    table = {Path(row["folder"]).name: row["duplicate_of"] for row in run_rows(found)}
    assert table == {"old": new, "metrics_only": new, "new": None, "other_seed": None}


def test_a_baseline_is_named_by_keys(tmp_path: Path) -> None:
    for fraction in (0.5, 1.0):
        write_run(tmp_path / f"s{fraction}", train_fraction=fraction)
        write_run(tmp_path / f"o{fraction}", method="StepByStep", train_fraction=fraction)
        write_run(tmp_path / f"x{fraction}", method="StepByStep", train_fraction=fraction, rationales="shuffled")
    rows = compared(tmp_path, baseline="method=StepByStep,rationales=shuffled").sections[0].rows
    for row in rows:
        if row.setting.rationales == "shuffled":
            assert row.baseline is None
            assert row.is_baseline
        else:
            assert row.baseline is not None
            assert row.baseline.rationales == "shuffled"
            assert row.baseline.train_fraction == row.setting.train_fraction
    # all of the data is the baseline of each
    rows = compared(tmp_path, baseline="method=Standard train_fraction=1.00").sections[0].rows
    bases = {(row.baseline.method, row.baseline.train_fraction) for row in rows if row.baseline}
    assert bases == {("Standard", 1.0)}
    assert sum(row.baseline is None for row in rows) == 1


def test_of_several_baselines_the_most_alike_is_taken(tmp_path: Path) -> None:
    for rate in (1e-3, 1e-4):
        write_run(tmp_path / f"s{rate}", model={"learning_rate": rate})
        write_run(tmp_path / f"o{rate}", method="StepByStep", model={"learning_rate": rate})
    write_run(tmp_path / "third", method="StepByStep", model={"learning_rate": 0.5})
    rows = rows_of(compared(tmp_path))
    for text in ("0.001", "0.0001"):
        base = rows[f"step-by-step, learning rate {text}"].baseline
        assert base is not None
        assert dict(base.extra) == {"model.init_args.learning_rate": text}
    third = rows["step-by-step, learning rate 0.5"]
    assert third.baseline is None
    assert third.remark == "2 settings could be its baseline; name one with --baseline"
    named = rows_of(compared(tmp_path, baseline="method=Standard,learning_rate=0.001"))
    assert named["step-by-step, learning rate 0.5"].examples is not None


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ("Standard", "'Standard' is not of the form key=value"),
        ("method=", "'method=' is not of the form key=value"),
        (" ", "must be key=value"),
        ("colour=red", "no key 'colour'; allowed are dataset, label_source, learning_rate, method, model.init_args"),
        ("method=Standrd", "no run has method=Standrd; allowed are Standard, StepByStep"),
        ("method=StepByStep,learning_rate=0.1", "no runs have all of method=StepByStep,learning_rate=0.1"),
    ],
)
def test_a_baseline_that_is_not_there(tmp_path: Path, baseline: str, message: str) -> None:
    write_run(tmp_path / "a", model={"learning_rate": 0.1})
    write_run(tmp_path / "b", method="StepByStep", model={"learning_rate": 0.2})
    write_run(tmp_path / "c", model={"learning_rate": 0.2})
    with pytest.raises(UserError, match=f"^baseline: {message}"):
        compared(tmp_path, baseline=baseline)


def test_no_runs_at_all(tmp_path: Path) -> None:
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no run that ended was found \(1 skipped; .*begun: no run.json"):
        compared(tmp_path)


def test_what_was_published_stands_beside_runs_of_its_kind(tmp_path: Path) -> None:
    cqa: dict[str, Any] = {"correct": [True] * 700 + [False] * 521}
    write_run(tmp_path / "1", **cqa)
    write_run(tmp_path / "2", method="StepByStep", **cqa)
    write_run(tmp_path / "3", method="SingleTask", **cqa)
    found = {row.setting.method: row.published for row in compared(tmp_path).sections[0].rows}
    assert {method: one and one.accuracy for method, one in found.items()} == {
        "Standard": 0.6219,
        "StepByStep": 0.6329,
        "SingleTask": 0.6137,
    }


@pytest.mark.parametrize(
    "how",
    [
        {"correct": [True, False]},
        {"student": "t5-v1_1-large"},
        {"train_fraction": 0.5},
        {"label_source": "teacher"},
        {"rationales": "shuffled"},
        {"dataset": "toy"},
        {"method": "Mixed"},
        {"model": {"rationale_weight": 0.5}},
        {"model": {"from_scratch": True}},
        {"data": {"rationales": "annotations"}},
        {"data": {"rationale_filter": "label_agrees"}},
    ],
)
def test_nothing_was_published_of_other_kinds(tmp_path: Path, how: dict[str, Any]) -> None:
    given: dict[str, Any] = {"method": "StepByStep", "correct": [True] * 700 + [False] * 521} | how
    write_run(tmp_path / "1", **given)
    assert compared(tmp_path).sections[0].rows[0].published is None


def test_the_teacher_is_taken_from_the_runs_or_from_the_paper(tmp_path: Path) -> None:
    write_run(tmp_path / "1")
    assert dict(compared(tmp_path).sections[0].teachers) == {0.7723: "the outputs that Hsieh et al. (2023) released"}
    write_run(tmp_path / "2", seed=1, teacher_accuracy=0.5)
    assert dict(compared(tmp_path).sections[0].teachers) == {0.5: "the runs"}


def test_rows_that_changed_under_the_same_config_are_told(tmp_path: Path) -> None:
    for name, hashed in (("1", "x"), ("2", "y")):
        prints = {"train": hashed, "test": "cqa-test"}
        write_run(tmp_path / name, seed=int(name), data_seed=0, fingerprints=prints)
    (remark,) = compared(tmp_path).sections[0].remarks
    assert "trained on different rows or rationales" in remark


def test_what_methods_differ_in_beside_is_told(tmp_path: Path) -> None:
    write_run(tmp_path / "1", model={"learning_rate": 1e-4, "label_prefix": ""})
    write_run(tmp_path / "2", method="StepByStep", model={"learning_rate": 5e-5, "label_prefix": "predict: "})
    section = compared(tmp_path).sections[0]
    assert [row.name for row in section.rows] == ["standard finetuning", "step-by-step"]
    assert section.remarks == ("learning rate differs between methods: standard finetuning 0.0001, step-by-step 5e-05",)


def test_the_table_has_a_row_a_run_with_what_differs(tmp_path: Path) -> None:
    write_run(tmp_path / "1", model={"learning_rate": 0.1})
    write_run(tmp_path / "2", method="StepByStep", seed=3, data_seed=4, model={"learning_rate": 0.2})
    first, second = run_rows(compared(tmp_path))
    assert first.keys() == second.keys()
    expected = {
        "dataset": "cqa",
        "method": "StepByStep",
        "student": "t5-v1_1-base",
        "parameters": 247_577_856,
        "label_source": "gold",
        "train_fraction": 1.0,
        "train_rows": 8766,
        "rationales": "own",
        "rationale_weight": 1.0,
        "model.init_args.learning_rate": "0.2",
        "seed": 3,
        "data_seed": 4,
        "validation_metric": "val/accuracy",
        "validation_value": 0.6,
        "validation_step": 2000.0,
        "wall_seconds": 12.5,
        "peak_memory_mib": 617.0,
        "folder": f"{tmp_path}/2",
        "predictions": True,
    }
    assert {key: second[key] for key in expected} == expected
    assert second["test/accuracy"] == pytest.approx(0.62)
    assert first["rationale_weight"] is None
