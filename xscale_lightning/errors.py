"""The one exception that means "the user can mend this", and how any exception is told to a user."""

import re


class UserError(ValueError):
    """Wrong input from the user.

    The message is one or two lines that name the argument, its value and the remedy. The command line prints it
    without a traceback (``--debug`` brings the traceback back) and exits with a non-zero code.
    """


def describe(error: BaseException) -> str:
    """One or two lines that say what went wrong.

    A `UserError` raised in a worker process arrives with that process's traceback in its text: only its own last lines
    are told. Exceptions that are not ours are named, because they may be a fault of the program.
    """
    text = str(error).strip()
    if "Original Traceback" in text:
        name = type(error).__name__
        text = re.split(rf"^(?:[\w.]*\.)?{name}: ", text, flags=re.MULTILINE)[-1].strip()
    if isinstance(error, UserError):
        return text
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["(no message)"]
    if type(error).__name__ == "MisconfigurationException":
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}\nIf this is not your input's fault, --debug shows the traceback to report."
