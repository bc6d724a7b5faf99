"""``fit``, ``validate``, ``test`` and ``predict``: build student, data and trainer from a config, and run."""

import shlex
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lit_distill.callbacks import SampleTable, Throughput, TokenBudget, ValidateEverySteps
from lit_distill.checkpoints import BestCheckpoint, LastCheckpoint, RunHistory, StopAtSignals, save_atomically
from lit_distill.commands.finish import Run, finish_fit
from lit_distill.commands.loggers import (
    continue_loggers,
    keep_metrics,
    logger_root,
    loggers_of,
    name_loggers,
    names,
    run_folder,
)
from lit_distill.commands.parser import Option, Parser, Raised, constructor_arguments
from lit_distill.commands.report import report, write_predictions
from lit_distill.commands.resume import CONFIG, check_checkpoint, check_training, check_unused, find_run, read_progress
from lit_distill.commands.settings import linked_tasks, parse_settings, settle
from lit_distill.data.base import RationaleDataModule
from lit_distill.data.needs import check_split
from lit_distill.data.student import StudentDataModule
from lit_distill.errors import UserError
from lit_distill.exporting.engine import Engine, EngineName, load_engine
from lit_distill.exporting.engine_student import run_on
from lit_distill.exporting.hugging_face import check_hub
from lit_distill.files import flatten, write_text
from lit_distill.interrupts import Interrupted, interruptible
from lit_distill.messages import COMMANDS
from lit_distill.modules.base import DistillModule
from lit_distill.progress import progress_bar
from lit_distill.students.sharding import deferred

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")

_WITHOUT_LABELS = ("fit", "validate")
"""Those that a corpus will do for."""

_OPTIONS: Sequence[Option] = (
    ("seed_everything", bool | int, 0, "Seed of initialisation and dropout; true draws one."),
    ("ckpt_path", str | None, None, "Checkpoint to go on from or to evaluate."),
    ("weights_only", bool, True, "Load plain data only from a checkpoint; anything else would be code to run."),
    ("variant", str | None, None, "What comparisons call this run beside its method; a grid's overlay sets it."),
    ("max_tokens", int | None, None, "Train until about so many tokens are read, in place of trainer.max_steps."),
    ("cpu_threads", int | None, None, "Threads of one operation on the CPU; a tiny student is fastest with 1."),
    ("test_after_fit", bool, True, "End fit with one test of the best checkpoint."),
    ("baseline_after_fit", bool, False, "After fit, train the label-only baseline for as many steps, too."),
    ("push_to_hub", str | None, None, "Hugging Face repository that fit uploads its student to, as in user/name."),
    ("predictions", str | None, None, "JSON lines file that predict writes; by default in the run's folder."),
)

_ENGINE: Sequence[Option] = (
    ("engine", EngineName, "transformers", "What predicts; for ctranslate2 model.student is a folder of `export`."),
)

_DEFAULTS = {
    "trainer.check_val_every_n_epoch": None,
    "trainer.max_epochs": -1,
    "trainer.max_steps": 10_000,
    "trainer.log_every_n_steps": 10,
    "checkpoint.monitor": "val/accuracy",
    "checkpoint.mode": "max",
    "checkpoint.filename": "best-step{step}",
    "checkpoint.auto_insert_metric_name": False,
    # a resumed run rewrites it
    "checkpoint.enable_version_counter": False,
    "checkpoint.save_on_train_epoch_end": False,
}


def train_parser(command: str, *, model: bool = True, data: bool = True) -> Parser:
    """The parser of a command that takes configs of ``fit``; without ``model`` or ``data``, these need not have one."""
    parser = Parser(prog=f"lit-distill {command}", description=COMMANDS[command])
    parser.add_argument("-c", "--config", action="config", help="Path to a configuration file in YAML.")
    parser.add_lightning_class_args(pl.Trainer, "trainer")
    parser.add_lightning_class_args(DistillModule, "model", subclass_mode=True, required=model)
    kind = StudentDataModule if command in _WITHOUT_LABELS else RationaleDataModule
    parser.add_lightning_class_args(kind, "data", subclass_mode=True, required=data)
    parser.add_lightning_class_args(ValidateEverySteps, "validation")
    parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
    parser.set_defaults(_DEFAULTS)
    parser.add_options([*_OPTIONS, *(_ENGINE if command == "predict" else ())])
    text = "Go on with the newest run of this configuration, in its folder, unless it is finished; fit only."
    parser.add_argument("--resume", action="store_true", help=text)
    if model:
        method = ("model.class_path", "model.init_args")
        parser.link_arguments("model.init_args.student", "data.init_args.tokenizer")
        parser.link_arguments(method, "data.init_args.tasks", compute_fn=linked_tasks)
    return parser


