"""Run a command; importing this module imports torch, lightning and transformers."""

import gc
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import transformers
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException

# these make data modules, methods and teachers known by their class names
import lit_distill.data
import lit_distill.modules
import lit_distill.teachers  # noqa: F401
from lit_distill.commands.annotate import annotate
from lit_distill.commands.capture import capture
from lit_distill.commands.check import check
from lit_distill.commands.compare import compare
from lit_distill.commands.experiment import experiment
from lit_distill.commands.export import export
from lit_distill.commands.inspect import inspect
from lit_distill.commands.memory import fit
from lit_distill.commands.parser import Parser, call
from lit_distill.commands.plan import plan
from lit_distill.commands.rounds import INTERRUPTED, rounds
from lit_distill.commands.search import search
from lit_distill.commands.serve import serve
from lit_distill.commands.shrink import shrink
from lit_distill.commands.tradeoff import tradeoff
from lit_distill.commands.train import TRAINER_COMMANDS, run_trainer, train_parser
from lit_distill.data.base import RationaleDataModule
from lit_distill.errors import UserError
from lit_distill.messages import COMMANDS, DESCRIPTION
from lit_distill.teachers.base import Teacher

_RUNS = "Folders of runs, or folders that are searched for runs; wandb://entity/project for metrics only."
_STUDENT = "Export, run, folder, checkpoint or hub name."


def run_annotate(args: list[str]) -> dict[str, Any]:
    """Run ``annotate``; ends with code 130 after Ctrl-C, with 1 if there is no answer or some questions are left."""
    summary = call("annotate", annotate, args, classes={"data": RationaleDataModule, "teacher": Teacher})
    if summary.get("stopped") == "interrupted":
        raise SystemExit(INTERRUPTED)
    unanswered = summary.get("answers") == 0 and summary["stopped"] is None
    if unanswered or summary.get("not answered now"):
        reasons = [summary[name] for name in ("most frequent errors", "why not") if summary.get(name)]
        kind = "no answer at all" if unanswered else f"{summary['not answered now']:,} questions not answered now"
        print(f"lit_distill: {kind}: {'; '.join(reasons) or 'nothing was asked'}", file=sys.stderr)
        raise SystemExit(1)
    return summary


def run_experiment(args: list[str]) -> dict[str, Any]:
    """Run ``experiment``; ends with code 130 after Ctrl-C, with 1 if a cell is not done."""
    summary = call("experiment", experiment, args)
    if summary.get("interrupted"):
        raise SystemExit(INTERRUPTED)
    # after a dry run or printed commands, pending cells are no failure
    if "interrupted" in summary and summary["done"] < len(summary["cells"]):
        raise SystemExit(1)
    return summary


RUN: Mapping[str, Callable[[list[str]], object]] = {
    **{name: partial(run_trainer, name) for name in TRAINER_COMMANDS},
    "fit": fit,
    "annotate": run_annotate,
    "capture": capture,
    "experiment": run_experiment,
    "rounds": rounds,
    "compare": lambda args: call("compare", compare, args, positional=("runs", _RUNS)),
    "inspect": inspect,
    "check": check,
    "plan": plan,
    "export": export,
    "shrink": shrink,
    "search": search,
    "tradeoff": tradeoff,
    "serve": lambda args: call("serve", serve, args, positional=("student", _STUDENT)),
}
"""Command -> what runs it, with the arguments after it."""


def dispatch(args: list[str]) -> None:
    """Run the command that the arguments begin with, or print completion for shells."""
    if not gc.isenabled():
        # what is imported is never garbage
        gc.freeze()
        gc.enable()
    quieten()
    set_parsing_settings(add_print_completion_argument=True)
    try:
        if args[0] in RUN:
            RUN[args[0]](args[1:])
        else:
            _print_completion(args)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error


def _print_completion(args: list[str]) -> None:
    parser = Parser(prog="lit-distill", description=DESCRIPTION)
    commands = parser.add_subcommands()
    for name, text in COMMANDS.items():
        # of the others only the names
        commands.add_subcommand(name, train_parser(name) if name in TRAINER_COMMANDS else Parser(description=text))
    parser.parse_args(args)


def quieten() -> None:
    """Hide useless messages of dependencies; other warnings stay."""
    # torch warns about Lightning's code
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    # logged by optimizer step, whatever the epoch's length
    warnings.filterwarnings("ignore", message=r"The number of training batches .* is smaller than the logging interval")
    # an advertisement, or the seed
    useless = ("litlogger", "litmodels", "Seed set to")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(lambda record: not any(text in record.getMessage() for text in useless))
    transformers.utils.logging.disable_progress_bar()
