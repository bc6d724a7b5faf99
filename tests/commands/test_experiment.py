"""``experiment``: ready grids, refusals before anything is written, real runs, and the sweep of the same cells."""

import itertools
import re
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps import utils as sweep_utils

from lit_distill.commands.dispatch import quieten, run_experiment
from lit_distill.commands.experiment import accepted_arguments, check_config, experiment, judge
from lit_distill.commands.parser import Parser
from lit_distill.commands.train import train_parser
from lit_distill.comparison.published import ROWS, TEST_ROWS
from lit_distill.errors import UserError
from lit_distill.experiments.cells import State
from lit_distill.experiments.grid import without_location
from lit_distill.experiments.launch import Board
from lit_distill.records import read_predictions_file, read_record, write_record
from tests.comparison.runs import write_run
from tests.experiments.fake_fit import make_record
from tests.runs import CONFIGS, REPOSITORY, at_work_in, run
from tests.runs import refusal as command_refusal

READY = sorted({*(CONFIGS / "experiments").rglob("*.yaml")} - {CONFIGS / "experiments" / "search.yaml"})
COUNTS = {
    "methods": 162,
    "learning_curve": 80,
    "model_size": 80,
    "ablation": 28,
    "reproduce": 12,
    "distiller": 18,
    "rationale_weight": 36,
    "smoke": 8,
}
DATASETS = {"cqa": "CQA", "svamp": "SVAMP", "esnli": "ESNLI", "anli1": "ANLI"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    quieten()
    with at_work_in(tmp_path, monkeypatch) as folder:
        (folder / "configs").symlink_to(CONFIGS)
        yield folder


@pytest.fixture
def teacher(here: Path, weights_folder: Path) -> None:
    """The teacher that the ready grids name."""
    Path("runs").mkdir()
    Path("runs/teacher").symlink_to(weights_folder)


@pytest.fixture(scope="module")
def parser() -> Parser:
    return train_parser("fit")


def small(student: Path, **content: Any) -> dict[str, Any]:
    """A grid of tiny runs on the toy."""
    base = {
        "model": {
            "class_path": "StepByStepModule",
            "init_args": {
                "student": str(student), "from_scratch": True, "max_label_length": 3, "max_rationale_length": 4,
                "rationale_weight": 0.5,
            },
        },
        "data": {
            "class_path": "ToyDataModule",
            "init_args": {"train_size": 12, "val_size": 4, "test_size": 5, "batch_size": 4},
        },
        "trainer": {
            "accelerator": "cpu", "max_steps": 2, "enable_progress_bar": False, "enable_model_summary": False,
        },
        "validation": {"every_n_steps": 1},
        "cpu_threads": 1,
    }  # fmt: skip
    Path("base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    return {"base": "base.yaml", "out": "cells", **content}


def write(content: dict[str, Any]) -> str:
    Path("grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return "grid.yaml"


def refusal(content: dict[str, Any], **arguments: Any) -> str:
    """The line with which a grid is refused, before anything is written."""
    path = write(content)
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError) as refused:
        experiment(path, **arguments)
    assert sorted(Path().rglob("*")) == before
    line = str(refused.value)
    assert "\n" not in line
    return line


# ---------------------------------------------------------------------- ready grids


def kind(path: Path) -> str:
    return path.parent.name if path.parent.name in COUNTS else path.stem


def test_there_is_a_grid_of_each_kind_for_each_dataset() -> None:
    wanted = {f"{name}/{dataset}.yaml" for name in COUNTS if name != "smoke" for dataset in DATASETS}
    wanted |= {"smoke.yaml", "methods/toy.yaml"}
    assert {path.relative_to(CONFIGS / "experiments").as_posix() for path in READY} == wanted


# the grids of a kind differ in their base alone, of which one cell of each is parsed; and these in all cells
WHOLE = {
    "methods/svamp", "learning_curve/esnli", "model_size/anli1", "ablation/cqa", "reproduce/anli1", "distiller/cqa",
    "rationale_weight/esnli", "experiments/smoke",
}  # fmt: skip
PARTS = [path for path in READY if f"{path.parent.name}/{path.stem}" not in WHOLE]


@pytest.mark.usefixtures("teacher")
@pytest.mark.parametrize(
    ("path", "whole"),
    [pytest.param(path, path not in PARTS) for path in READY]
    + [pytest.param(path, True, marks=pytest.mark.slow) for path in PARTS],
    ids=lambda value: f"{kind(value)}-{value.stem}" if isinstance(value, Path) else "",
)
def test_every_cell_of_a_ready_grid_is_what_fit_takes(
    path: Path, whole: bool, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []

    def check_one(parser: Parser, config: dict[str, Any]) -> None:
        if not checked:
            checked.append("")
            check_config(parser, config)

    if not whole:
        monkeypatch.setattr("lit_distill.commands.experiment.check_config", check_one)
    own = path.relative_to(REPOSITORY).as_posix()
    assert path.read_text().splitlines()[0] == f"# python -m lit_distill experiment --config {own}"
    summary = run_experiment(["--config", own, "--dry_run"])
    # programs are a method for arithmetic alone
    programs = 18 if path.parent.name == "methods" and path.stem == "svamp" else 0
    assert len(summary["cells"]) == summary["pending"] == COUNTS[kind(path)] + programs
    assert sorted(file.name for file in here.iterdir()) == ["configs", "runs"]
    assert [file.name for file in Path("runs").iterdir()] == ["teacher"]
    shown = capsys.readouterr().out
    assert all(name in shown for name in summary["cells"])
    out = yaml.safe_load(path.read_text())["out"]
    assert out == (f"runs/{kind(path)}/{path.stem}" if kind(path) != "smoke" else "runs/smoke")


def test_a_shipped_grid_and_its_base_are_found_from_any_folder(capsys: pytest.CaptureFixture[str]) -> None:
    Path("configs").unlink()
    run("experiment", "--config", "experiments/smoke", "--dry_run")
    assert "0 of 8 done, 8 pending" in capsys.readouterr().out


def test_cells_of_the_ready_grids_by_hand(parser: Parser, capsys: pytest.CaptureFixture[str]) -> None:
    experiment("configs/experiments/model_size/svamp.yaml", launcher="print", only="step_by_step-*-teacher-seed3")
    lines = capsys.readouterr().out.splitlines()
    names = [f"step_by_step-t5-v1_1-{size}-teacher-seed3" for size in ("small", "base", "large", "xl", "xxl")]
    assert lines == [f"python -m lit_distill fit --config runs/model_size/svamp/{name}/fit.yaml" for name in names]
    found = {}
    for name in names:
        config = yaml.safe_load(Path(f"runs/model_size/svamp/{name}/fit.yaml").read_text())
        model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
        assert (config["seed_everything"], data["seed"], data["label_source"]) == (3, 3, "teacher")
        devices = trainer.get("devices", 1)
        batch = data["batch_size"] * trainer.get("accumulate_grad_batches", 1) * devices
        found[model["student"]] = (batch, model["effective_batch_size"], trainer["max_steps"])
        assert check_config(parser, config)["model"]["class_path"] == "lit_distill.modules.StepByStepModule"
    google = "google/t5-v1_1-"
    assert found == {
        f"{google}small": (64, 64, 10_000), f"{google}base": (64, 64, 10_000), f"{google}large": (64, 64, 10_000),
        f"{google}xl": (64, 64, 10_000), f"{google}xxl": (32, 32, 4_000),
    }  # fmt: skip


@pytest.mark.usefixtures("teacher")
def test_the_search_of_distiller_varies_layers_and_divergence() -> None:
    experiment("configs/experiments/distiller/svamp.yaml", launcher="print")
    found = set()
    for path in Path("runs").rglob("fit.yaml"):
        states, divergence = yaml.safe_load(path.read_text())["model"]["init_args"]["objectives"]
        arguments = states["init_args"]
        found.add((states["class_path"], arguments["layers"], divergence["class_path"]))
        assert arguments["teacher"] == divergence["init_args"]["teacher"] == "teacher"
        assert ("alpha" in arguments) == (states["class_path"] == "MutualInformation")
    kinds = ["HiddenStates", "AttentionScores", "MutualInformation"]
    assert found == set(product(kinds, ["uniform", "last"], ["ForwardKL", "ReverseKL", "JensenShannon"]))


def test_the_ablation_has_its_control() -> None:
    experiment("configs/experiments/ablation/cqa.yaml", launcher="print", only="*-seed0")
    folders = sorted(path.parent.name for path in Path("runs").rglob("fit.yaml"))
    assert folders == [
        "single_task-order_label_first-seed0", "single_task-order_rationale_first-seed0", "standard-seed0",
        "step_by_step-own-weight0.5-seed0", "step_by_step-own-weight1-seed0", "step_by_step-own-weight2-seed0",
        "step_by_step-shuffled-weight1-seed0",
    ]  # fmt: skip

    def init_args(name: str, group: str) -> dict[str, Any]:
        content = yaml.safe_load(Path(f"runs/ablation/cqa/{name}/fit.yaml").read_text())
        arguments: dict[str, Any] = content[group]["init_args"]
        return arguments

    # what the base says for another method is not there
    assert "rationale_weight" not in init_args("standard-seed0", "model")
    assert init_args("single_task-order_label_first-seed0", "model")["order"] == "label_first"
    assert init_args("step_by_step-shuffled-weight1-seed0", "data")["rationale_pairing"] == "shuffled"


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_tolerance_is_two_standard_errors(dataset: str) -> None:
    content = yaml.safe_load((CONFIGS / "experiments" / "reproduce" / f"{dataset}.yaml").read_text())
    # of the rows of test, and of four seeds on either side
    spread = {"esnli": 0.3, "anli1": 1.0, "cqa": 1.0, "svamp": 2.0}[dataset]
    share = ROWS["step-by-step, PaLM 540B rationales"][dataset]
    wanted = 2 * (1e4 * share * (1 - share) / TEST_ROWS[dataset] + 2 * spread**2 / 4) ** 0.5
    assert content["tolerance"] == pytest.approx(wanted, abs=0.06)
    assert len(content["deviations"]) > 5


def test_a_verdict_is_on_what_the_comparison_finds(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, runs = TEST_ROWS["svamp"], here / "runs"
    # published are 62.63, 63.00 and 65.50 %
    for method, rights in (("Standard", (130, 132)), ("SingleTask", (126, 126)), ("StepByStep", (120, 121))):
        for seed, right in enumerate(rights):
            correct = [True] * right + [False] * (rows - right)
            write_run(
                runs / f"{method}{seed}", dataset="svamp", method=method, seed=seed, correct=correct, train_rows=720
            )
    assert judge(runs, 2.9) == {
        "standard finetuning": "within 2.9 points", "single task: rationale and label": "within 2.9 points",
        "step-by-step": "below",
    }  # fmt: skip
    shown = capsys.readouterr().out.splitlines()
    assert "standard finetuning: 65.50 ± 0.50 (2 seeds), published 62.63: within 2.9 points" in shown
    assert judge(runs, 2.8)["standard finetuning"] == "above"


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"grid": {"method": ["standrd"]}}, "model: unknown class 'StandrdModule' (did you mean StandardModule?)"),
        ({"grid": {"dataset": ["CQADataModul"]}}, "data: unknown class 'CQADataModul' (did you mean CQADataModule?)"),
        ({"grid": {"model.odrer": [1]}}, "model.odrer: no such argument"),
        ({"grid": {"trainer.max_stps": [1]}}, "trainer.max_stps: no such argument (did you mean trainer.max_steps?)"),
        ({"grid": {"fit.seed": [1]}}, "fit.seed: no such argument"),
        ({"grid": {"label_source": ["silver"]}}, "data.label_source: got silver; allowed is one of 'gold', 'teacher'"),
        ({"grid": {"rationales": ["mine"]}}, "data.rationale_pairing: got mine; allowed is one of 'own', 'shuffled'"),
        ({"grid": {"train_fraction": ["half"]}}, "data.train_fraction: got half; allowed is float"),
        # what no type says, and fit would refuse when it has begun
        (
            {"grid": {"train_fraction": [0.5, 1.5]}},
            "train_fraction must be in (0, 1] or a whole number above 1, got 1.5",
        ),
        ({"grid": {"rationale_weight": [-1]}}, "rationale_weight must be at least 0, got -1.0"),
        ({"grid": {"model.learning_rate": [0]}}, "learning_rate must be above 0, got 0.0"),
        ({"grid": {"trainer.gradient_clip_val": [-1]}}, "trainer.gradient_clip_val must be at least 0, got -1"),
        ({"grid": {"seed": [0]}, "set": {"trainer.max_steps": -1}}, "trainer.max_steps: -1 needs trainer.max_epochs"),
        # given for a method that does not take it; of the base it would go by itself
        (
            {"grid": {"method": ["standard", "step_by_step"], "rationale_weight": [1]}},
            "model.rationale_weight: no such argument",
        ),
        ({"cells": [{"method": "standard", "model.order": "label_first"}]}, "model.order: no such argument"),
    ],
)
def test_what_fit_would_refuse_is_refused_at_once(student_folder: Path, content: dict[str, Any], line: str) -> None:
    said = refusal(small(student_folder, **content))
    assert said.startswith(line)
    assert re.search(r" \(in the cell \S+ of grid\.yaml\)$", said)


