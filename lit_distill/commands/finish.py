"""The end of ``fit``: test the best checkpoint, save its student, train a label-only baseline, write the record."""

import platform
import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from lit_distill import __version__
from lit_distill.callbacks import ValidateEverySteps
from lit_distill.checkpoints import RunHistory, save_atomically
from lit_distill.commands.loggers import names, run_folder
from lit_distill.commands.parser import Parser, constructor_arguments
from lit_distill.commands.report import chance_level, report
from lit_distill.data.base import RationaleDataModule
from lit_distill.data.selection import teacher_accuracy
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Evaluation, Split, answer_row
from lit_distill.export import CardFacts, export_checkpoint, origin, push_folder
from lit_distill.modules.base import DistillModule
from lit_distill.modules.methods import StandardModule
from lit_distill.progress import progress_bar
from lit_distill.records import RunRecord, write_predictions_file, write_record
from lit_distill.tasks import fingerprint

_LIBRARIES = ("torch", "lightning", "transformers", "datasets", "tokenizers", "numpy")


def finish_fit(
    config: Namespace,
    plain: dict[str, Any],
    parser: Parser,
    trainer: pl.Trainer,
    module: DistillModule,
    data: RationaleDataModule,
    history: RunHistory,
) -> None:
    """Test the best checkpoint, export its student, write the record and print the results.

    Args:
        config: of the run.
        plain: the config in plain values.
        parser: of the config; it builds the baseline's trainer.
        trainer: after ``fit``.
        module: the student.
        data: the data.
        history: of all parts of the run.
    """
    folder, steps, fast_dev_run = run_folder(trainer), trainer.global_step, config["trainer"]["fast_dev_run"]
    if steps == 0:
        raise UserError(
            "trainer: not one step was taken, so that nothing is tested or saved;"
            " see max_steps, max_epochs, max_time and limit_train_batches"
        )
    best = best_checkpoint(trainer)
    if best is None and trainer.checkpoint_callbacks and not fast_dev_run:
        rank_zero_warn("No validation has chosen a checkpoint: the student of the last step is tested and saved")
        best = folder / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(best)
    testing = config["test_after_fit"] and data.split_rows("test") is not None
    if config["test_after_fit"] and not testing:
        rank_zero_warn(f"{data.absence('test')}: the student is saved untested")
    baseline = None
    try:
        if testing:
            # our table replaces Lightning's
            trainer.test(module, datamodule=data, ckpt_path=best, verbose=False, weights_only=True)
        if testing and config["baseline_after_fit"] and not fast_dev_run:
            baseline = train_baseline(config, parser, type(data), folder / "baseline")
    finally:
        # whatever becomes of the test
        student = save_student(trainer, module, data, best, folder / "student", baseline)
    if not fast_dev_run:
        write_results(folder, config, plain, trainer, module, data, history, steps)
    report(module, student=student, baseline=baseline)
    if config["push_to_hub"] is not None and student is not None and trainer.is_global_zero:
        push_folder(student, config["push_to_hub"])


