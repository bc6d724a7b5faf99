"""Hands a command its arguments; the one door through which the command line reaches torch, lightning, transformers."""

import logging
import sys
import warnings
from collections.abc import Callable, Mapping

import transformers
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType

# these three make data modules, methods and teachers known by their bare names
import lit_distill.data
import lit_distill.modules
import lit_distill.teachers  # noqa: F401
from lit_distill.commands.annotate_cli import run_annotate
from lit_distill.commands.compare_cli import run_compare
from lit_distill.commands.experiment_cli import run_experiment
from lit_distill.commands.inspect_cli import InspectCLI
from lit_distill.commands.train import run_trainer
from lit_distill.errors import UserError

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
    """Drop what dependencies say to no one's use; everything else keeps its warning."""
    # torch says so of Lightning's own code
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    # tests and notebooks call main in-process, beside arguments of their own
    warnings.filterwarnings("ignore", message=r"LightningCLI's args parameter is intended to run from within Python")
    # rows are logged by optimizer steps, which no epoch's length bounds
    warnings.filterwarnings("ignore", message=r"The number of training batches .* is smaller than the logging interval")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_is_of_use)
    transformers.utils.logging.disable_progress_bar()


def _is_of_use(record: logging.LogRecord) -> bool:
    """Neither an advertisement nor the seed, which the config says."""
    message = record.getMessage()
    return not any(text in message for text in ("litlogger", "litmodels", "Seed set to"))
