"""One window of one image, by band names: any GeoTIFF with all bands, or a folder with one file per band."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xscale_lightning.data.band_names import band_key, listed, says_its_bands
from xscale_lightning.data.bands import SENSORS, Bands
from xscale_lightning.data.geotiff import Grid, RasterReader, Source, UnreadableFile, common_grid, inspect
from xscale_lightning.data.scene_files import find_scenes, split_band
from xscale_lightning.errors import UserError


@dataclass(frozen=True)
class OpenImage:
    """An image whose bands are known and lie on one grid; nothing but headers has been read."""

    path: str
    sources: tuple[Source, ...]
    """One per band of the model, in its order."""
    grid: Grid
    crs: str | None
    note: str
    """What had to be assumed; "" if nothing."""

    def files(self) -> set[str]:
        """Paths of the files it is read from."""
        return {source.raster.path for source in self.sources}


def open_image(path: str, bands: Bands, file_bands: Sequence[str] | None = None, gsd: float | None = None) -> OpenImage:
    """Find the bands of a model in a file or folder.

    Args:
        path: a raster with all bands, or a folder with the files of one scene.
        bands: the bands wanted, found by name.
        file_bands: names of the bands of a file in its order, instead of the file's own descriptions.
        gsd: metres per pixel to read at; None takes the finest band's.

    Raises:
        UserError: no such file, a band missing, band names needed, or files that do not go together.
    """
    if not os.path.exists(path):
        raise UserError(f"IMAGE: '{path}' does not exist; give a GeoTIFF, or a folder with one file per band.")
    try:
        if os.path.isdir(path):
            sources, note = _in_folder(path, bands, file_bands), ""
        else:
            sources, note = _in_file(path, bands, file_bands)
        rasters = [source.raster for source in sources]
        unknown = all(raster.crs is None for raster in rasters)
        if unknown and gsd is None and bands.gsd is None:
            gsd, note = (
                1.0,
                (note + "\n" if note else "") + f"{path} does not say its resolution: taken as 1 m per pixel.",
            )
        grid = common_grid(rasters, gsd or (bands.gsd if unknown else None))
    except UnreadableFile as error:
        raise UserError(f"IMAGE: {str(error).replace('; set data.gsd', '; set --gsd')}.") from None
    return OpenImage(path, tuple(sources), grid, rasters[0].crs, note)


def _in_file(path: str, bands: Bands, file_bands: Sequence[str] | None) -> tuple[list[Source], str]:
    raster = inspect(path)
    count = len(raster.descriptions)
    if file_bands is not None and len(file_bands) != count:
        raise UserError(
            f"--file-bands: {len(file_bands)} names for the {count} band(s) of '{path}'; give one name each."
        )
    names, note = list(file_bands or raster.descriptions), ""
    known = [*bands.names, *(SENSORS[bands.sensor].names if bands.sensor in SENSORS else ())]
    if file_bands is None and not says_its_bands(names, known):
        wanted = {band_key(name) for name in bands.names}
        named = split_band(os.path.splitext(os.path.basename(path))[0], wanted)[1] if count == 1 else None
        if named is not None:
            names = [named]
        elif count == len(bands):
            names = list(bands.names)
            note = (
                f"{path} does not name its bands: taken in the model's order, {listed(names)}. "
                "If that is not their order, name them with --file-bands."
            )
        else:
            raise UserError(
                f"IMAGE: '{path}' has {count} band(s) without names, and the model needs {len(bands)} "
                f"({listed(bands.names)}); name the file's bands in its order with --file-bands."
            )
    found = {band_key(name): Source(raster, i) for i, name in reversed(list(enumerate(names, start=1))) if name}
    missing = [name for name in bands.names if band_key(name) not in found]
    if missing:
        there = listed([name for name in names if name])
        raise UserError(
            f"IMAGE: '{path}' has no {listed(missing)}, which the model needs; it has {there}.\n"
            "If these are other names of the same bands, give the model's names in the file's order with --file-bands."
        )
    return [found[band_key(name)] for name in bands.names], note


def _in_folder(path: str, bands: Bands, file_bands: Sequence[str] | None) -> list[Source]:
    known = SENSORS[bands.sensor].names if bands.sensor in SENSORS else ()
    scenes, problem = {}, ""
    try:
        scenes = find_scenes(path, bands.names, known, file_bands)[0]
    except UserError as error:
        problem = str(error)
    if problem:  # raised outside of the handler: of a chain of errors the command line tells the first
        for there, here in (("data.root", "IMAGE"), ("data.file_bands", "--file-bands"), ("data.bands", "IMAGE")):
            problem = problem.replace(there, here)
        raise UserError(problem)
    if len(scenes) > 1:
        raise UserError(
            f"IMAGE: folder '{path}' holds {len(scenes)} scenes ({listed(list(scenes))}); give one file or folder."
        )
    (files,) = scenes.values()
    return [files[band_key(name)] for name in bands.names]


@dataclass(frozen=True)
class Window:
    """A rectangle of an image's grid, in pixels."""

    row: int
    col: int
    height: int
    width: int


