"""What ``plan`` tells of a tiny student, and what ``fit`` says when memory runs out."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_distill import objectives, students
from lit_distill.commands.memory import ran_out
from lit_distill.commands.plan import make_planner
from lit_distill.commands.train import train_parser
from lit_distill.modules.training import Training
from lit_distill.planning import machine
from lit_distill.planning.machine import Machine
from lit_distill.planning.plan import AS_IT_IS, Planner, Strategy, Variant
from lit_distill.teachers.models import TeacherModel, Teachers
from tests.runs import CONFIGS, QUIET, refusal, run, small_model, small_trainer, toy_data

NO_MEMORY = "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."


def arguments(student: Path) -> list[str]:
    return [*small_model(student), *toy_data(batch=8), *small_trainer(steps=10)]


def planned(*more: object) -> dict[str, Any]:
    run("plan", *more, "--json=plan.json")
    report: dict[str, Any] = json.loads(Path("plan.json").read_text())
    return report


def planner_of(own: list[str], of: Machine, devices: int = 1) -> Planner:
    parser = train_parser("plan")
    parser.add_argument("--devices", type=int, default=devices)
    return make_planner(parser, parser.parse_args(own), of)


def refusal_of_fit(capsys: pytest.CaptureFixture[str], own: list[str]) -> str:
    """The last line, after what a run says of its data."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run("fit", own)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_numbers(student_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = planned(arguments(student_folder), "--memory=2GiB", "--tflops=0.5")
    student = students.load(student_folder, from_scratch=True)
    # tied or not, each weight counts once
    count = sum(parameter.numel() for parameter in student.parameters())
    assert report["parameters"] == {"total": count, "trained": count}
    assert report["machine"] == {"kind": "cpu", "memory": 2 * 2**30}
    rows = {row["name"]: row for row in report["variants"]}
    plain = rows["as it is"]
    assert plain["memory"]["weights"] == 4 * count
    # two moments, and the number of steps of each tensor
    assert plain["memory"]["optimizer"] == 8 * count + 4 * len(list(student.parameters()))
    assert plain["total"] == sum(plain["memory"].values())
    # a step's operations at this throughput, ten of them
    assert plain["steps_per_second"] == pytest.approx(0.5e12 / plain["flops"])
    assert plain["hours"] == pytest.approx(10 * plain["flops"] / 0.5e12 / 3600)
    assert rows["1/4 batch x 4"]["batch_size"] == 2
    assert rows["1/4 batch x 4"]["accumulated"] == 4
    assert rows["checkpointing"]["memory"]["activations"] < plain["memory"]["activations"]
    assert rows["checkpointing"]["flops"] > plain["flops"]
    # of a student as small as this one the adapter is larger
    assert rows["LoRA"]["memory"]["weights"] > 8 * count
    # the adapter is in float32
    assert rows["LoRA, bfloat16"]["memory"]["optimizer"] == rows["LoRA"]["memory"]["optimizer"]
    assert rows["LoRA, bfloat16"]["memory"]["weights"] < rows["LoRA"]["memory"]["weights"]
    # more rows than there are need no looking
    assert plain["largest_batch_size"] == 12


@pytest.mark.slow
def test_the_compiled_pass_is_planned_as_the_packed_one(student_folder: Path, here: Path) -> None:
    packed, compiled = (
        planned(arguments(student_folder), f"--model.fast={fast}", "--memory=2GiB") for fast in ("packed", "compiled")
    )
    assert compiled["variants"][0]["memory"] == packed["variants"][0]["memory"]
    assert "The compiled pass is planned as the packed one" in " ".join(compiled["notes"])


def test_devices(student_folder: Path, here: Path) -> None:
    found = planner_of(arguments(student_folder), Machine("gpu", 24 * 2**30), devices=4)
    strategies: tuple[Strategy, ...] = ("one", "ddp", "fsdp")
    plain, ddp, fsdp = (found.estimate(Variant(name, {}, name)).parts for name in strategies)
    assert ddp["buckets"] == pytest.approx(plain["weights"], rel=0.01)
    assert fsdp["weights"] == plain["weights"] // 4
    assert fsdp["unsharded"] > 0


def test_the_largest_batch(student_folder: Path, here: Path) -> None:
    own = [*small_model(student_folder), *toy_data(train=200), *small_trainer()]
    needed = planner_of([*own, "--data.batch_size=60"], Machine("gpu", 2**30)).estimate(AS_IT_IS).total
    # the same lengths are drawn at other sizes
    assert 54 <= (planner_of(own, Machine("gpu", needed)).largest(AS_IT_IS) or 0) <= 66
    assert planner_of(own, Machine("gpu", 2**20)).largest(AS_IT_IS) is None


def test_a_teacher(weights_folder: Path, teacher_folder: Path, here: Path) -> None:
    method = [f"--config={CONFIGS / 'method' / 'kl.yaml'}", f"--model.teachers.teacher.model={teacher_folder}"]
    own = [*small_model(weights_folder), *toy_data(), *small_trainer(), *method]
    memory = planner_of(own, Machine("cpu", 2**30)).estimate(AS_IT_IS).parts
    teacher = students.load(teacher_folder)
    weights = 4 * sum(parameter.numel() for parameter in teacher.parameters())
    # its states, too
    assert weights <= memory["teacher"] < 2 * weights


