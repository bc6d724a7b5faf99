"""What a finished ``fit`` leaves for comparisons: its record, and what its student said of each test row."""

import platform
import re
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_distill import __version__
from lit_distill.checkpoints import RunHistory
from lit_distill.commands.finish import chance_level
from lit_distill.commands.runs import names
from lit_distill.data.base import RationaleDataModule
from lit_distill.data.splits import teacher_accuracy
from lit_distill.evaluation.answers import Evaluation, Split, answer_row
from lit_distill.modules.base import DistillModule
from lit_distill.records import RunRecord, write_predictions_file, write_record
from lit_distill.tasks import Row, fingerprint

_LIBRARIES = ("torch", "lightning", "transformers", "datasets", "tokenizers", "numpy")


def record_run(
    folder: Path,
    *,
    config: Namespace,
    trainer: pl.Trainer,
    module: DistillModule,
    data: RationaleDataModule,
    history: RunHistory,
    steps: int,
) -> None:
    """Write a run's record, and its test predictions where it was tested.

    Args:
        folder: the run's.
        config: what ``fit`` was given.
        trainer: it has ended.
        module: it holds its last evaluation.
        data: it holds the rows.
        history: when it began, and how long it took.
        steps: optimizer steps that were taken.
    """
    dataset, method = names(config)
    arguments, settings = data.hparams, dict(module.hparams)
    evaluation = module.evaluation
    tested = evaluation is not None and evaluation.split == "test"
    if evaluation is not None and tested:
        write_predictions_file(folder, (answer_row(answer, evaluation.key) for answer in evaluation.answers))
    record = RunRecord(
        dataset=dataset,
        method=method,
        student=Path(str(settings["student"])).name,
        label_source=arguments["label_source"],
        train_fraction=arguments["train_fraction"],
        seed=config["seed_everything"],
        data_seed=arguments["seed"],
        train_rows=len(data.used_rows("train").examples),
        test_rows=len(evaluation.answers) if evaluation is not None and tested else 0,
        steps=steps,
        metrics={f"test/{name}": value for name, value in evaluation.metrics.items()} if evaluation and tested else {},
        validation=_validation(trainer),
        rationales=data.rationale_pairing if any("rationale" in task for task in data.tasks) else None,
        parameters=sum(parameter.numel() for parameter in module.student.parameters()),
        teacher_accuracy=_teacher_accuracy(data, evaluation if tested else None),
        chance=chance[1] if evaluation and tested and (chance := chance_level(evaluation)) else None,
        fingerprints=_fingerprints(data, evaluation if tested else None),
        config=_saved_config(folder),
        data=data.describe(),
        command=_command(),
        versions={"lit_distill": __version__, "python": platform.python_version(), **_versions()},
        git=_git(),
        machine=_machine(),
        started=history.started,
        wall_seconds=round(history.seconds, 2),
        validation_seconds=round(history.validation_seconds, 2),
        peak_memory_mib=round(_peak_memory(), 1),
    )
    write_record(folder, record)


def _command() -> list[str]:
    """What was typed, without the places of the interpreter and of the installed program."""
    program = Path(sys.argv[0]).name
    if program == "lit-distill":
        return [program, *sys.argv[1:]]
    return [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]


def _validation(trainer: pl.Trainer) -> dict[str, float]:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_score is not None:
            found = {callback.monitor: float(callback.best_model_score)}
            if step := re.search(r"step=?(\d+)", Path(callback.best_model_path).name):
                found["step"] = int(step.group(1))
            return found
    return {}


def _teacher_accuracy(data: RationaleDataModule, tested: Evaluation | None) -> float | None:
    """Of the teacher's labels on the rows that were tested, or on all of test."""
    rows = data.split_rows("test")
    if rows is None:
        return None
    if tested is not None:
        rows = rows.take([answer.index for answer in tested.answers])
    return teacher_accuracy(rows, data.teacher_agrees)


def _fingerprints(data: RationaleDataModule, tested: Evaluation | None) -> dict[str, str]:
    found: dict[str, str] = {}
    splits: tuple[Split, ...] = ("train", "val", "test")
    for split in splits:
        if data.split_rows(split) is None:
            continue
        used = data.used_rows(split)
        # what was trained on, rationales included; what was evaluated on, with gold labels
        rows: list[Row] = list(used.examples)
        if split == "test" and tested is not None:
            # those that the student was asked, of which a limited run leaves some out
            rows = [rows[answer.index] for answer in tested.answers]
        found[split] = fingerprint(rows, rationales=split == "train")
    return found


def _saved_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git() -> dict[str, Any]:
    """The state of the repository that the command ran in; empty where there is none."""

    def ask(*arguments: str) -> str:
        return subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607 - whichever git the user has
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout

    try:
        return {"commit": ask("rev-parse", "HEAD").strip(), "changed": bool(ask("status", "--porcelain").strip())}
    except (OSError, subprocess.SubprocessError):
        return {}


def _machine() -> dict[str, Any]:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"system": platform.system(), "processor": platform.machine(), "threads": torch.get_num_threads()} | (
        {"devices": devices} if devices else {}
    )


def _peak_memory() -> float:
    """MiB: of the accelerator where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    # in KiB on Linux, in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
