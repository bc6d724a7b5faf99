"""The command: what it takes, what it prints, what it refuses."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
import yaml

from lit_distill.commands.compare import compare
from lit_distill.commands.dispatch import RUN
from lit_distill.errors import UserError
from tests.comparison.runs import write_run, write_runs
from tests.runs import refusal

pytestmark = pytest.mark.usefixtures("here")

run_compare: Callable[[list[str]], Any] = RUN["compare"]


@pytest.fixture
def runs(here: Path) -> Path:
    for method, accuracy in (("Standard", 0.6), ("StepByStep", 0.7)):
        write_runs(here / "runs", [0, 1], accuracy, method=method)
    return here / "runs"


def test_runs_are_compared_from_the_command_line(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "begun").mkdir()
    (runs / "begun" / "config.yaml").touch()
    found = run_compare(["runs", "--out", "out", "--resamples=300"])
    assert len(found.compared) == 4
    assert found.skipped == {"runs/begun": "no run.json: the run has not ended"}
    standard, ours = (row for _, row in found.settings.iterrows())
    assert (standard["name"], standard.n, standard.difference) == ("standard finetuning", 2, None)
    assert ours.difference == pytest.approx(ours["mean"] - standard["mean"])
    assert ours.low < ours.difference < ours.high
    assert ours.p_value == pytest.approx(2 / 301)
    assert {path.name for path in Path("out").iterdir()} == {
        "report.md",
        "report.html",
        "runs.csv",
        "runs.parquet",
        "figures",
    }
    printed = capsys.readouterr().out
    for part in (
        "CQA, gold labels: test accuracy",
        "step-by-step",
        "baseline",
        "skipped runs/begun",
        "out/report.html",
    ):
        assert part in printed


def test_it_is_a_command_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "compare", "nowhere") == "runs: no folder 'nowhere'"


def test_several_folders_and_keys_from_a_file(runs: Path) -> None:
    write_runs(Path("more"), [0], 0.65, method="SingleTask")
    content = {"runs": ["runs", "more"], "out": "here", "metric": "test/loss", "baseline": "method=SingleTask"}
    Path("compare.yaml").write_text(yaml.safe_dump(content))
    found = run_compare(["--config", "compare.yaml"])
    assert len(found.compared) == 5
    assert list(found.settings.seed_difference) == [0, None, 0]
    assert Path("here/report.html").is_file()
    # what is given beside the file goes before it
    found = run_compare(["--config=compare.yaml", "runs", "--out=there", "--baseline=method=Standard"])
    assert len(found.compared) == 4
    assert Path("there/report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "runs: must be given: folders of runs, or wandb://entity/project"),
        (["nowhere"], "runs: no folder 'nowhere'"),
        (["empty"], "runs: found no finished run (0 skipped)"),
        (["runs", "--metric=test/f1"], "metric: no run has 'test/f1'; allowed are test/accuracy, test/loss"),
        (["runs", "--resamples=10"], "resamples must be an integer in [100, 100000], got 10"),
        (["runs", "--resamples=1000000000000"], "resamples must be an integer in [100, 100000], got 1000000000000"),
        (["runs", "--seed=-1"], "seed must be an integer in [0, 4294967295], got -1"),
        (["runs", "--baseline=x"], "baseline: 'x' is not of the form key=value"),
        (["runs", "--out=file"], "out: 'file' cannot be written (Not a directory)"),
        (["runs", "--out="], "out must be a text, got ''"),
        (["runs", "--outt=x"], "outt: no such argument (did you mean out?)"),
        (["runs", "wandb://me"], "runs: 'wandb://me' is not an address; allowed is wandb://entity/project"),
    ],
)
def test_what_is_wrong_is_one_line(runs: Path, arguments: list[str], message: str) -> None:
    Path("empty").mkdir()
    Path("file").write_text("")
    with pytest.raises(UserError) as refused:
        run_compare(arguments)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


def test_from_python_runs_are_a_list(runs: Path) -> None:
    with pytest.raises(UserError, match=r"^runs: must be given"):
        compare("runs")  # type: ignore[arg-type]


def test_different_tests_are_allowed_on_demand(runs: Path) -> None:
    write_run(runs / "other", seed=7, fingerprints={"test": "other"})
    with pytest.raises(UserError, match="tested on different rows"):
        run_compare(["runs"])
    found = run_compare(["runs", "--allow_different_tests", "true", "--resamples=200"])
    assert len(found.settings) == 3


def test_projects_of_wandb_join_in(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"dataset": "cqa", "method": "Standard", "seed_everything": 5, "model.init_args.student": "t5-v1_1-base"}
    config |= {"data.init_args.seed": 5, "data.init_args.label_source": "gold", "data.init_args.train_fraction": 1.0}
    online = SimpleNamespace(id="x", state="finished", config=config, summary={"test/accuracy": 0.5})
    asked = []

    class Api:
        def runs(self, path: str) -> list[SimpleNamespace]:
            asked.append(path)
            return [online]

    monkeypatch.setattr(wandb, "Api", Api)
    found = run_compare(["wandb://me/p", "runs", "--resamples=200"])
    assert asked == ["me/p"]
    assert len(found.compared) == 5
    assert "wandb://me/p/x: from W\\&B, which has metrics only" in Path("report/report.md").read_text(encoding="utf-8")


def test_the_table_fits_a_terminal(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_runs(runs, [0], 0.65, method="StepByStep", rationales="shuffled", student="t5-v1_1-large")
    monkeypatch.setenv("COLUMNS", "80")
    run_compare(["runs", "--resamples=200"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("│", "┃"))]
    assert lines
    assert all(len(line) <= 80 for line in lines)
    assert any("±" in line for line in lines)
    assert any("step-by-step" in line for line in lines)
    # nothing is left out, and numbers are whole
    for name in ("setting", "difference", "95 % interval", "p ", "by seed ± se (n)"):
        assert any(name in line for line in lines if line.startswith("┃")), name
    assert any(line.count("[") == 1 and line.count("]") == 1 for line in lines)