def test_other_refusals(student_folder: Path) -> None:
    content = small(student_folder, grid={"seed": [0]})
    assert refusal(content | {"base": "absent.yaml"}).startswith("base: no file 'absent.yaml'")
    Path("list.yaml").write_text("- a")
    assert refusal(content | {"base": ["list.yaml"]}) == "base: 'list.yaml' must hold keys with values"
    assert refusal(content, only="*-seed9").startswith("only: no cell's name matches '*-seed9'")
    assert refusal(content, jobs=0) == "jobs must be an integer >= 1, got 0"
    with pytest.raises(UserError, match=r"config: 'absent\.yaml' cannot be read"):
        run_experiment(["--config", "absent.yaml"])
    with pytest.raises(UserError, match=r"launcher: got cloud; allowed is one of 'local', 'slurm', 'print'"):
        run_experiment(["--config", "grid.yaml", "--launcher", "cloud"])
    with pytest.raises(UserError, match="gird: no such argument"):
        run_experiment(["--config", "grid.yaml", "--gird", "x"])


def test_groups_that_are_none(student_folder: Path) -> None:
    assert refusal(small(student_folder, grid={"trainer": [3]})).startswith("trainer: got 3; allowed is a mapping")
    content = small(student_folder, grid={"seed": [0]}, set={"checkpoint": "x"})
    assert refusal(content).startswith("checkpoint: Unable to load config 'x'")
    content = small(student_folder, grid={"seed": [0]}, set={"trainer": 1, "trainer.max_steps": 2})
    assert refusal(content).startswith("trainer.max_steps: lies within another key that is set")


