"""Every config under ``configs/`` through the real command line, because it is there."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml

from lit_distill.files import flatten
from tests.runs import (
    CONFIGS,
    QUIET,
    REPOSITORY,
    at_work_in,
    metric_rows,
    refusal,
    run,
    run_folders,
    write_lines,
    write_release,
)
from tests.students import make_student_folder
from tests.teachers.models import make_talker

FILES = sorted(CONFIGS.rglob("*.yaml"))
DATASETS = {"cqa": "CQA", "svamp": "SVAMP", "esnli": "ESNLI", "anli1": "ANLI"}
METHODS = {"standard": "Standard", "step_by_step": "StepByStep", "single_task": "SingleTask"}
PAPER = [CONFIGS / dataset / f"{method}.yaml" for dataset in DATASETS for method in METHODS]
LAUNCH = "# python -m lit_distill {} --config "


def content(path: Path) -> dict[str, Any]:
    # a list that is appended to is what it is where there was none
    loaded: dict[str, Any] = yaml.safe_load(path.read_text().replace("+:", ":"))
    return loaded


# whose students are trained, ranked and compared in `commands/test_search.py`
SEARCH = CONFIGS / "experiments" / "search.yaml"
WHOLE = [
    path
    for path in FILES
    if {"model", "data"} <= content(path).keys() and "class_path" in content(path)["model"] and path != SEARCH
]
# of the paper's configs each dataset and each method; in all, the settings are those of the paper
TRAINED = [path for path in WHOLE if path not in PAPER] + [PAPER[number] for number in (0, 4, 8, 10)]
# texts without labels
CORPUS = [path for path in WHOLE if content(path)["data"]["class_path"] == "CorpusDataModule"]
ANNOTATE = [path for path in FILES if "teacher" in content(path)]
# what is in a grid, and whether each of its cells is a config of `fit`, is for `commands/test_experiment.py`
EXPERIMENTS = [path for path in FILES if path.is_relative_to(CONFIGS / "experiments")]
# those of configs/method, which need teachers, are fitted in `objectives/test_overlays.py`
METHOD = [path for path in FILES if path.is_relative_to(CONFIGS / "method")]
OVERLAYS = [path for path in FILES if path not in [*WHOLE, *ANNOTATE, *EXPERIMENTS, *METHOD]]
# what a machine without accelerators lacks: the overlay, why it can be had after all, what the refusal names
LACKING = {
    "strategy/fsdp.yaml": (torch.cuda.is_available, "gpu"),
    "strategy/deepspeed.yaml": (torch.cuda.is_available, "gpu"),
    "strategy/tpu.yaml": (lambda: "TPU_NAME" in os.environ, "torch_xla"),
}


def relative(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with at_work_in(tmp_path, monkeypatch) as folder:
        # as from the repository, where configs name their students by relative paths
        (folder / "configs").symlink_to(CONFIGS)
        yield folder
    # what outlives a command in this process: wandb's own that it writes with, and the group of a strategy's processes
    wandb.teardown()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_release(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talker(tmp_path_factory.mktemp("teachers") / "talker", "I do not know", chat=True)


def shrink(config: Path, student: Path, release: Path) -> list[str]:
    """What makes a whole config tiny, its method and dataset left as they are."""
    arguments = [
        f"--model.student={student}", "--model.from_scratch=true", "--model.max_label_length=3",
        "--model.max_rationale_length=4", f"--data.data_dir={release}", "--data.batch_size=4",
        "--data.eval_batch_size=8", "--data.max_source_length=16", "--data.max_target_length=8",
        "--trainer.accelerator=cpu", "--trainer.max_steps=2", "--validation.every_n_steps=1",
        "--trainer.log_every_n_steps=1", *QUIET,
    ]  # fmt: skip
    if content(config)["data"]["class_path"] == "ToyDataModule":
        arguments += ["--data.train_size=12", "--data.val_size=4", "--data.test_size=5"]
    if "train_fraction" in content(config)["data"]["init_args"]:
        arguments += ["--data.train_fraction=1"]
    if config in CORPUS:
        arguments = [
            argument for argument in arguments if "source_length" not in argument and "target_" not in argument
        ]
        write_lines(release / "corpus" / "a.jsonl", [{"text": f"the cat is {i} ."} for i in range(300)])
        arguments += ["--data.max_length=16", "--data.shuffle_buffer=40"]
    return arguments


def test_there_is_a_config_for_each_dataset_and_method() -> None:
    assert PAPER
    assert set(PAPER) <= set(FILES)
    assert not set(WHOLE) & set(ANNOTATE)
    assert {path.relative_to(CONFIGS).as_posix() for path in ANNOTATE} == {
        f"{dataset}/annotate.yaml" for dataset in (*DATASETS, "tickets", "toy")
    }
    assert OVERLAYS
    assert len(EXPERIMENTS) == 31
    assert {relative(path) for path in OVERLAYS} >= {
        "strategy/ddp.yaml", "strategy/fsdp.yaml", "strategy/deepspeed.yaml", "strategy/tpu.yaml",
        "logger/wandb.yaml", "logger/tensorboard.yaml", "logger/csv.yaml",
    }  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_config_opens_with_its_launch_command(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    own = path.relative_to(REPOSITORY).as_posix()
    command = "annotate" if path in ANNOTATE else "experiment" if path in EXPERIMENTS else "fit"
    command = "search" if path == SEARCH else command
    command = "rounds" if path.stem in ("self_training", "complementary") else command
    launch = LAUNCH.format(command)
    assert first.startswith(launch)
    named = first.removeprefix(launch).split(" --config ")
    if path not in [*OVERLAYS, *METHOD]:
        assert named == [own]
    else:
        # an overlay is shown on top of a config that is there, with the arguments that it needs
        assert named[-1].split(" --")[0] == own
        assert len(named) > 1
        assert all((REPOSITORY / name) in WHOLE for name in named[:-1])


@pytest.mark.parametrize("path", PAPER, ids=relative)
def test_the_papers_settings_are_what_is_parsed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("fit", "--config", path, "--print_config")
    assert stopped.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    model, data, trainer = parsed["model"]["init_args"], parsed["data"]["init_args"], parsed["trainer"]
    assert parsed["model"]["class_path"].endswith(f".{METHODS[path.stem]}Module")
    assert parsed["data"]["class_path"].endswith(f".{DATASETS[path.parent.name]}DataModule")
    # of the paper: batch 64, learning rate 5e-5, 10,000 steps, inputs of 1,024 tokens; validation every 250 steps
    assert model["student"] == "google/t5-v1_1-base"
    assert (model["learning_rate"], model["optimizer"], model["lr_schedule"]) == (5e-5, "adamw", "linear")
    assert (model["warmup_steps"], model["weight_decay"]) == (0, 0.0)
    assert model["effective_batch_size"] == data["batch_size"] * trainer["accumulate_grad_batches"] == 64
    assert (data["max_source_length"], data["max_target_length"]) == (1024, 256)
    assert (data["label_source"], data["train_fraction"]) == ("gold", 1.0)
    assert (trainer["max_steps"], trainer["max_epochs"], trainer["gradient_clip_val"]) == (10_000, -1, 1.0)
    assert parsed["validation"]["every_n_steps"] == 250
    if path.stem == "step_by_step":
        assert (model["rationale_weight"], model["label_prefix"]) == (1.0, "predict: ")
        assert model["rationale_prefix"] == "explain: "
    if path.stem == "single_task":
        assert model["order"] == "rationale_first"


@pytest.mark.parametrize("path", ANNOTATE, ids=relative)
def test_a_teacher_is_asked_once_a_row(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("annotate", "--config", path, "--print_config")
    assert stopped.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    assert_holds(parsed, content(path))
    folder = path.parent.name
    name = {**DATASETS, "tickets": "JSONL", "toy": "Toy"}[folder]
    assert parsed["data"]["class_path"] == f"lit_distill.data.{name}DataModule"
    assert (parsed["out"], parsed["split"]) == (f"annotations/{folder}", "train")
    # one sample, greedy as long as nobody asks for several
    assert (parsed["num_samples"], parsed["temperature"], parsed["until_agrees"]) == (1, None, None)
    assert "api_key" not in parsed["teacher"]["init_args"]


@pytest.mark.parametrize("path", ANNOTATE, ids=relative)
def test_what_would_be_asked_is_shown(
    path: Path, release: Path, talker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--data.data_dir={release}"]
    if content(path)["teacher"]["class_path"] == "TransformersTeacher":
        arguments += [f"--teacher.model={talker}"]
    if content(path)["data"]["class_path"] == "ToyDataModule":
        arguments += ["--data.train_size=12"]
    run("annotate", "--config", path, arguments, "--dry_run")
    shown = capsys.readouterr().out
    # the twelve rows of the release, or those of the example, each once
    count = 220 if path.parent.name == "tickets" else 12
    assert re.search(rf"rows +│ +{count} │", shown)
    assert re.search(rf"questions at most +│ +{count} │", shown)
    # an answer in the dataset's own form stands in a demonstration, or is asked for
    assert {"svamp": "The answer is (", "esnli": "Answer: ", "tickets": "this very form"}.get(
        path.parent.name, "So the answer is "
    ) in shown
    assert not Path("annotations").exists()


# the batch is shrunk on purpose, and with it the effective batch
@pytest.mark.filterwarnings("ignore:The effective batch is:UserWarning")
@pytest.mark.parametrize("path", TRAINED, ids=relative)
def test_a_whole_config_trains_tests_and_saves(path: Path, student_folder: Path, release: Path) -> None:
    if path in CORPUS:
        student_folder = make_student_folder(Path("reader"), sentinels=5)
    run("fit", "--config", path, shrink(path, student_folder, release))
    [folder] = run_folders()
    kept = content(folder / "config.yaml")
    assert kept["model"]["class_path"].endswith(content(path)["model"]["class_path"])
    assert kept["data"]["class_path"].endswith(content(path)["data"]["class_path"])
    assert kept["trainer"]["max_steps"] == 2
    rows = metric_rows(folder)
    chosen_by = "val/loss" if path in CORPUS else "val/accuracy"
    assert [row["step"] for row in rows if chosen_by in row] == ["0", "1"]
    assert sum("test/accuracy" in row for row in rows) == (path not in CORPUS)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {file.name for file in folder.glob("student/*")}


# as above; a strategy for several processes is run with one
@pytest.mark.filterwarnings("ignore:The effective batch is:UserWarning")
@pytest.mark.parametrize("path", OVERLAYS, ids=relative)
def test_an_overlay_composes_onto_a_dataset(
    path: Path, student_folder: Path, release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = CONFIGS / "cqa" / "step_by_step.yaml"
    configs = ["--config", base, "--config", path]
    # what the overlay sets is left to it
    own = {f"--{key.replace('.init_args', '')}" for key in flatten(content(path))}
    small = [one for one in shrink(base, student_folder, release) if one.partition("=")[0] not in own]
    with pytest.raises(SystemExit) as stopped:
        run("fit", configs, small, "--print_config")
    assert stopped.value.code == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    assert parsed["model"]["class_path"] == "lit_distill.modules.StepByStepModule"
    assert_holds(parsed, content(path))
    if relative(path) in LACKING:
        there, named = LACKING[relative(path)]
        if there():
            pytest.skip("this machine has what the overlay needs")
        line = refusal(capsys, "fit", configs, small)
        assert line.startswith(("trainer: ", "rationales: "))
        assert named in line.lower()
        return
    run("fit", configs, small)
    assert list(Path("runs").rglob("student/model.safetensors"))


def assert_holds(parsed: Any, wanted: Any) -> None:
    """All that an overlay says is in what was parsed (class names there are import paths)."""
    if isinstance(wanted, dict):
        for key, value in wanted.items():
            assert_holds(parsed[key], value)
    elif isinstance(wanted, list):
        for got, value in zip(parsed, wanted, strict=True):
            assert_holds(got, value)
    else:
        assert parsed == wanted or str(parsed).endswith(f".{wanted}")
