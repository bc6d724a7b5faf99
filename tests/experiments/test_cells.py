"""Each cell is run once, whatever becomes of the others; a fake stands in for ``fit``."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lit_distill.errors import UserError
from lit_distill.experiments.cells import FAILED, LOG, Cell, Run, State
from lit_distill.experiments.launch import Board, Local, run_cells
from tests.experiments.cells import Events, go, look, make_cell, make_cells, soon, starts, until

REPOSITORY = Path(__file__).parents[2]
DONE, FAILURE = State.DONE, State.FAILED


# ---------------------------------------------------------------------- in this process


def test_cells_run_one_after_another_and_once(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, a={}, b={})
    states, events = go(cells)
    assert events == ["a running", "a done", "b running", "b done"]
    assert states == [DONE, DONE]
    assert "at work" in (cells[0].folder / LOG).read_text()
    assert go(cells) == ([DONE, DONE], [])
    assert [starts(cell) for cell in cells] == [["new"], ["new"]]


def test_cells_run_at_a_time(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    cells = make_cells(tmp_path / "out", a={"until": str(gate)}, b={}, c={})
    board, events, most = look(cells), Events(), 0

    # with one job alone, the first would wait for ever
    def show(board: Board, cell: Cell) -> None:
        nonlocal most
        events(board, cell)
        most = max(most, list(board.values()).count(State.RUNNING))

    soon(lambda: cells[2].state is DONE, gate.touch)
    assert run_cells(board, Local(2), show, pause=0.02)
    assert most == 2
    assert events.index("a done") > events.index("b done")


def test_a_failed_cell_is_recorded_and_stops_no_other(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, a={"code": 3, "say": "lit_distill: error: no such student", "once": True}, b={})
    assert go(cells)[0] == [FAILURE, DONE]
    assert cells[0].failure == "exit code 3: lit_distill: error: no such student"
    assert "at work" not in (cells[0].folder / FAILED).read_text()
    # it is run again when asked, and then once
    cells[0].lay_out()
    assert go(cells) == ([FAILURE, DONE], [])
    cells[0].lay_out(retry_failed=True)
    assert go(cells)[0] == [DONE, DONE]
    assert len(starts(cells[0])) == 2


def test_a_run_without_a_record_has_failed(tmp_path: Path) -> None:
    [cell] = make_cells(tmp_path, a={"forget": True})
    assert go([cell])[0] == [FAILURE]
    assert cell.failure == "it ended without a record of its run: at work"


def test_slots_share_cores_and_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    three = Local(3, ["4", "7"])
    assert [three.environment(slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "7", "4"]
    assert three.environment(0)["OMP_NUM_THREADS"] == "2"
    # a cell alone takes what it finds
    assert Local(1, ["4", "7"]).environment(0) == {}
    # more jobs than cores, and a user who knows better
    assert Local(20).environment(0) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    cells = make_cells(tmp_path, a={}, b={})
    run_cells(look(cells), Local(2, ["4", "7"]), Events(), pause=0.02)
    assert {(cell.folder / "environment.txt").read_text() for cell in cells} == {"5 4", "5 7"}


@pytest.mark.parametrize("jobs", [0, 1.5, True])
def test_jobs_are_a_number(jobs: int) -> None:
    with pytest.raises(UserError, match="jobs must be an integer >= 1"):
        Local(jobs)


# ---------------------------------------------------------------------- edited configs


def test_a_run_of_another_config_is_not_gone_on_with(tmp_path: Path) -> None:
    [cell] = make_cells(tmp_path, a={"code": 3})
    edited = make_cell(tmp_path, "a", {"code": 0})
    # nothing has run yet
    edited.check_folder()
    go([cell])
    with pytest.raises(UserError, match=r"a: holds a run of another config \(code: 3 there, 0 wanted\); move it away"):
        edited.check_folder()


def test_a_config_whose_folder_was_moved_is_not_edited(tmp_path: Path) -> None:
    def placed(folder: Path) -> Cell:
        own = {"checkpoint": {"dirpath": str(folder / "a")}, "ckpt_path": "last", "trainer": {"logger": [str(folder)]}}
        return make_cell(folder, "a", {"sleep": 0, **own})

    first = placed(tmp_path / "one")
    first.lay_out()
    (first.folder / LOG).touch()
    (tmp_path / "one").rename(tmp_path / "two")
    second = placed(tmp_path / "two")
    second.check_folder()
    second.lay_out()
    assert "two" in (second.folder / "fit.yaml").read_text()
    (second.folder / "fit.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"cannot be read \(not YAML.*; move it away"):
        second.check_folder()


def test_a_cell_that_runs_is_not_run_twice(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    [cell] = make_cells(tmp_path / "out", a={"until": str(gate)})
    run = Run.start(cell)
    assert run is not None
    until(lambda: bool(starts(cell)))
    assert cell.state is State.RUNNING_ELSEWHERE
    assert Run.start(cell) is None
    gate.touch()
    run.wait()
    # what is done in the meantime is not done again
    assert cell.state is DONE
    assert Run.start(cell) is None
    assert starts(cell) == ["new"]


# ---------------------------------------------------------------------- experiments that are stopped, and several


@contextmanager
def driven(out: Path, jobs: int = 1) -> Iterator[subprocess.Popen[str]]:
    """An experiment in a process of its own."""
    process = subprocess.Popen(  # noqa: S603 - our own program
        [sys.executable, "-m", "tests.experiments.drive", str(out), str(jobs)],
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


def run_id(cell: Cell) -> int:
    """The process of its last run."""
    return int((cell.folder / "starts.txt").read_text().splitlines()[-1].split()[0])


def test_two_experiments_share_the_cells(tmp_path: Path) -> None:
    cells = make_cells(tmp_path, **{f"cell{i}": {"sleep": 0.2} for i in range(6)})
    with driven(tmp_path) as one, driven(tmp_path) as two:
        (code_one, said_one), (code_two, said_two) = ended(one), ended(two)
    assert (code_one, code_two) == (0, 0), said_one + said_two
    assert [starts(cell) for cell in cells] == [["new"]] * 6
    # both were at work, and both saw all to its end
    assert all(any(line.endswith(" running") for line in said) for said in (said_one, said_two))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_experiment_stops_its_runs_and_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    gate = tmp_path / "gate"
    cells = make_cells(tmp_path / "out", **{name: {"until": str(gate)} for name in "abc"})
    with driven(tmp_path / "out", 2) as process:
        until(lambda: bool(starts(cells[0]) and starts(cells[1])))
        pids = [run_id(cell) for cell in cells[:2]]
        process.send_signal(number)
        code, said = ended(process)
    assert code == 130, said
    assert sorted(said[-2:]) == ["a stopped", "b stopped"]
    assert not any(alive(pid) for pid in pids)
    # each was told once, and could save
    assert all((cell.folder / "checkpoint").exists() for cell in cells[:2])
    assert not any((cell.folder / FAILED).exists() for cell in cells)
    gate.touch()
    assert go(cells)[0] == [DONE] * 3
    assert [starts(cell) for cell in cells] == [["new", "resumed"], ["new", "resumed"], ["new"]]


@pytest.mark.parametrize(("signals", "grace"), [(1, 0.3), (2, 60)])
def test_what_does_not_stop_in_time_or_at_a_second_signal_is_killed(tmp_path: Path, signals: int, grace: float) -> None:
    [cell] = make_cells(tmp_path / "out", a={"until": str(tmp_path / "never"), "deaf": True})
    board = look([cell])

    def interrupt() -> None:
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    soon(lambda: bool(starts(cell)), interrupt)
    assert not run_cells(board, Local(), Events(), pause=0.02, grace=grace)
    assert board == {cell: State.STOPPED}
    until(lambda: cell.state is State.PENDING)


def test_a_run_that_someone_stops_is_not_started_again(tmp_path: Path) -> None:
    [cell] = make_cells(tmp_path, a={"sleep": 20})
    board, events = look([cell]), Events()
    soon(lambda: bool(starts(cell)), lambda: os.kill(run_id(cell), signal.SIGTERM))
    assert run_cells(board, Local(), events, pause=0.02)
    assert events == ["a running", "a stopped"]
    assert cell.state is State.PENDING


def test_a_killed_experiment_leaves_its_run_to_end(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    cells = make_cells(tmp_path / "out", a={"until": str(gate)}, b={})
    with driven(tmp_path / "out") as killed:
        until(lambda: bool(starts(cells[0])))
        killed.kill()
        killed.wait()
    assert alive(run_id(cells[0]))
    with driven(tmp_path / "out") as again:
        until(lambda: cells[1].state is DONE)
        gate.touch()
        code, said = ended(again)
    assert code == 0, said
    assert "a done" in said
    # the run of the killed one ended well, and was not begun a second time
    assert [starts(cell) for cell in cells] == [["new"], ["new"]]


def test_a_killed_run_has_failed(tmp_path: Path) -> None:
    [cell] = make_cells(tmp_path / "out", a={"until": str(tmp_path / "never")})
    run = Run.start(cell)
    assert run is not None
    until(lambda: bool(starts(cell)))
    os.kill(run_id(cell), signal.SIGKILL)
    run.wait()
    assert cell.failure == "ended by signal 9 (Killed): at work"


def test_a_killed_experiment_resumes_what_was_killed_with_it(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    [cell] = make_cells(tmp_path / "out", a={"until": str(gate)})
    with driven(tmp_path / "out") as process:
        until(lambda: bool(starts(cell)))
        # as when a machine goes down
        for pid in (process.pid, run_id(cell)):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    (cell.folder / "checkpoint").write_text("of its last validation")
    until(lambda: cell.state is State.PENDING)
    gate.touch()
    assert go([cell])[0] == [DONE]
    assert starts(cell) == ["new", "resumed"]