def test_keys_of_a_condition_are_checked(student_folder: Path) -> None:
    when = [{"if": {"method": "StandardModule"}, "set": {"model.odrer": 1}}]
    content = small(student_folder, grid={"method": ["step_by_step", "standard"]}, when=when)
    assert refusal(content).startswith("model.odrer: no such argument")


def test_settings_of_one_cell_stay_its_own(student_folder: Path) -> None:
    content = small(
        student_folder, set={"model": {"init_args": {"learning_rate": 0.001}}}, grid={"train_fraction": [0.25, 0.5]},
        when=[{"if": {"train_fraction": 0.25}, "set": {"model.warmup_steps": 77}}],
    )  # fmt: skip
    experiment(write(content), launcher="print")
    found = [yaml.safe_load(path.read_text())["model"]["init_args"] for path in sorted(Path().glob("cells/*/fit.yaml"))]
    assert [(one["learning_rate"], one.get("warmup_steps")) for one in found] == [(0.001, 77), (0.001, None)]


def test_an_overlay_is_laid_over_the_base_of_its_cells(student_folder: Path) -> None:
    Path("mine.yaml").write_text("model: {init_args: {warmup_steps: 7, weight_decay: 0.1}}\n")
    cells = [{"method": "standard"}, {"method": "standard", "overlay": "mine.yaml"}]
    found = experiment(write(small(student_folder, cells=cells, set={"model.weight_decay": 0.2})), launcher="print")
    assert list(found["cells"]) == ["standard", "standard-mine.yaml"]
    settings = [
        yaml.safe_load(Path("cells", name, "fit.yaml").read_text())["model"]["init_args"] for name in found["cells"]
    ]
    assert [(one.get("warmup_steps"), one["weight_decay"]) for one in settings] == [(None, 0.2), (7, 0.2)]
    teacher = {"overlay": "method/kl", "teacher": "large"}
    experiment(write(small(student_folder, cells=[teacher | {"method": "standard"}])), launcher="print")
    made = yaml.safe_load(Path("cells/standard-kl-large/fit.yaml").read_text())["model"]["init_args"]
    assert made["teachers"] == {"teacher": {"model": "large"}}
    assert [one["class_path"] for one in made["objectives"]] == ["ForwardKL"]
    shipped = [{"overlay": "overlay/by_length"}]
    assert list(experiment(write(small(student_folder, cells=shipped)), dry_run=True)["cells"]) == ["overlay+by_length"]
    assert refusal(small(student_folder, cells=[{"overlay": "method/kll"}])).startswith("overlay: no file 'method/kll'")
    # an objective's own checks run before any cell, too
    for key, said in (
        ("alpha", ""),
        ("init_args.alpha", "objectives: mi_alpha: alpha must be at least 0 and at most 1"),
    ):
        distiller = [{"overlay": "method/distiller", f"model.objectives.0.{key}": 1.5}]
        assert refusal(small(student_folder, cells=distiller)).startswith(said)