class SaveConfig(Callback):
    """Saves the whole config, as YAML, in the run's folder and in checkpoints, and logs it."""

    def __init__(self, config: Namespace, text: str) -> None:
        self.config, self.text = config, text
        self.plain: dict[str, Any] = yaml.safe_load(text)

    def state_dict(self) -> dict[str, Any]:
        return {"config": self.plain}

    @staticmethod
    def of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
        """The config that a checkpoint was trained with; empty if it holds none."""
        return dict(checkpoint.get("callbacks", {}).get(SaveConfig.__qualname__, {}).get("config", {}))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # not declared by Lightning
        # before training; the record reads test in any case
        if stage == "fit" and self.config["test_after_fit"] and data.split_rows("test") is not None:
            check_split(data, "test", "test")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # on every rank, as finding the folder is a collective
        folder = run_folder(trainer)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, self.text)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]  # not declared by Lightning
        dataset, method = names(self.config)
        flat = flatten(self.config.as_dict()).items()
        logged = {key: value if isinstance(value, int | float | bool | None) else str(value) for key, value in flat}
        # for comparing runs
        logged |= {"dataset": dataset, "method": method}
        if data.split_rows("train") is not None:
            train = data.used_rows("train")
            logged["train_rows"] = len(train.rows)
            if any(task.uses_output for task in data.tasks.values()):
                logged["train_rationales"] = len(train.with_rationale)
            if data.split_rows("val") is not None:
                logged["val_rows"] = len(data.used_rows("val").rows)
        for logger in trainer.loggers:
            logger.log_hyperparams(logged)


