"""Reading one pair of dates whole: from files beside each other, or from TorchGeo's OSCD."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from xscale_lightning.data.band_names import match_names
from xscale_lightning.data.damage import is_constant
from xscale_lightning.data.datamodule import check_folder
from xscale_lightning.errors import UserError

logger = logging.getLogger(__name__)


@dataclass
class Labels:
    """Values of a map of changes."""

    unknown: int | None = 0
    """Pixels that nobody has looked at; they do not count. Null: there are none."""
    unchanged: int = 1
    """Pixels that stayed what they were."""
    changed: int = 2
    """Pixels that changed."""

    def classes(self, values: np.ndarray, name: str) -> np.ndarray:
        """`[H, W]` int8: 0 unchanged, 1 changed, -1 unknown.

        Raises:
            UserError: another value, with the file's name.
        """
        result = np.full(values.shape, -2, np.int8)
        meanings = {self.unchanged: 0, self.changed: 1} | ({} if self.unknown is None else {self.unknown: -1})
        for value, meaning in meanings.items():
            result[values == value] = meaning
        if (result == -2).any():
            strange = np.unique(values[result == -2])[:3].tolist()
            raise UserError(f"data.labels: '{name}' has the values {strange}, and {sorted(meanings)} are named.")
        return result


@dataclass
class ChangeScene:
    """Two images of one place `[C, H, W]` in raw units, and what changed `[H, W]` (0, 1, -1 unknown)."""

    name: str
    first: np.ndarray
    second: np.ndarray
    mask: np.ndarray
    gsd: float | None

    def __post_init__(self) -> None:
        """Refuse parts of different size."""
        if not self.first.shape[1:] == self.second.shape[1:] == self.mask.shape:
            sizes = ", ".join(
                f"{a[0]} x {a[1]}" for a in (self.first.shape[1:], self.second.shape[1:], self.mask.shape)
            )
            raise UserError(f"data: scene {self.name}: first image, second image and label differ in size ({sizes}).")


Opener = Callable[[], ChangeScene]


def undamaged(found: dict[str, Opener], stop: bool, keep_constant: bool) -> tuple[dict[str, Opener], dict[str, str]]:
    """The scenes that can be used, and why the others are left out.

    Raises:
        UserError: one cannot be used, and that is to stop the run; or none can.
    """
    good: dict[str, Opener] = {}
    left_out: dict[str, str] = {}
    for name, opener in found.items():
        reason = problem(opener, keep_constant)
        if reason and stop:
            raise UserError(f"{reason} With data.on_error: skip it is left out.")
        if reason:
            left_out[name] = reason
            logger.warning("Left out scene %s: %s", name, reason)
        else:
            good[name] = opener
    if not good:
        raise UserError(f"data.root: no scene can be used; {next(iter(left_out.values()))}")
    return good, left_out


def problem(opener: Opener, keep_constant: bool) -> str:
    """Why a scene cannot be used, as a sentence; "" where it can."""
    try:
        scene = opener()
        for which, image in (("first", scene.first), ("second", scene.second)):
            if image.dtype.kind == "f" and not np.isfinite(image).all():
                share = 1.0 - np.isfinite(image).mean()
                return f"data: scene {scene.name}: {share:.1%} of the {which} image's pixels are NaN or infinite."
            if not keep_constant and is_constant(image):
                return f"data: scene {scene.name}: all pixels of the {which} image have one value."
    except UserError as error:
        return str(error)
    return ""


def folders(
    root: str,
    files: tuple[str, str, str],
    bands: Sequence[str],
    channels: Sequence[str] | None,
    labels: Labels,
    gsd: float | None,
) -> dict[str, Opener]:
    """Readers of `root`, or of those of its sub-folders that hold all of `files`, by name.

    Raises:
        UserError: there is no such folder, or none with these files.
    """
    if not all(files):
        raise UserError("data.first, data.second and data.label: '' is no file name; give one.")
    remedy = f"give a folder with {', '.join(files)}, or one of such folders."
    check_folder("data.root", root, remedy)
    places = [place for place in (Path(root), *sorted(Path(root).iterdir())) if place.is_dir()]
    whole = [place for place in places if all((place / file).is_file() for file in files)]
    if not whole:
        raise UserError(f"data.root: '{root}' holds no pair; {remedy}")
    taken = None if channels is None else match_names(bands, list(channels), "data.channels")
    delivered = len(channels or bands)
    return {place.name: partial(_read_folder, place, files, taken, delivered, labels, gsd) for place in whole}


def _read_folder(
    place: Path, files: tuple[str, str, str], taken: list[int] | None, delivered: int, labels: Labels, gsd: float | None
) -> ChangeScene:
    first, found = _read_image(place / files[0], taken, delivered)
    second, _ = _read_image(place / files[1], taken, delivered)
    mask = labels.classes(_read_label(place / files[2]), str(place / files[2]))
    return ChangeScene(place.name, first, second, mask, gsd or found)


def _read_image(path: Path, taken: list[int] | None, delivered: int) -> tuple[np.ndarray, float | None]:
    from rasterio.errors import RasterioIOError

    from xscale_lightning.data.geotiff import UnreadableFile, open_raster

    try:
        with open_raster(str(path)) as source:
            pixels, crs = source.read(), source.crs
            gsd = None
            if crs is not None and crs.is_projected:
                gsd = (source.res[0] * source.res[1]) ** 0.5 * crs.linear_units_factor[1]
    except (RasterioIOError, UnreadableFile) as error:
        raise UserError(f"data: '{path}' is not readable ({error}).") from error
    if len(pixels) != delivered:
        raise UserError(
            f"data.bands: '{path}' has {len(pixels)} bands, and {delivered} are named; fit data.bands, or name all "
            "of them in data.channels."
        )
    return pixels if taken is None else pixels[taken], gsd


def _read_label(path: Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            values = np.array(picture)
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"data: '{path}' is not readable ({error}).") from error
    return values if values.ndim == 2 else values[..., 0]


def read_oscd(dataset: Any, index: int, name: str, gsd: float) -> ChangeScene:
    """City `index` of TorchGeo's OSCD, in the order of bands that the data set was opened with."""
    sample = dataset[index]
    first, second = sample["image"].numpy().astype(np.uint16)
    return ChangeScene(name, first, second, sample["mask"].squeeze(0).numpy().astype(np.int8), gsd)
