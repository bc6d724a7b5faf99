"""The fastest path is chosen by timings, which leave no trace."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lit_distill.batch import TaskBatch
from lit_distill.students import timing
from lit_distill.students.seq2seq import DEFAULT_PATH, PathName, Seq2SeqPass, Seq2SeqStudent
from lit_distill.students.timing import TOO_SHORT, Choice, Stage, choose
from tests.students.fast.examples import TASKS, as_student, make_student, make_task

BATCH = {str(number): task for number, task in enumerate(TASKS)}
LARGE = {"label": make_task([9, 4] * 16, [3] * 32, seed=3), "rationale": make_task([5] * 8, [6] * 8, seed=4)}


class Clock:
    """Timings of given seconds, on each path in turn or always the same; the time that passes is their sum."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **seconds: float | list[float]) -> None:
        self.seconds = {name: own if isinstance(own, list) else [own] * 9 for name, own in seconds.items()}
        self.now, self.order, self.rows = 0.0, list[str](), list[int]()
        monkeypatch.setattr(timing, "TOO_SHORT", TOO_SHORT)  # the package's own
        monkeypatch.setattr(timing, "_time", self.time)
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def time(self, step: Any, found: Seq2SeqPass) -> tuple[float, float]:
        name = type(found).__name__.removesuffix("Pass").lower()
        self.order.append(name)
        self.rows.append(sum(len(inputs["labels"]) for inputs in found.batch.values()))
        seconds = self.seconds[name].pop(0)
        if seconds == float("inf"):
            raise torch.OutOfMemoryError
        self.now += seconds
        return seconds, seconds


@pytest.fixture
def student() -> Seq2SeqStudent:
    return as_student(make_student())


@pytest.mark.parametrize(("plain", "path"), [(2.0, "packed"), (0.95, "packed"), (0.8, "plain")])
def test_on_a_cpu_another_path_must_be_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, student: Seq2SeqStudent, plain: float, path: str
) -> None:
    Clock(monkeypatch, packed=1.0, plain=plain)
    assert choose(student, LARGE, "training").path == path


def test_the_median_counts_without_the_first_step(monkeypatch: pytest.MonkeyPatch, student: Seq2SeqStudent) -> None:
    Clock(monkeypatch, packed=[2.0, 1.0, 1.0, 3.0, 1.0], plain=[3.0, 0.8, 0.5, 0.8, 0.8])
    assert choose(student, LARGE, "training") == Choice(
        "plain", 4, {"packed": 1.0, "plain": 0.8}, {"packed": 2.0, "plain": 3.0}
    )


def test_on_a_cpu_a_part_of_the_rows_is_timed(monkeypatch: pytest.MonkeyPatch, student: Seq2SeqStudent) -> None:
    clock = Clock(monkeypatch, packed=1.0, plain=2.0)
    choose(student, LARGE, "training")
    # an eighth of each task's
    assert set(clock.rows) == {4 + 1}
    # the default first, and twice as often as the budget of three whole steps, of 4.5 timed ones at least, allows
    assert clock.order == ["packed", "plain"] * 5


@pytest.mark.parametrize("seconds", [0.1, 10.0])
def test_a_batch_that_cannot_be_divided_costs_few_steps(
    monkeypatch: pytest.MonkeyPatch, student: Seq2SeqStudent, seconds: float
) -> None:
    clock = Clock(monkeypatch, packed=seconds, plain=2 * seconds)
    choose(student, {"label": make_task([9, 4], [3, 3], seed=3)}, "training")
    assert clock.order == ["packed", "plain", "packed"]
    assert clock.now <= 4 * seconds


@pytest.mark.parametrize(("batch", "packed"), [(BATCH, 0.002), (LARGE, 0.04)])
def test_steps_of_milliseconds_are_not_compared(
    monkeypatch: pytest.MonkeyPatch, student: Seq2SeqStudent, batch: TaskBatch, packed: float
) -> None:
    # an eighth of LARGE takes so long
    clock = Clock(monkeypatch, packed=packed, plain=packed / 2)
    assert choose(student, batch, "training") == Choice(DEFAULT_PATH)
    assert clock.order == ["packed"]