@interruptible()
def run_trainer(command: str, args: list[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` with the arguments after it."""
    # TF32 matrix products where supported: several times faster than float32, and good enough for T5
    torch.set_float32_matmul_precision("high")
    fit, parser = command == "fit", train_parser(command)
    config = parse_settings(parser, args)
    if config["resume"] and not fit:
        raise UserError("resume: only fit goes on with a run; to evaluate one give --ckpt_path")
    if config["resume"] and config["ckpt_path"] is not None:
        raise UserError("ckpt_path: not with --resume, which finds the run and its newest checkpoint by itself")
    if config["ckpt_path"] is not None:
        check_checkpoint(config["ckpt_path"])
    if (seed := config["seed_everything"]) is not False:
        config["seed_everything"] = pl.seed_everything(None if seed is True else seed, workers=True)
    if config["cpu_threads"] is not None:
        torch.set_num_threads(config["cpu_threads"])
    engine = _engine(config)
    settle(config, command)
    name_loggers(config, command)
    # of a new run it is not needed
    plain = yaml.safe_load(parser.dump(config, skip_unset=False)) if config["resume"] else {}
    folder = find_run(config, plain) if fit else None
    if folder is None:
        check_unused(config, fit=fit)
    else:
        warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
    progress = read_progress(config["ckpt_path"])
    # what was parsed is valid
    saving = SaveConfig(config, parser.dump(config, skip_unset=False, skip_validation=True))
    if fit:
        trained = SaveConfig.of(progress)
        if progress and not trained and folder is None:
            rank_zero_warn("ckpt_path: the checkpoint holds no config to compare with the one given here")
        check_training(saving.plain, trained, constructor_arguments(DistillModule))
    history = RunHistory(run_folder)
    with nullcontext() if engine is None else deferred():
        trainer, module, data = build(parser, _to_build(config, folder, progress), [history, saving])
    if engine is not None:
        run_on(engine, module)
    # a resumed run records its original student
    for name in ("student", "from_scratch"):
        module.hparams[name] = module._hparams_initial[name] = config["model"]["init_args"][name]
    roots = [root for logger in loggers_of(config) for root in (logger_root(logger), *logger_root(logger).parents)]
    made = [root for root in roots if not root.exists()]
    failed = True
    try:
        if folder is not None:
            history.lock(folder)
            keep_metrics(trainer.loggers, progress.get("global_step", 0))
        checkpoint = {"ckpt_path": config["ckpt_path"], "weights_only": config["weights_only"]}
        if command != "predict":
            module.check_teachers(trainer, command)
        if fit:
            if config["push_to_hub"] is not None and trainer.is_global_zero:
                check_hub(config["push_to_hub"])
            trainer.fit(module, datamodule=data, **checkpoint)
            finish_fit(Run(config, saving.plain, parser, trainer, module, data, history))
        elif command == "predict":
            path = Path(config["predictions"] or run_folder(trainer) / "predictions.jsonl")
            write_predictions(trainer, module, data, path, **checkpoint)
        else:
            # our table of metrics, with intervals, replaces Lightning's
            getattr(trainer, command)(module, datamodule=data, verbose=False, **checkpoint)
            report(module)
        failed = False
    except UserError:
        # the folders that were made for a run that is refused; where there are files, they stay
        for place in (*(Path(logger.log_dir or "") for logger in trainer.loggers), *made):
            with suppress(OSError):
                place.rmdir()
        raise
    except OSError as error:
        # the error of a full disk names no file
        error.filename = error.filename or str(run_folder(trainer))
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not any(frame.filename.endswith("checkpoint_connector.py") for frame in frames):
            raise
        path, reason = config["ckpt_path"], " ".join(str(error).split())[:300]
        kind = type(error).__name__
        raise UserError(f"ckpt_path: {path!r} does not fit what is run here ({kind}: {reason})") from error
    except Interrupted as stopped:
        if fit:
            _say_how_to_go_on(stopped, trainer, args)
        raise
    finally:
        history.release()
        if any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
            import wandb

            # the next command of this process starts a new run
            wandb.finish(exit_code=int(failed))


def _engine(config: Namespace) -> Engine | None:
    """The engine of an export that is to predict, and its student without weights in the config; else ``None``."""
    if config.get("engine", "transformers") == "transformers":
        return None
    if config["ckpt_path"] is not None:
        raise UserError("ckpt_path: not with --engine ctranslate2, for which model.student is a folder of `export`")
    config["model"]["init_args"].update(Namespace(from_scratch=False, adapter=None))
    return load_engine(config["model"]["init_args"]["student"], "ctranslate2")


def _to_build(config: Namespace, folder: Path | None, progress: Mapping[str, Any]) -> Namespace:
    """The config to build from: the student comes from the checkpoint, not from the hub or its folder."""
    built: Namespace = config.clone()
    if folder is not None:
        continue_loggers(built, folder, progress)
    path = config["ckpt_path"]
    if path is not None and Path(path).is_file():
        # reading weights twice (here and in Lightning) is faster than random initialisation
        built["model"]["init_args"].update(Namespace(student=str(path), from_scratch=False))
        built["data"]["init_args"]["tokenizer"] = str(path)
    return built


def build(parser: Parser, config: Namespace, callbacks: Sequence[Callback]) -> tuple[pl.Trainer, DistillModule, Any]:
    """Build everything; exceptions of our own and of a user's classes pass through."""
    strategy = config["trainer"]["strategy"]
    name = strategy["class_path"] if isinstance(strategy, Namespace) else str(strategy)
    try:
        # FSDP loads weights in parts
        with deferred() if "fsdp" in name.lower() else nullcontext():
            built = parser.instantiate_classes(config)
        module: DistillModule = built["model"]
        data: StudentDataModule = built["data"]
        # share it, to read its files only once
        data.tokenizer = module.student.tokens
        arguments = {**built["trainer"]}
        given = arguments["callbacks"] or []
        own: list[Callback] = [built["validation"]]
        if arguments["enable_checkpointing"] is not False and not arguments["fast_dev_run"]:
            own += [built["checkpoint"], LastCheckpoint(dirpath=built["checkpoint"].dirpath)]
        if arguments["enable_progress_bar"] is not False:
            own.append(progress_bar())
        if config["max_tokens"] is not None:
            own.append(TokenBudget(config["max_tokens"]))
        own += [*callbacks, Throughput(), SampleTable()]
        arguments["callbacks"] = [*(given if isinstance(given, list) else [given]), *own]
        trainer = pl.Trainer(**arguments)
    except Raised as raised:
        raise raised.error from None
    except UserError:
        raise
    except (MisconfigurationException, ImportError, ValueError, TypeError) as error:
        # a trainer depends only on its arguments and the machine
        raise UserError(f"trainer: {error}") from error
    save_atomically(trainer)
    # before Lightning's own, too
    trainer.callbacks.insert(0, StopAtSignals())  # type: ignore[attr-defined]  # not declared by Lightning
    return trainer, module, data


@rank_zero_only
def _say_how_to_go_on(stopped: Interrupted, trainer: pl.Trainer, args: list[str]) -> None:
    """Print what an interrupted ``fit`` has saved, and the command that resumes it."""
    what = "nothing was trained that could be kept"
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, LastCheckpoint) and callback.dirpath and callback.path.exists():
            what = f"saved in {callback.path.parent.parent}"
            # which finds the checkpoint by itself
            given = [word for before, word in zip(["", *args], args, strict=False) if before != "--ckpt_path"]
            args = [word for word in given if word.partition("=")[0] not in ("--ckpt_path", "--resume")]
            args.append("--resume")
    of = f" of {trainer.max_steps}" if trainer.max_steps != -1 else ""
    print(f"Stopped by {stopped.name} at step {trainer.global_step}{of}: {what}", file=sys.stderr)
    print(f"To go on: {shlex.join(['python', '-m', 'lit_distill', 'fit', *args])}", file=sys.stderr)
