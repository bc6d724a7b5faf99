"""Each cell is run once, whatever becomes of the others; a fake stands in for ``fit``."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lit_distill.errors import UserError
from lit_distill.experiments.cells import FAILED, LOG, Cell, State, failure_of, is_busy, lay_out, record_of
from lit_distill.experiments.launchers import Job, Local
from lit_distill.experiments.schedule import Board, Watcher, look, run_cells
from lit_distill.experiments.worker import BUSY, INTERRUPTED, run_cell
from tests.experiments.cells import make_cell, make_cells, starts

REPOSITORY = Path(__file__).parents[2]


class Events(Watcher):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.most = 0

    def changed(self, board: Board, cell: Cell) -> None:
        self.lines.append(f"{cell.name} {board.states[cell.name]}")
        self.most = max(self.most, board.count(State.RUNNING))


def go(cells: list[Cell], jobs: int = 1, *, retry_failed: bool = False) -> tuple[Board, Events]:
    board, events = look(cells, retry_failed=retry_failed), Events()
    assert run_cells(board, Local(jobs), events, pause=0.02, elsewhere_pause=0.1)
    return board, events


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.02)


# ---------------------------------------------------------------------- in this process


def test_cells_run_one_after_another(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, a={}, b={}, c={})
    board, events = go(cells)
    assert events.lines == ["a running", "a done", "b running", "b done", "c running", "c done"]
    assert board.states == dict.fromkeys("abc", State.DONE)
    assert all(record_of(cell.folder) is not None for cell in cells)
    assert "at work" in (cells[0].folder / LOG).read_text()


def test_cells_run_at_a_time(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    cells = make_cells(tmp_path / "out", a={"until": str(gate)}, b={}, c={})

    # with one job alone, the first would wait for ever
    class Opens(Events):
        def changed(self, board: Board, cell: Cell) -> None:
            super().changed(board, cell)
            if board.states[cell.name] is State.DONE and cell.name == "c":
                gate.touch()

    board, events = look(cells), Opens()
    assert run_cells(board, Local(2), events, pause=0.02)
    assert events.most == 2
    assert events.lines[-1] == "a done"


def test_what_is_done_is_not_run_again(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, a={}, b={})
    go(cells)
    board, events = go(cells)
    assert events.lines == []
    assert board.count(State.DONE) == 2
    assert [starts(cell) for cell in cells] == [["new"], ["new"]]


def test_a_record_that_cannot_be_read_is_not_run_over(tmp_path: Path) -> None:
    [cell] = make_cells(tmp_path, a={})
    (cell.folder / "run.json").write_text("{")
    board, _ = go([cell])
    assert board.states == {"a": State.FAILED}
    assert starts(cell) == []


def test_a_failed_cell_is_kept_and_stops_no_other(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, a={"code": 3, "say": "lit_distill: error: no such student"}, b={})
    board, _ = go(cells)
    assert board.states == {"a": State.FAILED, "b": State.DONE}
    kept = json.loads((cells[0].folder / FAILED).read_text())
    assert (kept["exit_code"], kept["reason"]) == (3, "exit code 3")
    assert kept["lines"][-1] == "lit_distill: error: no such student"


def test_a_failed_cell_is_run_again_when_asked(tmp_path: Path) -> None:
    [cell] = make_cells(tmp_path, a={"code": 3, "once": True})
    assert go([cell])[0].states == {"a": State.FAILED}
    assert go([cell])[0].states == {"a": State.FAILED}
    assert len(starts(cell)) == 1
    assert go([cell], retry_failed=True)[0].states == {"a": State.DONE}
    assert len(starts(cell)) == 2
    assert not (cell.folder / FAILED).exists()


def test_a_cell_that_fails_again_is_not_tried_for_ever(tmp_path: Path) -> None:
    [cell] = make_cells(tmp_path, a={"code": 3})
    go([cell])
    assert go([cell], retry_failed=True)[0].states == {"a": State.FAILED}
    assert len(starts(cell)) == 2


def test_a_run_without_a_record_has_failed(tmp_path: Path) -> None:
    [cell] = make_cells(tmp_path, a={"forget": True})
    assert go([cell])[0].states == {"a": State.FAILED}
    failure = failure_of(cell.folder)
    assert failure is not None
    assert (failure.exit_code, failure.reason) == (0, "it ended without a record of its run")


def test_a_command_that_is_not_there_has_failed(tmp_path: Path) -> None:
    [cell] = make_cells(tmp_path, a={})
    missing = Cell(cell.name, cell.folder, {}, cell.config, ("/no/such/program",))
    assert go([missing])[0].states == {"a": State.FAILED}
    failure = failure_of(cell.folder)
    assert failure is not None
    assert "No such file" in failure.lines[-1]


def test_slots_share_cores_and_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("lit_distill.experiments.launchers._cores", lambda: 8)
    three = Local(3, ["4", "7"])
    assert [three.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "7", "4"]
    assert three.environment(0)["OMP_NUM_THREADS"] == "2"
    # a cell alone takes what it finds
    alone = Local(1, ["4", "7"]).environment(0)
    assert not {"CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"} & alone.keys()
    # more jobs than cores, and a user who knows better
    assert Local(20).environment(0)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert three.environment(0)["OMP_NUM_THREADS"] == "5"
    cells = make_cells(tmp_path, a={}, b={})
    run_cells(look(cells), Local(2, ["4", "7"]), pause=0.02)
    assert {(cell.folder / "environment.txt").read_text() for cell in cells} == {"5 4", "5 7"}


@pytest.mark.parametrize("jobs", [0, -1, 1.5, True])
def test_jobs_are_a_number(jobs: int) -> None:
    with pytest.raises(UserError, match="jobs must be an integer >= 1"):
        Local(jobs)


# ---------------------------------------------------------------------- edited configs


def test_an_edited_config_starts_anew(tmp_path: Path) -> None:
    [cell] = make_cells(tmp_path, a={"code": 3})
    go([cell])
    (cell.folder / "checkpoint").write_text("trained with the old config")
    edited = make_cell(tmp_path, "a", {"code": 0})
    aside = lay_out(edited)
    assert aside == tmp_path / ".edited" / "a.1"
    assert (aside / "checkpoint").exists()
    assert go([edited])[0].states == {"a": State.DONE}
    assert starts(edited) == ["new"]


def test_a_config_whose_folder_was_moved_is_not_edited(tmp_path: Path) -> None:
    def placed(folder: Path) -> Cell:
        own = {"checkpoint": {"dirpath": str(folder / "a")}, "ckpt_path": "last", "trainer": {"logger": [str(folder)]}}
        return make_cell(folder, "a", {"sleep": 0, **own})

    first = placed(tmp_path / "one")
    lay_out(first)
    (tmp_path / "one").rename(tmp_path / "two")
    second = placed(tmp_path / "two")
    assert lay_out(second) is None
    assert "two" in (second.folder / "fit.yaml").read_text()


def test_a_config_that_is_none(tmp_path: Path) -> None:
    [cell] = make_cells(tmp_path, a={})
    (cell.folder / "fit.yaml").write_text("- a list")
    with pytest.raises(UserError, match="no config; move it away"):
        lay_out(cell)


def test_a_cell_that_runs_is_not_edited(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    [cell] = make_cells(tmp_path / "out", a={"until": str(gate)})
    job = Local().start(cell)
    until(lambda: bool(starts(cell)))
    assert lay_out(cell) is None
    with pytest.raises(UserError, match="another process runs it with another config"):
        lay_out(make_cell(tmp_path / "out", "a", {"sleep": 1}))
    gate.touch()
    until(lambda: job.poll() is not None)
    assert job.poll() == 0


def test_a_cell_is_run_by_one_worker(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    [cell] = make_cells(tmp_path / "out", a={"until": str(gate)})
    job = Local().start(cell)
    until(lambda: bool(starts(cell)))
    assert run_cell(cell.folder, cell.arguments) == BUSY
    gate.touch()
    until(lambda: job.poll() is not None)
    # what is done in the meantime is not done again
    assert run_cell(cell.folder, cell.arguments) == 0
    assert starts(cell) == ["new"]


# ---------------------------------------------------------------------- experiments that are stopped, and several


@contextmanager
def driven(out: Path, jobs: int = 1, *more: str) -> Iterator[subprocess.Popen[str]]:
    """An experiment in a process of its own."""
    process = subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-m", "tests.experiments.drive", str(out), str(jobs), *more],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    said, _ = process.communicate(timeout=30)
    return process.returncode, said.splitlines()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def processes(cell: Cell) -> list[int]:
    """The ids of a cell's last run and of its worker."""
    return [int(text) for text in (cell.folder / "starts.txt").read_text().splitlines()[-1].split()[:2]]


