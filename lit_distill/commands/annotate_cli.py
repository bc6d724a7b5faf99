"""``annotate`` on the command line: a dataset, a teacher, and what is asked."""

import sys
from typing import Any

from lit_distill.commands.annotate import annotate
from lit_distill.commands.parser import Parser, Raised
from lit_distill.data.base import RationaleDataModule
from lit_distill.messages import COMMANDS
from lit_distill.teachers.base import Teacher

SWITCHES = ("nearest_demonstrations", "structured", "retry_errors", "dry_run")
"""Arguments that stand for ``true`` where no value follows."""

INTERRUPTED = 130
"""The exit code of a job that Ctrl-C ended, as shells have it."""

UNANSWERED = 1
"""The exit code of a job that has no answer at all, or that a busy teacher left with questions for another start."""


def run_annotate(args: list[str]) -> dict[str, Any]:
    """Parse the arguments after ``annotate``, and ask.

    Returns:
        The summary.

    Raises:
        UserError: an argument is wrong, or the teacher is unavailable.
        SystemExit: with code 130 after Ctrl-C, once what was in flight is kept; with 1 where there is no answer at all,
            or questions are left because the teacher was busy.
    """
    parser = Parser(prog="lit-distill annotate", description=COMMANDS["annotate"])
    # as Lightning's own commands have it
    parser.add_argument("-c", "--config", action="config", help="Path to a configuration file in YAML.")
    parser.add_subclass_arguments(RationaleDataModule, "data", required=True)
    parser.add_subclass_arguments(Teacher, "teacher", required=True)
    parser.add_function_arguments(annotate, skip={"datamodule", "teacher"})
    for switch in SWITCHES:
        # also without a value
        action = next(action for action in parser._actions if action.dest == switch)
        action.nargs, action.const = "?", True
    config = parser.parse_args(args)
    try:
        built = parser.instantiate_classes(config)
    except Raised as raised:
        raise raised.error from None
    arguments = built.as_dict()
    datamodule, teacher = arguments.pop("data"), arguments.pop("teacher")
    arguments.pop("config", None)
    summary = annotate(datamodule, teacher, **arguments)
    if summary.get("stopped") == "interrupted":
        raise SystemExit(INTERRUPTED)
    unanswered = summary.get("answers") == 0 and summary["stopped"] is None
    if unanswered or summary.get("not answered now"):
        reasons = [summary[name] for name in ("most frequent errors", "why not") if summary.get(name)]
        kind = "no answer at all" if unanswered else f"{summary['not answered now']:,} questions not answered now"
        print(f"lit_distill: {kind}: {'; '.join(reasons) or 'nothing was asked'}", file=sys.stderr)
        raise SystemExit(UNANSWERED)
    return summary
