"""The command line: dispatches to the commands, and tells what the user can mend in one line."""

import logging
import os
import sys
import warnings

import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType

# these two make data modules and methods known by their bare names
import lit_distill.data
import lit_distill.modules  # noqa: F401
from lit_distill.commands.inspect_cli import InspectCLI
from lit_distill.commands.train import run_trainer
from lit_distill.errors import UserError

BESIDE = {"inspect": "Report on a dataset as a config uses it: rows, teacher's labels, lengths, examples."}
"""The commands that are not the trainer's, and what they do."""


def main(args: ArgsType = None) -> None:
    """Run one command.

    Args:
        args: the arguments as a list; by default the process's.

    Raises:
        SystemExit: with code 2 and one line on stderr, for what the user can mend.
    """
    # a user's own classes lie in the folder that the command is given in
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    quieten()
    given = sys.argv[1:] if args is None else args
    try:
        if isinstance(given, list) and given[:1] == ["inspect"]:
            InspectCLI(given[1:])
        else:
            run_trainer(args, BESIDE)
    except (UserError, MisconfigurationException) as error:
        print(f"lit_distill: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error


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
