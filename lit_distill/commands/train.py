"""``fit``, ``validate``, ``test`` and ``predict``: LightningCLI over methods and datasets."""

import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from lit_distill.callbacks import SampleTable, Throughput, ValidateEverySteps
from lit_distill.checkpoints import BestCheckpoint, LastCheckpoint, RunHistory, StopAtSignals, save_atomically
from lit_distill.commands.finish import add_baseline, record_run, save_best_student, train_baseline
from lit_distill.commands.naming import fixed_folder, name_loggers, names, plain_config, run_folder
from lit_distill.commands.parser import Parser, Raised, import_class
from lit_distill.commands.predict import write_predictions
from lit_distill.commands.report import report
from lit_distill.commands.resume import (
    best_checkpoint,
    check_same_training,
    check_unused,
    continue_loggers,
    find_checkpoint,
    keep_metrics,
    newest_run,
    read_progress,
)
from lit_distill.commands.settings import check_settings, linked_tasks, refuse_overruled, settle
from lit_distill.data.base import RationaleDataModule
from lit_distill.errors import UserError
from lit_distill.evaluation.answers import Evaluation
from lit_distill.export import check_hub, push_folder
from lit_distill.files import write_text
from lit_distill.interrupts import Interrupted, interruptible
from lit_distill.messages import COMMANDS, DESCRIPTION
from lit_distill.modules.base import DistillModule
from lit_distill.progress import progress_bar
from lit_distill.records import RECORD
from lit_distill.students.sharding import deferred

_OPTIONS: Sequence[tuple[str, Any, object, str]] = (
    ("cpu_threads", int | None, None, "Threads of one operation on the CPU; a tiny student is fastest with 1."),
    ("test_after_fit", bool, True, "End fit with one test of the best checkpoint."),
    (
        "baseline_after_fit",
        bool,
        False,
        "After fit, train the label-only baseline for as many steps, and print it too.",
    ),
    ("push_to_hub", str | None, None, "Hugging Face repository that fit uploads its student to, as in user/name."),
    ("predictions", str | None, None, "JSON lines file that predict writes; by default in the run's folder."),
)
"""Options besides Lightning's: name, type, default, help."""


class _SaveConfig(SaveConfigCallback):
    """Saves the whole config in the run's folder and logs it."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check early that test can be evaluated."""
        data: RationaleDataModule = trainer.datamodule  # type: ignore[attr-defined]
        # the record reads it in any case
        if stage == "fit" and data.split_rows("test") is not None and self.config["test_after_fit"]:
            data.check_split("test", "test")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save and log, on rank 0."""
        # on every rank, as finding the folder is a collective
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / self.config_filename, self.parser.dump(self.config, skip_unset=False))
        data: RationaleDataModule = trainer.datamodule  # type: ignore[attr-defined]
        train = data.used_rows("train").rows
        dataset, method = names(self.config)
        # with the two extra keys for comparing runs
        flat = plain_config(self.config) | {"dataset": dataset, "method": method, "train_rows": len(train)}
        if any(task.uses_output for task in data.tasks.values()):
            flat["train_rationales"] = sum(row.rationale is not None for row in train)
        if data.split_rows("val") is not None:
            flat["val_rows"] = len(data.used_rows("val").rows)
        for logger in trainer.loggers:
            logger.log_hyperparams(flat)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the number of tested rows."""
        if isinstance(evaluation := pl_module.evaluation, Evaluation):
            for logger in trainer.loggers:
                logger.log_hyperparams({"test_rows": len(evaluation.answers)})