@pytest.mark.parametrize("name", ["mi_alpha", "prediction_heads", "progressive"])
def test_objectives_with_own_weights(name: str, weights_folder: Path, teacher_folder: Path, here: Path) -> None:
    method = yaml.safe_load((CONFIGS / "method" / f"{name}.yaml").read_text().replace("objectives+", "objectives"))
    own = method["model"]["init_args"]
    for settings in own["teachers"].values():
        settings["model"] = [str(teacher_folder)] * 3 if isinstance(settings["model"], list) else str(teacher_folder)
    Path("method.yaml").write_text(yaml.safe_dump(method))
    given = [*small_model(weights_folder), *toy_data(), *small_trainer(), "--config=method.yaml"]
    planner = planner_of(given, Machine("gpu", 2**30))
    parts = planner.estimate(AS_IT_IS).parts
    made = [getattr(objectives, one["class_path"])(**one["init_args"]) for one in own["objectives"]]
    student = students.load(weights_folder)
    teachers = Teachers({each: TeacherModel(**settings) for each, settings in own["teachers"].items()})
    teachers.load(student)
    for objective in made:
        objective.setup(student, teachers)
    modules = [student, *made]
    assert parts["weights"] == 4 * sum(one.numel() for module in modules for one in module.parameters())


@pytest.mark.parametrize(("precision", "size"), [("16-true", 2), ("64-true", 8)])
def test_weights_in_the_precision_of_the_trainer(precision: str, size: int, student_folder: Path, here: Path) -> None:
    own = [*arguments(student_folder), f"--trainer.precision={precision}"]
    count = sum(one.numel() for one in students.load(student_folder, from_scratch=True).parameters())
    assert planner_of(own, Machine("gpu", 2**30)).estimate(AS_IT_IS).parts["weights"] == size * count


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-true"])
def test_a_run_in_16_bits_saves_nothing_by_them(precision: str, student_folder: Path, here: Path) -> None:
    own = [*arguments(student_folder), f"--trainer.precision={precision}"]
    names = [variant.name for variant in planner_of(own, Machine("gpu", 2**30)).variants()]
    assert not any("bf16" in name for name in names)


@pytest.mark.slow
def test_a_table_of_80_columns(
    student_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run("plan", arguments(student_folder), "--memory=100MiB", "--measure")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "│ LoRA, bfloat16 │" in text
    assert "!: more than 100.0 MiB" in text
    assert "none" in text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--memory=24"], "memory: got '24'; allowed is a number above 0 with a unit, as 24GiB (MB, MiB, GB, ...)"),
        (["--devices=0"], "devices must be an integer at least 1 and below 65536, got 0"),
        (["--json=/no/such/plan.json"], "json: there is no folder '/no/such' to write it in"),
        (["--tflops=0"], "tflops must be above 0, got 0.0"),
        (["--tflops=1", "--measure"], "tflops: not with --measure, which finds it"),
        (["--trainer.accelerator=gpu"], "memory: there is no GPU here to read it of; give it, as in --memory 24GiB"),
    ],
)
def test_bad_input(
    more: list[str], said: str, student_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, "plan", arguments(student_folder), more) == said


def test_memory_smaller_than_the_student(student_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "plan", arguments(student_folder), "--memory=2KiB")
    assert re.match(r"memory: the student's weights alone need [\d.]+ MiB, and there are 0.00195 MiB;", line)


def test_without_data(student_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "plan", small_model(student_folder), QUIET)
    assert line.startswith("data: must be given")


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (RuntimeError(NO_MEMORY), True),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("of a user's own"), False),
    ],
)
def test_errors_of_memory(error: Exception, memory: bool) -> None:
    assert ran_out(error) is memory


def test_a_fit_without_memory(
    student_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(NO_MEMORY)

    monkeypatch.setattr(machine, "CPU_FRAMEWORK", 0)
    needed = planner_of(arguments(student_folder), Machine("cpu", 2**30)).estimate(AS_IT_IS).total
    monkeypatch.setattr("lit_distill.commands.memory.free_memory", lambda: int(0.95 * needed))
    monkeypatch.setattr("lit_distill.commands.memory.run_trainer", fail)
    line = refusal_of_fit(capsys, arguments(student_folder))
    assert "out of memory ([enforce fail" in line
    assert "by its plan the run needs" in line
    assert "data.batch_size " in line
    assert " would fit" in line


def test_a_student_larger_than_the_memory(
    student_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("lit_distill.commands.memory.free_memory", lambda: 1000)
    monkeypatch.setattr("lit_distill.commands.memory.run_trainer", fail)
    line = refusal_of_fit(capsys, arguments(student_folder))
    assert "the student's weights alone need" in line


def test_another_error_passes(student_folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("of a user's own")

    monkeypatch.setattr(Training, "training_step", fail)
    with pytest.raises(RuntimeError, match="of a user's own"):
        run("fit", arguments(student_folder))
