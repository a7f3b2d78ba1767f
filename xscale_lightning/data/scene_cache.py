"""Decoded copies of whole scenes on disk, memory-mapped: patches of scenes that do not fit into memory."""

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from xscale_lightning.data.geotiff import Grid, Source, open_raster
from xscale_lightning.data.shards import write_array
from xscale_lightning.errors import UserError
from xscale_lightning.files import PART
from xscale_lightning.locks import is_free

Pixels = tuple[np.ndarray, np.ndarray | None]
FRESH = 10.0  # seconds in which a new file is locked by its writer
BESIDE = (".ovr", ".aux.xml")  # what viewers write beside a raster


def mapped(folder: str, what: tuple[Sequence[Source], Grid, float | None], read: Callable[[], Pixels]) -> Pixels:
    """Pixels `[C, H, W]` and validity of a scene from its copy in `folder`, which is made by `read` if there is none.

    A copy belongs to files of one name, size and time of change, to one choice of bands and one grid; when one of these
    changes, a new copy is made. While it is made, one whole scene is in memory.

    Args:
        folder: where the copies are; it is made.
        what: bands, grid, and the value for no data that the files do not declare.
        read: reads the whole scene.

    Raises:
        UserError: the copy cannot be written, or there is no room for it.
        UnreadableFile: a file cannot be opened.
    """
    sources, grid, nodata = what
    files = [(source.raster.path, source.index, _stamps(source.raster.path)) for source in sources]
    key = hashlib.sha256(repr((files, grid, nodata)).encode()).hexdigest()[:32]
    paths = (Path(folder, f"{key}.npy"), Path(folder, f"{key}.valid.npy"))
    if (found := _open(*paths, (len(sources), grid.height, grid.width))) is not None:
        return found
    pixels, valid = read()
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        remove_stale(Path(folder))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"data.cache_dir: '{folder}' cannot be written ({error.strerror}); choose another.") from error
    if (wanted := pixels.nbytes + (0 if valid is None else valid.nbytes)) > free:
        raise UserError(
            f"data.cache_dir: a decoded scene needs {wanted / 1e9:.1f} GB and '{folder}' has {free / 1e9:.1f} GB free; "
            "make room, or set it to null."
        )
    write_array(paths[1], np.empty(0, bool) if valid is None else valid)
    write_array(paths[0], pixels)  # last: where it is, both are whole
    return _open(*paths, pixels.shape) or (pixels, valid)


def remove_stale(folder: Path) -> None:
    """Remove what writers that were killed have left. Several processes may fill one folder: theirs are locked."""
    now = time.time()
    for part in folder.glob(f".*{PART}"):
        with contextlib.suppress(OSError):
            if not part.is_symlink() and part.is_file() and now - part.stat().st_mtime > FRESH and is_free(part):
                part.unlink()


def _stamps(path: str) -> list[tuple[str, int, int]]:
    """Name, size and time of change of all files of a raster: a virtual one has its pixels elsewhere."""
    with open_raster(path) as raster:
        names = [name for name in raster.files if not name.endswith(BESIDE)]
    found = []
    for name in names:
        with contextlib.suppress(OSError):  # inside an archive
            status = os.stat(name)
            found.append((name, status.st_size, status.st_mtime_ns))
    return found


def _open(pixels: Path, valid: Path, shape: tuple[int, ...]) -> Pixels | None:
    """Map both arrays; None if there is no whole copy of this shape."""
    try:
        values, mask = (np.load(path, mmap_mode="r", allow_pickle=False) for path in (pixels, valid))
    except (OSError, ValueError):  # none yet, or cut short
        return None
    if values.shape != shape or mask.shape not in (shape, (0,)):
        return None
    return np.asarray(values), np.asarray(mask) if mask.size else None
