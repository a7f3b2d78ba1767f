"""A whole scene in overlapping windows, row of windows by row of windows, and the map of patches they make."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from xscale_lightning.data.geotiff import RasterReader, UnreadableFile
from xscale_lightning.data.image_window import OpenImage
from xscale_lightning.errors import UserError


@dataclass(frozen=True)
class Tiling:
    """Windows of `size` pixels every `stride` pixels, all on one lattice of patches.

    The last window of a row or column is moved back to end with the last whole patch of the image, so every patch lies
    in a window; pixels beyond the last whole patch belong to none.
    """

    height: int
    """Pixels of the image."""
    width: int
    size: int
    stride: int
    patch: int

    def __post_init__(self) -> None:
        """Refuse windows that do not fit patches or image."""
        for name, value in (("size", self.size), ("stride", self.stride)):
            if value < self.patch or value % self.patch:
                raise UserError(f"--{name} {value} is no multiple of the patch of {self.patch} pixels; give one.")
        if self.stride > self.size:
            raise UserError(
                f"--stride {self.stride} leaves gaps between windows of {self.size}; give at most the size."
            )
        if self.size > min(self.height, self.width):
            raise UserError(
                f"--size {self.size} is larger than the image of {self.height} x {self.width} pixels; give less."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of the whole image."""
        return self.height // self.patch, self.width // self.patch

    @property
    def rows(self) -> list[int]:
        """First pixel row of every row of windows."""
        return self._starts(self.grid[0] * self.patch)

    @property
    def cols(self) -> list[int]:
        """First pixel column of every column of windows."""
        return self._starts(self.grid[1] * self.patch)

    def _starts(self, length: int) -> list[int]:
        last = length - self.size
        return [*range(0, last, self.stride), last]


def read_rows(
    image: OpenImage, tiling: Tiling, row: int, batch: int, fill: np.ndarray, nodata: float | None
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Read one row of windows, `batch` at a time.

    Args:
        image: the scene.
        tiling: its windows.
        row: first pixel row of this row of windows.
        batch: windows at a time.
        fill: `[C]`, what pixels without data become.
        nodata: value that means no data, in files that declare none.

    Yields:
        first columns, pixels `[B, C, size, size]` float32 in raw units, validity of the patches: the share of their
        pixels that have data in every band `[B, h, w]` float32.

    Raises:
        UserError: a file that cannot be read.
    """
    reader = RasterReader(nodata)
    side = tiling.size // tiling.patch
    for start in range(0, len(tiling.cols), batch):
        cols = tiling.cols[start : start + batch]
        pixels = np.empty((len(cols), len(image.sources), tiling.size, tiling.size), np.float32)
        shares = np.ones((len(cols), side, side), np.float32)
        for i, col in enumerate(cols):
            try:
                values, valid = reader.read(image.sources, image.grid, row, col, tiling.size, tiling.size)
            except UnreadableFile as error:
                raise UserError(f"SOURCE: {error}.") from None
            pixels[i] = values
            if valid is not None and not valid.all():
                np.copyto(pixels[i], fill[:, None, None], where=~valid)
                every = valid.all(axis=0).reshape(side, tiling.patch, side, tiling.patch)
                shares[i] = every.mean(axis=(1, 3))
        yield cols, pixels, shares


@dataclass
class Strip:
    """What one row of windows adds to the map of a scene."""

    first: int
    """Its first row of patches."""
    total: np.ndarray
    """`[D, h, W]`: sum over the windows of the features of every patch."""
    count: np.ndarray
    """`[h, W]`: how many windows that is; 0 where there is no data."""

    @classmethod
    def empty(cls, first: int, dim: int, height: int, width: int) -> "Strip":
        """A strip without any window."""
        return cls(first, np.zeros((dim, height, width), np.float32), np.zeros((height, width), np.float32))

    def add(self, col: int, features: np.ndarray, valid: np.ndarray) -> None:
        """Add a window: first column of patches, features `[D, h, w]`, and which patches count `[h, w]` (bool)."""
        span = slice(col, col + valid.shape[1])
        self.total[:, :, span] += np.where(valid, features, 0)
        self.count[:, span] += valid


def merge(strips: Iterator[Strip], height: int) -> Iterator[tuple[int, np.ndarray]]:
    """The map of a scene from its strips, in order of their rows, which may overlap.

    Memory holds the overlap of two strips, never the whole map.

    Args:
        strips: of all rows of windows, in order.
        height: rows of patches of the map.

    Yields:
        first row, features `[D, n, W]` float32 of rows that are complete: the mean over the windows, NaN without data.
    """
    pending: Strip | None = None
    for strip in strips:
        if pending is not None:
            done = strip.first - pending.first
            yield pending.first, _mean(pending.total[:, :done], pending.count[:done])
            rest, counts = pending.total[:, done:], pending.count[done:]
            strip.total[:, : rest.shape[1]] += rest
            strip.count[: len(counts)] += counts
        pending = strip
    if pending is not None:
        yield pending.first, _mean(pending.total[:, : height - pending.first], pending.count[: height - pending.first])


def _mean(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, total / count, np.float32(np.nan)).astype(np.float32)
