"""From runs to rows: groups, baselines, tests, what was published."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_distill.comparison.comparing import Comparison, compare_runs
from lit_distill.comparison.report import run_rows, to_markdown
from lit_distill.comparison.runs import find_runs
from lit_distill.errors import UserError
from tests.comparison.runs import answers, write_run, write_runs


def compared(root: Path, **how: Any) -> Comparison:
    return compare_runs(*find_runs([root]), **({"resamples": 200} | how))


def rows_of(comparison: Comparison) -> list[SimpleNamespace]:
    return [SimpleNamespace(**row) for row in comparison.settings.to_dict("records")]


def results_of(comparison: Comparison) -> dict[str, SimpleNamespace]:
    return {row.name: row for row in rows_of(comparison)}


def test_seeds_are_one_setting(tmp_path: Path) -> None:
    write_runs(tmp_path, [0, 1, 2], 0.6, method="Standard")
    write_runs(tmp_path, [0, 1], 0.65, method="StepByStep")
    standard, ours = rows_of(compared(tmp_path))
    assert (standard.name, standard.n, standard.is_baseline) == ("standard finetuning", 3, True)
    assert (standard.baseline, standard.difference, standard.seed_n, standard.remark) == (None, None, None, "")
    assert (ours.name, ours.n, ours.baseline, ours.seed_n) == ("step-by-step", 2, 0, 2)
    # both over the seeds that both have
    assert ours.difference == pytest.approx(ours.seed_difference)
    assert (ours.left_out, standard.left_out) == (True, False)
    own, base = ours.values, standard.values
    assert ours.seed_difference == pytest.approx((own[0] - base[0] + own[1] - base[1]) / 2)


def test_datasets_and_labels_are_compared_for_themselves(tmp_path: Path) -> None:
    write_run(tmp_path / "1", dataset="svamp")
    write_run(tmp_path / "2", dataset="cqa", method="StepByStep")
    write_run(tmp_path / "3", dataset="cqa", label_source="teacher")
    found = compared(tmp_path)
    assert list(found.settings.dataset) == ["cqa", "cqa", "svamp"]
    ours = results_of(found)["step-by-step"]
    assert ours.baseline is None
    assert ours.remark == "no baseline with its student, labels and fraction"


def test_different_test_rows_are_refused_with_their_places(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, fingerprints={"test": "other"})
    write_run(tmp_path / "c", method="StepByStep")
    with pytest.raises(UserError, match="tested on different rows") as refused:
        compared(tmp_path)
    for part in (
        f"{tmp_path}/a (cqa-test, 200 rows) and 1 more, {tmp_path}/b (other, 200 rows);",
        "--allow_different_tests true",
    ):
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)
    found = compared(tmp_path, allow_different_tests=True)
    ours = rows_of(found)[2]
    # of two it might be compared with, the one on the same rows
    assert found.settings["test rows"][ours.baseline] == "cqa-test, 200 rows"
    assert ours.difference is not None
    assert list(found.settings.n) == [1, 1, 1]


def test_no_pairs_across_different_test_rows(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", method="StepByStep", fingerprints={"test": "other"})
    ours = rows_of(compared(tmp_path, allow_different_tests=True))[1]
    assert (ours.baseline, ours.difference, ours.seed_n) == (0, None, None)
    assert ours.remark == "tested on different or unknown rows"


def test_no_pairs_where_rows_or_answers_are_not_known(tmp_path: Path) -> None:
    write_run(tmp_path / "a", correct=[True, False, True])
    write_run(tmp_path / "b", method="StepByStep", correct=[True, False, True], fingerprints={})
    write_run(tmp_path / "c", method="SingleTask", predictions=False, correct=[True, False, False])
    found = compared(tmp_path)
    rows = results_of(found)
    assert rows["step-by-step"].remark == "tested on different or unknown rows"
    assert found.remarks == {"cqa": ["It is unknown on which rows some runs were tested"]}
    single = rows["single task: rationale and label"]
    assert (single.remark, single.difference, single.seed_n) == ("without predictions", None, 1)


def test_other_metrics_have_no_interval_over_rows(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", method="StepByStep")
    ours = results_of(compared(tmp_path, metric="test/loss"))["step-by-step"]
    assert (ours.difference, ours.remark) == (None, "predictions say nothing about test/loss")
    assert (ours.mean, ours.seed_n) == (0.25, 1)


def test_votes_are_compared_row_by_row(tmp_path: Path) -> None:
    for name, method, votes in (("a", "Standard", [True, False] * 50), ("b", "StepByStep", [True, True] * 50)):
        write_run(tmp_path / name, method=method, correct=[False] * 100, votes=votes)
    ours = results_of(compared(tmp_path, metric="test/vote_accuracy"))["step-by-step"]
    assert (ours.difference, ours.differing, ours.remark) == (0.5, 50, "")
    # accuracy itself is the same
    assert results_of(compared(tmp_path))["step-by-step"].difference == 0
    # predictions of an earlier version have no votes
    write_run(tmp_path / "b", method="StepByStep", further={"test/vote_accuracy": 1.0}, correct=[False] * 100)
    ours = results_of(compared(tmp_path, metric="test/vote_accuracy"))["step-by-step"]
    assert (ours.difference, ours.remark) == (None, "without predictions")


def test_what_fewer_rows_cost(tmp_path: Path) -> None:
    # of seeds 1 and 2, which both fractions have: 60 - 55 and 62 - 51
    values = {1.0: {0: 70, 1: 60, 2: 62}, 0.5: {1: 58, 2: 58}, 0.1: {1: 55, 2: 51, 3: 20}, 0.05: {1: 10}}
    for fraction, own in values.items():
        for seed, right in own.items():
            correct = [row < right for row in range(100)]
            write_run(tmp_path / f"{fraction} {seed}", correct=correct, train_fraction=fraction, seed=seed)
    for seed in (1, 2):
        how: Any = {"method": "StepByStep", "correct": [True] * 100}
        write_run(tmp_path / f"other {seed}", seed=seed, **how)
        write_run(tmp_path / f"some {seed}", seed=seed + 5, train_fraction=0.25, **how)
    found = {(row.name, row.train_fraction): row.lost for row in compared(tmp_path).settings.itertuples(index=False)}
    fraction, mean, error, number = found["standard finetuning", 1.0]
    assert (fraction, number) == (0.1, 2)
    assert mean == pytest.approx(0.08)
    # half the difference of two values
    assert error == pytest.approx(0.03)
    # no seed in common
    assert [lost for key, lost in found.items() if key != ("standard finetuning", 1.0)] == [None] * 5
    assert compared(tmp_path, metric="test/loss").settings.lost.isna().all()


def test_further_metrics_are_of_settings_whose_runs_all_have_them(tmp_path: Path) -> None:
    for seed, tokens in ((0, 4.0), (1, 6.0)):
        further = {"test/tokens": tokens} | ({"test/worst_group_accuracy": 0.5} if seed else {})
        write_run(tmp_path / f"a{seed}", seed=seed, further=further, train_tokens=1000 * (1 + seed))
        write_run(tmp_path / f"b{seed}", method="StepByStep", seed=seed, train_tokens=seed)
    found = results_of(compared(tmp_path))
    further = found["standard finetuning"].further
    assert list(further) == ["train_tokens", "test/tokens"]
    assert [*further["train_tokens"], *further["test/tokens"]] == pytest.approx([1500, 500, 5, 1])
    assert found["step-by-step"].further == {}


def test_a_run_that_was_done_again_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "old", started="2026-01-01T00:00:00+00:00")
    write_run(tmp_path / "new", started="2026-02-01T00:00:00+00:00", correct=answers(0.7, 200, 5))
    write_run(tmp_path / "metrics_only", started="2026-03-01T00:00:00+00:00", predictions=False)
    write_run(tmp_path / "other_seed", data_seed=9)
    found = compared(tmp_path)
    new = f"{tmp_path}/new"
    assert found.repeated == {f"{tmp_path}/old": new, f"{tmp_path}/metrics_only": new}
    assert found.settings["values"][0] == pytest.approx([0.7, 0.62])
    table = {Path(row["folder"]).name: row["duplicate_of"] for row in run_rows(found)}
    assert table == {"old": new, "metrics_only": new, "new": None, "other_seed": None}


def test_a_baseline_is_named_by_keys(tmp_path: Path) -> None:
    for fraction in (0.5, 1.0):
        write_run(tmp_path / f"s{fraction}", train_fraction=fraction)
        write_run(tmp_path / f"o{fraction}", method="StepByStep", train_fraction=fraction)
        write_run(tmp_path / f"x{fraction}", method="StepByStep", train_fraction=fraction, rationales="shuffled")
    rows = rows_of(compared(tmp_path, baseline="method=StepByStep,rationales=shuffled"))
    for row in rows:
        if row.rationales == "shuffled":
            assert (row.baseline, row.is_baseline) == (None, True)
        else:
            assert rows[row.baseline].rationales == "shuffled"
            assert rows[row.baseline].train_fraction == row.train_fraction
    # all of the data is the baseline of each
    rows = rows_of(compared(tmp_path, baseline="method=Standard train_fraction=1.00"))
    bases = [rows[row.baseline] for row in rows if row.baseline is not None]
    assert {(base.method, base.train_fraction) for base in bases} == {("Standard", 1.0)}
    assert len(bases) == len(rows) - 1


def test_of_several_baselines_the_most_alike_is_taken(tmp_path: Path) -> None:
    for rate in (1e-3, 1e-4):
        write_run(tmp_path / f"s{rate}", model={"learning_rate": rate})
        write_run(tmp_path / f"o{rate}", method="StepByStep", model={"learning_rate": rate})
    write_run(tmp_path / "third", method="StepByStep", model={"learning_rate": 0.5})
    found = compared(tmp_path)
    rows = results_of(found)
    for text in ("0.001", "0.0001"):
        base = rows[f"step-by-step, learning rate {text}"].baseline
        assert found.settings.name[base] == f"standard finetuning, learning rate {text}"
    third = rows["step-by-step, learning rate 0.5"]
    assert third.baseline is None
    assert third.remark == "2 settings could be its baseline; name one with --baseline"
    named = results_of(compared(tmp_path, baseline="method=Standard,learning_rate=0.001"))
    assert named["step-by-step, learning rate 0.5"].difference is not None


def test_a_baseline_with_more_to_it_is_compared_with_the_plain_one(tmp_path: Path) -> None:
    kl = {
        "objectives": [{"class_path": "lit_distill.objectives.ForwardKL"}],
        "teachers": {"big": {"model": "runs/big"}},
    }
    for rate in (1e-3, 1e-4):
        write_run(tmp_path / f"s{rate}", model={"learning_rate": rate})
        write_run(tmp_path / f"kl{rate}", model={"learning_rate": rate, **kl})
    write_run(tmp_path / "o", method="StepByStep", model={"learning_rate": 1e-3})
    found = compared(tmp_path)
    rows = results_of(found)
    baselines = {name: row.baseline and found.settings.name[row.baseline] for name, row in rows.items()}
    assert baselines == {
        "standard finetuning, learning rate 0.001": None,
        "standard finetuning, learning rate 0.0001": None,
        "standard finetuning, learning rate 0.001, objectives ForwardKL": "standard finetuning, learning rate 0.001",
        "standard finetuning, learning rate 0.0001, objectives ForwardKL": "standard finetuning, learning rate 0.0001",
        "step-by-step, learning rate 0.001": "standard finetuning, learning rate 0.001",
    }
    # at another rate there is no plain one
    write_run(tmp_path / "kl", model={"learning_rate": 0.5, **kl})
    other = results_of(compared(tmp_path))["standard finetuning, learning rate 0.5, objectives ForwardKL"]
    assert (other.baseline, other.remark) == (None, "")


def test_a_baseline_of_other_labels_and_of_a_large_number(tmp_path: Path) -> None:
    for method in ("Standard", "StepByStep"):
        for labels in ("gold", "teacher"):
            write_run(tmp_path / f"{method}-{labels}", method=method, label_source=labels)
    write_run(tmp_path / "long", model={"max_tokens": 4913888})
    write_run(tmp_path / "small", model={"learning_rate": 1e-6})
    found = compared(tmp_path, baseline="label_source=gold")
    to = {(row["label_source"], row["name"]): row["compared_with"] for row in found.settings.to_dict("records")}
    assert to["teacher", "step-by-step"] == "step-by-step, gold labels"
    assert to["teacher", "standard distillation"] == "standard finetuning, gold labels"
    for wanted in ("max_tokens=4913888", "learning_rate=1e-6", "learning_rate=0.0000010"):
        assert compared(tmp_path, baseline=wanted).settings.is_baseline.sum() == 1


def test_rows_of_val_are_checked_for_each_data_seed(tmp_path: Path) -> None:
    for seed in (0, 1):
        for method in ("Standard", "StepByStep"):
            write_run(tmp_path / f"{method}{seed}", method=method, seed=seed, fingerprints={"val": f"split {seed}"})
    assert len(compared(tmp_path, metric="val/accuracy").settings) == 2
    write_run(tmp_path / "other", method="SingleTask", seed=1, fingerprints={"val": "another"})
    with pytest.raises(UserError, match=r"^runs: those of cqa were validated on different rows: .* cannot be compared"):
        compared(tmp_path, metric="val/accuracy")
    assert len(compared(tmp_path, metric="val/accuracy", allow_different_tests=True).settings) == 3


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ("Standard", "'Standard' is not of the form key=value"),
        ("method=", "'method=' is not of the form key=value"),
        (" ", "' ' is not of the form key=value"),
        ("colour=red", "no key 'colour'; allowed are dataset, label_source, learning_rate, method, model.init_args"),
        ("method=Standrd", "no run has method=Standrd; method is one of Standard, StepByStep"),
        (
            "method=StepByStep,learning_rate=0.1",
            "no run has method=StepByStep, model.init_args.learning_rate=0.1; learning_rate is one of 0.1, 0.2",
        ),
    ],
)
def test_a_baseline_that_is_not_there(tmp_path: Path, baseline: str, message: str) -> None:
    write_run(tmp_path / "a", model={"learning_rate": 0.1})
    write_run(tmp_path / "b", method="StepByStep", model={"learning_rate": 0.2})
    write_run(tmp_path / "c", model={"learning_rate": 0.2})
    with pytest.raises(UserError, match=f"^baseline: {message}"):
        compared(tmp_path, baseline=baseline)


def test_no_runs_at_all(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").touch()
    with pytest.raises(UserError, match=r"found no finished run \(1 skipped; .*begun: no run.json"):
        compared(tmp_path)


def test_what_was_published_stands_beside_runs_of_its_kind(tmp_path: Path) -> None:
    cqa: dict[str, Any] = {"correct": [True] * 700 + [False] * 521}
    write_run(tmp_path / "1", **cqa)
    write_run(tmp_path / "2", method="StepByStep", **cqa)
    write_run(tmp_path / "3", method="SingleTask", **cqa)
    assert dict(compared(tmp_path).settings[["method", "published"]].values) == {
        "Standard": 0.6219,
        "StepByStep": 0.6329,
        "SingleTask": 0.6137,
    }


def test_other_numbers_of_test_rows_are_refused_where_their_hash_is_unknown(tmp_path: Path) -> None:
    for rows in (20, 30):
        write_run(tmp_path / str(rows), correct=[True] * rows, fingerprints={}, seed=rows)
    with pytest.raises(UserError, match=r"tested on different rows: \S+ \(20 rows\), \S+ \(30 rows\); "):
        compared(tmp_path)
    assert len(compared(tmp_path, allow_different_tests=True).runs) == 2


def test_the_teacher_is_taken_from_the_runs_or_from_the_paper(tmp_path: Path) -> None:
    write_run(tmp_path / "1")
    assert compared(tmp_path).settings.teachers[0] == [0.7723]
    write_run(tmp_path / "2", seed=1, teacher_accuracy=0.5)
    assert compared(tmp_path).settings.teachers[0] == [0.5]
    # another teacher's
    write_run(tmp_path / "3", seed=2, teacher_accuracy=0.25)
    assert compared(tmp_path).settings.teachers[0] == [0.25, 0.5]
    assert "| 25.00, 50.00 |" in to_markdown(compared(tmp_path))


def test_rows_that_changed_under_the_same_config_are_told(tmp_path: Path) -> None:
    for name, hashed in (("1", "x"), ("2", "y")):
        prints = {"train": hashed, "test": "cqa-test"}
        write_run(tmp_path / name, seed=int(name), data_seed=0, fingerprints=prints)
    remark = "standard finetuning: trained on different rows with the same data seed"
    assert compared(tmp_path).remarks == {"cqa": [remark]}


def test_a_part_of_the_test_rows_is_another_test(tmp_path: Path) -> None:
    """A hash of a whole test set says nothing of a limit."""
    write_run(tmp_path / "a", correct=answers(0.5, 200, 0))
    write_run(tmp_path / "b", correct=answers(0.9, 100, 1), seed=1)
    write_run(tmp_path / "c", correct=answers(0.9, 100, 1), method="StepByStep")
    with pytest.raises(UserError, match=r"a \(cqa-test, 200 rows\), .*b \(cqa-test, 100 rows\) and 1 more"):
        compared(tmp_path)
    rows = rows_of(compared(tmp_path, allow_different_tests=True))
    assert [(row.n, row.seed_n) for row in rows] == [(1, None)] * 3


def test_students_of_one_name_are_told_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", model={"student": "/home/me/distilled/t5-v1_1-base"})
    write_run(tmp_path / "c", model={"student": "/home/me/distilled/t5-v1_1-base/"}, seed=1)
    found = compared(tmp_path)
    assert found.repeated == {}
    assert {row.student: row.n for row in rows_of(found)} == {
        "google/t5-v1_1-base": 1,
        "distilled/t5-v1_1-base": 2,
    }
    assert "google/t5-v1_1-base" in {row["model.init_args.student"] for row in run_rows(found)}


def test_of_other_seeds_the_shared_are_compared(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"s{seed}", seed=seed, correct=answers(0.5 + seed / 10, 200, seed))
    for seed in (1, 2):
        write_run(tmp_path / f"o{seed}", seed=seed, method="StepByStep", correct=answers(0.6 + seed / 10, 200, seed))
    ours = results_of(compared(tmp_path))["step-by-step"]
    assert ours.difference == pytest.approx(ours.seed_difference) == pytest.approx(0.1)
    assert ours.left_out


def test_without_shared_seeds_all_are_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "s")
    write_run(tmp_path / "o", seed=1, method="StepByStep")
    ours = results_of(compared(tmp_path))["step-by-step"]
    assert (ours.seed_n, ours.left_out) == (None, False)
    assert ours.difference is not None


def test_what_methods_differ_in_beside_is_told(tmp_path: Path) -> None:
    write_run(tmp_path / "1", model={"learning_rate": 1e-4, "label_prefix": ""})
    write_run(tmp_path / "2", method="StepByStep", model={"learning_rate": 5e-5, "label_prefix": "predict: "})
    found = compared(tmp_path)
    assert list(found.settings.name) == ["standard finetuning", "step-by-step"]
    assert found.remarks == {"cqa": ["learning rate differs with method (Standard: 0.0001, StepByStep: 5e-05)"]}


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
        "model.init_args.rationale_weight": "1",
        "model.init_args.learning_rate": "0.2",
        "seed": 3,
        "data_seed": 4,
        "validation.val/accuracy": 0.6,
        "validation.step": 2000.0,
        "wall_seconds": 12.5,
        "peak_memory_mib": 617.0,
        "folder": f"{tmp_path}/2",
        "predictions": True,
    }
    assert {key: second[key] for key in expected} == expected
    assert second["test/accuracy"] == pytest.approx(0.62)
    assert first["model.init_args.rationale_weight"] is None