def test_two_experiments_share_the_cells(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, **{f"cell{i}": {"sleep": 0.2} for i in range(6)})
    with driven(tmp_path) as one, driven(tmp_path) as two:
        (code_one, said_one), (code_two, said_two) = ended(one), ended(two)
    assert (code_one, code_two) == (0, 0), said_one + said_two
    assert [starts(cell) for cell in cells] == [["new"]] * 6
    # both were at work, and both saw all to its end
    assert all(any(line.startswith("running") for line in said) for said in (said_one, said_two))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_experiment_stops_its_runs_and_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    gate = tmp_path / "gate"
    cells = make_cells(tmp_path / "out", **{name: {"until": str(gate)} for name in "abc"})
    with driven(tmp_path / "out", 2) as process:
        until(lambda: bool(starts(cells[0]) and starts(cells[1])))
        pids = processes(cells[0]) + processes(cells[1])
        process.send_signal(number)
        code, said = ended(process)
    assert code == 130, said
    assert said[-2:] == ["stopped a", "stopped b"]
    assert not any(alive(pid) for pid in pids)
    # each was told once, and could save
    assert all((cell.folder / "checkpoint").exists() for cell in cells[:2])
    assert not any((cell.folder / FAILED).exists() for cell in cells)
    gate.touch()
    assert go(cells)[0].count(State.DONE) == 3
    assert [starts(cell) for cell in cells] == [["new", "resumed"], ["new", "resumed"], ["new"]]


