"""The end of ``fit``: export the best student, train a label-only baseline, and write the record."""

import inspect
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lit_distill import __version__
from lit_distill.callbacks import ValidateEverySteps
from lit_distill.checkpoints import RunHistory, save_atomically
from lit_distill.commands.naming import names
from lit_distill.commands.report import chance_level
from lit_distill.data.base import RationaleDataModule
from lit_distill.data.selection import teacher_accuracy
from lit_distill.evaluation.answers import Evaluation, Split, answer_row
from lit_distill.export import CardFacts, export_checkpoint, model_card, origin
from lit_distill.files import write_text
from lit_distill.modules.base import DistillModule
from lit_distill.modules.standard import StandardModule
from lit_distill.progress import progress_bar
from lit_distill.records import RunRecord, write_predictions_file, write_record
from lit_distill.tasks import fingerprint


def save_best_student(
    trainer: pl.Trainer, module: DistillModule, data: RationaleDataModule, best: Path | None, folder: Path
) -> Path | None:
    """Export the best checkpoint to ``student`` in the run's folder, on rank 0; ``None`` without a checkpoint."""
    if best is None:
        return None
    if not best.is_file():
        rank_zero_warn(f"{best} is a sharded checkpoint: no student is saved; consolidate it and export it by hand")
        return None
    target = folder / "student"
    if trainer.is_global_zero:
        export_checkpoint(best, target, _card_facts(module, data))
    trainer.strategy.barrier("student")
    return target


@rank_zero_only
def add_baseline(
    student: Path, module: DistillModule, data: RationaleDataModule, baseline: Mapping[str, float]
) -> None:
    """Rewrite an exported student's card with the label-only baseline."""
    write_text(student / "README.md", model_card(replace(_card_facts(module, data), baseline=baseline)))


def _tested(module: DistillModule) -> Evaluation | None:
    """The last evaluation, if it was of test."""
    return module.evaluation if module.evaluation is not None and module.evaluation.split == "test" else None


def _card_facts(module: DistillModule, data: RationaleDataModule) -> CardFacts:
    settings, tested = dict(module.hparams), _tested(module)
    base_model, licence = origin(str(settings["student"]), from_scratch=settings["from_scratch"])
    return CardFacts(
        method=type(module).__name__.removesuffix("Module"),
        dataset=data.name,
        student=Path(str(settings["student"])).name,
        tasks={
            name: {"prefix": task.prefix, **module.generation_settings(name)} for name, task in module.tasks.items()
        },
        settings=settings,
        data=data.describe(),
        metrics=tested.metrics if tested else {},
        rows=len(tested.answers) if tested else 0,
        base_model=base_model,
        license=licence,
        hub_dataset=data.hub_name,
        family=module.student.tokens.family,
        chat=module.student.tokens.family == "causal" and module.tokenizer.chat_template is not None,
        adapter_alone=(adapter := module.student.adapter) is not None and adapter.export == "adapter",
    )


def train_baseline(
    config: Namespace, trainer_args: Mapping[str, Any], data_class: type[RationaleDataModule], folder: Path
) -> dict[str, float]:
    """Train, select and test a ``StandardModule`` with the same student, data, settings and number of steps.

    Args:
        config: of the run; arguments that ``StandardModule`` lacks are dropped.
        trainer_args: of the run, rebuilt, since strategies and plugins serve one trainer only.
        data_class: of the run.
        folder: for the checkpoints.

    Returns:
        The test metrics of the best checkpoint.
    """
    pl.seed_everything(config["seed_everything"], workers=True, verbose=False)
    shared = set(inspect.signature(DistillModule.__init__).parameters) - {"self", "tasks", "objectives", "teachers"}
    model_args = config["model"]["init_args"].as_dict()
    module = StandardModule(**{name: value for name, value in model_args.items() if name in shared})
    linked = {"tasks": module.tasks}
    data = data_class(**config["data"]["init_args"].as_dict() | linked)
    best = ModelCheckpoint(folder / "checkpoints", monitor="val/accuracy", mode="max", save_on_train_epoch_end=False)
    bar = [] if trainer_args.get("enable_progress_bar") is False else [progress_bar()]
    callbacks = [ValidateEverySteps(config["validation"]["every_n_steps"]), best, *bar]
    own = {"logger": False, "callbacks": callbacks, "enable_model_summary": False, "enable_checkpointing": True}
    trainer = pl.Trainer(**dict(trainer_args) | own)
    save_atomically(trainer)
    trainer.fit(module, datamodule=data)
    path = best.best_model_path or None
    [results] = trainer.test(module, datamodule=data, ckpt_path=path, verbose=False, weights_only=True)
    return {name: float(value) for name, value in results.items()}


