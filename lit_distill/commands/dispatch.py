"""Runs a command; importing this module imports torch, lightning and transformers."""

import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import transformers
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType

# these three make data modules, methods and teachers known by their bare names
import lit_distill.data
import lit_distill.modules
import lit_distill.teachers  # noqa: F401
from lit_distill.commands.annotate import annotate
from lit_distill.commands.compare import compare
from lit_distill.commands.experiment import experiment
from lit_distill.commands.inspect_cli import InspectCLI
from lit_distill.commands.parser import call
from lit_distill.commands.train import run_trainer
from lit_distill.comparison.comparing import Comparison
from lit_distill.data.base import RationaleDataModule
from lit_distill.errors import UserError
from lit_distill.teachers.base import Teacher

INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended, as shells have it."""

_RUNS = "Folders of runs, or folders that are searched for runs; wandb://entity/project for metrics only."


def run_annotate(args: list[str]) -> dict[str, Any]:
    """Ask a teacher.

    Raises:
        SystemExit: with code 130 after Ctrl-C, once what was in flight is kept; with 1 where there is no answer at all,
            or questions are left because the teacher was busy.
    """
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


def run_compare(args: list[str]) -> Comparison:
    """Compare the runs in the folders that are named before the options."""
    return call("compare", compare, args, positional=("runs", _RUNS))


def run_experiment(args: list[str]) -> dict[str, Any]:
    """Run a grid's cells.

    Raises:
        SystemExit: with code 1 where a cell is not done, with code 130 after Ctrl-C.
    """
    summary = call("experiment", experiment, args)
    if summary.get("interrupted"):
        raise SystemExit(INTERRUPTED)
    # a dry run and printed commands leave cells to be run; that is what was asked for
    if "interrupted" in summary and summary["done"] < len(summary["cells"]):
        raise SystemExit(1)
    return summary


BESIDE: Mapping[str, Callable[[list[str]], object]] = {
    "annotate": run_annotate,
    "compare": run_compare,
    "experiment": run_experiment,
    "inspect": InspectCLI,
}
"""The commands beside the trainer's own."""


def dispatch(args: ArgsType) -> None:
    """Run one command.

    Args:
        args: the arguments as LightningCLI takes them.

    Raises:
        UserError: whatever the user can mend.
    """
    quieten()
    set_parsing_settings(add_print_completion_argument=True)
    given = sys.argv[1:] if args is None else args
    try:
        if isinstance(given, list) and given and given[0] in BESIDE:
            BESIDE[given[0]](given[1:])
        else:
            run_trainer(args)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error


def quieten() -> None:
    """Leave out messages of dependencies that help nobody; everything else keeps its warning."""
    # torch says so of Lightning's own code
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    # tests and notebooks call main in-process, beside arguments of their own
    warnings.filterwarnings("ignore", message=r"LightningCLI's args parameter is intended to run from within Python")
    # rows are logged by optimizer steps, which no epoch's length bounds
    warnings.filterwarnings("ignore", message=r"The number of training batches .* is smaller than the logging interval")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_is_helpful)
    transformers.utils.logging.disable_progress_bar()


def _is_helpful(record: logging.LogRecord) -> bool:
    """Neither an advertisement nor the seed, which the config says."""
    return not any(text in record.getMessage() for text in ("litlogger", "litmodels", "Seed set to"))