def best_checkpoint(trainer: pl.Trainer) -> Path | None:
    """The best checkpoint of a run; ``None`` if there is none."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            # for a resumed run it may be elsewhere, or gone
            found = Path(callback.best_model_path)
            return found if found.exists() else None
    return None


def train_baseline(
    config: Namespace, parser: Parser, data_class: type[RationaleDataModule], folder: Path
) -> dict[str, float] | None:
    """The test metrics of a ``StandardModule`` with the same student, data, settings and number of steps.

    ``None`` if the original student is gone: unlike a resumed run, a baseline needs it.
    """
    rank_zero_info("Training the label-only baseline: same data, settings and steps.")
    # strategies and plugins serve one trainer only
    arguments = {**parser.instantiate_classes(Namespace(trainer=config["trainer"]))["trainer"]}
    pl.seed_everything(config["seed_everything"], workers=True, verbose=False)
    shared = constructor_arguments(DistillModule).keys() - {"tasks", "objectives", "teachers"}
    settings = {name: value for name, value in config["model"]["init_args"].as_dict().items() if name in shared}
    try:
        module = StandardModule(**settings)
    except UserError as error:
        rank_zero_warn(f"No baseline: {error}")
        return None
    data = data_class(**config["data"]["init_args"].as_dict() | {"tasks": module.tasks})
    best = ModelCheckpoint(folder / "checkpoints", monitor="val/accuracy", mode="max", save_on_train_epoch_end=False)
    callbacks = [ValidateEverySteps(config["validation"]["every_n_steps"]), best]
    bar = [] if arguments["enable_progress_bar"] is False else [progress_bar()]
    own = {"logger": False, "callbacks": [*callbacks, *bar], "enable_model_summary": False}
    trainer = pl.Trainer(**arguments | own | {"enable_checkpointing": True})
    save_atomically(trainer)
    trainer.fit(module, datamodule=data)
    path = best.best_model_path or None
    [results] = trainer.test(module, datamodule=data, ckpt_path=path, verbose=False, weights_only=True)
    return {name: float(value) for name, value in results.items()}


def save_student(
    trainer: pl.Trainer,
    module: DistillModule,
    data: RationaleDataModule,
    best: Path | None,
    folder: Path,
    baseline: Mapping[str, float] | None,
) -> Path | None:
    """Export the best checkpoint to a folder, on rank 0; ``None`` without a checkpoint."""
    if best is None:
        return None
    if not best.is_file():
        rank_zero_warn(f"{best} is a sharded checkpoint: no student is saved; consolidate it and export it by hand")
        return None
    if trainer.is_global_zero:
        settings, tested = dict(module.hparams), _tested(module)
        base_model, licence = origin(str(settings["student"]), from_scratch=settings["from_scratch"])
        family, adapter = module.student.tokens.family, module.student.adapter
        facts = CardFacts(
            method=type(module).__name__.removesuffix("Module"),
            dataset=data.name,
            student=Path(str(settings["student"])).name,
            settings=settings,
            tasks={
                name: {"prefix": task.prefix, **module.generation_settings(name)} for name, task in module.tasks.items()
            },
            data=data.describe(),
            metrics=tested.metrics if tested else {},
            rows=len(tested.answers) if tested else 0,
            baseline=baseline or {},
            base_model=base_model,
            license=licence,
            hub_dataset=data.hub_name,
            family=family,
            chat=family == "causal" and module.tokenizer.chat_template is not None,
            adapter_alone=adapter is not None and adapter.export == "adapter",
        )
        export_checkpoint(best, folder, facts)
    trainer.strategy.barrier("student")
    return folder


def _tested(module: DistillModule) -> Evaluation | None:
    """The last evaluation, if it was of test."""
    return module.evaluation if module.evaluation is not None and module.evaluation.split == "test" else None


@rank_zero_only
def write_results(
    folder: Path,
    config: Namespace,
    plain: dict[str, Any],
    trainer: pl.Trainer,
    module: DistillModule,
    data: RationaleDataModule,
    history: RunHistory,
    steps: int,
) -> None:
    """Write any test predictions, and the record of a run that ended after ``steps`` optimizer steps."""
    tested = _tested(module)
    splits: tuple[Split, ...] = ("train", "val", "test")
    # training rows with rationales, evaluated rows with gold labels
    used = {split: list(data.used_rows(split).rows) for split in splits if data.split_rows(split) is not None}
    if tested is not None:
        # a limited run tests only some
        used["test"] = [used["test"][answer.index] for answer in tested.answers]
        write_predictions_file(folder, (answer_row(answer, tested.key) for answer in tested.answers))
    (dataset, method), arguments = names(config), data.hparams
    chance = chance_level(tested) if tested else None
    record = RunRecord(
        dataset=dataset,
        method=method,
        student=Path(str(module.hparams["student"])).name,
        label_source=arguments["label_source"],
        train_fraction=arguments["train_fraction"],
        seed=config["seed_everything"],
        data_seed=arguments["seed"],
        train_rows=len(used["train"]),
        test_rows=len(tested.answers) if tested else 0,
        steps=steps,
        metrics={f"test/{name}": value for name, value in tested.metrics.items()} if tested else {},
        validation=_validation(trainer),
        rationales=data.rationale_pairing if any(task.uses_output for task in data.tasks.values()) else None,
        parameters=sum(parameter.numel() for parameter in module.student.parameters()),
        teacher_accuracy=teacher_accuracy(used["test"], data.teacher_agrees) if "test" in used else None,
        chance=chance[1] if chance else None,
        fingerprints={split: fingerprint(rows, rationales=split == "train") for split, rows in used.items()},
        config=plain,
        data=data.describe(),
        command=_command(),
        versions={"lit_distill": __version__, "python": platform.python_version()}
        | {name: version(name) for name in _LIBRARIES},
        git=repository_state(),
        started=history.started,
        wall_seconds=round(history.seconds, 2),
        peak_memory_mib=round(_peak_memory(), 1),
    )
    write_record(folder, record)


def _validation(trainer: pl.Trainer) -> dict[str, float]:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_score is not None:
            step = re.search(r"step=?(\d+)", Path(callback.best_model_path).name)
            return {callback.monitor: float(callback.best_model_score)} | ({"step": int(step[1])} if step else {})
    return {}


def _command() -> list[str]:
    """The command line, without the paths of interpreter and program."""
    program = Path(sys.argv[0]).name
    words = sys.argv if program == "lit-distill" else sys.orig_argv
    return [Path(words[0]).name, *words[1:]]


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
