"""The one exception for what a user can mend: a value, a file, a name."""


class UserError(ValueError):
    """Something the user gave is wrong.

    The message is one line that names the argument (or the file) and says what is allowed. The command line prints
    it without a traceback and exits with code 2; in Python it is a plain ``ValueError``.
    """
