"""The exception for errors that a user can fix."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(ValueError):
    """An invalid value, file or name that the user gave.

    Its message is one line that names the argument or file and says what is allowed. The command line prints it without
    a traceback and exits with code 2; in Python it is a ``ValueError``.
    """


def first_fault(error: "ValidationError") -> str:
    """The first of pydantic's faults as one line: where it is, what is wrong, and the value if this does not say it."""
    fault = error.errors(include_url=False)[0]
    place, text = ".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")
    # our own words say what is wrong; what lacks a key is no value
    got = "" if fault["type"] in ("value_error", "missing") else f", got {fault['input']!r:.100}"
    return f"{place + ': ' if place else ''}{text}{got}"