class DistillCLI(LightningCLI):
    """LightningCLI in subclass mode; links the method's tasks and the student to the data."""

    _last = False
    """Whether ``--ckpt_path last`` was given."""
    _earlier_folder: Path | None = None  # the folder of the run that is resumed

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Callbacks, our own options, and links from the model to the data."""
        parser.add_lightning_class_args(ValidateEverySteps, "validation")
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/accuracy",
                "checkpoint.mode": "max",
                "checkpoint.filename": "best-step{step}",
                "checkpoint.auto_insert_metric_name": False,
                # a resumed run rewrites it
                "checkpoint.enable_version_counter": False,
                "checkpoint.save_on_train_epoch_end": False,
            }
        )
        for name, kind, default, text in _OPTIONS:
            parser.add_argument(f"--{name}", type=kind, default=default, help=text)
        parser.add_argument(
            "--resume",
            action="store_true",
            help="Go on with the newest run of this configuration, in its folder, unless it is finished; fit only.",
        )
        self.add_links(parser)

    def add_links(self, parser: LightningArgumentParser) -> None:
        """Pass the student's tokenizer and the method's tasks to the data module."""
        method = ("model.class_path", "model.init_args")
        parser.link_arguments("model.init_args.student", "data.init_args.tokenizer")
        parser.link_arguments(method, "data.init_args.tasks", compute_fn=linked_tasks)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """As Lightning's, with our checks."""
        commands = parser._subcommands_action
        if commands is not None and isinstance(args, list) and args and args[0].startswith("--print_completion"):
            # other commands have their own parsers: complete only their names
            for name in set(COMMANDS) - set(commands.choices):
                commands.add_subcommand(name, Parser(description=COMMANDS[name]))
        self._command = ["python", "-m", "lit_distill", *(args if isinstance(args, list) else sys.argv[1:])]
        super().parse_arguments(parser, args)
        command = self.config.get("subcommand")
        config = self.config if command is None else self.config[command]
        refuse_overruled(parser, args, config)
        check_settings(config)

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint before anything is built.

        Replaces Lightning's hook, with which the checkpoint's arguments would override the config.
        """
        if (command := self.config.get("subcommand")) is None:
            return
        config = self.config[command]
        self._last = config["ckpt_path"] == "last"
        if config["resume"]:
            if command != "fit":
                raise UserError("resume: only fit goes on with a run; to evaluate one give --ckpt_path")
            if config["ckpt_path"] not in (None, "last"):
                raise UserError("ckpt_path: not with --resume, which finds the run and its newest checkpoint by itself")
            config["ckpt_path"] = None
        folder = config["checkpoint"]["dirpath"]
        config["ckpt_path"] = find_checkpoint(config["ckpt_path"], folder, required=command != "fit")

    def before_instantiate_classes(self) -> None:
        """Finish the config, name the run, and find the run to resume."""
        self._settle()
        name_loggers(self.config[self.subcommand], str(self.subcommand))
        self._find_earlier()

    def _settle(self) -> None:
        settle(self.config[self.subcommand], str(self.subcommand))

    def _find_earlier(self) -> None:
        """Find the run to resume, if any, and check that no other is overwritten.

        All processes of a distributed run decide from files that do not change before all have joined.
        """
        config = self.config[self.subcommand]
        folder, path = fixed_folder(config), config["ckpt_path"]
        own = folder is not None and path is not None and Path(path).absolute().is_relative_to(folder.absolute())
        if config["resume"]:
            config["resume"] = False
            earlier = newest_run(config, yaml.safe_load(self._parser(self.subcommand).dump(config, skip_unset=False)))
            if earlier is not None and (earlier[0] / RECORD).exists():
                # for restarted jobs
                rank_zero_only(print)(f"--resume: this run is finished: {earlier[0]}")
                raise SystemExit(0)
            if earlier is not None:
                self._earlier_folder, config["ckpt_path"] = earlier[0], earlier[1] and str(earlier[1])
                start = earlier[1] or "its beginning"
                rank_zero_info(f"--resume: going on with {earlier[0]} from {start}")
        elif self.subcommand == "fit" and folder is not None and (own or self._last) and not (folder / RECORD).exists():
            self._earlier_folder = folder
        if self._earlier_folder is None:
            check_unused(config, str(self.subcommand))
        else:
            warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
        self._progress = read_progress(config["ckpt_path"])
        if self.subcommand == "fit":
            check_same_training(config, import_class(config["model"]["class_path"]), self._progress)

    def instantiate_classes(self) -> None:
        """As Lightning's; a missing package is a one-line error."""
        self._given = self.config
        self.config = self._from_checkpoint()
        strategy = self.config[str(self.subcommand)]["trainer"]["strategy"]
        name = strategy["class_path"] if isinstance(strategy, Namespace) else str(strategy)
        try:
            # FSDP loads weights in parts
            with deferred() if "fsdp" in name.lower() else nullcontext():
                super().instantiate_classes()
        except Raised as raised:
            error: Exception = raised.error
        except ValueError as unbuilt:
            lacking = next((e for e in _chain(unbuilt) if isinstance(e, ModuleNotFoundError)), None)
            if lacking is None:
                raise
            raise UserError(f"trainer: {lacking}") from unbuilt
        else:
            # share it, to read its files only once
            self.datamodule.tokenizer = self.model.student.tokens
            # a resumed run records its original student
            given = self.config[self.subcommand]["model"]["init_args"]
            for name in ("student", "from_scratch"):
                self.model.hparams[name] = self.model._hparams_initial[name] = given[name]
            return
        # raised here with its own traceback, without jsonargparse's
        raise error

    def _from_checkpoint(self) -> Namespace:
        """The config to build from: the student comes from the checkpoint, not from the hub or its folder."""
        whole: Namespace = self.config.clone()
        config = whole[str(self.subcommand)]
        path = config["ckpt_path"]
        if self._earlier_folder is not None:
            continue_loggers(config, self._earlier_folder, self._progress)
        if path is not None and Path(path).is_file():
            # reading weights twice (here and in Lightning) is faster than random initialisation
            config["model"]["init_args"].update(Namespace(student=str(path), from_scratch=False))
            config["data"]["init_args"]["tokenizer"] = str(path)
        return whole

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """With our callbacks, and checkpoints only if enabled."""
        self.config = self._given
        built = self.config_init[self.subcommand]
        self._history = RunHistory(run_folder)
        callbacks: list[pl.Callback] = [self._history, Throughput(), SampleTable()]
        if built["trainer"]["enable_progress_bar"] is not False:
            callbacks.insert(0, progress_bar())
        if built["trainer"]["enable_checkpointing"] is False or built["trainer"]["fast_dev_run"]:
            self._parser(self.subcommand).callback_keys = ["validation"]
        else:
            callbacks.insert(0, LastCheckpoint(dirpath=built["checkpoint"].dirpath))
        self.trainer_defaults["callbacks"] = callbacks
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ImportError, ValueError, TypeError) as error:
            # a trainer depends only on its arguments and the machine
            raise UserError(f"trainer: {error}") from error
        save_atomically(trainer)
        # before Lightning's own, too
        trainer.callbacks.insert(0, StopAtSignals())  # type: ignore[attr-defined]  # not declared by Lightning
        if self._earlier_folder is not None:
            self._history.lock(self._earlier_folder)
            keep_metrics(trainer.loggers, self._progress)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """As Lightning's; also ends the W&B run, so that the next command starts a new one."""
        failed = True
        try:
            super()._run_subcommand(subcommand)
            failed = False
        except UserError:
            raise
        except OSError as error:
            # the error of a full disk names no file
            error.filename = error.filename or str(run_folder(self.trainer))
            raise
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            if not any(frame.filename.endswith("checkpoint_connector.py") for frame in frames):
                raise
            path, reason = str(self.config[subcommand]["ckpt_path"]), " ".join(str(error).split())[:300]
            kind = type(error).__name__
            raise UserError(f"ckpt_path: {path!r} does not fit what is run here ({kind}: {reason})") from error
        except Interrupted as stopped:
            if subcommand == "fit":
                self._say_how_to_go_on(stopped)
            raise
        finally:
            self._history.release()
            if any(isinstance(logger, WandbLogger) for logger in self.trainer.loggers):
                import wandb

                wandb.finish(exit_code=int(failed))

    @rank_zero_only
    def _say_how_to_go_on(self, stopped: Interrupted) -> None:
        """Print what an interrupted ``fit`` has saved, and the command that resumes it."""
        trainer, command, what = self.trainer, self._command, "nothing was trained that could be kept"
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, LastCheckpoint) and callback.dirpath and callback.path.exists():
                what = f"saved in {callback.path.parent.parent}"
                command = [*_without_checkpoint(command), "--resume"]
        of = f" of {trainer.max_steps}" if trainer.max_steps != -1 else ""
        print(f"Stopped by {stopped.name} at step {trainer.global_step}{of}: {what}", file=sys.stderr)
        print(f"To go on: {shlex.join(command)}", file=sys.stderr)

    def before_fit(self) -> None:
        """Check that the hub repository can be written to."""
        if (repository := self.config[self.subcommand]["push_to_hub"]) is not None and self.trainer.is_global_zero:
            check_hub(repository)

    def after_fit(self) -> None:
        """Test the best checkpoint, export its student, write the record and print the results."""
        config, trainer, model, data = self.config[self.subcommand], self.trainer, self.model, self.datamodule
        folder, steps, history = run_folder(trainer), trainer.global_step, self._history
        fast_dev_run = config["trainer"]["fast_dev_run"]
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
        tested = config["test_after_fit"] and data.split_rows("test") is not None
        if config["test_after_fit"] and not tested:
            rank_zero_warn(f"{data.absence('test')}: the student is saved untested")
        try:
            if tested:
                # our table replaces Lightning's
                trainer.test(model, datamodule=data, ckpt_path=best, verbose=False, weights_only=True)
        finally:
            # export the student even if test failed
            student = save_best_student(trainer, model, data, best, folder)
        baseline = None
        if config["baseline_after_fit"] and tested and not fast_dev_run:
            baseline = self._baseline(folder)
            if student is not None and baseline is not None:
                add_baseline(student, model, data, baseline)
        if not fast_dev_run:
            record_run(folder, config=config, trainer=trainer, module=model, data=data, history=history, steps=steps)
        report(model, student=student, baseline=baseline)
        if config["push_to_hub"] is not None and student is not None and trainer.is_global_zero:
            push_folder(student, config["push_to_hub"])

    def _baseline(self, folder: Path) -> dict[str, float] | None:
        rank_zero_info("Training the label-only baseline: same data, settings and steps.")
        config = self.config[self.subcommand]
        try:
            trainer = self._parser(self.subcommand).instantiate_classes(Namespace(trainer=config["trainer"]))["trainer"]
            return train_baseline(config, dict(trainer), type(self.datamodule), folder / "baseline")
        except UserError as error:
            # unlike a resumed run, a baseline needs the original student
            rank_zero_warn(f"No baseline: {error}")
            return None

    def after_validate(self) -> None:
        """Print the metrics."""
        report(self.model)

    after_test = after_validate

    def predict(self, model: DistillModule, datamodule: RationaleDataModule, **kwargs: Any) -> None:
        """Write predictions as JSON lines."""
        kwargs.pop("return_predictions", None)
        target = self.config[self.subcommand]["predictions"]
        path = Path(target) if target else run_folder(self.trainer) / "predictions.jsonl"
        write_predictions(self.trainer, model, datamodule, path, **kwargs)


def _without_checkpoint(command: Sequence[str]) -> Iterator[str]:
    """A command without ``--ckpt_path``: ``--resume`` finds the checkpoint."""
    values = iter(command)
    for value in values:
        if value == "--ckpt_path":
            next(values, None)
        elif value != "--resume" and not value.startswith("--ckpt_path="):
            yield value


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@interruptible()
def run_trainer(args: ArgsType, cli: type[DistillCLI] = DistillCLI) -> DistillCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        args: as LightningCLI takes them.
        cli: the class to run.
    """
    # TF32 matrix products where supported: several times faster than float32, and good enough for T5
    torch.set_float32_matmul_precision("high")
    # LightningCLI passes each command's parser its section of the config
    described = {name: {"description": text} for name, text in COMMANDS.items() if name in DistillCLI.subcommands()}
    return cli(
        DistillModule,
        RationaleDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=args,
        parser_class=Parser,
        parser_kwargs={"prog": "lit-distill", "description": DESCRIPTION, **described},
        save_config_callback=_SaveConfig,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        trainer_defaults={
            "check_val_every_n_epoch": None,
            "max_epochs": -1,
            "max_steps": 10_000,
            "log_every_n_steps": 10,
        },
    )
