"""Georeferenced rasters band by band: inspect a file, and read any window of several bands on one common grid.

Everything that touches rasterio for scenes is in this file; it is imported when the first file is opened. Lengths are
in units of the file's coordinate reference system unless a name says metres.
"""

import math
import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from xscale_lightning.data import raster_guard
from xscale_lightning.data.damage import without_path
from xscale_lightning.data.ground import metres_per_pixel
from xscale_lightning.data.soundness import implausible, turned, unwritten

SUFFIXES = (".tif", ".tiff", ".jp2", ".vrt", ".img")
MAX_OPEN_FILES = 64
MAX_SNAP = 64
_EPSILON = 1e-4  # pixels; origins written as decimal fractions of a degree are not exact


class UnreadableFile(Exception):
    """A raster that cannot be used; says which and why in one line."""

    def __init__(self, path: str, reason: str) -> None:
        """Remember the file and the reason."""
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Raster:
    """What the header of a north-up raster says."""

    path: str
    descriptions: tuple[str, ...]
    """One per band, "" where the file gives none."""
    crs: str | None
    left: float
    top: float
    dx: float
    """Pixel width, CRS units, positive."""
    dy: float
    """Pixel height, CRS units, positive."""
    width: int
    height: int
    dtype: str
    metres: float | None
    """Ground sample distance in metres per pixel; None without a CRS."""
    masked: bool
    """Whether pixels can be without data: a declared no-data value, a mask, or a type that has NaN."""
    unwritten: str = ""
    """Why pixels read as zeros that nobody wrote; "" where none do."""


@dataclass(frozen=True)
class Source:
    """One band: where to read it."""

    raster: Raster
    index: int
    """1-based band number in the file."""


@dataclass(frozen=True)
class Grid:
    """Pixel grid on which the bands of one scene are read."""

    left: float
    top: float
    dx: float
    dy: float
    width: int
    height: int
    snap: int
    """Origins at multiples of `snap` pixels lie on the pixel edges of the coarsest band."""
    gsd: float
    """Metres per pixel."""


def inspect(path: str) -> Raster:
    """Read the header of a raster.

    Raises:
        UnreadableFile: if it is empty, not a raster, or not north-up.
    """
    try:
        empty = os.path.getsize(path) == 0
    except OSError as error:  # a link to nothing, a file that went away
        raise UnreadableFile(path, f"cannot be opened ({error.strerror})") from None
    if empty:
        raise UnreadableFile(path, "the file is empty (0 bytes)")
    with open_raster(path) as source:
        if found := implausible(source, path):
            raise UnreadableFile(path, found[1])
        if problem := turned(source):
            raise UnreadableFile(path, problem)
        transform = source.transform
        return Raster(
            path=path,
            descriptions=tuple(text or "" for text in source.descriptions),
            crs=source.crs.to_string() if source.crs else None,
            left=transform.c,
            # Without a CRS rasterio reports the identity, in which y grows downwards; here top is the largest y.
            top=transform.f if transform.e < 0 else -transform.f,
            dx=transform.a,
            dy=abs(transform.e),
            width=source.width,
            height=source.height,
            dtype=np.result_type(*source.dtypes).name,
            metres=metres_per_pixel(source),
            masked=any(np.issubdtype(np.dtype(t), np.floating) for t in source.dtypes) or any(_masked_bands(source)),
            unwritten=unwritten(source),
        )


def open_raster(path: str) -> Any:
    """Open a raster, with or without georeference.

    Raises:
        UnreadableFile: if it cannot be opened, would lead elsewhere, or claims more than it can hold.
    """
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError

    length, problem = raster_guard.look(path)
    if problem:
        raise UnreadableFile(path, problem)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            source = rasterio.open(path)
    except RasterioError as error:
        raise UnreadableFile(path, f"cannot be opened as a raster ({_first_line(error, path)})") from None
    item = np.result_type(*source.dtypes).itemsize
    if problem := raster_guard.claims_too_much(source.width, source.height, source.count, item, length):
        source.close()
        raise UnreadableFile(path, problem)
    return source


def _masked_bands(source: Any) -> list[bool]:
    """Which bands have a no-data value or a mask; asked for once per file, it is slow with hundreds of bands."""
    from rasterio.enums import MaskFlags

    return [MaskFlags.all_valid not in flags for flags in source.mask_flag_enums]


def _first_line(error: Exception, path: str) -> str:
    """First line of GDAL's message about the cause; rasterio's own often says only "see previous exception"."""
    return without_path(str(error.__cause__ or error).strip().split("\n")[0], path)[:160]


