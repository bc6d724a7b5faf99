"""``compare`` on the command line: folders, and how they are compared."""

from typing import Any

from lit_distill.commands.compare import compare
from lit_distill.commands.parser import Parser
from lit_distill.errors import UserError
from lit_distill.messages import COMMANDS

_RUNS = "Folders of runs, or folders that are searched for runs; wandb://entity/project for metrics only."


def run_compare(args: list[str]) -> dict[str, Any]:
    """Parse the arguments after ``compare``, and compare.

    Returns:
        What was found.

    Raises:
        UserError: an argument is wrong, no run was found, or runs cannot be compared.
    """
    parser = Parser(prog="lit-distill compare", description=COMMANDS["compare"])
    parser.add_argument("-c", "--config", action="config", help="Path to a configuration file in YAML.")
    parser.add_argument("folders", nargs="*", type=str, metavar="RUNS", help=_RUNS)
    # jsonargparse takes no positional arguments from a file
    parser.add_argument("--runs", type=list[str] | None, default=None, help="The same, for a configuration file.")
    parser.add_function_arguments(compare, skip={"runs"})
    arguments = parser.parse_args(args).as_dict()
    arguments.pop("config", None)
    in_file = arguments.pop("runs") or []
    runs = arguments.pop("folders") or in_file
    if not runs:
        raise UserError("runs: must be given: folders of runs, or wandb://entity/project")
    return compare(runs, **arguments)
