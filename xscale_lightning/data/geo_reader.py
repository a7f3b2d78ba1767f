"""Tiles of a TorchGeo GeoDataset as images with a pixel grid, read window by window through the dataset's own query."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xscale_lightning.data import describe
from xscale_lightning.data.geotiff import Grid, Raster, Source, UnreadableFile, common_grid
from xscale_lightning.errors import UserError

_WHOLE = 0.01  # pixels by which an extent may miss whole pixels, as decimal fractions in a header do


@dataclass(frozen=True)
class Tile:
    """One entry of a GeoDataset's index."""

    raster: Raster
    """Its pixel grid at the dataset's resolution; `descriptions` are the dataset's channels."""
    start: Any
    """First moment it is valid for."""
    stop: Any
    """Last moment it is valid for."""

    def days_from(self, other: "Tile") -> float:
        """Days between the two times, 0 where they overlap."""
        gap = max(self.start, other.start) - min(self.stop, other.stop)
        return max(0.0, gap.total_seconds() / 86400)


def tiles_of(dataset: Any, names: Sequence[str], owner: str) -> list[Tile]:
    """List the tiles of a GeoDataset.

    A GeoDataset says its resolution but not where its pixels lie: as in its files, they start at each tile's upper left
    corner.

    Args:
        dataset: TorchGeo GeoDataset.
        names: what to call its channels, in order.
        owner: the dataset's name, for tiles without a file.

    Raises:
        UserError: if the dataset does not know its resolution, or the time of a tile.
    """
    dx, dy = (abs(float(side)) for side in dataset.res)
    if min(dx, dy) <= 0:
        raise UserError(f"data: {owner} says no resolution; give its `res` in the dataset's arguments.")
    index, tiles, seen = dataset.index, [], set()
    files = list(index["filepath"]) if "filepath" in index else []
    for number, (interval, shape) in enumerate(zip(index.index, index.geometry, strict=True)):
        left, bottom, right, top = shape.bounds
        path = str(files[number]) if files else f"{owner} {number}"
        path = path if path not in seen else f"{path} ({number})"
        seen.add(path)
        if not hasattr(interval, "left"):
            raise UserError(f"data: {owner} knows no time of {path}, so it cannot be queried; mend the file's name.")
        # A GeoDataset fills what it does not have, and floating point values can be NaN: always look.
        raster = Raster(
            path, tuple(names), dataset.crs.to_string(), left, top, dx, dy, _pixels(right - left, dx),
            _pixels(top - bottom, dy), "float32",
            describe.gsd_of(dataset, {}, (slice(left, right), slice(bottom, top))), True,
        )  # fmt: skip
        tiles.append(Tile(raster, interval.left, interval.right))
    return tiles


def _pixels(length: float, step: float) -> int:
    exact = length / step
    return round(exact) if abs(exact - round(exact)) < _WHOLE else int(exact)


def tile_grid(tile: Tile) -> Grid:
    """Pixel grid of a tile.

    Raises:
        UnreadableFile: if the dataset has no coordinate system from which metres follow.
    """
    return common_grid([tile.raster], None)


class GeoReader:
    """Reads windows of tiles from a GeoDataset; takes the place of a `RasterReader`."""

    def __init__(self, dataset: Any, tiles: Sequence[Tile], nodata: float | None, owner: str) -> None:
        """Remember where to read.

        Args:
            dataset: TorchGeo GeoDataset.
            tiles: its tiles.
            nodata: value that means "no data"; None takes what the first tile's file declares.
            owner: the dataset's name, for messages.
        """
        self.dataset, self.owner = dataset, owner
        self.nodata = _declared(tiles[0].raster.path) if nodata is None else nodata
        self._times = {tile.raster.path: slice(tile.start, tile.stop) for tile in tiles}
        self._process = os.getpid()

    def read(
        self, sources: Sequence[Source], grid: Grid, row: int, col: int, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Read one window of `grid` from one tile.

        Returns:
            pixels `[C, height, width]` float32, and their validity (bool), or None where all are valid.

        Raises:
            UnreadableFile: if the window cannot be read.
            UserError: if the dataset delivers other channels than were named.
        """
        raster = sources[0].raster
        self._own_files()
        left, top = grid.left + col * grid.dx, grid.top - row * grid.dy
        x = slice(left, left + width * grid.dx, grid.dx)
        y = slice(top - height * grid.dy, top, grid.dy)
        try:
            sample = self.dataset[x, y, self._times[raster.path]]
        except (OSError, IndexError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).split("\n")[0][:160]
            raise UnreadableFile(raster.path, f"cannot be read ({reason})") from None
        if "image" not in sample:
            raise UserError(f"data: samples of {self.owner} have no 'image', only {', '.join(sample)}.")
        pixels = np.asarray(sample["image"], np.float32)
        if len(pixels) != len(raster.descriptions):
            raise UserError(
                f"data.channels: {self.owner} delivers {len(pixels)} channels, but {len(raster.descriptions)} are "
                "named; name all it delivers, in its order."
            )
        if pixels.shape[1:] != (height, width):
            shape = "x".join(str(side) for side in pixels.shape[1:])
            raise UnreadableFile(raster.path, f"a window of {height}x{width} pixels came as {shape}")
        pixels = pixels[[source.index - 1 for source in sources]]
        valid = np.isfinite(pixels)
        if self.nodata is not None:
            valid &= pixels != self.nodata
        return (pixels, None) if valid.all() else (pixels, valid)

    def _own_files(self) -> None:
        """Forget files that another process opened: a fork shares their position in the file."""
        if self._process != os.getpid():
            self._process = os.getpid()
            clear = getattr(getattr(self.dataset, "_cached_load_warp_file", None), "cache_clear", None)
            if clear is not None:
                clear()


def _declared(path: str) -> float | None:
    """Value for "no data" that a file declares; None if it declares none, or is no raster."""
    import rasterio
    from rasterio.errors import RasterioError

    try:
        with rasterio.open(path) as file:
            return file.nodata
    except (OSError, RasterioError):
        return None
