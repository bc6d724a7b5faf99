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
from lit_distill.progress import Progress
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
"""What the commands take beside Lightning's arguments: name, type, default, help."""


class _SaveConfig(SaveConfigCallback):
    """Writes the whole config into the run's folder, and gives it to the loggers."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check before training that test can be evaluated; the run's folder is not known yet."""
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
        # beside the keys of the config, the two that runs are compared by
        flat = plain_config(self.config) | {"dataset": dataset, "method": method, "train_rows": len(train)}
        if any(task.uses_output for task in data.tasks.values()):
            flat["train_rationales"] = sum(row.rationale is not None for row in train)
        if data.split_rows("val") is not None:
            flat["val_rows"] = len(data.used_rows("val").rows)
        for logger in trainer.loggers:
            logger.log_hyperparams(flat)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log how many rows were tested."""
        if isinstance(evaluation := pl_module.evaluation, Evaluation):
            for logger in trainer.loggers:
                logger.log_hyperparams({"test_rows": len(evaluation.answers)})


class DistillCLI(LightningCLI):
    """LightningCLI in subclass mode, with the method's tasks and the student linked to the data when parsing."""

    _last = False
    """Whether the checkpoint to go on from was asked for as ``last``."""
    _earlier_folder: Path | None = None
    """The folder of an earlier run that this one goes on in."""

    # ------------------------------------------------------------------ arguments

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Callbacks with arguments, what ``fit`` ends with, and the links from the model to the data."""
        parser.add_lightning_class_args(ValidateEverySteps, "validation")
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/accuracy",
                "checkpoint.mode": "max",
                "checkpoint.filename": "best-step{step}",
                "checkpoint.auto_insert_metric_name": False,
                # a resumed run writes the same one in its place
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
        """The data module gets the student's tokenizer and the tasks of the method's class."""
        method = ("model.class_path", "model.init_args")
        parser.link_arguments("model.init_args.student", "data.init_args.tokenizer")
        parser.link_arguments(method, "data.init_args.tasks", compute_fn=linked_tasks)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """As Lightning's, with checks of values and contradictions."""
        commands = parser._subcommands_action
        if commands is not None and isinstance(args, list) and args and args[0].startswith("--print_completion"):
            # the other commands have parsers of their own: of them the names are completed
            for name in set(COMMANDS) - set(commands.choices):
                commands.add_subcommand(name, Parser(description=COMMANDS[name]))
        self._command = ["python", "-m", "lit_distill", *(args if isinstance(args, list) else sys.argv[1:])]
        super().parse_arguments(parser, args)
        command = self.config.get("subcommand")
        config = self.config if command is None else self.config[command]
        refuse_overruled(parser, args, config)
        check_settings(config)

    def _parse_ckpt_path(self) -> None:
        """See that the checkpoint is one, before anything is built.

        Replaces Lightning's own hook, which would let the checkpoint's arguments overrule the config.
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

    # ------------------------------------------------------------------ before anything is built

    def before_instantiate_classes(self) -> None:
        """Settle the config, name the run, and find an earlier part of it."""
        self._settle()
        name_loggers(self.config[self.subcommand], str(self.subcommand))
        self._find_earlier()

    def _settle(self) -> None:
        settle(self.config[self.subcommand], str(self.subcommand))

    def _find_earlier(self) -> None:
        """Find the run to resume, if any, and check that no other one is overwritten.

        Each process of a distributed run decides by files that none of them changes before all have joined.
        """
        config = self.config[self.subcommand]
        folder, path = fixed_folder(config), config["ckpt_path"]
        own = folder is not None and path is not None and Path(path).absolute().is_relative_to(folder.absolute())
        if config["resume"]:
            config["resume"] = False
            earlier = newest_run(config, yaml.safe_load(self._parser(self.subcommand).dump(config, skip_unset=False)))
            if earlier is not None and (earlier[0] / RECORD).exists():
                # for a job that is started again
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

    # ------------------------------------------------------------------ what is built

    def instantiate_classes(self) -> None:
        """As Lightning's; a package that is not installed is one line."""
        self._given = self.config
        self.config = self._from_checkpoint()
        strategy = self.config[str(self.subcommand)]["trainer"]["strategy"]
        name = strategy["class_path"] if isinstance(strategy, Namespace) else str(strategy)
        try:
            # FSDP gives the student its weights part by part
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
            # the very same one, which would be read from its files once more
            self.datamodule.tokenizer = self.model.student.tokens
            # what is saved and logged of a resumed run names the student that it began with
            given = self.config[self.subcommand]["model"]["init_args"]
            for name in ("student", "from_scratch"):
                self.model.hparams[name] = self.model._hparams_initial[name] = given[name]
            return
        # out here it keeps its own traceback and cause, without jsonargparse's around it
        raise error

    def _from_checkpoint(self) -> Namespace:
        """The config to build from: a checkpoint brings its own student, neither hub nor original folder is read."""
        whole: Namespace = self.config.clone()
        config = whole[str(self.subcommand)]
        path = config["ckpt_path"]
        if self._earlier_folder is not None:
            continue_loggers(config, self._earlier_folder, self._progress)
        if path is not None and Path(path).is_file():
            # its weights are read twice, here and by Lightning; to draw random ones first takes several times as long
            config["model"]["init_args"].update(Namespace(student=str(path), from_scratch=False))
            config["data"]["init_args"]["tokenizer"] = str(path)
        return whole

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """With our callbacks, and checkpoints only where they are enabled."""
        self.config = self._given
        built = self.config_init[self.subcommand]
        self._history = RunHistory(run_folder)
        callbacks: list[pl.Callback] = [self._history, Throughput(), SampleTable()]
        if built["trainer"]["enable_progress_bar"] is not False:
            callbacks.insert(0, Progress())
        if built["trainer"]["enable_checkpointing"] is False or built["trainer"]["fast_dev_run"]:
            self._parser(self.subcommand).callback_keys = ["validation"]
        else:
            callbacks.insert(0, LastCheckpoint(dirpath=built["checkpoint"].dirpath))
        self.trainer_defaults["callbacks"] = callbacks
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ImportError, ValueError, TypeError) as error:
            # all that a trainer is built from is its arguments and the machine
            raise UserError(f"trainer: {error}") from error
        save_atomically(trainer)
        # before those that Lightning adds by itself, too
        trainer.callbacks.insert(0, StopAtSignals())  # type: ignore[attr-defined]  # not declared by Lightning
        if self._earlier_folder is not None:
            self._history.lock(self._earlier_folder)
            keep_metrics(trainer.loggers, self._progress)
        return trainer

    # ------------------------------------------------------------------ the command and what follows it

    def _run_subcommand(self, subcommand: str) -> None:
        """As Lightning's; a W&B run ends with its command, so that the next one in this process is another run."""
        failed = True
        try:
            super()._run_subcommand(subcommand)
            failed = False
        except UserError:
            raise
        except OSError as error:
            # of a write to a full disk the system names no file
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
        """Print what an interrupted ``fit`` has saved, and the command that goes on from there."""
        trainer, command, what = self.trainer, self._command, "nothing was trained that could be kept"
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, LastCheckpoint) and callback.dirpath and callback.path.exists():
                what = f"saved in {callback.path.parent.parent}"
                command = [*_without_checkpoint(command), "--resume"]
        of = f" of {trainer.max_steps}" if trainer.max_steps != -1 else ""
        print(f"Stopped by {stopped.name} at step {trainer.global_step}{of}: {what}", file=sys.stderr)
        print(f"To go on: {shlex.join(command)}", file=sys.stderr)

    def before_fit(self) -> None:
        """See that the student can be pushed where it is to go."""
        if (repository := self.config[self.subcommand]["push_to_hub"]) is not None and self.trainer.is_global_zero:
            check_hub(repository)

    def after_fit(self) -> None:
        """Test the best checkpoint once, save its student, write the record and print the results."""
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
                # Lightning's own table is left out for ours
                trainer.test(model, datamodule=data, ckpt_path=best, verbose=False, weights_only=True)
        finally:
            # whatever test stumbled over, what was trained is kept
            student = save_best_student(trainer, model, data, best, folder)
        baseline = None
        if config["baseline_after_fit"] and tested and not fast_dev_run:
            baseline = self._baseline(folder)
            if student is not None and baseline is not None:
                add_baseline(student, model, data, baseline)
        if not fast_dev_run:
            record_run(folder, config=config, trainer=trainer, module=model, data=data, history=history, steps=steps)
        seconds, validation = history.seconds, history.validation_seconds
        timing = f"Validation took {validation:.0f} s of {seconds:.0f} s ({validation / seconds:.0%})."
        report(model, student=student, baseline=baseline, timing=timing if validation else "")
        if config["push_to_hub"] is not None and student is not None and trainer.is_global_zero:
            push_folder(student, config["push_to_hub"])

    def _baseline(self, folder: Path) -> dict[str, float] | None:
        rank_zero_info("Training the label-only baseline: same data, settings and steps.")
        config = self.config[self.subcommand]
        try:
            trainer = self._parser(self.subcommand).instantiate_classes(Namespace(trainer=config["trainer"]))["trainer"]
            return train_baseline(config, dict(trainer), type(self.datamodule), folder / "baseline")
        except UserError as error:
            # a resumed run does not need its original student, a baseline from the start does
            rank_zero_warn(f"No baseline: {error}")
            return None

    def after_validate(self) -> None:
        """The metrics as a table."""
        report(self.model)

    after_test = after_validate

    def predict(self, model: DistillModule, datamodule: RationaleDataModule, **kwargs: Any) -> None:
        """Write predictions as JSON lines."""
        kwargs.pop("return_predictions", None)
        target = self.config[self.subcommand]["predictions"]
        path = Path(target) if target else run_folder(self.trainer) / "predictions.jsonl"
        write_predictions(self.trainer, model, datamodule, path, **kwargs)


def _without_checkpoint(command: Sequence[str]) -> Iterator[str]:
    """A command without ``--ckpt_path``: ``--resume`` finds the checkpoint by itself."""
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
        args: the arguments as LightningCLI takes them.
        cli: what runs them.
    """
    # matrix products in TF32 where the hardware has it: T5 is trained in it, and float32 on it costs several times more
    torch.set_float32_matmul_precision("high")
    # LightningCLI hands each command's parser what stands under its name
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