def test_a_teacher_that_is_not_there_is_refused(student_folder: Path, weights_folder: Path) -> None:
    def with_teachers(*names: str) -> dict[str, Any]:
        return small(student_folder, cells=[{"overlay": "method/kl", "teacher": name} for name in names])

    # hub names cannot be checked offline
    found = experiment(write(with_teachers("large", "org/large", str(weights_folder))), dry_run=True)
    assert found["pending"] == 3
    for absent, dry_run in (("runs/teacher", True), ("./teacher", False), ("a/b/teacher", True), ("last.ckpt", True)):
        said = refusal(with_teachers("large", absent), dry_run=dry_run)
        assert said.startswith(f"teachers: teacher: there is no {absent!r} yet; train, capture or copy it first (in ")
    Path("empty").mkdir()
    said = refusal(with_teachers("empty"), dry_run=True)
    assert said.startswith("teachers: teacher: the config.json of 'empty' is absent, empty or no object (in the cell")
    # a finished cell needs none
    Path("big").symlink_to(weights_folder)
    [name] = experiment(write(with_teachers("./big")), launcher="print")["cells"]
    write_record(Path("cells", name), make_record(0.5))
    Path("big").unlink()
    assert experiment("grid.yaml", dry_run=True)["done"] == 1


@pytest.mark.parametrize("damage", ["format", "half"])
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_record_that_cannot_be_read_is_not_run_over(damage: str, dry_run: bool, student_folder: Path) -> None:
    content = small(student_folder, grid={"seed": [0, 1]})
    folder = Path("cells/seed1")
    folder.mkdir(parents=True)
    write_record(folder, make_record(0.5))
    text = (folder / "run.json").read_text()
    text = text.replace('"format": 1', '"format": 2') if damage == "format" else text[:50]
    (folder / "run.json").write_text(text)
    line = refusal(content, dry_run=dry_run)
    assert line.startswith("cells/seed1/run.json: ")
    assert line.endswith("; move it away to run the cell again")
    # of cells that are not looked at, nothing is said
    assert experiment("grid.yaml", only="seed0", dry_run=True)["pending"] == 1


