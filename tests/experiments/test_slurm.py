"""Cells as jobs: with a stand-in for submitit, and with submitit's own local executor where it is installed."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_distill.errors import UserError
from lit_distill.experiments.cells import State, failure_of
from lit_distill.experiments.schedule import Board, Watcher, look, run_cells
from lit_distill.experiments.slurm import Requeued, Slurm
from lit_distill.experiments.worker import INTERRUPTED, run_cell
from tests.experiments.cells import make_cells, starts


class FakeJob:
    """Runs when it is first looked at."""

    def __init__(self, function: Any, arguments: tuple[Any, ...]) -> None:  # noqa: ANN401
        self.function, self.arguments, self.looks, self.cancelled, self.job_id = function, arguments, 0, False, "17"
        self.code: int | Exception = 0

    def done(self) -> bool:
        self.looks += 1
        if self.looks == 2 and not self.cancelled:
            try:
                self.code = self.function(*self.arguments)
            except RuntimeError as error:
                self.code = error
        return self.looks > 1 or self.cancelled

    def result(self) -> int:
        if isinstance(self.code, Exception):
            raise self.code
        return self.code

    def cancel(self, check: bool = True) -> None:
        self.cancelled = True


class FakeExecutor:
    last: "FakeExecutor"

    def __init__(self, folder: Path, cluster: str) -> None:
        if cluster == "absent":
            raise RuntimeError("no such cluster")
        self.folder, self.cluster, self.jobs = folder, cluster, list[FakeJob]()
        self.parameters: dict[str, Any] = {}
        FakeExecutor.last = self

    def update_parameters(self, **parameters: Any) -> None:
        if "nonsense" in parameters:
            raise ValueError("Unavailable parameter(s): ['nonsense']")
        self.parameters |= parameters

    def submit(self, function: Any, *arguments: Any) -> FakeJob:  # noqa: ANN401
        self.jobs.append(FakeJob(function, arguments))
        return self.jobs[-1]


@pytest.fixture
def submitit(monkeypatch: pytest.MonkeyPatch) -> None:
    helpers = SimpleNamespace(DelayedSubmission=lambda *arguments: ("again", *arguments))
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=FakeExecutor, helpers=helpers))


def test_cells_are_submitted_and_looked_after(tmp_path: Path, submitit: None) -> None:
    cells = make_cells(tmp_path, a={}, b={"code": 3}, c={})
    board = look(cells)
    assert run_cells(board, Slurm(tmp_path / ".submitit", None, {"slurm_partition": "gpu"}), pause=0.01)
    assert board.states == {"a": State.DONE, "b": State.FAILED, "c": State.DONE}
    executor = FakeExecutor.last
    assert (executor.folder, executor.cluster) == (tmp_path / ".submitit", "slurm")
    assert executor.parameters == {"name": "lit_distill", "timeout_min": 1440, "slurm_partition": "gpu"}
    assert [job.arguments for job in executor.jobs] == [(str(cell.folder), cell.arguments) for cell in cells]


def test_so_many_jobs_at_a_time(tmp_path: Path, submitit: None) -> None:
    most: list[int] = []

    class Counts(Watcher):
        def tick(self, board: Board) -> None:
            most.append(board.count(State.RUNNING))

    cells = make_cells(tmp_path, a={}, b={}, c={})
    assert run_cells(look(cells), Slurm(tmp_path / ".submitit", 2), Counts(), pause=0.01)
    assert max(most) == 2
    assert run_cells(look(make_cells(tmp_path, d={}, e={}, f={})), Slurm(tmp_path / ".submitit"), Counts(), pause=0.01)
    assert max(most) == 3


def test_a_job_that_is_lost_has_failed(tmp_path: Path, submitit: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*arguments: object) -> int:
        raise RuntimeError("a long story\nJob 17 not requeued")

    monkeypatch.setattr("lit_distill.experiments.slurm.run_cell", lost)
    [cell] = make_cells(tmp_path, a={})
    board = look([cell])
    run_cells(board, Slurm(tmp_path / ".submitit"), pause=0.01)
    assert board.states == {"a": State.FAILED}
    failure = failure_of(cell.folder)
    assert failure is not None
    assert failure.reason == "the job 17 failed: Job 17 not requeued"


def test_an_interrupt_cancels_the_jobs(tmp_path: Path, submitit: None) -> None:
    class Stops(Watcher):
        stopped = False

        def tick(self, board: Board) -> None:
            if not self.stopped:
                self.stopped = True
                raise KeyboardInterrupt

    cells = make_cells(tmp_path, a={}, b={})
    board = look(cells)
    assert not run_cells(board, Slurm(tmp_path / ".submitit"), Stops(), pause=0.01)
    assert board.states == dict.fromkeys("ab", State.STOPPED)
    assert all(job.cancelled for job in FakeExecutor.last.jobs)
    assert not any(starts(cell) for cell in cells)


def test_a_job_that_saved_and_stopped_is_submitted_again(
    tmp_path: Path, submitit: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = [INTERRUPTED, None]

    def preempted(folder: str, arguments: list[str]) -> int:
        return codes.pop(0) or run_cell(folder, arguments)

    monkeypatch.setattr("lit_distill.experiments.slurm.run_cell", preempted)
    [cell] = make_cells(tmp_path, a={})
    board = look([cell])
    assert run_cells(board, Slurm(tmp_path / ".submitit"), pause=0.01)
    assert board.states == {"a": State.DONE}
    assert len(FakeExecutor.last.jobs) == 2


def test_a_job_that_is_preempted_is_queued_again(submitit: None) -> None:
    job = Requeued()
    assert job.checkpoint("folder", ["fit"]) == ("again", job, "folder", ["fit"])


@pytest.mark.parametrize(
    ("parameters", "line"),
    [
        ({"cluster": "absent"}, "slurm: no such cluster"),
        ({"nonsense": 1}, "slurm: Unavailable parameter(s): ['nonsense']"),
    ],
)
def test_what_submitit_refuses(tmp_path: Path, submitit: None, parameters: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as refused:
        Slurm(tmp_path, None, parameters)
    assert str(refused.value) == line


def test_without_submitit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r'pip install "lit_distill\[slurm\]"'):
        Slurm(tmp_path)


def test_submitits_own_local_executor(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    cells = make_cells(tmp_path, a={}, b={"code": 3})
    board = look(cells)
    launcher = Slurm(tmp_path / ".submitit", None, {"cluster": "local", "slurm_partition": "gpu", "timeout_min": 5})
    assert run_cells(board, launcher, pause=0.1)
    assert board.states == {"a": State.DONE, "b": State.FAILED}
    failure = failure_of(cells[1].folder)
    assert failure is not None
    assert failure.reason == "exit code 3"


def test_a_preempted_run_saves_before_its_job_ends(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    gate = tmp_path / "gate"
    [cell] = make_cells(tmp_path / "out", a={"until": str(gate), "saves": 0.5})

    class Preempts(Watcher):
        told = False

        def tick(self, board: Board) -> None:
            if starts(cell) and not self.told:
                self.told = True
                # a cluster signals all processes of a job
                run, worker = map(int, (cell.folder / "starts.txt").read_text().split()[:2])
                os.kill(run, signal.SIGUSR2)
                os.kill(worker, signal.SIGUSR2)
                gate.touch()

    board = look([cell])
    launcher = Slurm(tmp_path / ".submitit", None, {"cluster": "local", "timeout_min": 5})
    assert run_cells(board, launcher, Preempts(), pause=0.05)
    assert board.states == {"a": State.DONE}
    assert starts(cell) == ["new", "resumed"]
