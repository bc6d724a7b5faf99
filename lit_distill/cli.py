"""The command line: answers ``--help`` without heavy imports, runs commands, and prints errors as one line."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lit_distill import __version__
from lit_distill.errors import UserError
from lit_distill.interrupts import Interrupted
from lit_distill.messages import COMMANDS, DESCRIPTION, likely, no_command
from lit_distill.secrets import refuse_secrets
from lit_distill.shipped import find_configs, list_or_copy

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType

_LONGEST = 2000
"""Maximum length of an error line."""


def run() -> None:
    """The program ``lit-distill``."""
    main(own_process=True)


def main(args: ArgsType = None, *, own_process: bool = False) -> None:
    """Run one command.

    Args:
        args: the arguments; by default those of the process.
        own_process: the process runs this command only, so garbage collection can skip imported objects.

    Raises:
        SystemExit: after one line on stderr: code 2 for a user error, 130 or 143 after SIGINT or SIGTERM.
    """
    # for the user's own classes in the working directory
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    given = sys.argv[1:] if args is None else args
    try:
        if isinstance(given, list):
            if given[:1] == ["configs"]:
                return list_or_copy(given[1:])
            answer_at_once(given)
            given = ["--help" if word == "--help_all" else word for word in find_configs(given)]
            refuse_secrets(given)
        if own_process:
            # garbage collection of imported objects would take a third of the start-up time
            gc.disable()
        # torch, lightning and transformers come with this one
        from lit_distill.commands.dispatch import dispatch

        if own_process:
            # nor is there any need to collect or free them later
            gc.freeze()
            gc.enable()
        dispatch(given)
    except (UserError, OSError) as error:
        line = str(error) if isinstance(error, UserError) else of_a_file(error)
        if line is None:
            raise
        line = " ".join(line.split())
        if len(line) > _LONGEST:
            # a value may be a whole file's content
            line = f"{line[: _LONGEST // 2]} [...] {line[-_LONGEST // 2 :]}"
        print(f"lit_distill: error: {line}", file=sys.stderr)
        raise SystemExit(2) from error
    except (KeyboardInterrupt, Interrupted) as stopped:
        stopped = stopped if isinstance(stopped, Interrupted) else Interrupted(signal.SIGINT)
        print(f"lit_distill: stopped by {stopped.name}", file=sys.stderr)
        raise stopped from None


def of_a_file(error: OSError) -> str | None:
    """The message for a file or folder that cannot be read or written; ``None`` for other errors."""
    if isinstance(error, ConnectionError | TimeoutError | ChildProcessError | ProcessLookupError) or not error.strerror:
        return None
    if error.filename is None:
        return f"a file cannot be written: {error.strerror}"
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if not isinstance(name, int | None)]
    return f"{' -> '.join(names)}: cannot be read or written: {error.strerror}"


def answer_at_once(given: list[str]) -> None:
    """Print help or version and exit; return if a command is to run.

    Raises:
        SystemExit: with code 0, after help or version.
        UserError: there is no command, or it is unknown.
    """
    option = given[0].partition("=")[0] if given else ""
    if option == "--version":
        end(f"lit_distill {__version__}")
    if option in ("-h", "--help"):
        commands = "\n".join(f"    {name:<12}{text}" for name, text in COMMANDS.items())
        end(help_texts()[0].format(description=DESCRIPTION, commands=commands))
    if not option.startswith("-") and option not in COMMANDS:
        raise UserError(no_command(option))
    if option.startswith("-") and option not in ("-c", *(f"--{name}" for name in BEFORE)):
        name = option.lstrip("-")
        raise UserError(
            f"{name}: no such argument{likely(name, BEFORE)}; allowed before a command are {', '.join(BEFORE)}"
        )
    if option in SHORT_HELP and {"-h", "--help"} & set(given):
        # the full help has hundreds of lines, mostly of the trainer
        _, text, parts = help_texts()
        shown = [part for part in parts.split("\n\n") if part.partition(":")[0].split("\n")[0] in SHORT_HELP[option]]
        end(text.format(command=option, description=COMMANDS[option], shown="\n\n".join(shown)))


def help_texts() -> list[str]:
    """The overview of the commands, the help of a command, and its parts."""
    return Path(__file__).with_name("help.txt").read_text(encoding="utf-8").rstrip().split("\n\n====\n\n")


def end(text: str) -> NoReturn:
    """Print a text and exit."""
    print(text)
    raise SystemExit(0)


BEFORE = ("help", "version", "config", "print_completion")
"""Options that may stand before a command."""

_TRAINING = ("config", "method", "of StepByStepModule", "data", "run")
SHORT_HELP = dict.fromkeys(("fit", "validate", "test", "predict"), _TRAINING) | {
    "inspect": ("config", "data", "report")
}
"""Command -> the parts of ``help.txt`` that its ``--help`` shows."""