def test_what_does_not_stop_in_time_is_killed(tmp_path: Path) -> None:
    [cell] = make_cells(tmp_path, a={})
    deaf = "import signal, time, pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    deaf += f"pathlib.Path({str(cell.folder / 'deaf')!r}).touch(); time.sleep(60)"
    stubborn = Cell("a", cell.folder, {}, {}, (sys.executable, "-c", deaf))

    class Stops(Watcher):
        stopped = False

        def tick(self, board: Board) -> None:
            if (cell.folder / "deaf").exists() and not self.stopped:
                self.stopped = True
                raise KeyboardInterrupt

    board = look([stubborn])
    assert not run_cells(board, Local(), Stops(), pause=0.02, grace=0.3)
    assert board.states == {"a": State.STOPPED}
    until(lambda: not is_busy(cell.folder))


@pytest.mark.parametrize("moment", ["before", "during"])
def test_a_worker_that_is_told_before_its_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def told(*arguments: object, **more: object) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return ""

    def told_and_started(*arguments: Any, **more: Any) -> subprocess.Popen[bytes]:
        told()
        return started(*arguments, **more)

    started = subprocess.Popen
    [cell] = make_cells(tmp_path, a={"sleep": 3})
    if moment == "before":
        monkeypatch.setattr(time, "strftime", told)
    else:
        monkeypatch.setattr(subprocess, "Popen", told_and_started)
    assert run_cell(cell.folder, cell.arguments) == INTERRUPTED
    assert record_of(cell.folder) is None
    assert failure_of(cell.folder) is None
    assert not is_busy(cell.folder)
    assert look([cell]).states == {"a": State.PENDING}


def test_a_worker_that_is_ended_while_it_starts_leaves_its_cell_to_be_run(tmp_path: Path) -> None:
    class Ends(Local):
        def start(self, cell: Cell) -> Job:
            job = super().start(cell)
            job.interrupt()
            return job

    [cell] = make_cells(tmp_path, a={"sleep": 3})
    board = look([cell])
    assert run_cells(board, Ends(), pause=0.02)
    assert board.states == {"a": State.STOPPED}
    assert failure_of(cell.folder) is None


def test_a_worker_that_is_unwound_waits_until_its_run_has_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As submitit's handler of a preemption does it, which ends the process."""
    [cell] = make_cells(tmp_path, a={"sleep": 20, "saves": 0.5})
    waited = subprocess.Popen.wait

    def unwound(run: subprocess.Popen[bytes]) -> int:
        monkeypatch.setattr(subprocess.Popen, "wait", waited)
        until(lambda: bool(starts(cell)))
        raise SystemExit(-1)

    monkeypatch.setattr(subprocess.Popen, "wait", unwound)
    with pytest.raises(SystemExit):
        run_cell(cell.folder, cell.arguments)
    assert (cell.folder / "checkpoint").exists()
    assert not is_busy(cell.folder)


