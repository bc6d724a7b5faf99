"""Runs of wandb, from an object that answers as its public API does."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from lit_distill.comparison.comparing import compare_runs
from lit_distill.comparison.runs import Found, find_runs
from lit_distill.comparison.settings import differing_keys
from lit_distill.comparison.wandb_runs import find_wandb_runs
from lit_distill.errors import UserError
from lit_distill.files import flatten
from tests.comparison.runs import config_of, write_run


class FakeApi:
    """What ``wandb.Api`` has of runs."""

    def __init__(self, *runs: SimpleNamespace, error: Exception | None = None) -> None:
        self.found, self.error, self.asked = runs, error, ""

    def runs(self, path: str) -> Iterable[Any]:
        self.asked = path
        if self.error:
            raise self.error
        return iter(self.found)


def online(name: str, method: str = "Standard", seed: int = 0, **more: Any) -> SimpleNamespace:
    data = {"seed": seed, "label_source": "gold", "train_fraction": 1.0, "rationale_pairing": "own"}
    config = flatten(config_of("cqa", method, "t5-v1_1-base", {}, data, Path("runs")))
    fields: dict[str, Any] = {
        "id": name,
        "state": "finished",
        # as `fit` logs it: flat, with the two that runs are compared by
        "config": config | {"dataset": "cqa", "method": method},
        "summary": {"test/accuracy": 0.63, "_runtime": 61.5, "trainer/global_step": 900, "_wandb": {"runtime": 61}},
    }
    return SimpleNamespace(**(fields | more))


def test_rows_have_metrics_only() -> None:
    api = FakeApi(online("b", "StepByStep", 3), online("a"))
    found = find_wandb_runs("wandb://me/lit_distill/", api)
    assert api.asked == "me/lit_distill"
    first, second = found.runs
    assert first.source == "wandb://me/lit_distill/a"
    record = second.record
    assert (record.dataset, record.method, record.student) == ("cqa", "StepByStep", "t5-v1_1-base")
    assert (record.label_source, record.train_fraction, record.seed, record.data_seed) == ("gold", 1.0, 3, 3)
    assert (record.rationales, first.record.rationales) == ("own", None)
    assert (record.metrics, record.wall_seconds, record.steps) == ({"test/accuracy": 0.63}, 61.5, 900)
    assert second.predictions is None
    assert second.remark == "of wandb, which has metrics only"


def test_they_join_runs_in_folders(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"s{seed}", seed=seed)
    write_run(tmp_path / "o0", method="StepByStep")
    there = find_wandb_runs("wandb://me/p", FakeApi(online("x", "StepByStep", 1)))
    here = find_runs([tmp_path])
    comparison = compare_runs(Found(here.runs + there.runs, ()), resamples=200)
    standard, ours = comparison.sections[0].rows
    # one setting, though wandb does not know the student's size
    assert (standard.summary.n, ours.summary.n) == (2, 2)
    assert (ours.examples, ours.remark) == (None, "without predictions")
    assert ours.seeds is not None
    assert ours.seeds.n == 2
    assert "which rows some runs were tested on is not known" in comparison.sections[0].remarks[0]


def test_lists_are_read_from_the_text_that_was_logged(tmp_path: Path) -> None:
    stopping = [{"class_path": "EarlyStopping", "init_args": {"patience": 3}}]
    write_run(tmp_path / "s0", data={"callbacks": stopping})
    run = online("x", seed=1)
    run.config["data.init_args.callbacks"] = str(stopping)
    run.config["trainer.odd"] = None
    here, there = find_runs([tmp_path]), find_wandb_runs("wandb://me/p", FakeApi(run))
    assert differing_keys([*here.runs, *there.runs]) == []
    run.config["data.init_args.callbacks"] = "[not a list"
    assert differing_keys(find_wandb_runs("wandb://me/p", FakeApi(run)).runs + here.runs) == [
        "data.init_args.callbacks"
    ]


def test_other_runs_are_listed() -> None:
    runs = [
        online("running", state="running"),
        online("annotating", config={"dataset": "cqa", "teacher": "x"}),
        online("odd", config={"dataset": "cqa", "method": "Standard", "model.init_args.student": "s"}),
        online("good"),
    ]
    found = find_wandb_runs("wandb://me/p", FakeApi(*runs))
    assert [run.source for run in found.runs] == ["wandb://me/p/good"]
    assert {one.source.rpartition("/")[2]: one.reason for one in found.skipped} == {
        "running": "is running",
        "annotating": "its config lacks 'method'",
        "odd": "its config lacks 'data.init_args.label_source'",
    }


@pytest.mark.parametrize("address", ["wandb://", "wandb://me", "wandb://me/p/x", "wandb://me//"])
def test_an_address_names_entity_and_project(address: str) -> None:
    with pytest.raises(UserError, match="allowed is wandb://entity/project"):
        find_wandb_runs(address, FakeApi())


@pytest.mark.parametrize("error", [wandb.errors.CommError("no such\nproject"), ValueError("no api key")])
def test_what_wandb_refuses_is_one_line(error: Exception) -> None:
    with pytest.raises(UserError, match=r"'wandb://me/p' cannot be read \(no (such project|api key)\)"):
        find_wandb_runs("wandb://me/p", FakeApi(error=error))