@rank_zero_only
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
    """Write the record of a run that ended after ``steps`` optimizer steps, and any test predictions."""
    dataset, method = names(config)
    arguments, settings, tested = data.hparams, dict(module.hparams), _tested(module)
    if tested is not None:
        write_predictions_file(folder, (answer_row(answer, tested.key) for answer in tested.answers))
    chance, saved = chance_level(tested) if tested else None, folder / "config.yaml"
    record = RunRecord(
        dataset=dataset,
        method=method,
        student=Path(str(settings["student"])).name,
        label_source=arguments["label_source"],
        train_fraction=arguments["train_fraction"],
        seed=config["seed_everything"],
        data_seed=arguments["seed"],
        train_rows=len(data.used_rows("train").rows),
        test_rows=len(tested.answers) if tested else 0,
        steps=steps,
        metrics={f"test/{name}": value for name, value in tested.metrics.items()} if tested else {},
        validation=_validation(trainer),
        rationales=data.rationale_pairing if any(task.uses_output for task in data.tasks.values()) else None,
        parameters=sum(parameter.numel() for parameter in module.student.parameters()),
        teacher_accuracy=_teacher_accuracy(data, tested),
        chance=chance[1] if chance else None,
        fingerprints=_fingerprints(data, tested),
        config=yaml.safe_load(saved.read_text(encoding="utf-8")) if saved.is_file() else {},
        data=data.describe(),
        command=_command(),
        versions=_versions(),
        git=repository_state(),
        started=history.started,
        wall_seconds=round(history.seconds, 2),
        peak_memory_mib=round(_peak_memory(), 1),
    )
    write_record(folder, record)


def _command() -> list[str]:
    """The command line, without the paths of interpreter and program."""
    program = Path(sys.argv[0]).name
    words = sys.argv if program == "lit-distill" else sys.orig_argv
    return [Path(words[0]).name, *words[1:]]


def _validation(trainer: pl.Trainer) -> dict[str, float]:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_score is not None:
            step = re.search(r"step=?(\d+)", Path(callback.best_model_path).name)
            return {callback.monitor: float(callback.best_model_score)} | ({"step": int(step[1])} if step else {})
    return {}


def _teacher_accuracy(data: RationaleDataModule, tested: Evaluation | None) -> float | None:
    """Accuracy of the teacher labels on the tested rows, or on all of test."""
    rows = data.split_rows("test")
    if rows is not None and tested is not None:
        rows = [rows[answer.index] for answer in tested.answers]
    return None if rows is None else teacher_accuracy(rows, data.teacher_agrees)


def _fingerprints(data: RationaleDataModule, tested: Evaluation | None) -> dict[str, str]:
    found: dict[str, str] = {}
    splits: tuple[Split, ...] = ("train", "val", "test")
    for split in splits:
        if data.split_rows(split) is None:
            continue
        # training rows with rationales, evaluated rows with gold labels
        rows = list(data.used_rows(split).rows)
        if split == "test" and tested is not None:
            # a limited run tests only some
            rows = [rows[answer.index] for answer in tested.answers]
        found[split] = fingerprint(rows, rationales=split == "train")
    return found


def _versions() -> dict[str, str]:
    found = {"lit_distill": __version__, "python": platform.python_version()}
    for name in ("torch", "lightning", "transformers", "datasets", "tokenizers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def repository_state() -> dict[str, Any]:
    """Commit and state of the working directory's repository; empty if there is none."""

    def ask(*arguments: str) -> str:
        # the user's git, from PATH
        command = ["git", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()  # noqa: S603

    try:
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def _peak_memory() -> float:
    """In MiB: of the accelerator, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    # in KiB on Linux, in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
