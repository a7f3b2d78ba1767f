"""Files are written whole or not at all: under another name in the same folder, synced, renamed, the folder synced.

Whoever opens a file of ours, also after the machine has lost its power, finds the old content or the new one.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xscale_lightning.errors import UserError
from xscale_lightning.places import PART, beside

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room: on the disk, in the quota, in a file


@contextlib.contextmanager
def whole(path: str | os.PathLike[str], suffix: str = PART) -> Iterator[Path]:
    """Path of an empty file to fill; after the body it takes the name `path`, unless the body has raised.

    A new file may be read by whom the process's umask lets; one that replaces another is as open as that.

    Args:
        path: the file to be.
        suffix: end of the temporary file's name, for writers that go by it.

    Raises:
        OSError: it cannot be written; the temporary file is gone, and what was there under the name is untouched.
    """
    target = Path(path).absolute()
    with beside(target) as folder:
        part = folder / f"new{suffix}"
        part.touch()
        yield part
        with contextlib.suppress(FileNotFoundError):
            os.chmod(part, os.stat(target).st_mode & 0o777)
        sync(part)
        os.replace(part, target)
    sync_folder(target.parent)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write a file whole or not at all. Returns its path.

    Raises:
        OSError: it cannot be written.
    """
    with whole(path) as part:
        part.write_bytes(content)
    return Path(path)


def write_json(content: Mapping[str, Any], path: Path) -> Path:
    """Write strict JSON (numbers that are not finite become null), whole or not at all; folders are made.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_bytes(path, strict_json(content))


def strict_json(content: Mapping[str, Any]) -> bytes:
    """Content of a JSON file; numbers that are not finite become null."""
    return (json.dumps(_strict(content), indent=2, allow_nan=False) + "\n").encode()


def _strict(value: Any) -> Any:
    """Numbers that are not finite as null."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write all files, or none: every one is complete under another name before the first gets its own.

    Raises:
        UserError: a file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        for path, content in contents.items():
            stack.enter_context(told(path))
            part = stack.enter_context(whole(path))
            part.write_bytes(content)
            sync(part)  # before the first gets its name: a disk may say only now that it is full


@contextlib.contextmanager
def told(path: str | os.PathLike[str], label: str = "", remedy: str = "choose another") -> Iterator[None]:
    """What keeps the body from writing `path`, as a `UserError` that says it.

    Args:
        path: what is written.
        label: the option it was given with, such as `--map `.
        remedy: what to do, where the disk is not full.

    Raises:
        UserError: in the place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        why = reason(error, path)
        raise UserError(f"{label}'{path}' cannot be written ({why}); {advice(error, remedy)}.") from error


def advice(error: OSError, remedy: str) -> str:
    """What to do about an error: make room where that is missing, else `remedy`."""
    return "make room and run it again" if is_full(error) else remedy


def reason(error: OSError, path: str | os.PathLike[str]) -> str:
    """Words for an error of writing; where there is no room, with the room that is left."""
    if error.errno is not None and is_full(error):  # libraries have words of their own
        return f"{os.strerror(error.errno)}: {size(free_space(path))} free"
    return error.strerror or str(error).splitlines()[0]


def is_full(error: BaseException) -> bool:
    """Whether an error says that there is no room left on the disk or in the quota."""
    return isinstance(error, OSError) and error.errno in FULL


def free_space(path: str | os.PathLike[str]) -> int:
    """Bytes that are free where `path` is or will be; 0 if that cannot be said."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    with contextlib.suppress(OSError):
        return shutil.disk_usage(place).free
    return 0


def size(count: int) -> str:
    """Bytes for people: `12.3 MB`."""
    number = float(count)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"


def sync(path: str | os.PathLike[str]) -> None:
    """Bring a file, or the names in a folder, from the system's memory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Bring a folder's names to the disk, where the system can do that."""
    with contextlib.suppress(OSError):  # network file systems and Windows cannot; the files themselves are whole
        sync(folder)


def save_tensors(tensors: Mapping[str, Any], path: Path, about: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all.

    Args:
        tensors: torch's, on the CPU and contiguous, by name.
        path: the file to be.
        about: metadata of the file.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole(path) as part:
        try:
            save_file(dict(tensors), part, dict(about) if about else None)
        except SafetensorError as error:
            found = re.search(r"os error (\d+)", str(error))
            if not found:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
