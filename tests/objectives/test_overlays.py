"""Every overlay under ``configs/method`` on a tiny student, because it is there."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_distill import objectives
from tests.runs import (
    CONFIGS,
    metric_rows,
    refusal,
    run,
    run_folders,
    small_model,
    small_trainer,
    toy_data,
    write_lines,
    write_release,
)
from tests.students import add_weights, make_causal_folder, make_causal_tokenizer, make_student_folder
from tests.test_configs import assert_holds, content, shrink

METHODS = CONFIGS / "method"
OVERLAYS = sorted(METHODS.rglob("*.yaml"))
DATASETS = sorted(CONFIGS.glob("*/step_by_step.yaml"))
FAMILIES = "t5", "llama"

_SEVERAL = "--model.teachers.several.model=[{teacher}, {teacher}]"
# the second of two steps is of the last stage
_SEQUENCE = ["--model.teachers.sequence.model=[{teacher}, {teacher}]", "--model.teachers.sequence.at=[1]"]

# of several teachers and kinds
_OUTPUTS = ["--data.rationales=[released, {outputs}]"]

MORE: dict[str, list[str]] = {
    **dict.fromkeys(("answer_consistency", "correct", "counterfactual", "mixed", "several_rationales"), _OUTPUTS),
    **dict.fromkeys(("self_evaluation", "several_teachers", "styles"), _OUTPUTS),
    "baby_llama": [_SEVERAL],
    "backtrack": _SEQUENCE,
    "distill_nearest": [_SEVERAL],
    "distill_weighted": [_SEVERAL],
    # samples in every micro-batch
    "distillm": ["--model.objectives.share=1.0"],
    "gkd": ["--model.objectives.share=1.0"],
    "progressive": [*_SEQUENCE, "--model.teachers.sequence.by=step"],
}
"""Arguments that an overlay needs on such small models: the folder of its teacher, the file of further outputs."""

# the batch is shrunk on purpose, and with it the effective batch
pytestmark = pytest.mark.filterwarnings("ignore:The effective batch is:UserWarning")


def name_of(path: Path) -> str:
    return path.relative_to(METHODS).with_suffix("").as_posix()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A student and a wider and deeper teacher of each family."""
    folder = tmp_path_factory.mktemp("models")
    t5 = [make_student_folder(folder / "t5", dropout_rate=0.1), make_student_folder(folder / "t5-teacher", d_model=24)]
    llama = [
        make_causal_folder(folder / "llama"),
        make_causal_folder(folder / "llama-teacher", hidden_size=24, num_hidden_layers=3),
    ]
    for path in t5:
        add_weights(path)
    for path in llama:
        add_weights(path, make_causal_tokenizer())
    return {"t5": (t5[0], t5[1]), "llama": (llama[0], llama[1])}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_release(tmp_path_factory.mktemp("release"))
    write_outputs(folder, 12)
    return folder


def write_outputs(folder: Path, rows: int) -> Path:
    """Outputs of CommonsenseQA's rows by another teacher, and of all kinds that overlays name."""
    kinds = [
        "program",
        "counterfactual",
        "self_evaluation",
        *content(METHODS / "styles.yaml")["model"]["init_args"]["tasks"],
    ]
    made = [("rationale", "TEACHER"), *((kind, "released") for kind in kinds)]
    outputs = [
        {
            "id": f"{split}{i}",
            "split": split,
            "teacher": teacher,
            "kind": kind,
            "rationale": f"{i} is",
            "label": "dog",
            "given_rationale": f"{i}",
            "given_label": "dog",
        }
        for split in ("train", "test")
        for i in range(rows)
        for kind, teacher in made
    ]
    return write_lines(folder / "outputs.jsonl", outputs)


def arguments(path: Path, teacher: Path, outputs: Path) -> list[str]:
    """The overlay with the tiny teacher in the place of each that it names."""
    named = content(path)["model"]["init_args"].get("teachers", {})
    models = [f"--model.teachers.{name}.model={teacher}" for name in named]
    more = [one.format(teacher=teacher, outputs=outputs) for one in MORE.get(name_of(path), [])]
    return [f"--config={path}", *models, *more]


def test_there_are_overlays_and_datasets() -> None:
    assert len(DATASETS) >= 5
    assert {name_of(path) for path in OVERLAYS} >= {"kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"}
    assert set(MORE) <= {name_of(path) for path in OVERLAYS}


@pytest.mark.parametrize("path", OVERLAYS, ids=name_of)
def test_an_overlay_trains(path: Path, models: dict[str, tuple[Path, Path]], release: Path, here: Path) -> None:
    # `check` trains the steps of the other family
    base, (student, teacher) = CONFIGS / "cqa" / "step_by_step.yaml", models["t5"]
    small = [argument for argument in shrink(base, student, release) if "from_scratch" not in argument]
    quick = ["--test_after_fit=false", "--validation.every_n_steps=2"]
    command = ["fit", f"--config={base}", *arguments(path, teacher, release / "outputs.jsonl"), *small, *quick]
    run(*command)
    [folder] = run_folders()
    rows = [row for row in metric_rows(folder) if "train/loss" in row]
    assert len(rows) == 2
    logged = {name for row in rows for name in row}
    assert all(term_name(objective) in logged for objective in configured(folder))
    assert all(f"train/{task}_loss" in logged for task in content(path)["model"]["init_args"].get("tasks", {}))


def configured(folder: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]["objectives"] or [])


def term_name(objective: dict[str, Any]) -> str:
    kind: type[objectives.Objective] = getattr(objectives, objective["class_path"].rpartition(".")[2])
    return f"train/{objective['init_args'].get('name') or kind.term or kind.__name__.lower()}_loss"


# each with one of them in turn; CommonsenseQA's and SVAMP's grids of methods have all
@pytest.mark.parametrize("path", OVERLAYS, ids=name_of)
def test_an_overlay_composes_with_a_dataset(path: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = DATASETS[OVERLAYS.index(path) % len(DATASETS)]
    with pytest.raises(SystemExit) as stopped:
        run("fit", f"--config={base}", f"--config={path}", "--print_config")
    assert stopped.value.code == 0
    assert_holds(yaml.safe_load(capsys.readouterr().out), content(path))


def test_overlays_add_up(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["quickstart", "method/kl", "method/hidden"]
    with pytest.raises(SystemExit):
        run("fit", *(f"--config={name}" for name in names), "--print_config")
    found = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["objectives"]
    assert [one["class_path"].rpartition(".")[2] for one in found] == ["ForwardKL", "HiddenStates", "HiddenStates"]


def test_an_objective_and_a_run_as_its_teacher_on_the_command_line(
    models: dict[str, tuple[Path, Path]], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, teacher = models["t5"]
    small = [*small_model(student), *toy_data(), *small_trainer(1), "--test_after_fit=false"]
    run("fit", small_model(teacher), toy_data(), small_trainer(1), "--test_after_fit=false")
    [taught] = run_folders()
    for number, by in enumerate((taught, taught / "student", taught / "checkpoints" / "last.ckpt"), start=1):
        run("fit", small, "--model.objectives+=ForwardKL", f"--model.objectives.teacher={by}")
        assert "train/kl_loss" in metric_rows(run_folders()[number])[0]
    line = refusal(capsys, "fit", *small, "--model.objectives+=ForwardKL", "--model.objectives.teacher=runs/none")
    assert line == "objectives: kl: unknown teacher 'runs/none'; there is none (model.teachers names them)"