@pytest.mark.parametrize(
    ("packed", "plain", "path", "known"),
    [
        (0.01, 0.0098, "plain", {"packed", "plain"}),
        (0.01, float("inf"), "packed", {"packed"}),
        (float("inf"), 0.01, "plain", {"plain"}),
        (float("inf"), float("inf"), "packed", set()),
    ],
)
def test_an_accelerator_takes_the_fastest_that_fits(
    monkeypatch: pytest.MonkeyPatch, student: Seq2SeqStudent, packed: float, plain: float, path: str, known: set[str]
) -> None:
    monkeypatch.setattr(Seq2SeqStudent, "device", torch.device("mps"))
    clock = Clock(monkeypatch, packed=packed, plain=plain)
    choice = choose(student, LARGE, "training")
    assert choice.path == path
    assert set(choice.seconds) == known
    assert set(clock.rows) == {40}


@pytest.mark.parametrize(("seconds", "path"), [([60.0, 1.0, 1.0], "compiled"), ([60.0, 3.0, 3.0], "packed")])
def test_a_gpu_tries_the_compiled_pass_in_training(
    monkeypatch: pytest.MonkeyPatch, student: Seq2SeqStudent, seconds: list[float], path: str
) -> None:
    last, freed = list[str](), list[str]()
    monkeypatch.setattr(Seq2SeqStudent, "device", torch.device("cuda"))

    def paths(self: Seq2SeqStudent, batch: TaskBatch, name: PathName) -> list[PathName]:
        last.append(name)
        return ["packed", "compiled"]

    monkeypatch.setattr(Seq2SeqStudent, "paths", paths)
    monkeypatch.setattr("lit_distill.students.fast.compiled.free", lambda: freed.append("graphs"))
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: freed.append("memory"))
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda: None)
    # compiling, a warm-up and a recording do not count
    Clock(monkeypatch, packed=0.02, compiled=[*seconds, *([0.01] if path == "compiled" else [0.03]) * 4])
    choice = choose(student, LARGE, "training")
    assert choice.path == path
    assert choice.first["compiled"] == 60
    assert freed == (["memory"] if path == "compiled" else ["graphs", "memory"])
    assert last == ["compiled"]


def test_nothing_is_timed_where_only_one_path_is_supported(
    monkeypatch: pytest.MonkeyPatch, student: Seq2SeqStudent
) -> None:
    clock = Clock(monkeypatch)
    student.sharded = True
    assert choose(student, BATCH, "training") == Choice(DEFAULT_PATH)
    assert clock.order == []


def test_what_is_told() -> None:
    assert str(Choice("packed")) == "packed"
    few = Choice("packed", 2, {"packed": 0.4123, "plain": 1.2345}, {"packed": 2.0, "plain": 3.0})
    assert str(few) == "packed (a step of 2 rows: packed 412 ms, plain 1.23 s)"
    compiled = Choice("packed", 64, {"packed": 0.04123, "plain": 0.05}, {"packed": 61.0, "plain": 0.1})
    assert str(compiled) == "packed (a step of 64 rows: packed 41.2 ms, plain 50 ms, packed's first 61.00 s)"


def states(student: Seq2SeqStudent) -> str:
    """Those of all random generators, and the mode of each module."""
    numbers = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    return str((numbers, [module.training for module in student.modules()]))


@pytest.mark.parametrize("stage", ["training", "evaluation"])
def test_timing_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, stage: Stage) -> None:
    # all steps are taken, however short
    monkeypatch.setattr(timing, "TOO_SHORT", 0.0)
    student, called = as_student(make_student(dropout_rate=0.2)).train(stage == "training"), list[Any]()
    weights = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    for parameter in student.parameters():
        parameter.register_post_accumulate_grad_hook(called.append)
    before = states(student)
    choice = choose(student, BATCH, stage)
    assert choice.seconds.keys() == {"packed", "plain"}
    assert states(student) == before
    assert called == []
    assert all(parameter.grad is None for parameter in student.parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in student.state_dict().items())
    assert (student.path, student.evaluation_path) == (DEFAULT_PATH, DEFAULT_PATH)


def test_a_frozen_student_is_timed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "TOO_SHORT", 0.0)
    student = as_student(make_student()).requires_grad_(False)
    assert choose(student, BATCH, "training").seconds.keys() == {"packed", "plain"}
