"""What this process could not write and had to go on without: told at once, and again when the command ends."""

import sys

_LOST: dict[str, str] = {}
_TOLD: set[str] = set()


def note(what: str, text: str, kind: str | None = None) -> None:
    """Remember that `what` is not written, and say so; of one `kind` only the first is told at once.

    Args:
        what: a path, or words for it; `made_good` takes the same.
        text: one line for the user.
        kind: such as `pictures`; None tells every one.
    """
    if kind is None or kind not in _TOLD:
        print(f"xscale: warning: {text}", file=sys.stderr, flush=True)
    if kind is not None:
        _TOLD.add(kind)
    _LOST[what] = text


def made_good(what: str) -> None:
    """Forget about `what`: it has been written after all."""
    _LOST.pop(what, None)


def lost() -> dict[str, str]:
    """What is not written now, and why."""
    return dict(_LOST)


def forget() -> None:
    """Begin anew: a command has started."""
    _LOST.clear()
    _TOLD.clear()


def tell(shown: int = 5) -> int:
    """Say what is lost; returns the exit code of the command: 1 where something is."""
    lines = list(_LOST.values())
    for text in lines[:shown]:
        print(f"xscale: error: {text}", file=sys.stderr)
    if len(lines) > shown:
        print(f"xscale: error: ... and {len(lines) - shown} more files are not written", file=sys.stderr)
    return int(bool(lines))
