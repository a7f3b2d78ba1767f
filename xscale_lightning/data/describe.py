"""What a TorchGeo dataset tells about itself: its band names, files, classes and ground sample distance.

TorchGeo has no common interface for these, and their names have moved between its releases; this is the one place that
looks for them. Nothing here imports TorchGeo.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

METRES_PER_DEGREE = 111_320.0  # of latitude, and of longitude at the equator


def innermost(dataset: Any) -> Any:
    """Dataset inside subsets, and the first of concatenated or intersected ones."""
    while True:
        if hasattr(dataset, "indices") and hasattr(dataset, "dataset"):
            dataset = dataset.dataset
        elif isinstance(getattr(dataset, "datasets", None), Sequence) and dataset.datasets:
            dataset = dataset.datasets[0]
        else:
            return dataset


def band_names(dataset: Any) -> list[str] | None:
    """Names of the channels the dataset delivers, in order, or None if it does not say."""
    inner = innermost(dataset)
    for attribute in ("bands", "all_band_names", "all_bands"):
        names = getattr(inner, attribute, None)
        if (
            isinstance(names, Sequence)
            and not isinstance(names, str)
            and names
            and all(isinstance(n, str) for n in names)
        ):
            return list(names)
    return None


def num_classes(dataset: Any) -> int | None:
    """Number of classes, or None if the dataset does not say."""
    inner = innermost(dataset)
    for attribute in ("num_classes", "classes"):
        value = getattr(inner, attribute, None)
        if isinstance(value, int):
            return value
        if isinstance(value, Sequence) and not isinstance(value, str):
            return len(value)
    return None


def class_names(dataset: Any) -> list[str] | None:
    """Names of the classes, in order, or None if the dataset does not say."""
    names = getattr(innermost(dataset), "classes", None)
    if isinstance(names, Sequence) and not isinstance(names, str) and names and all(isinstance(n, str) for n in names):
        return list(names)
    return None


def file_of(dataset: Any, index: Any) -> str | None:
    """Path of the file (or folder of files) behind an index, or None if the dataset does not say."""
    while hasattr(dataset, "indices") and hasattr(dataset, "dataset"):
        index, dataset = dataset.indices[index], dataset.dataset
    if not isinstance(index, int):
        return None
    for attribute in ("samples", "imgs", "files", "folders", "image_paths"):
        entries = getattr(dataset, attribute, None)
        if not isinstance(entries, Sequence) or isinstance(entries, str) or index >= len(entries):
            continue
        entry = entries[index]
        if isinstance(entry, Mapping):  # one path per sensor or kind; the optical image where it can be told
            entry = entry.get("image", entry.get("s2", next(iter(entry.values()), None)))
        elif isinstance(entry, tuple) and entry:
            entry = entry[0]
        if isinstance(entry, str):
            return entry
    return None


def place_of(dataset: Any, index: Any) -> str | None:
    """What to call a sample in a message: its file, or of a window of a GeoDataset the one file below it.

    None where the dataset says neither, or the window shows several files.
    """
    if not isinstance(index, Sequence) or isinstance(index, str) or not all(isinstance(s, slice) for s in index[:2]):
        return file_of(dataset, index)
    tiles: Any = getattr(innermost(dataset), "index", None)
    if len(index) < 2 or not hasattr(tiles, "geometry") or "filepath" not in getattr(tiles, "columns", ()):
        return None
    x, y = index[0], index[1]
    sides = tiles.geometry.bounds
    below = (sides.minx < x.stop) & (sides.maxx > x.start) & (sides.miny < y.stop) & (sides.maxy > y.start)
    files = sorted({str(path) for path in tiles["filepath"][below]})
    return files[0] if len(files) == 1 else None


def gsd_of(dataset: Any, sample: Mapping[str, Any], index: Any = None) -> float | None:
    """Ground sample distance in metres per pixel, or None if neither sample nor dataset says it.

    A sample may bring `gsd`, or `res` in metres (SSL4EO). A GeoDataset has `res` in units of its coordinate system:
    degrees are converted at the latitude of the window (or of the data set's middle), feet by their length.
    """
    for key in ("gsd", "res"):
        if key in sample:
            return float(sample[key])
    inner = dataset if hasattr(dataset, "crs") else innermost(dataset)
    res, crs = getattr(inner, "res", None), getattr(inner, "crs", None)
    if res is None or crs is None:
        return None
    across, along = res if isinstance(res, Sequence) else (res, res)
    if not crs.is_geographic:
        axes = getattr(crs, "axis_info", ())
        metres = axes[0].unit_conversion_factor if axes else 1.0
        return math.sqrt(across * along) * metres
    latitude = _latitude(index) or _latitude(getattr(inner, "bounds", None)) or 0.0
    return math.sqrt(across * along * math.cos(math.radians(latitude))) * METRES_PER_DEGREE


def _latitude(window: Any) -> float | None:
    """Middle of the y slice of a window (x, y[, t]) of slices."""
    if not isinstance(window, Sequence) or len(window) < 2 or not isinstance(window[1], slice):
        return None
    return (window[1].start + window[1].stop) / 2
