"""The exception for errors that a user can fix."""


class UserError(ValueError):
    """An invalid value, file or name that the user gave.

    Its message is one line that names the argument or file and says what is allowed. The command line prints it without
    a traceback and exits with code 2; in Python it is a ``ValueError``.
    """
