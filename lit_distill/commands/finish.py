"""The end of ``fit``: test the best checkpoint, save its student, train a label-only baseline, write the record."""

import platform
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
from lit_distill.commands.report import report
from lit_distill.data.floor import floors
from lit_distill.data.selection import flags_of, teacher_accuracy
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Evaluation, Split, answer_row
from lit_distill.exporting.hugging_face import CardFacts, export_checkpoint, origin, push_folder
from lit_distill.exporting.predictor import record_task
from lit_distill.modules.base import DistillModule
from lit_distill.modules.methods import StandardModule
from lit_distill.progress import progress_bar
from lit_distill.records import NO_LABELS, RunRecord, write_predictions_file, write_record
from lit_distill.tasks import fingerprint

_LIBRARIES = ("torch", "lightning", "transformers", "datasets", "tokenizers", "numpy")


@dataclass(frozen=True)
class Run:
    """A run of ``fit``."""

    config: Namespace
    plain: dict[str, Any]  # the config in plain values
    parser: Parser  # of the config
    trainer: pl.Trainer
    module: DistillModule
    data: Any  # a `StudentDataModule`; of one without rows nothing else is asked
    history: RunHistory

    @property
    def tested(self) -> Evaluation | None:
        """The last evaluation, if it was of test."""
        evaluation = self.module.evaluation
        return evaluation if evaluation is not None and evaluation.split == "test" else None

    @property
    def selection(self) -> ModelCheckpoint | None:
        """The callback that selects the best checkpoint, once it has selected one."""
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
                return callback
        return None


def finish_fit(run: Run) -> None:
    """Test the best checkpoint, export its student, write the record and print the results."""
    config, trainer, module, data = run.config, run.trainer, run.module, run.data
    folder, fast_dev_run = run_folder(trainer), config["trainer"]["fast_dev_run"]
    trained = what_was_trained(run)
    testing = config["test_after_fit"] and data.split_rows("test") is not None
    if config["test_after_fit"] and not testing:
        rank_zero_warn(f"{data.absence('test')}: the student is saved untested")
    baseline = None
    try:
        if testing:
            # our table replaces Lightning's
            trainer.test(module, datamodule=data, ckpt_path=trained.best, verbose=False, weights_only=True)
            for logger in trainer.loggers:
                logger.log_hyperparams({"test_rows": len(run.tested.answers) if run.tested else 0})
        if testing and config["baseline_after_fit"] and not fast_dev_run:
            baseline = train_baseline(run, folder / "baseline")
    finally:
        # whatever becomes of the test
        student = save_student(run, trained.best, folder / "student", baseline or {})
    found = run_floors(run) if not fast_dev_run and trainer.is_global_zero else {}
    if not fast_dev_run:
        write_results(run, folder, trained, found)
    read = {"optimizer steps": trained.steps, "tokens read, of sources and targets": trained.tokens}
    best_losses = best_metric(run.selection)
    report(module, student=student, baseline=baseline, floors=found, read=read, best=best_losses)
    if config["push_to_hub"] is not None and student is not None and trainer.is_global_zero:
        push_folder(student, config["push_to_hub"])


@dataclass(frozen=True)
class Trained:
    """What training has done."""

    steps: int  # optimizer steps
    rows: int  # different rows that were read
    tokens: int  # source and target tokens that were read
    best: Path | None  # the best checkpoint, or else that of the last step; `None` without any


def what_was_trained(run: Run) -> Trained:
    """What a run has trained. Raises a ``UserError`` without a step."""
    trainer, steps, tokens = run.trainer, run.trainer.global_step, max(run.module.train_tokens(), 0)
    if steps == 0:
        raise UserError(
            "trainer: not one step was taken, so that nothing is tested or saved;"
            " see max_steps, max_epochs, max_time and limit_train_batches"
        )
    for logger in trainer.loggers:
        logger.log_hyperparams({"train_tokens": tokens})
    best = Path(run.selection.best_model_path) if run.selection else None
    # for a resumed run it may be gone
    best = best if best is not None and best.exists() else None
    if best is None and trainer.checkpoint_callbacks and not run.config["trainer"]["fast_dev_run"]:
        rank_zero_warn("No validation has chosen a checkpoint: the student of the last step is tested and saved")
        best = run_folder(trainer) / "checkpoints" / "last.ckpt"
        trainer.save_checkpoint(best)
    return Trained(steps, run.data.train_rows(), tokens, best)