def common_grid(rasters: Sequence[Raster], gsd: float | None) -> Grid:
    """Grid over the area that all rasters cover, at `gsd` metres per pixel (None: the finest raster's).

    Its origin lies on a pixel corner of the coarsest raster, so that nested products (10/20/60 m) are read exactly.

    Raises:
        UnreadableFile: if the rasters differ in CRS, do not overlap, or no gsd is known.
    """
    first = rasters[0]
    for raster in rasters:
        if raster.crs != first.crs:
            raise UnreadableFile(raster.path, f"its CRS {raster.crs} is not that of {first.path} ({first.crs})")
    finest = min(rasters, key=lambda raster: raster.dx)
    coarsest = max(rasters, key=lambda raster: raster.dx)
    native = finest.metres if finest.metres is not None else gsd
    if native is None:
        raise UnreadableFile(first.path, "it has no CRS, so its resolution is unknown; set data.gsd (metres per pixel)")
    scale = (gsd or native) / native
    dx, dy = finest.dx * scale, finest.dy * scale
    left, right = max(r.left for r in rasters), min(r.left + r.dx * r.width for r in rasters)
    top, bottom = min(r.top for r in rasters), max(r.top - r.dy * r.height for r in rasters)
    left = coarsest.left + math.ceil((left - coarsest.left) / coarsest.dx - _EPSILON) * coarsest.dx
    top = coarsest.top - math.ceil((coarsest.top - top) / coarsest.dy - _EPSILON) * coarsest.dy
    width, height = math.floor((right - left) / dx + _EPSILON), math.floor((top - bottom) / dy + _EPSILON)
    if width < 1 or height < 1:
        raise UnreadableFile(first.path, f"its bands share no area of a pixel of {gsd or native:g} m (gsd)")
    nesting = Fraction(dx / coarsest.dx).limit_denominator(MAX_SNAP)
    nested = abs(float(nesting) - dx / coarsest.dx) * max(width, height) < 0.01
    return Grid(left, top, dx, dy, width, height, nesting.denominator if nested else 1, gsd or native)


class RasterReader:
    """Reads windows; keeps the newest files open, per process (open files do not survive a fork)."""

    def __init__(self, nodata: float | None = None) -> None:
        """Set the value that counts as no data in files that declare none."""
        self.nodata = nodata
        self._files: OrderedDict[str, tuple[Any, list[bool]]] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"nodata": self.nodata, "_files": OrderedDict(), "_process": -1}

    def read(
        self, sources: Sequence[Source], grid: Grid, row: int, col: int, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Read one window of `grid` from every source.

        Finer bands are averaged over the area of a pixel, coarser ones interpolated bilinearly; where the grids agree
        the values are the file's own.

        Returns:
            pixels `[C, height, width]` in the files' type, and their validity `[C, height, width]` (bool), or None
            where the files cannot hold invalid pixels.

        Raises:
            UnreadableFile: if a file cannot be opened or this part of it cannot be read.
        """
        pixels = np.empty((len(sources), height, width), _dtype(sources))
        valid: np.ndarray | None = None
        for raster in dict.fromkeys(source.raster for source in sources):
            channels = [c for c, source in enumerate(sources) if source.raster == raster]
            indexes = [sources[c].index for c in channels]
            values, mask = self._read_file(raster, indexes, grid, row, col, height, width)
            pixels[channels] = values
            if mask is not None:
                valid = np.ones(pixels.shape, bool) if valid is None else valid
                valid[channels] = mask
        return pixels, valid

    def _read_file(
        self, raster: Raster, indexes: list[int], grid: Grid, row: int, col: int, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        from rasterio.enums import Resampling
        from rasterio.errors import RasterioError
        from rasterio.windows import Window

        if raster.unwritten and self.nodata is None:
            raise UnreadableFile(raster.path, f"{raster.unwritten}, and it declares no no-data value")
        scale_x, scale_y = grid.dx / raster.dx, grid.dy / raster.dy
        exact = (
            (grid.left - raster.left) / raster.dx + col * scale_x,
            (raster.top - grid.top) / raster.dy + row * scale_y,
            width * scale_x,
            height * scale_y,
        )
        rounded = tuple(round(value) for value in exact)
        on_edges = all(abs(a - b) < 0.01 for a, b in zip(exact, rounded, strict=True))
        window = Window(*(rounded if on_edges else exact))  # type: ignore[arg-type]
        if on_edges and rounded[2:] == (width, height):
            method = Resampling.nearest
        else:
            method = Resampling.average if scale_x > 1 else Resampling.bilinear
        shape = (len(indexes), height, width)
        file, masked = self._file(raster.path)
        try:
            values = file.read(indexes, window=window, out_shape=shape, resampling=method)
            mask: np.ndarray | None = None
            if any(masked[i - 1] for i in indexes):
                mask = file.read_masks(indexes, window=window, out_shape=shape) > 0
        except RasterioError as error:
            raise UnreadableFile(
                raster.path, f"cannot be read, it may be truncated ({_first_line(error, raster.path)})"
            ) from None
        if np.issubdtype(values.dtype, np.floating):
            finite = np.isfinite(values)
            if not finite.all():
                mask = finite if mask is None else mask & finite
        return values, mask

    def _file(self, path: str) -> tuple[Any, list[bool]]:
        if self._process != os.getpid():
            self._files, self._process = OrderedDict(), os.getpid()
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        file = open_raster(path)
        if self.nodata is not None and file.nodata is None:
            from rasterio.vrt import WarpedVRT

            # The same grid and values, but masks and resampling know about the value that counts as no data.
            same = {"transform": file.transform, "width": file.width, "height": file.height, "crs": file.crs}
            file = WarpedVRT(file, src_nodata=self.nodata, nodata=self.nodata, **same)
        self._files[path] = file, _masked_bands(file)
        if len(self._files) > MAX_OPEN_FILES:
            self._files.popitem(last=False)[1][0].close()
        return self._files[path]


def _dtype(sources: Sequence[Source]) -> np.dtype:
    """Smallest common type; doubles are read as float32, which is what a batch holds."""
    common = np.result_type(*(source.raster.dtype for source in sources))
    return np.dtype(np.float32) if common == np.float64 else common
