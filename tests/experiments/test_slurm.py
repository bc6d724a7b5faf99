"""Cells as jobs: with a stand-in for submitit, and with submitit's own local executor where it is installed."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_distill.errors import UserError
from lit_distill.experiments.cells import Cell, State
from lit_distill.experiments.launch import Board, CellTask, Slurm, run_cells
from tests.experiments.cells import Events, look, make_cells, soon, starts, until


class FakeJob:
    """Runs when it is looked at for the second time."""

    def __init__(self, function: Any, cell: Cell) -> None:
        self.function, self.cell, self.looks, self.cancelled, self.job_id = function, cell, 0, False, "17"
        self.error: Exception | None = None

    def done(self) -> bool:
        self.looks += 1
        if self.looks == 2 and not self.cancelled:
            try:
                self.function(self.cell)
            except RuntimeError as error:
                self.error = error
        return self.looks > 1

    def exception(self) -> Exception | None:
        return self.error

    def cancel(self, check: bool = True) -> None:
        self.cancelled = True


class FakeExecutor:
    last: "FakeExecutor"

    def __init__(self, folder: Path, cluster: str, slurm_max_num_timeout: int) -> None:
        if cluster == "absent":
            raise RuntimeError("no such cluster")
        self.folder, self.cluster, self.jobs = folder, cluster, list[FakeJob]()
        self.parameters: dict[str, Any] = {}
        FakeExecutor.last = self

    def update_parameters(self, **parameters: Any) -> None:
        if "nonsense" in parameters:
            raise ValueError("Unavailable parameter(s): ['nonsense']")
        self.parameters |= parameters

    def submit(self, function: Any, cell: Cell) -> FakeJob:
        self.jobs.append(FakeJob(function, cell))
        return self.jobs[-1]


@pytest.fixture
def submitit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=FakeExecutor))


def test_cells_are_submitted_and_looked_after(tmp_path: Path, submitit: None) -> None:
    cells = make_cells(tmp_path, a={}, b={"code": 3}, c={})
    board, most = look(cells), 0

    def show(board: Board, cell: Cell) -> None:
        nonlocal most
        most = max(most, list(board.values()).count(State.RUNNING))

    assert run_cells(board, Slurm(tmp_path / ".submitit", 2, {"slurm_partition": "gpu"}), show, pause=0.01)
    assert list(board.values()) == [State.DONE, State.FAILED, State.DONE]
    assert most == 2
    executor = FakeExecutor.last
    assert (executor.folder, executor.cluster) == (tmp_path / ".submitit", "slurm")
    assert executor.parameters == {"name": "lit_distill", "timeout_min": 1440, "slurm_partition": "gpu"}
    assert [job.cell for job in executor.jobs] == cells


def test_a_job_that_is_lost_has_failed(tmp_path: Path, submitit: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(self: object, cell: Cell) -> None:
        raise RuntimeError("a long story\nJob 17 not requeued")

    monkeypatch.setattr(CellTask, "__call__", lost)
    [cell] = make_cells(tmp_path, a={})
    board = look([cell])
    run_cells(board, Slurm(tmp_path / ".submitit"), Events(), pause=0.01)
    assert board == {cell: State.FAILED}
    assert cell.failure == "the job 17 failed: Job 17 not requeued"


def test_an_interrupt_cancels_the_jobs(tmp_path: Path, submitit: None) -> None:
    cells = make_cells(tmp_path, a={}, b={})
    board = look(cells)

    def show(board: Board, cell: Cell) -> None:
        if list(board.values()) == [State.RUNNING] * 2:
            os.kill(os.getpid(), signal.SIGINT)

    assert not run_cells(board, Slurm(tmp_path / ".submitit"), show, pause=0.01)
    assert list(board.values()) == [State.STOPPED] * 2
    assert all(job.cancelled for job in FakeExecutor.last.jobs)
    assert not any(starts(cell) for cell in cells)


def test_a_job_that_was_stopped_is_submitted_again(
    tmp_path: Path, submitit: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = CellTask.__call__

    def stopped(self: CellTask, cell: Cell) -> None:
        monkeypatch.setattr(CellTask, "__call__", run)

    monkeypatch.setattr(CellTask, "__call__", stopped)
    [cell] = make_cells(tmp_path, a={})
    board = look([cell])
    assert run_cells(board, Slurm(tmp_path / ".submitit"), Events(), pause=0.01)
    assert board == {cell: State.DONE}
    assert len(FakeExecutor.last.jobs) == 2


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


def test_submitits_own_local_executor_with_a_preemption(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    gate = tmp_path / "gate"
    cells = make_cells(tmp_path / "out", a={"until": str(gate), "saves": 0.5}, b={"code": 3})
    board = look(cells)
    parameters = {"cluster": "local", "slurm_partition": "gpu", "timeout_min": 5}

    def preempt() -> None:
        run = int((cells[0].folder / "starts.txt").read_text().split()[0])
        status = Path(f"/proc/{run}/status").read_text().split()
        # a cluster signals all processes of a job
        for process in (run, int(status[status.index("PPid:") + 1])):
            os.kill(process, signal.SIGUSR2)
        until((cells[0].folder / "checkpoint").exists)
        gate.touch()

    soon(lambda: bool(starts(cells[0])), preempt)
    assert run_cells(board, Slurm(tmp_path / ".submitit", None, parameters), Events(), pause=0.05)
    assert list(board.values()) == [State.DONE, State.FAILED]
    assert cells[1].failure == "exit code 3: at work"
    # it saved before its job ended
    assert starts(cells[0]) == ["new", "resumed"]
