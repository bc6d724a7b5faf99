"""What is seen of a run while it goes: bars on a terminal, lines in a file."""

import io
import re
from pathlib import Path

import pytest

from lit_distill import progress
from tests.runs import metric_rows, run, run_folders, small_model, small_trainer, toy_data


def fit(student: Path, *more: object) -> None:
    # 12 rows are 3 micro-batches: with windows of 2 an epoch has 2 steps, and the run more than two epochs
    shown = ["--trainer.enable_progress_bar=true", "--trainer.accumulate_grad_batches=2"]
    run("fit", small_model(student), toy_data(), small_trainer(5, 2), shown, *more)


@pytest.mark.usefixtures("here")
def test_off_a_terminal_there_are_lines(
    student_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    fit(student_folder)
    lines = capsys.readouterr().out.splitlines()
    rows = metric_rows(run_folders()[0])
    for step in range(1, 6):
        line = next(line for line in lines if line.startswith(f"step {step} of 5: train/"))
        [row] = [row for row in rows if row["step"] == str(step - 1) and "train/loss" in row]
        shown = re.fullmatch(r".*train/label_loss (\S+), train/loss (\S+), .*; \d:\d\d:\d\d left", line)
        assert shown is not None, line
        assert float(shown[1]) == pytest.approx(float(row["train/label_loss"]), rel=1e-3)
        assert float(shown[2]) == pytest.approx(float(row["train/loss"]), rel=1e-3)
    for step in (2, 4, 5):
        [line] = [line for line in lines if line.startswith(f"step {step} of 5: val/")]
        [row] = [row for row in rows if row["step"] == str(step - 1) and "val/loss" in row]
        assert f"val/accuracy {float(row['val/accuracy']):.4g}" in line
    assert lines.count("validate: batch 1 of 1") == 3
    assert {"test: batch 1 of 2", "test: batch 2 of 2"} <= set(lines)


@pytest.mark.usefixtures("here")
def test_lines_are_seconds_apart(student_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(student_folder, "--test_after_fit=false")
    lines = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if "train/loss" in line]
    assert lines == ["step 1 of 5"]


@pytest.mark.usefixtures("here")
def test_on_a_terminal_there_are_bars(student_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", terminal)
    fit(student_folder)
    assert re.search(r"\rEpoch 2: .*loss=\d", terminal.getvalue())
    assert "step 1 of 5" not in terminal.getvalue()
    # an error's line begins below the bar
    with pytest.raises(SystemExit):
        fit(student_folder, "--model.learning_rate=1e30")
    assert terminal.getvalue().endswith("\n")


@pytest.mark.parametrize(("total", "expected"), [(5000, "rows: 1,003 of 5,000"), (None, "rows: 1,003, ok")])
def test_a_ticker_counts_on(
    total: int | None, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with progress.ticker("rows", total, done=1) as advance:
        advance(2)
        advance(1000, "" if total else "ok")
    assert capsys.readouterr().err.splitlines()[-1] == expected


def test_a_ticker_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress, "BAR_DELAY", 0.0)
    with progress.ticker("rows", 10) as advance:
        advance(4, "fine")
        advance(6, "better")
    assert "10/10" in terminal.getvalue()
    assert "better" in terminal.getvalue()
