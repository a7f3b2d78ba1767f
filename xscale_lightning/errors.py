"""The one exception that means "the user can mend this", and how any exception is told to a user."""

import errno
import re

LINE = 1_000  # characters
NAMES = (errno.ENAMETOOLONG, errno.ELOOP)  # what no file system takes for a name


def printable(text: str) -> str:
    """Text with everything but printable characters and line ends escaped."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(mark if mark == "\n" or mark.isprintable() else repr(mark)[1:-1] for mark in text)


class UserError(ValueError):
    """Wrong input from the user.

    The message is one or two lines that name the argument, its value and the remedy. The command line prints it
    without a traceback (``--debug`` brings the traceback back) and exits with a non-zero code. Values quoted from files
    cannot steer a terminal: whatever is not printable stands there escaped.
    """

    def __init__(self, *parts: object) -> None:
        super().__init__(*(printable(part) if isinstance(part, str) else part for part in parts))


class Stopped(BaseException):
    """A run was asked to stop and has done so in good order; the message says how to go on.

    Attributes:
        code: exit code of the command.
        requeue: whether the scheduler is to queue the job again.
    """

    def __init__(self, message: str, code: int, requeue: bool = False) -> None:
        super().__init__(message)
        self.code, self.requeue = code, requeue


def find_user_error(error: BaseException) -> UserError | None:
    """The innermost `UserError` among an exception and those it came from."""
    found, seen, waiting = None, set(), [error]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:  # parsers re-raise errors inside one another: the chain can be a ring
            continue
        seen.add(id(current))
        if isinstance(current, UserError):
            found = current
        waiting += [e for e in (current.__context__, current.__cause__) if e is not None]
    return found


def is_users(error: BaseException) -> bool:
    """Whether the user's input is at fault, as far as the exception's type tells."""
    foreign = type(error).__name__ == "MisconfigurationException" or type(error).__module__.startswith("yaml")
    foreign = foreign or (isinstance(error, OSError) and error.errno in NAMES) or isinstance(error, UnicodeDecodeError)
    return foreign or lightnings(error) or find_user_error(error) is not None


def lightnings(error: BaseException) -> bool:
    """Whether the Trainer itself refuses a value: its words name the option."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return isinstance(error, ValueError) and place.startswith(("lightning.pytorch.trainer", "lightning.pytorch.loops"))


def describe(error: BaseException) -> str:
    """One or two lines that say what went wrong.

    A `UserError` raised in a worker process arrives with that process's traceback in its text: only its own last lines
    are told. Exceptions that are not ours are named, because they may be a fault of the program. What is quoted in them
    cannot steer a terminal either, and a line ends after a thousand characters.
    """
    return "\n".join(
        line if len(line) <= LINE else f"{line[:LINE]} ..." for line in printable(_words(error)).split("\n")
    )


def _words(error: BaseException) -> str:
    ours = find_user_error(error)
    text = str(ours or error).strip()
    if "Original Traceback" in text:
        text = re.split(r"^(?:[\w.]*\.)?UserError: ", text, flags=re.MULTILINE)[-1].strip()
    if ours is not None:
        return text
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["(no message)"]
    if type(error).__name__ == "MisconfigurationException":
        return f"{lines[0]} Change the trainer options; `xscale doctor` shows the devices."
    if lightnings(error):
        return f"trainer: {lines[0]}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror}: {error.filename or 'the disk is full'}; make room and run it again."
    if isinstance(error, UnicodeDecodeError):
        return f"a file is no text: {error.reason} at byte {error.start}; configurations and lists are UTF-8."
    if isinstance(error, OSError) and error.errno in NAMES:
        return f"{error.strerror}: '{str(error.filename)[:100]}'; give the path of a file or folder."
    if type(error).__module__.startswith("yaml"):
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        return f"a --config file is no valid YAML{where}: {getattr(error, 'problem', None) or lines[0]}"
    return f"{type(error).__name__}: {lines[0]}\nIf your input is not at fault, --debug shows the traceback to report."
