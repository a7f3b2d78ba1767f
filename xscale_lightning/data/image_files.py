"""Image files below a folder or inside a zip file: listed, read and decoded."""

import contextlib
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xscale_lightning.data.datamodule import check_folder
from xscale_lightning.data.raster_guard import claims_too_much
from xscale_lightning.data.soundness import implausible, unwritten
from xscale_lightning.errors import UserError

PICTURES = (".jpg", ".jpeg", ".png")
GEOTIFFS = (".tif", ".tiff")
MAX_BYTES = 500_000_000  # of a file that holds one labelled image
REMEDY = "give a folder (or zip file) with one sub-folder of images per class."


class FileStore:
    """Lists and reads files below a folder or inside a zip file, by their path relative to it.

    A zip file is opened anew in every process: an open handle must not be shared between workers.
    """

    def __init__(self, root: str) -> None:
        """Remember the folder or zip file.

        Raises:
            UserError: if there is no such folder or file, or the folder is empty.
        """
        self.root = root
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        if not os.path.isfile(root):
            check_folder("data.root", root, REMEDY)

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_archive": None}

    def paths(self) -> list[str]:
        """Relative paths of all images, sorted, with "/" between folders."""
        if os.path.isdir(self.root):
            tree = ((Path(folder).relative_to(self.root), files) for folder, _, files in os.walk(self.root))
            found = [(folder / name).as_posix() for folder, files in tree for name in files]
        else:
            found = self._open().namelist()
        return sorted(path for path in found if path.lower().endswith(PICTURES + GEOTIFFS))

    def read(self, path: str) -> bytes:
        """Content of one file.

        Raises:
            OSError: it is none, or far larger than an image that is read as a whole.
        """
        if os.path.isdir(self.root):
            place = Path(self.root, path)
            if place.exists() and not place.is_file():
                raise OSError("it is no file but a folder, a pipe or a device")
            _check_length(place.stat().st_size)
            return place.read_bytes()
        archive = self._open()
        _check_length(archive.getinfo(path).file_size)
        return archive.read(path)

    def _open(self) -> zipfile.ZipFile:
        if self._archive is None or self._archive[0] != os.getpid():
            try:
                self._archive = (os.getpid(), zipfile.ZipFile(self.root))
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"data.root: '{self.root}' is no readable zip file ({error}); {REMEDY}") from None
        return self._archive[1]


@contextlib.contextmanager
def open_content(path: str, content: bytes) -> Iterator[Any]:
    """A GeoTIFF from its bytes; GDAL's messages name it as `path` does.

    Only GDAL's GeoTIFF driver looks at it: others go by the content, whatever the name says, and follow the paths and
    addresses in it.

    Raises:
        OSError: it is no GeoTIFF.
    """
    import rasterio

    if not content:  # rasterio would take it for a file to be written
        raise OSError("the file is empty (0 bytes)")
    name = os.path.basename(path)
    with rasterio.MemoryFile(content, filename=name) as memory, memory.open(driver="GTiff") as source:
        item = np.result_type(*source.dtypes).itemsize
        if problem := claims_too_much(source.width, source.height, source.count, item, len(content)):
            raise OSError(problem)
        yield source


def _check_length(length: int) -> None:
    if length > MAX_BYTES:
        raise OSError(f"it has {length} bytes, far more than an image that is read as a whole")


def decode(path: str, content: bytes) -> tuple[Tensor, float | None]:
    """Decode one image to `[C, H, W]` float32, and its gsd in metres per pixel (None where the file does not say it).

    jpg and png are read by Pillow (palettes become RGB, an alpha channel stays), GeoTIFFs by rasterio. Pixels without
    data, as the file declares them, are NaN; the reader fills them (`damage.usable`).

    Raises:
        ValueError: if no pixel has data, or the header cannot be true.
    """
    if path.lower().endswith(PICTURES):
        from PIL import Image

        with Image.open(io.BytesIO(content)) as picture:
            array = np.array(picture.convert("RGB") if picture.mode in ("P", "CMYK", "YCbCr") else picture, np.float32)
        return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1), None
    with open_content(path, content) as source:
        problem = implausible(source, content)
        if reason := problem[1] if problem else unwritten(source):
            raise ValueError(reason)
        crs = source.crs
        gsd = None
        if crs is not None and crs.is_projected:
            gsd = (source.res[0] * source.res[1]) ** 0.5 * crs.linear_units_factor[1]
        pixels = source.read().astype(np.float32)
        if source.nodata is not None:
            present = source.read_masks() > 0
            if not present.any():
                raise ValueError("no pixel has data")
            pixels[~present] = np.nan
        return torch.from_numpy(pixels), gsd


def descriptions(path: str, content: bytes) -> tuple[str, ...]:
    """Band descriptions of a GeoTIFF, "" where it gives none; () for pictures."""
    if path.lower().endswith(PICTURES):
        return ()
    with open_content(path, content) as source:
        return tuple(text or "" for text in source.descriptions)
