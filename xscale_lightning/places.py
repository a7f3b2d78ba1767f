"""Where what is not whole yet waits, and how it takes the place of what is there: at every moment one of both is there.

A folder beside the target is of one process alone, which holds it by a lock that the system gives back when the process
is gone, however it ended. So what a killed process leaves is known as such, and removed by the next that writes there.
"""

import contextlib
import ctypes
import errno
import functools
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from xscale_lightning.errors import UserError
from xscale_lightning.locks import LOCK, acquire, is_held, release

PART = ".part"  # end of the name of what is not whole
NAMED = 60  # characters of the target's name in that of its folder: names have an end
OLD = ".old"  # end of the name of what is replaced, where two names cannot be exchanged
_OWN = re.compile(r"\..+\.[a-z0-9_]{8}\.part")
_SWEPT: set[Path] = set()  # folders that this process has looked through
_SWEEPING = threading.Lock()


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A folder beside `target`, of this process alone, which is gone after the body.

    Raises:
        OSError: it cannot be made.
    """
    parent = target.absolute().parent
    with _SWEEPING:  # before another thread makes a folder here
        if parent not in _SWEPT:
            remove_abandoned(parent)
            _SWEPT.add(parent)
    folder, lock = _own_folder(parent, target.name[:NAMED])
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        release(lock)


def _own_folder(parent: Path, name: str) -> tuple[Path, Path | None]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=PART, dir=parent))
        with contextlib.suppress(UserError):  # another process takes it for one that was left, and removes it
            lock = acquire(folder, words=False)
            if folder.is_dir() and (lock is None or lock.is_file()):
                return folder, lock
            release(lock)


def remove_abandoned(parent: Path) -> None:
    """Remove the folders in `parent` that processes were writing into when they were killed."""
    with contextlib.suppress(OSError):
        found = [Path(entry.path) for entry in os.scandir(parent) if _OWN.fullmatch(entry.name) and entry.is_dir()]
        for folder in found:
            ours = (folder / LOCK).is_file() or not any(folder.iterdir())
            if folder.is_symlink() or not ours or is_held(folder):
                continue
            with contextlib.suppress(UserError):  # its process lives
                if (lock := acquire(folder)) is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    release(lock)


def put_in_place(new: Path, target: Path) -> None:
    """Give the folder `new` the name `target`; what is there has the name of `new` afterwards, or is gone.

    Where the system can, both names are exchanged in one step. Else `target` is away for a moment, under a name that
    `recover` knows.

    Raises:
        OSError: it cannot be done; what was there is there.
    """
    if not target.is_dir() or not any(target.iterdir()):
        os.replace(new, target)
        return
    if _exchanged(new, target):
        return
    old = target.with_name(f".{target.name}{OLD}")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(target, old)
    try:
        os.replace(new, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> bool:
    """Give back its name to what was to be replaced when a process was killed; returns whether that was so."""
    old = target.with_name(f".{target.name}{OLD}")
    if target.exists() or target.is_symlink() or not old.is_dir():
        return False
    with contextlib.suppress(OSError):  # another process may have been faster
        os.rename(old, target)
        return True
    return False


def _exchanged(one: Path, two: Path) -> bool:
    """Exchange two names in one step; returns False where the system or the file system cannot."""
    call = _exchange_call()
    if call is None:
        return False
    ctypes.set_errno(0)
    if call(os.fsencode(one), os.fsencode(two)) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(two))


@functools.cache
def _exchange_call() -> Callable[[bytes, bytes], int] | None:
    """The system's call; None where there is none."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            swap = library.renamex_np
            swap.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint)
            return lambda one, two: swap(one, two, 2)  # RENAME_SWAP
        here = -100  # AT_FDCWD
        exchange = library.renameat2
        exchange.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
        return lambda one, two: exchange(here, one, here, two, 2)  # RENAME_EXCHANGE
    return None