def run_floors(run: Run) -> dict[str, float]:
    """The `floors` of the rows that were evaluated last; none, with a warning, if they cannot be found."""
    if (last := run.module.evaluation) is None:
        return {}
    try:
        return floors(run.data, {last.split: [answer.index for answer in last.answers]})[last.split]
    # a trained run is not lost for them
    except (UserError, ValueError, MemoryError) as error:
        rank_zero_warn(f"No floors: {type(error).__name__}: {error}")
        return {}


def train_baseline(run: Run, folder: Path) -> dict[str, float] | None:
    """The test metrics of a ``StandardModule`` with the same student, data, settings and number of steps.

    ``None`` if the original student is gone: unlike a resumed run, a baseline needs it.
    """
    rank_zero_info("Training the label-only baseline: same data, settings and steps.")
    # strategies and plugins serve one trainer only
    config = run.config
    arguments = {**run.parser.instantiate_classes(Namespace(trainer=config["trainer"]))["trainer"]}
    pl.seed_everything(config["seed_everything"], workers=True, verbose=False)
    shared = constructor_arguments(DistillModule).keys() - {"tasks", "objectives", "teachers", "vote"}
    settings = {name: value for name, value in config["model"]["init_args"].as_dict().items() if name in shared}
    try:
        module = StandardModule(**settings)
    except UserError as error:
        rank_zero_warn(f"No baseline: {error}")
        return None
    data = type(run.data)(**config["data"]["init_args"].as_dict() | {"tasks": module.tasks})
    best = ModelCheckpoint(folder / "checkpoints", monitor="val/accuracy", mode="max", save_on_train_epoch_end=False)
    callbacks = [ValidateEverySteps(config["validation"]["every_n_steps"]), best]
    bar = [] if arguments["enable_progress_bar"] is False else [progress_bar()]
    if config["max_tokens"] is not None:
        arguments["max_steps"] = run.trainer.max_steps
    own = {"logger": False, "callbacks": [*callbacks, *bar], "enable_model_summary": False}
    trainer = pl.Trainer(**arguments | own | {"enable_checkpointing": True})
    save_atomically(trainer)
    trainer.fit(module, datamodule=data)
    path = best.best_model_path or None
    [results] = trainer.test(module, datamodule=data, ckpt_path=path, verbose=False, weights_only=True)
    return {name: float(value) for name, value in results.items()}


def save_student(run: Run, best: Path | None, folder: Path, baseline: Mapping[str, float]) -> Path | None:
    """Export the best checkpoint to a folder, on rank 0; ``None`` without a checkpoint."""
    if best is None:
        return None
    if not best.is_file():
        rank_zero_warn(f"{best} is a sharded checkpoint: no student is saved; consolidate it and export it by hand")
        return None
    if run.trainer.is_global_zero:
        module, data, settings, tested = run.module, run.data, dict(run.module.hparams), run.tested
        base_model, licence = origin(str(settings["student"]), from_scratch=settings["from_scratch"])
        family, adapter = module.student.tokens.family, module.student.adapter
        facts = CardFacts(
            method=type(module).__name__.removesuffix("Module"),
            dataset=data.name,
            student=Path(str(settings["student"])).name,
            settings=settings,
            tasks={
                name: record_task(task, module.generation_settings(name))
                # texts without labels are no task to ask of it
                for name, task in (module.tasks.items() if data.split_rows("train") is not None else ())
            },
            data=data.describe(),
            metrics=tested.metrics if tested else {},
            rows=len(tested.answers) if tested else 0,
            baseline=baseline,
            base_model=base_model,
            license=licence,
            hub_dataset=data.hub_name,
            family=family,
            chat=family == "causal" and module.tokenizer.chat_template is not None,
            adapter_alone=adapter is not None and adapter.export == "adapter",
        )
        export_checkpoint(best, folder, facts)
    run.trainer.strategy.barrier("student")
    return folder