def place_window(grid: Grid, height: int, width: int, row: int | None = None, col: int | None = None) -> Window:
    """A window of the grid, in its middle where `row` or `col` is None (at the coarsest band's pixel edges).

    Raises:
        UserError: if it does not lie inside.
    """
    if height > grid.height or width > grid.width:
        raise UserError(
            f"--size: a window of {height} x {width} pixels is larger than the image ({grid.height} x {grid.width} "
            f"at {grid.gsd:g} m); give at most {min(grid.height, grid.width)}."
        )
    row = (grid.height - height) // 2 // grid.snap * grid.snap if row is None else row
    col = (grid.width - width) // 2 // grid.snap * grid.snap if col is None else col
    for name, start, side, whole in (("row", row, height, grid.height), ("col", col, width, grid.width)):
        if not 0 <= start <= whole - side:
            raise UserError(
                f"--{name} {start}: a window of {side} pixels from there leaves the image, which has {whole}; "
                f"give 0 to {whole - side}."
            )
    return Window(row, col, height, width)


def read_window(image: OpenImage, window: Window, nodata: float | None = None) -> Tensor:
    """Read a window and nothing else of the image: `[1, C, H, W]` float32 in raw units.

    Raises:
        UserError: if a part of it has no data, or a file cannot be read.
    """
    try:
        pixels, valid = RasterReader(nodata).read(
            image.sources, image.grid, window.row, window.col, window.height, window.width
        )
    except UnreadableFile as error:
        raise UserError(f"IMAGE: {error}.") from None
    missing = 0.0 if valid is None else 1 - float(valid.all(axis=0).mean())
    if missing:
        raise UserError(
            f"IMAGE: {100 * missing:.3g} % of the window's pixels (row {window.row}, column {window.col}, "
            f"{window.height} x {window.width}) have no data; choose another window with --row and --col, or a "
            "smaller --size."
        )
    return torch.from_numpy(pixels.astype(np.float32))[None]


def geotiff_bytes(pixels: np.ndarray, names: Sequence[str], image: OpenImage, window: Window) -> bytes:
    """A GeoTIFF in memory, float32, placed where the window lies.

    Args:
        pixels: `[C, H, W]` in raw units.
        names: band descriptions.
        image: the image the window belongs to.
        window: where the pixels lie.
    """
    from rasterio.io import MemoryFile
    from rasterio.transform import from_origin

    grid = image.grid
    place = from_origin(grid.left + window.col * grid.dx, grid.top - window.row * grid.dy, grid.dx, grid.dy)
    options = {"driver": "GTiff", "count": len(pixels), "height": window.height, "width": window.width}
    georeference = {"crs": image.crs, "transform": place} if image.crs else {}
    with MemoryFile() as memory:
        with memory.open(**options, **georeference, dtype="float32", compress="deflate", predictor=3) as file:
            file.write(pixels.astype(np.float32))
            file.descriptions = tuple(names)
        return bytes(memory.getbuffer())
