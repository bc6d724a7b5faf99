"""``experiment`` on the command line: a grid, and where its cells are run."""

from typing import Any

from lit_distill.commands.experiment import experiment
from lit_distill.commands.parser import Parser
from lit_distill.messages import COMMANDS

SWITCHES = ("retry_failed", "dry_run")
"""Arguments that stand for ``true`` where no value follows."""

INTERRUPTED = 130
"""The exit code of a job that Ctrl-C ended, as shells have it."""


def run_experiment(args: list[str]) -> dict[str, Any]:
    """Parse the arguments after ``experiment``, and run its cells.

    Returns:
        The summary.

    Raises:
        UserError: an argument, the grid or a cell's config is wrong; nothing has been run.
        SystemExit: with code 1 where a cell is not done, with code 130 after Ctrl-C.
    """
    parser = Parser(prog="lit-distill experiment", description=COMMANDS["experiment"])
    parser.add_function_arguments(experiment)
    for switch in SWITCHES:
        # also without a value
        action = next(action for action in parser._actions if action.dest == switch)
        action.nargs, action.const = "?", True
    arguments = parser.parse_args(args).as_dict()
    summary = experiment(**arguments)
    if summary.get("interrupted"):
        raise SystemExit(INTERRUPTED)
    # a dry run and printed commands leave cells to be run; that is what was asked for
    if "interrupted" in summary and summary["done"] < len(summary["cells"]):
        raise SystemExit(1)
    return summary
