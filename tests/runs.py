"""Runs of the command line in this process, small enough to be many."""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_distill.callbacks import Throughput
from lit_distill.cli import main

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "configs"

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@contextmanager
def at_work_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In a folder of its own, offline, on one thread: what a run writes or changes is seen by no other test."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LIT_DISTILL_CACHE", str(folder / "token-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # tables and help are wrapped at the terminal's width
    monkeypatch.setenv("COLUMNS", "200")
    # `main` puts the current folder on the path
    monkeypatch.setattr(sys, "path", list(sys.path))
    # nor is a user's file that one test imported found by another
    before = set(sys.modules)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    yield folder
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(folder):
            del sys.modules[name]


def run(command: str, *arguments: object) -> None:
    """Run a command; an argument that is a list stands for its items."""
    main([command, *flat(arguments)])


def flat(arguments: Sequence[object]) -> list[str]:
    """Nested arguments as one list of texts."""
    texts: list[str] = []
    for argument in arguments:
        texts += flat(argument) if isinstance(argument, list) else [str(argument)]
    return texts


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command line is refused, without its beginning."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(flat(arguments))
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2, lines
    assert len(lines) == 1, lines
    beginning = "lit_distill: error: "
    assert lines[0].startswith(beginning)
    return lines[0].removeprefix(beginning)


def small_model(student: Path, method: str = "StepByStepModule") -> list[str]:
    """A tiny student that writes little; from scratch where it has no weights."""
    from_scratch = str(not (student / "model.safetensors").exists()).lower()
    lengths = ["--model.max_label_length=3", "--model.max_rationale_length=4"]
    return [f"--model={method}", f"--model.student={student}", f"--model.from_scratch={from_scratch}", *lengths]


def toy_data(train: int = 12, batch: int = 4) -> list[str]:
    """A few rows of the toy."""
    sizes = [f"--data.train_size={train}", "--data.val_size=4", "--data.test_size=5"]
    return ["--data=ToyDataModule", *sizes, f"--data.batch_size={batch}"]


def small_trainer(steps: int = 2, every: int | None = 1) -> list[str]:
    """A few steps on CPU."""
    every_n = "null" if every is None else every
    limits = [f"--trainer.max_steps={steps}", f"--validation.every_n_steps={every_n}", "--trainer.log_every_n_steps=1"]
    return ["--trainer.accelerator=cpu", *limits, *QUIET]


def small_toy(student: Path, steps: int = 2, every: int | None = 1) -> list[str]:
    """All arguments of a run on the toy."""
    return [*small_model(student), *toy_data(), *small_trainer(steps, every)]


def run_folders(root: Path = Path("runs")) -> list[Path]:
    """The folders of the runs so far, in their order."""
    return sorted(root.glob("*/version_*"), key=lambda path: (path.parent.name, int(path.name.partition("_")[2])))


def metric_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's ``metrics.csv``, without empty cells."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def last(folder: Path) -> dict[str, Any]:
    """A run's last checkpoint."""
    loaded: dict[str, Any] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return loaded


def break_off(
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    *arguments: object,
    saving: bool = True,
    inside: bool = False,
    keyboard: bool = False,
) -> None:
    """Break off a run before micro-batch ``after``, or ``inside`` the hooks of the one before it.

    Without saving, as a kill would.
    """
    fault = KeyboardInterrupt if keyboard else FloatingPointError
    with monkeypatch.context() as patch:

        def stop(self: Throughput, trainer: Any, *args: Any) -> None:
            if trainer.fit_loop.epoch_loop.total_batch_idx == after - inside:
                raise fault

        patch.setattr(Throughput, "on_train_batch_end" if inside else "on_train_batch_start", stop)
        if not saving:
            patch.setattr("lit_distill.checkpoints.LastCheckpoint.on_exception", lambda *args: None)
        # Lightning turns Ctrl-C into an exit
        with pytest.raises(SystemExit if keyboard else FloatingPointError):
            run("fit", *arguments)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_release(root: Path, rows: int = 12) -> Path:
    """All four datasets in the released layout, a dozen rows each, with the teacher's outputs."""
    answers = ["cat", "dog"]
    for name, words in {
        "cqa": ["train", "test"], "svamp": ["train", "test"],
        "esnli": ["train", "valid", "test"], "anli1": ["train", "valid", "test"],
    }.items():  # fmt: skip
        for word in words:
            lines: list[dict[str, Any]] = []
            outputs: list[str] = []
            for i in range(rows):
                if name == "cqa":
                    answer = answers[i % 2]
                    lines.append({"id": f"{word}{i}", "question": f"{i} ?", "choices": answers, "answer": answer})
                    outputs.append(f"because {i} . So the answer is (a) {answer}.\n\nQ: a")
                elif name == "svamp":
                    lines.append({"input": f"{i} + 1 ?", "label": f"( {i} + 1 )"})
                    outputs.append(f"because {i} . The answer is ({i} + 1).\n\nQ: a")
                else:
                    label = ["entailment", "neutral", "contradiction"][i % 3]
                    # the row of ANLI has a uid, that of e-SNLI has none
                    own = {"uid": f"{word}-{i}"} if name == "anli1" else {}
                    lines.append({"premise": f"a {i}", "hypothesis": "cat", "label": i % 3, **own})
                    mark = f"\nAnswer: {label}" if name == "esnli" else f" So the answer is {label}."
                    outputs.append(f"because {i} .{mark}\n\nPremise: a")
            write_lines(root / name / f"{name}_{word}.json", lines)
            (root / name / "llm").mkdir(exist_ok=True)
            (root / name / "llm" / f"{word}_CoT_0.json").write_text(json.dumps(outputs), encoding="utf-8")
    return root