def test_a_run_that_goes_on_keeps_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = tmp_path / "gate"
    [cell] = make_cells(tmp_path / "out", a={"until": str(gate), "deaf": True})
    waited, runs = subprocess.Popen.wait, list[subprocess.Popen[bytes]]()

    def unwound(run: subprocess.Popen[bytes]) -> int:
        runs.append(run)
        until(lambda: bool(starts(cell)))
        raise SystemExit(-1)

    monkeypatch.setattr(subprocess.Popen, "wait", unwound)
    with pytest.raises(SystemExit):
        run_cell(cell.folder, cell.arguments)
    assert is_busy(cell.folder)
    assert run_cell(cell.folder, cell.arguments) == BUSY
    gate.touch()
    waited(runs[0])
    assert record_of(cell.folder) is not None
    assert not is_busy(cell.folder)


def test_a_killed_experiment_leaves_its_run_to_end(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    cells = make_cells(tmp_path / "out", a={"until": str(gate)}, b={})
    with driven(tmp_path / "out") as killed:
        until(lambda: bool(starts(cells[0])))
        killed.kill()
        killed.wait()
    assert all(alive(pid) for pid in processes(cells[0]))
    with driven(tmp_path / "out") as again:
        until(lambda: record_of(cells[1].folder) is not None)
        gate.touch()
        code, said = ended(again)
    assert code == 0, said
    assert said[0] == "running elsewhere a"
    # the run of the killed one ended well, and was not begun a second time
    assert [starts(cell) for cell in cells] == [["new"], ["new"]]


def test_a_run_that_fails_after_its_experiment_was_killed_is_known(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    [cell] = make_cells(tmp_path / "out", a={"until": str(gate), "code": 4})
    with driven(tmp_path / "out") as killed:
        until(lambda: bool(starts(cell)))
        killed.kill()
        killed.wait()
    gate.touch()
    until(lambda: failure_of(cell.folder) is not None)
    assert go([cell])[0].states == {"a": State.FAILED}
    assert starts(cell) == ["new"]


def test_a_killed_worker_leaves_the_lock_to_its_run(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    [cell] = make_cells(tmp_path / "out", a={"until": str(gate)})
    with driven(tmp_path / "out") as process:
        until(lambda: bool(starts(cell)))
        run, worker = processes(cell)
        os.kill(worker, signal.SIGKILL)
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in range(2)] == ["running a", "running elsewhere a"]
        assert alive(run)
        gate.touch()
        code, said = ended(process)
    assert code == 0, said
    assert starts(cell) == ["new"]


def test_a_killed_run_has_failed(tmp_path: Path) -> None:
    [cell] = make_cells(tmp_path / "out", a={"until": str(tmp_path / "never")})
    with driven(tmp_path / "out") as process:
        until(lambda: bool(starts(cell)))
        os.kill(processes(cell)[0], signal.SIGKILL)
        code, said = ended(process)
    assert code == 1, said
    failure = failure_of(cell.folder)
    assert failure is not None
    assert (failure.exit_code, failure.reason) == (-9, "ended by SIGKILL")


def test_a_killed_experiment_resumes_what_was_killed_with_it(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    [cell] = make_cells(tmp_path / "out", a={"until": str(gate)})
    with driven(tmp_path / "out") as process:
        until(lambda: bool(starts(cell)))
        # as when a machine goes down
        for pid in (process.pid, *reversed(processes(cell))):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    (cell.folder / "checkpoint").write_text("of its last validation")
    until(lambda: not is_busy(cell.folder))
    gate.touch()
    assert go([cell])[0].states == {"a": State.DONE}
    assert starts(cell) == ["new", "resumed"]


def test_a_worker_does_not_run_over_a_record_that_it_cannot_read(tmp_path: Path) -> None:
    [cell] = make_cells(tmp_path / "out", a={})
    (cell.folder / "run.json").write_text('{"format": 9}')
    assert run_cell(cell.folder, cell.arguments) == 1
    assert starts(cell) == []
    failure = failure_of(cell.folder)
    assert failure is not None
    assert failure.reason.startswith(f"{cell.folder / 'run.json'}: no record of format 1; move it away")
    assert (cell.folder / "run.json").read_text() == '{"format": 9}'
