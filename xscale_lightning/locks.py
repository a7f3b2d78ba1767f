"""One process writes into a folder at a time: a lock that the system gives back when the process is gone."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from xscale_lightning.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: folders are made under names of their own, and nothing watches over those that exist
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_HELD: dict[Path, list[int]] = {}  # lock file -> file descriptor, and how often this process has taken it


def _forget_in_child() -> None:
    """A forked process, such as a worker that loads data, must not keep the lock of a parent that has died."""
    for handle, _ in _HELD.values():
        with contextlib.suppress(OSError):
            os.close(handle)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def acquire(folder: Path, what: str = "folder", words: bool = True) -> Path | None:
    """Take a folder that exists for this process, which may take it again.

    Args:
        folder: what to take.
        what: words for it in messages.
        words: write into the lock file whose it is; an empty one takes no block of a disk that is nearly full.

    Returns:
        What to `release`; None where the file system has no locks.

    Raises:
        UserError: another process writes into it.
    """
    path = folder.resolve() / LOCK
    if path in _HELD and _is_at(_HELD[path][0], path):
        _HELD[path][1] += 1
        return path
    handle = _lock(path, f"{what} '{folder}'")
    if handle is None:
        return None
    if path in _HELD:  # somebody has removed the folder since
        os.close(_HELD.pop(path)[0])
    with contextlib.suppress(OSError):  # a full disk: the lock holds without its words
        os.ftruncate(handle, 0)
        if words:
            command = " ".join(sys.argv[:2])[:80]
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()} ({command})\n".encode(), 0)
    _HELD[path] = [handle, 1]
    return path


def _lock(path: Path, label: str) -> int | None:
    """Descriptor of the locked file; None where that cannot be had."""
    while fcntl is not None:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:  # a folder that cannot be written: whoever writes into it says so
            return None
        owner = ""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
        except OSError:  # network file systems may have no locks
            os.close(handle)
            return None
        if owner:
            os.close(handle)
            raise UserError(f"{label} is in use by {owner}: wait until that has ended, or choose another.")
        if _is_at(handle, path):
            return handle
        os.close(handle)  # its owner has removed it on leaving: there may be a new one
    return None


def _is_at(handle: int, path: Path) -> bool:
    try:
        there, here = os.stat(path), os.fstat(handle)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def is_held(folder: Path) -> bool:
    """Whether this process holds a folder."""
    path = folder.resolve() / LOCK
    return path in _HELD and _is_at(_HELD[path][0], path)


def release(path: Path | None) -> None:
    """Give a folder back, as often as it was taken; its lock file is removed."""
    if path is None or path not in _HELD:
        return
    _HELD[path][1] -= 1
    if _HELD[path][1] > 0:
        return
    handle, _ = _HELD.pop(path)
    with contextlib.suppress(OSError):
        if _is_at(handle, path):
            path.unlink(missing_ok=True)
    os.close(handle)


@contextlib.contextmanager
def held(folder: Path | None, what: str = "folder") -> Iterator[None]:
    """Hold a folder, which is made, while the body runs; None holds nothing.

    Raises:
        UserError: another process writes into it.
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = acquire(folder, what)
    try:
        yield
    finally:
        release(handle)


def lock_file(handle: int) -> None:
    """Lock an open file until it is closed, where the system can do that."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_free(path: Path) -> bool:
    """Whether nobody has locked a file; False where that cannot be said."""
    if fcntl is None:
        return False
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True