@pytest.mark.parametrize("out", ["file", "file/below", "nowhere/below", "a" * 300])
def test_an_out_that_can_be_none(out: str, student_folder: Path) -> None:
    content = small(student_folder, grid={"seed": [0]})
    Path("file").write_text("")
    Path("nowhere").symlink_to("absent")
    assert refusal(content, out=out).startswith(f"out: {out!r} cannot be used as a folder")


def test_a_refusal_on_the_command_line_is_one_line(student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(small(student_folder, grid={"train_fraction": [2.5]}))
    line = command_refusal(capsys, "experiment", "--config", path)
    assert line.startswith(
        "train_fraction must be in (0, 1] or a whole number above 1, got 2.5 (in the cell fraction2.5 of grid.yaml)"
    )


def test_help_is_the_functions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("experiment", "--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--config", "--out", "--launcher {local,slurm,print}", "--jobs", "--only", "--retry_failed"):
        assert option in shown


def test_many_cells_are_checked_in_no_time(parser: Parser) -> None:
    config = yaml.safe_load((CONFIGS / "cqa" / "step_by_step.yaml").read_text())
    check_config(parser, config)
    times = []
    for _ in range(5):
        # of the processor, as others may use it, too
        began = time.process_time()
        check_config(parser, config)
        times.append(time.process_time() - began)
    # about 40 ms
    assert min(times) < 0.4


def test_the_arguments_of_a_class() -> None:
    standard = accepted_arguments("StandardModule")
    assert standard is not None
    assert {"student", "label_prefix", "learning_rate"} <= set(standard)
    assert not {"rationale_weight", "kwargs", "self"} & set(standard)
    assert accepted_arguments("lit_distill.modules.StepByStepModule") == {
        *standard,
        "rationale_weight",
        "rationale_prefix",
    }
    assert {"round", "train_fraction"} <= set(accepted_arguments("ANLIDataModule") or ())
    assert accepted_arguments("no.such.Class") is None
    assert accepted_arguments("Nothing") is None


# ---------------------------------------------------------------------- runs


def test_cells_run_for_real(student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # several at a time run in `experiments/test_cells.py`
    grid = {"method": ["step_by_step"], "train_fraction": [0.5], "seed": [1]}
    content = small(student_folder, grid=grid)
    content |= {"tolerance": 0.5, "deviations": ["it is a toy"]}
    path = write(content)
    summary = run_experiment(["--config", path, "--jobs", "2"])
    names = ["step_by_step-fraction0.5-seed1"]
    assert summary["cells"] == dict.fromkeys(names, "done"), [
        (Path("cells") / name / "log.txt").read_text() for name in names
    ]
    # nothing was published of a toy
    assert summary["verdicts"] == {}
    shown = capsys.readouterr()
    assert all(f"{name} " in shown.out for name in names)
    assert "- it is a toy" in shown.out
    assert "1 of 1 done" in shown.err
    for name in names:
        folder = Path("cells") / name
        # all that a run leaves lies in the cell's own folder
        for file in (
            "fit.yaml",
            "config.yaml",
            "metrics.csv",
            "log.txt",
            "checkpoints/last.ckpt",
            "student/config.json",
        ):
            assert (folder / file).exists(), file
        record = read_record(folder)
        assert (record.method, record.train_fraction, record.seed, record.data_seed) == ("StepByStep", 0.5, 1, 1)
        assert (record.steps, record.train_rows, record.test_rows) == (2, 6, 5)
        assert 0 <= record.metrics["test/accuracy"] <= 1
        assert len(read_predictions_file(folder)) == 5
    # nothing lies elsewhere
    assert not Path("runs").exists()
    times = [(Path("cells") / name / "run.json").stat().st_mtime_ns for name in names]
    assert run_experiment(["--config", path])["done"] == 1
    # a further seed is one more cell; those that are done keep their names and stay done
    content["grid"]["seed"] = [1, 0]
    content["grid"]["train_fraction"] = [1.0, 0.5]
    listed = experiment(write(content), dry_run=True)
    assert {name for name, state in listed["cells"].items() if state == "done"} == set(names)
    assert listed["pending"] == 3
    assert times == [(Path("cells") / name / "run.json").stat().st_mtime_ns for name in names]
    # an edited grid does not take them for its own
    for edit in ({"set": {"trainer.max_steps": 3}}, {"set": {"data.train_size": 10}}):
        line = refusal(content | edit)
        [value] = edit["set"].values()
        assert line.startswith(f"cells/{names[0]}: holds a run of another config (")
        assert f"{value!r} wanted" in line
    # nor where a key is no longer set
    base = yaml.safe_load(Path("base.yaml").read_text())
    del base["data"]["init_args"]["train_size"]
    Path("base.yaml").write_text(yaml.safe_dump(base))
    assert "data.init_args.train_size: 12 there, None wanted" in refusal(content)


def test_a_finished_run_without_a_config_is_not_taken(student_folder: Path) -> None:
    content = small(student_folder, grid={"seed": [0]})
    folder = Path("cells/seed0")
    folder.mkdir(parents=True)
    write_record(folder, make_record(0.5))
    assert "holds a run of another config" in refusal(content)


@pytest.mark.parametrize(
    ("states", "ended", "code"),
    [(["done", "done"], True, 0), (["done", "failed"], True, 1), (["done", "pending"], False, 130)],
)
def test_exit_codes(
    states: list[str], ended: bool, code: int, student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pretend(board: Board, *arguments: object) -> bool:
        for cell, state in zip(board, states, strict=True):
            board[cell] = State(state)
            if state == "done":
                write_record(cell.folder, make_record(0.5))
            if state == "failed":
                cell.fail("exit code 1")
        return ended

    monkeypatch.setattr("lit_distill.commands.experiment.run_cells", pretend)
    path = write(small(student_folder, grid={"seed": [0, 1]}))
    if code == 0:
        assert run_experiment(["--config", path])["done"] == 2
        return
    with pytest.raises(SystemExit) as stopped:
        run_experiment(["--config", path])
    assert stopped.value.code == code


def test_a_logger_of_ones_own_stands_beside(student_folder: Path) -> None:
    content = small(student_folder, grid={"seed": [0]})
    experiment(write(content | {"base": ["base.yaml", "configs/logger/wandb.yaml"]}), launcher="print", out="beside")
    loggers = yaml.safe_load(Path("beside/seed0/fit.yaml").read_text())["trainer"]["logger"]
    assert [one["class_path"].rpartition(".")[2] for one in loggers] == ["CSVLogger", "WandbLogger"]
    experiment(write(content | {"base": ["base.yaml", "configs/logger/csv.yaml"]}), launcher="print", out="instead")
    loggers = yaml.safe_load(Path("instead/seed0/fit.yaml").read_text())["trainer"]["logger"]
    assert [one["init_args"] for one in loggers] == [{"save_dir": "instead", "name": "seed0", "version": ""}]


# ---------------------------------------------------------------------- sweeps


def agents_commands(path: Path) -> list[list[str]]:
    """What an agent runs for each combination, put together by W&B's own code."""
    sweep = yaml.safe_load(path.read_text())
    assert sweep["method"] == "grid"
    names = list(sweep["parameters"])
    commands = []
    for values in itertools.product(*(sweep["parameters"][name]["values"] for name in names)):
        chosen = {name: {"value": value} for name, value in zip(names, values, strict=True)}
        known = sweep_utils.create_sweep_command_args({"args": chosen})
        known |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [sweep["program"]]}
        parts = [known[part[2:-1]] if part.startswith("${") else [part] for part in sweep["command"]]
        commands.append([text for part in parts for text in part])
    return commands


def test_a_sweep_is_the_same_cells(student_folder: Path, parser: Parser) -> None:
    content = small(
        student_folder, set={"trainer.max_steps": 3, "data.batching": "by_length", "trainer.callbacks": None},
        grid={"method": ["standard", "step_by_step"], "train_fraction": [0.5, 1.0], "seed": [0, 7]},
        when=[{"if": {"method": "step_by_step"}, "set": {"rationale_weight": 2.0}}],
    )  # fmt: skip
    experiment(write(content), launcher="print")
    commands = agents_commands(Path("cells/sweep.yaml"))
    assert all(command[:5] == ["/usr/bin/env", "python", "-m", "lit_distill", "fit"] for command in commands)
    swept = [parser.parse_args(command[5:]) for command in commands]
    cells = [
        check_config(parser, yaml.safe_load(path.read_text())) for path in sorted(Path("cells").glob("*/fit.yaml"))
    ]
    assert len(cells) == 8

    def told(config: Any) -> str:
        plain = without_location(config.as_dict())
        # what settles itself when fit begins
        return repr(sorted((key, repr(value)) for key, value in plain.items() if key not in ("weights_only", "config")))

    assert sorted(map(told, swept)) == sorted(map(told, cells))
    for config in swept:
        own, last = config["trainer"]["logger"]
        assert own["class_path"].endswith("CSVLogger")
        assert last["class_path"].endswith("WandbLogger")
        assert last["init_args"]["project"] == "lit_distill"
        # the run lies in its cell's folder
        assert Path(config["checkpoint"]["dirpath"]).parts[0] == "cells"
    comment = Path("cells/sweep.yaml").read_text().splitlines()[0]
    assert comment.startswith("# wandb sweep cells/sweep.yaml; then")
