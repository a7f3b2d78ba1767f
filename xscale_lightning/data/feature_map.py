"""A GeoTIFF whose pixels are patches: one band per feature, or principal components of them."""

import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from xscale_lightning.data.image_window import OpenImage
from xscale_lightning.data.scene_windows import Tiling
from xscale_lightning.errors import UserError
from xscale_lightning.files import told, whole

Rows = Callable[[], Iterator[tuple[int, np.ndarray]]]
MAX_BANDS = 65535  # of a TIFF
PROBE = 2**22  # bytes: more than GDAL may have had left to write when it closed a file


def write_feature_map(
    path: Path, rows: Rows, image: OpenImage, tiling: Tiling, names: Sequence[str], components: "Components | None"
) -> None:
    """Write the map of a scene, whole or not at all; row by row, so it may be larger than memory.

    Args:
        path: the file.
        rows: gives the map's rows `(first, [D, n, W])` from the beginning, every time it is called.
        image: the scene; the map has its coordinate system, and pixels of one patch.
        tiling: its patches.
        names: band descriptions.
        components: principal components to write instead of the features.

    Raises:
        UserError: it cannot be written.
    """
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning, RasterioError
    from rasterio.transform import from_origin
    from rasterio.windows import Window

    if len(names) > MAX_BANDS:
        raise UserError(f"--map: {len(names)} features are more bands than a GeoTIFF has; give --pca 3.")
    (height, width), grid = tiling.grid, image.grid
    place = from_origin(grid.left, grid.top, grid.dx * tiling.patch, grid.dy * tiling.patch)
    profile = {"driver": "GTiff", "count": len(names), "height": height, "width": width, "dtype": "float32"}
    profile |= {"nodata": float("nan"), "compress": "deflate", "predictor": 3, "bigtiff": "if_safer"}
    # One row per block and band: whole rows are written once, and nothing is compressed again.
    profile |= {"interleave": "band", "blockysize": 1, "tiled": False}
    profile |= {"crs": image.crs, "transform": place} if image.crs else {}
    with told(path, "--map "), whole(path, ".part.tif") as part, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        problem = ""
        try:
            sums = []
            with rasterio.open(part, "w", **profile) as file:
                for first, values in rows():
                    values = values if components is None else components.project(values)
                    values = np.ascontiguousarray(values, np.float32)
                    file.write(values, window=Window(0, first, width, values.shape[1]))  # type: ignore[arg-type]
                    sums.append((first, values.shape[1], zlib.crc32(values.data)))
                file.descriptions = tuple(names)
            problem = _difference(part, width, sums)
        except RasterioError as error:
            problem = str(error.__cause__ or error).splitlines()[0]
        if problem:
            _check_room(part)
            raise UserError(f"--map '{path}' cannot be written ({problem}); choose another.")


def _difference(part: Path, width: int, sums: Sequence[tuple[int, int, int]]) -> str:
    """What is wrong with a map that was written; "" if it is whole.

    GDAL says nothing where the disk gets full while it closes a file: it is read once more.

    Args:
        part: the file.
        width: its columns.
        sums: first row, number of rows and checksum of what was written.
    """
    import rasterio
    from rasterio.windows import Window

    with rasterio.open(part) as file:
        for first, count, wanted in sums:
            found = file.read(window=Window(0, first, width, count))  # type: ignore[arg-type]
            if zlib.crc32(found.data) != wanted:
                return f"row {first} is not as it was written"
    return ""


def _check_room(part: Path) -> None:
    """Say it if there is no room, where a library does not say why it cannot write.

    Raises:
        OSError: as the system has it.
    """
    with part.open("ab") as file:
        file.write(bytes(PROBE))
        file.flush()
        os.fsync(file.fileno())


class Components:
    """Principal components of a map's features, from all patches with data, in one pass over its rows.

    Attributes:
        shares: share of the variance of every component `[K]`.

    Raises:
        UserError: more components than features, or fewer than two patches with data.
    """

    def __init__(self, rows: Rows, count: int) -> None:
        total: np.ndarray | float = 0.0
        products: np.ndarray | float = 0.0
        number = 0
        for _, values in rows():
            points = values.reshape(len(values), -1).astype(np.float64)  # [D, n * W]
            points = points[:, np.isfinite(points).all(axis=0)]
            total = total + points.sum(axis=1)
            products = products + points @ points.T
            number += points.shape[1]
        if number < 2:
            raise UserError("--pca: the scene has fewer than two patches with data.")
        self.mean = np.asarray(total) / number
        if count > len(self.mean):
            raise UserError(f"--pca {count}: there are {len(self.mean)} features; give at most as many.")
        covariance = np.asarray(products) / number - np.outer(self.mean, self.mean)
        variances, vectors = np.linalg.eigh(covariance)
        vectors = vectors[:, ::-1][:, :count]
        signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(count)])
        self.vectors = vectors * np.where(signs == 0, 1, signs)  # the largest entry is positive: no arbitrary sign
        self.shares = np.clip(variances[::-1][:count], 0, None) / max(float(variances.clip(0).sum()), 1e-300)

    def project(self, values: np.ndarray) -> np.ndarray:
        """Features `[D, n, W]` -> components `[K, n, W]` float32; NaN stays NaN."""
        points = values.reshape(len(values), -1).astype(np.float64) - self.mean[:, None]
        return (self.vectors.T @ points).reshape(-1, *values.shape[1:]).astype(np.float32)
