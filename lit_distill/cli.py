"""The command line: answers ``--help`` without heavy imports, runs commands, and prints errors as one line."""

import gc
import os
import signal
import sys
from pathlib import Path

from lit_distill import __version__
from lit_distill.errors import UserError
from lit_distill.interrupts import Interrupted
from lit_distill.messages import COMMANDS, DESCRIPTION, likely
from lit_distill.secrets import refuse_secrets
from lit_distill.shipped import find_configs, list_or_copy

_LONGEST = 2000
"""Maximum length of an error line."""
_ALONE = ("help", "version", "print_completion")
"""Options that stand without a command."""
SHORT_HELP = {
    **dict.fromkeys(("fit", "validate", "test", "predict"), 1),
    **{"inspect": 2, "check": 3, "capture": 4, "plan": 5, "rounds": 6, "export": 7, "shrink": 8, "tradeoff": 9},
    "serve": 10,
    "search": 11,
}
"""Command -> the part of ``help.txt`` that its ``--help`` shows; the whole help is mostly the trainer's."""


def run() -> None:
    """The program ``lit-distill``."""
    # looking for garbage among all that is imported would take a third of the start-up time; `dispatch` enables it
    gc.disable()
    main()


def main(args: list[str] | None = None) -> None:
    """Run one command, with the arguments of the process by default.

    Raises:
        SystemExit: after one line on stderr: code 2 for a user error, 130 or 143 after SIGINT or SIGTERM.
    """
    # for the user's own classes in the working directory
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    given = sys.argv[1:] if args is None else args
    try:
        if given[:1] == ["configs"]:
            return list_or_copy(given[1:])
        if (text := answer_at_once(given)) is not None:
            print(text)
            raise SystemExit(0)
        given = ["--help" if word == "--help_all" else word for word in find_configs(given)]
        refuse_secrets(given)
        # torch, lightning and transformers come with this one
        from lit_distill.commands.dispatch import dispatch

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


def answer_at_once(given: list[str]) -> str | None:
    """The help or the version, if that is asked for. Raises a ``UserError`` if there is no command."""
    option = given[0].partition("=")[0] if given else ""
    name = option.lstrip("-")
    if option == "--version":
        return f"lit_distill {__version__}"
    helps = Path(__file__).with_name("help.txt").read_text(encoding="utf-8").rstrip().split("\n\n====\n\n")
    if option in ("-h", "--help"):
        commands = "\n".join(f"    {name:<12}{text}" for name, text in COMMANDS.items())
        return helps[0].format(description=DESCRIPTION, commands=commands)
    if not option.startswith("-") and option not in COMMANDS:
        found = f"{option}: no such command{likely(option, tuple(COMMANDS))}" if option else "a command must be given"
        raise UserError(f"{found}; allowed are {', '.join(COMMANDS)}")
    if option.startswith("-") and name not in _ALONE:
        raise UserError(f"{name}: no such argument{likely(name, _ALONE)}; allowed are a command, {', '.join(_ALONE)}")
    if option in SHORT_HELP and {"-h", "--help"} & set(given):
        return helps[SHORT_HELP[option]].format(command=option, description=COMMANDS[option])
    return None
