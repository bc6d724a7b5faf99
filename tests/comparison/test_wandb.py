"""Runs of wandb, from an object that answers as its public API does."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from lit_distill.comparison.comparing import compare_runs
from lit_distill.comparison.runs import find_runs
from lit_distill.comparison.table import runs_table
from lit_distill.errors import UserError
from lit_distill.files import flatten
from tests.comparison.runs import config_of, write_run


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What ``wandb.Api`` finds: ``runs``, or the exception ``error``; ``asked`` is the address."""
    found = SimpleNamespace(runs=[], error=None, asked="")

    class FakeApi:
        def runs(self, path: str) -> Iterable[Any]:
            found.asked = path
            if found.error:
                raise found.error
            return list(found.runs)

    monkeypatch.setattr(wandb, "Api", FakeApi)
    return found


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


def test_runs_online_have_metrics_only(project: SimpleNamespace) -> None:
    project.runs = [online("b", "StepByStep", 3), online("a")]
    first, second = find_runs(["wandb://me/lit_distill/"])[0]
    assert project.asked == "me/lit_distill"
    assert first.source == "wandb://me/lit_distill/a"
    record = second.record
    assert (record.dataset, record.method, record.student) == ("cqa", "StepByStep", "t5-v1_1-base")
    assert (record.label_source, record.train_fraction, record.seed, record.data_seed) == ("gold", 1.0, 3, 3)
    assert (record.rationales, first.record.rationales) == ("own", None)
    assert (record.metrics, record.wall_seconds, record.steps) == ({"test/accuracy": 0.63}, 61.5, 900)
    assert (second.correct, second.remark) == (None, "from W&B, which has metrics only")


def test_they_join_runs_in_folders(tmp_path: Path, project: SimpleNamespace) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"s{seed}", seed=seed)
    write_run(tmp_path / "o0", method="StepByStep")
    project.runs = [online("x", "StepByStep", 1)]
    comparison = compare_runs(*find_runs([tmp_path, "wandb://me/p"]), resamples=200)
    standard, ours = comparison.settings.to_dict("records")
    # one setting, though wandb does not know the student's size
    assert (standard["n"], ours["n"]) == (2, 2)
    assert (ours["difference"], ours["remark"], ours["seed_n"]) == (None, "without predictions", 2)
    assert comparison.remarks == {"cqa": ["It is unknown on which rows some runs were tested"]}


def test_lists_are_read_from_the_text_that_was_logged(tmp_path: Path, project: SimpleNamespace) -> None:
    stopping = [{"class_path": "EarlyStopping", "init_args": {"patience": 3}}]
    write_run(tmp_path / "s0", data={"callbacks": stopping})
    project.runs = [online("x", seed=1)]
    config = project.runs[0].config
    config |= {"data.init_args.callbacks": str(stopping), "trainer.odd": None}
    assert runs_table(find_runs([tmp_path, "wandb://me/p"])[0])[1] == []
    config["data.init_args.callbacks"] = "[not a list"
    assert runs_table(find_runs([tmp_path, "wandb://me/p"])[0])[1] == ["data.init_args.callbacks"]


def test_other_runs_are_listed(project: SimpleNamespace) -> None:
    project.runs = [
        online("running", state="running"),
        online("annotating", config={"dataset": "cqa", "teacher": "x"}),
        online("odd", config={"dataset": "cqa", "method": "Standard", "model.init_args.student": "s"}),
        online("good"),
    ]
    runs, skipped = find_runs(["wandb://me/p"])
    assert [run.source for run in runs] == ["wandb://me/p/good"]
    assert {source.rpartition("/")[2]: reason for source, reason in skipped.items()} == {
        "running": "is running",
        "annotating": "its config lacks 'method'",
        "odd": "its config lacks 'data.init_args.label_source'",
    }


@pytest.mark.parametrize("address", ["wandb://", "wandb://me", "wandb://me/p/x", "wandb://me//"])
def test_an_address_names_entity_and_project(address: str) -> None:
    with pytest.raises(UserError, match="allowed is wandb://entity/project"):
        find_runs([address])


@pytest.mark.parametrize("error", [wandb.errors.CommError("no such\nproject"), ValueError("no api key")])
def test_what_wandb_refuses_is_one_line(project: SimpleNamespace, error: Exception) -> None:
    project.error = error
    with pytest.raises(UserError, match=r"'wandb://me/p' cannot be read \(no (such project|api key)\)"):
        find_runs(["wandb://me/p"])
