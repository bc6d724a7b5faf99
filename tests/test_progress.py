"""What is seen of a run while it goes: bars that fit a terminal, lines in a file."""

import fcntl
import io
import logging
import os
import re
import struct
import termios
import threading
from pathlib import Path

import pytest

import lit_distill.progress
from tests.runs import metric_rows, run, run_folders, small_model, small_trainer, toy_data

pytestmark = pytest.mark.usefixtures("here")


def fit(student: Path, *more: object, steps: int = 5, every: int = 2) -> None:
    # 12 rows are 3 micro-batches: with windows of 2 an epoch has 2 steps, and the run more than two epochs
    shown = ["--trainer.enable_progress_bar=true", "--trainer.accumulate_grad_batches=2"]
    run("fit", small_model(student), toy_data(), small_trainer(steps, every), shown, *more)


def test_off_a_terminal_steps_and_evaluations_are_lines(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lit_distill.progress, "_LINE_SECONDS", 0.0)
    fit(student_folder)
    lines = capsys.readouterr().out.splitlines()
    [folder] = run_folders()
    rows = metric_rows(folder)
    assert "fit: 5 steps" in lines
    for step in range(1, 6):
        [line] = [line for line in lines if line.startswith(f"step {step} of 5: train/")]
        [row] = [row for row in rows if row["step"] == str(step - 1) and "train/loss" in row]
        shown = re.fullmatch(r".*train/label_loss (\S+), train/loss (\S+), .*; \S+ steps/s, \d:\d\d:\d\d left", line)
        assert shown is not None, line
        assert float(shown[1]) == pytest.approx(float(row["train/label_loss"]), rel=1e-3)
        assert float(shown[2]) == pytest.approx(float(row["train/loss"]), rel=1e-3)
    for step in (2, 4, 5):
        [line] = [line for line in lines if line.startswith(f"step {step} of 5: val/")]
        [row] = [row for row in rows if row["step"] == str(step - 1) and "val/loss" in row]
        assert f"val/accuracy {float(row['val/accuracy']):.4g}" in line
        assert f"val/loss {float(row['val/loss']):.4g}" in line
    assert lines.count("validation: 4 rows") == 3
    assert sum(bool(re.fullmatch(r"validation: 4 rows in \d:\d\d:\d\d", line)) for line in lines) == 3
    assert "test: 5 rows" in lines
    # of two batches the first is not the end
    assert sum(line.startswith("test: 4 of 5 rows, ") for line in lines) == 1


def test_lines_are_seconds_apart_but_the_first_and_the_last(
    student_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(student_folder, "--test_after_fit=false", steps=6, every=100)
    lines = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if "train/loss" in line]
    assert lines == ["step 1 of 6", "step 6 of 6"]


def test_a_resumed_run_says_what_is_done(student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(student_folder, "--test_after_fit=false", steps=2)
    last = run_folders()[0] / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    fit(student_folder, "--test_after_fit=false", f"--ckpt_path={last}", steps=4)
    lines = capsys.readouterr().out.splitlines()
    assert "fit: 4 steps, 2 of them done" in lines
    assert [line.partition(":")[0] for line in lines if "train/loss" in line] == ["step 3 of 4", "step 4 of 4"]


@pytest.mark.parametrize(("command", "name", "rows"), [("validate", "validation", 4), ("test", "test", 5),
                                                       ("predict", "predict", 5)])  # fmt: skip
def test_an_evaluation_alone_says_how_many_rows_it_has(
    command: str, name: str, rows: int, weights_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(command, small_model(weights_folder), toy_data(), small_trainer(), "--trainer.enable_progress_bar=true")
    lines = capsys.readouterr().out.splitlines()
    assert f"{name}: {rows} rows" in lines
    assert any(re.fullmatch(rf"{name}: {rows} rows in \d:\d\d:\d\d", line) for line in lines)


def test_without_a_bar_there_are_no_lines(student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(student_folder, "--trainer.enable_progress_bar=false")
    out = capsys.readouterr().out
    assert not re.search(r"^(step|fit|validation|test:|sanity)", out, re.MULTILINE)


def test_on_a_terminal_bars_count_the_runs_steps_in_80_columns(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lit_distill.progress, "_BAR_SECONDS", 0.0)
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    found = io.BytesIO()

    def read() -> None:
        while True:
            try:
                found.write(os.read(reader, 2**16))
            except OSError:
                return

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    with monkeypatch.context() as terminal, os.fdopen(writer, "w") as stdout:
        terminal.setattr("sys.stdout", stdout)
        # Lightning's own, as it is when stderr is the terminal, too
        log = logging.getLogger("lightning.pytorch")
        terminal.setattr(log, "handlers", [logging.StreamHandler(stdout)])
        fit(student_folder, "--test_after_fit=false")
    thread.join()
    os.close(reader)
    raw = found.getvalue().decode()
    # a message stands on a line of its own, from which the bars were taken before
    assert re.search(r"[\r\n]`Trainer.fit` stopped", raw)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw)
    bars = [line for line in re.split(r"[\r\n]+", text) if re.match(r"(fit|validation) .*[█ ]+", line)]
    assert max(map(len, bars)) <= 80
    steps = [re.search(r"(\d+)/(\d+)", line) for line in bars if line.startswith("fit")]
    assert {(int(step[1]), int(step[2])) for step in steps if step} == {(step, 5) for step in range(6)}
    rows = [re.search(r"(\d+)/(\d+)", line) for line in bars if line.startswith("validation")]
    assert {(int(row[1]), int(row[2])) for row in rows if row} == {(0, 4), (4, 4)}
    assert any("loss " in line and "accuracy " in line for line in bars)
