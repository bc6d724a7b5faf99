"""Runs of ``fit`` that are killed at random instants, again and again, and end as if nobody had."""

import json
import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl
import pytest

from tests.commands.forked import Forked, forking
from tests.runs import metric_rows, read_lines, run_folders, small_model, small_trainer, toy_data
from tests.test_interrupts import assert_same_run

STEPS = 24
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Mark(pl.Callback):
    """Tells other processes by files that a run trains, and validates, and makes that last."""

    def __init__(self, folder: str) -> None:
        self.training, self.validating = Path(folder, "training"), Path(folder, "validating")

    def on_train_batch_start(self, *args: object) -> None:
        self.training.touch()
        time.sleep(0.02)

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        if not trainer.sanity_checking:
            self.validating.touch()
            time.sleep(0.02)

    def on_validation_end(self, *args: object) -> None:
        self.validating.unlink(missing_ok=True)


def arguments(student: Path, folder: Path) -> list[str]:
    model = [*small_model(student), "--model.dropout=0.2", "--model.learning_rate=0.01"]
    trainer = [*small_trainer(STEPS, 4), "--trainer.accumulate_grad_batches=2", f"--trainer.default_root_dir={folder}"]
    best = ["--checkpoint.monitor=val/loss", "--checkpoint.mode=min"]
    mark = ["--trainer.callbacks=tests.test_kills.Mark", f"--trainer.callbacks.folder={folder}"]
    return ["fit", *model, *toy_data(10, 4), *trainer, *best, *mark, "--data.eval_batch_size=1", "--resume"]


def folder_of(root: Path) -> Path:
    [folder] = run_folders(root / "runs")
    return folder


def kill_once(forked: Forked, given: list[str], root: Path, number: int, *, once: str, delay: float) -> bool:
    """Start or resume a run and kill it, so long after its start, or once it is ``training`` or ``validating``.

    Returns:
        Whether it was killed; it may have ended before.
    """
    log = root / "log"
    for name in ("training", "validating"):
        (root / name).unlink(missing_ok=True)
    child = forked.start(given, str(log))
    while once and not (root / once).exists() and Path(f"/proc/{child}").exists():
        time.sleep(0.002)
    time.sleep(delay)
    with suppress(ProcessLookupError):
        os.kill(child, number)
    code = forked.wait()
    said = log.read_text(errors="replace")
    # SIGTERM before the command has begun ends it as any process
    assert code in (0, 128 + number, -number), said
    assert "Traceback" not in said, said
    return code != 0


def run_killed(
    forked: Forked, student: Path, root: Path, draw: random.Random, counts: Counter[str], *, kills: int, validating: int
) -> Path:
    """One run, killed so many times if it does not end before, and then let end."""
    root.mkdir(parents=True)
    given = arguments(student, root)
    for number in range(kills):
        once = "validating" if number < validating else draw.choice(("training", "training", "training", ""))
        sent = SIGNALS[draw.randrange(3)]
        delay = draw.uniform(0, {"validating": 0.05, "training": 0.6, "": 3.0}[once])
        if not kill_once(forked, given, root, sent, once=once, delay=delay):
            break
        counts[sent.name] += 1
        counts[once or "at any time"] += 1
    forked.start(given, str(root / "log"))
    assert forked.wait() == 0, (root / "log").read_text()
    return folder_of(root)


def assert_unharmed(whole: Path, killed: Path) -> None:
    """The same checkpoints, student, predictions and metrics; each row once; nothing beside."""
    assert_same_run(whole, killed)
    for name in ("test_predictions.jsonl", "student/model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    records = [json.loads((folder / "run.json").read_text()) for folder in (whole, killed)]
    assert records[0]["metrics"] == records[1]["metrics"]
    assert records[0]["steps"] == records[1]["steps"] == STEPS
    told = [
        Counter(
            (row["step"], name, value) for row in metric_rows(folder) for name, value in row.items() if _repeats(name)
        )
        for folder in (whole, killed)
    ]
    assert told[0] == told[1]
    assert max(told[1].values()) == 1
    assert not [path for path in killed.rglob("*") if path.name.endswith(".tmp")]
    assert read_lines(killed / "test_predictions.jsonl")


def _repeats(name: str) -> bool:
    """Whether a column is the same in every run: times and rates are not."""
    return name.endswith(("loss", "accuracy", "grad_norm"))


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIT_DISTILL_CACHE", str(tmp_path / "token-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def campaign(student: Path, root: Path, *, kills: int, validating: int, seed: int) -> Counter[str]:
    """Runs that are killed until that many kills have hit."""
    draw, counts = random.Random(seed), Counter[str]()  # noqa: S311 - no secret
    with forking() as forked:
        (root / "whole").mkdir(parents=True)
        forked.start(arguments(student, root / "whole"), str(root / "whole" / "log"))
        assert forked.wait() == 0, (root / "whole" / "log").read_text()
        whole, runs = folder_of(root / "whole"), 0
        while (done := sum(counts[one.name] for one in SIGNALS)) < kills:
            runs += 1
            left = min(10, kills - done)
            to_validate = min(left, 4 if validating > 4 else validating, validating - counts["validating"])
            killed = run_killed(forked, student, root / f"run{runs}", draw, counts, kills=left, validating=to_validate)
            assert_unharmed(whole, killed)
    counts["runs"] = runs
    return counts


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_ends_as_if_it_had_not_been(student_folder: Path, cwd: Path) -> None:
    counts = campaign(student_folder, cwd, kills=3, validating=2, seed=0)
    assert counts["validating"] == 2


@pytest.mark.slow
def test_a_hundred_kills_lose_nothing(
    student_folder: Path, cwd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = campaign(student_folder, cwd / "same", kills=80, validating=20, seed=1)
    memory = Path("/dev/shm")  # noqa: S108 - another file system
    if memory.is_dir() and memory.stat().st_dev != cwd.stat().st_dev:
        monkeypatch.setenv("TMPDIR", str(memory))
    across = campaign(student_folder, cwd / "across", kills=20, validating=4, seed=2)
    with capsys.disabled():
        print(f"\n{dict(counts)}; the temporary folder on another file system: {dict(across)}")