@rank_zero_only
def write_results(run: Run, folder: Path, trained: Trained, floor: Mapping[str, float]) -> None:
    """Write any test predictions, and a run's record with what was trained and its floors."""
    module, data, tested = run.module, run.data, run.tested
    splits: tuple[Split, ...] = ("train", "val", "test")
    # training rows with rationales, evaluated rows with gold labels
    used = {split: data.used_rows(split).rows for split in splits if data.split_rows(split) is not None}
    if tested is not None:
        # a limited run tests only some
        used["test"] = [used["test"][answer.index] for answer in tested.answers]
        write_predictions_file(folder, (answer_row(answer, tested.key) for answer in tested.answers))
    tally = Counter(flags_of(row, data.teacher_agrees, data.label_set) for row in used.get("test", ()))
    (dataset, method), arguments = names(run.config), data.hparams
    # of val, if test was left out
    chance = module.evaluation.chance() if module.evaluation else None
    record = RunRecord(
        dataset=dataset,
        method=method,
        student=Path(str(module.hparams["student"])).name,
        # texts have none, and are all read
        label_source=arguments.get("label_source", NO_LABELS),
        train_fraction=arguments.get("train_fraction", 1.0),
        seed=run.config["seed_everything"],
        data_seed=arguments["seed"],
        train_rows=trained.rows,
        test_rows=len(tested.answers) if tested else 0,
        steps=trained.steps,
        metrics={f"test/{name}": value for name, value in tested.metrics.items()} if tested else {},
        validation=best_metric(run.selection),
        train_tokens=trained.tokens,
        rationales=data.rationale_pairing if any(task.uses_output for task in data.tasks.values()) else None,
        teacher_accuracy=teacher_accuracy(tally) if "test" in used else None,
        chance=chance[1] if chance else None,
        floors=dict(floor),
        fingerprints={split: fingerprint(rows, rationales=split == "train") for split, rows in used.items()},
        **repeatable(run),
    )
    write_record(folder, record)


def repeatable(run: Run) -> dict[str, Any]:
    """Of a record, what is needed to repeat a run, and what it cost."""
    module = run.module
    return {
        "parameters": sum(parameter.numel() for parameter in module.student.parameters()),
        "config": run.plain,
        "data": run.data.describe(),
        "command": ["lit-distill", *sys.argv[1:]],
        "versions": {"lit_distill": __version__, "python": platform.python_version()}
        | {name: version(name) for name in _LIBRARIES},
        "git": repository_state(),
        "paths": {stage: asdict(choice) for stage, choice in module.chosen_paths.items()},
        "started": run.history.started,
        "wall_seconds": round(run.history.seconds, 2),
        "peak_memory_mib": round(_peak_memory(), 1),
    }


def best_metric(selection: ModelCheckpoint | None) -> dict[str, float]:
    """The metric that selected the best checkpoint, and its step."""
    if selection is None or selection.best_model_score is None:
        return {}
    step = re.search(r"step=?(\d+)", Path(selection.best_model_path).name)
    return {str(selection.monitor): float(selection.best_model_score)} | ({"step": int(step[1])} if step else {})


def repository_state() -> dict[str, Any]:
    """Commit of the working directory's repository, and whether files differ from it; empty if there is none."""
    # the user's git, from PATH
    command = ["git", "status", "--porcelain=v2", "--branch"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return {}
    oid, *lines = done.stdout.splitlines()
    return {"commit": oid.split()[-1], "changed": any(not line.startswith("#") for line in lines)}


def _peak_memory() -> float:
    """In MiB: of the accelerator, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    # in KiB on Linux, in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
