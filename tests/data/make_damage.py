"""Makes damaged files of every kind, many in a second: 16 x 16 pixels, three bands, and good ones beside them."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin

SIDE, BANDS, PIXELS = 16, 3, (500, 3000)


def good(rng: np.random.Generator, count: int = BANDS, side: int = SIDE, dtype: str = "uint16") -> np.ndarray:
    return rng.integers(*PIXELS, (count, side, side)).astype(dtype)


def write(path: Path, pixels: np.ndarray, crs: str = "EPSG:32632", gsd: float = 10.0, **profile) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    place = {"crs": crs, "transform": from_origin(300000.0, 5000000.0, gsd, gsd)}
    count, height, width = pixels.shape
    with rasterio.open(path, "w", "GTiff", width, height, count, dtype=pixels.dtype, **place, **profile) as file:
        file.write(pixels)


def empty(path, rng):
    path.write_bytes(b"")


def truncated(path, rng):
    write(path, good(rng))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 900])


def no_image(path, rng):
    path.write_bytes(b"<html>404 not found</html>" * 20)


def missing(path, rng):
    path.symlink_to(path.parent / "nowhere" / path.name)


def no_data(path, rng):
    write(path, np.zeros((BANDS, SIDE, SIDE), "uint16"), nodata=0)


def not_finite(path, rng):
    pixels = good(rng, dtype="float32")
    pixels[:, : SIDE - 3] = np.nan
    write(path, pixels)


def constant(path, rng):
    write(path, np.full((BANDS, SIDE, SIDE), int(rng.integers(0, 4000)), "uint16"))


def bands(path, rng):
    write(path, good(rng, int(rng.choice([2, 5]))))


def dtype(path, rng):
    write(path, good(rng, dtype="float32"))


def crs(path, rng):
    write(path, good(rng), crs="EPSG:32750")


def size(path, rng):
    write(path, good(rng, side=8))


def gsd(path, rng):
    write(path, good(rng), gsd=60.0)


def statistics(path, rng):
    write(path, (good(rng) // 500).astype("uint16") + rng.integers(0, 2, (BANDS, SIDE, SIDE)).astype("uint16"))


KINDS = {
    "empty": empty, "truncated": truncated, "no image": no_image, "missing": missing, "no data": no_data,
    "not finite": not_finite, "constant": constant, "bands": bands, "dtype": dtype, "crs": crs, "size": size,
    "gsd": gsd, "statistics": statistics,
}  # fmt: skip
HARD = ("empty", "truncated", "no image", "missing", "no data", "not finite", "constant", "bands", "size")


def names(root: Path, kind: str, count: int) -> Iterator[Path]:
    yield from (root / f"{kind.replace(' ', '-')}{number:04d}.tif" for number in range(count))


def fabricate(root: Path, each: int, well: int, kinds=tuple(KINDS)) -> dict[str, str]:
    """Write `well` good files and `each` of every kind; returns the kind by path."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    for path in names(root, "good", well):
        write(path, good(rng))
    expected = {}
    for kind in kinds:
        for path in names(root, kind, each):
            KINDS[kind](path, rng)
            expected[str(path)] = kind
    return expected


def copies(source: Path, target: Path) -> None:
    """The same files elsewhere, links included."""
    shutil.copytree(source, target, symlinks=True)


if __name__ == "__main__":
    import sys

    found = fabricate(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[2]) * 60)
    print(f"{len(found)} damaged files in {os.path.abspath(sys.argv[1])}")
