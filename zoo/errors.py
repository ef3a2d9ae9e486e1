"""The one exception a user is meant to see as a single line."""


class DimmixError(Exception):
    """Something the user can mend; the message is one line: what went wrong, where, and what to do.

    The command line prints it to stderr without a traceback and exits with `exit_code`: 1 when an input failed,
    2 for wrong usage.
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def system_error(error: OSError) -> str:
    """What the operating system refused, on one line: the file, where it names one, and why."""
    return f"{error.filename or 'output'}: {error.strerror or error}"


class Interrupted(KeyboardInterrupt):
    """A signal that ended the work; the exit code is 128 and its `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number
