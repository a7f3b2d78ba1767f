"""The embedded imagery: 11 km x 9.6 km of a Sentinel-2 Level-1C scene, ready without a download."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from xscale_lightning.data.bands import BandSelection, band_key, match_names
from xscale_lightning.data.datamodule import DEFAULT_BANDS
from xscale_lightning.data.geotiff import Grid, Source
from xscale_lightning.data.scene import Scene
from xscale_lightning.data.scenes import SceneFolder

FOLDER = Path(__file__).with_name("sample_imagery")
CLASSES = ("open water", "bare or built", "wet ground", "dark vegetation", "bright vegetation", "mixed")
MIXED = CLASSES.index("mixed")
# Chosen among the first 300 deals: with patches of 64 pixels every split holds at least 6 % of each class, in similar
# shares. It was chosen by the labels alone, never by the accuracy of a model.
DEFAULT_SPLIT = 79
_LABEL_BANDS = ("B03", "B04", "B08", "B11")


@cache
def sample_record() -> dict[str, Any]:
    """What `scripts/cut_sample.py` wrote about the cut: window, CRS, and per band checksum and statistics."""
    return json.loads(FOLDER.joinpath("sample.json").read_text())


def index_classes(green: np.ndarray, red: np.ndarray, nir: np.ndarray, swir: np.ndarray) -> np.ndarray:
    """Class of every pixel by thresholds on spectral indices; an index of `CLASSES`, never "mixed".

    With MNDWI = (green - swir) / (green + swir) (Xu 2006), NDVI = (nir - red) / (nir + red) (Rouse et al. 1974) and
    NDWI = (green - nir) / (green + nir) (McFeeters 1996), in this order:

        open water         MNDWI > 0.5
        dark vegetation    NDVI >= 0.3 and nir < 2000    (here mostly woods)
        bright vegetation  NDVI >= 0.3                   (here mostly crops and grass)
        wet ground         NDWI > -0.1                   (here mostly salt marsh and mud; also shadow and dark roofs)
        bare or built      all else

    The thresholds are for this one scene in top-of-atmosphere reflectance x 10000; they were set by eye.

    Args:
        green: B03 `[H, W]`.
        red: B04 `[H, W]`.
        nir: B08 `[H, W]`.
        swir: B11 `[H, W]`.
    """
    green, red, nir, swir = (band.astype(np.float32) for band in (green, red, nir, swir))
    mndwi, ndvi, ndwi = ((a - b) / np.maximum(a + b, 1.0) for a, b in ((green, swir), (nir, red), (green, nir)))
    plant = ndvi >= 0.3
    return np.select([mndwi > 0.5, plant & (nir < 2000), plant, ndwi > -0.1], [0, 3, 4, 2], default=1)


def patch_labels(classes: np.ndarray, size: tuple[int, int], snap: int) -> np.ndarray:
    """Label of the patch at every snapped origin, `[ceil(H / snap), ceil(W / snap)]`.

    The label is the class that covers more than half of the patch's centre (half its height and width), else "mixed".
    Origins from which a patch would leave the scene have the label -1.

    Args:
        classes: `[H, W]` class per pixel.
        size: (height, width) of a patch in pixels.
        snap: pixels between origins.
    """
    height, width = (max(1, side // 2) for side in size)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    rows = np.arange(0, max(0, classes.shape[0] - size[0] + 1), snap)[:, None]
    cols = np.arange(0, max(0, classes.shape[1] - size[1] + 1), snap)[None, :]
    shares = []
    for number in range(MIXED):
        total = np.pad((classes == number).cumsum(0, np.int64).cumsum(1), ((1, 0), (1, 0)))  # integral image
        y, x = rows + top, cols + left
        count = total[y + height, x + width] - total[y, x + width] - total[y + height, x] + total[y, x]
        shares.append(count / (height * width))
    stacked = np.stack(shares)
    labels = np.full([-(-side // snap) for side in classes.shape], -1, np.int64)
    found = np.where(stacked.max(axis=0) > 0.5, stacked.argmax(axis=0), MIXED)
    labels[: found.shape[0], : found.shape[1]] = found
    return labels


class SampleScene(SceneFolder):
    """The embedded Sentinel-2 scene, all 13 bands at 10 m unless told otherwise; needs no argument and no network.

    11.04 km x 9.6 km (1104 x 960 pixels of 10 m) of fields, woods, settlements, salt marsh, a lagoon and a barrier
    beach. It is held in memory, so patches cost microseconds. Band statistics are those of the cut itself.

    Labels are *index classes, not ground truth*: `index_classes` by thresholds on spectral indices, then the majority
    in the middle of the patch, or "mixed" (`patch_labels`); `mask`, in the fixed grids, is the class of every pixel, at
    the resolution of `image_hr` where there are pairs. They tell whether features separate surfaces better than at
    step 0. They do not tell whether features are good for land cover: every label is a function of four of the bands,
    neighbouring patches resemble each other, and mean and standard deviation per band already score well.
    """

    def __init__(
        self,
        bands: BandSelection = DEFAULT_BANDS,
        gsd: float | None = None,
        image_size: int | tuple[int, int] = 64,
        samples_per_epoch: int = 4096,
        fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
        split_seed: int = DEFAULT_SPLIT,
        eval_stride: int | None = None,
        pair_ratio: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int | None = 0,
    ) -> None:
        """Check the arguments; the imagery is opened by `setup`.

        Args:
            bands: which of the 13 Sentinel-2 bands, and their statistics; those of the cut if none are given.
            gsd: metres per pixel of the patches before any degradation; null takes the finest chosen band's.
            image_size: pixels, or [height, width], of `image`.
            samples_per_epoch: random patches that make a training epoch.
            fractions: shares of the area for train, val and test; 0 leaves a split out.
            split_seed: deals out the area; apart from `seed` so that runs with other seeds keep the split.
            eval_stride: pixels between the patches of the fixed grids; null: half a patch.
            pair_ratio: above 1, deliver `image_hr`, `gsd_hr` too, `image` being their area mean (Wald's protocol).
            seed: of the random patches.
            batch_size: samples per device and step.
            num_workers: worker processes; 0, because nothing is read from disk while training.

        Raises:
            UserError: if an argument is out of range or the scene lacks a band.
        """
        sides = (image_size,) if isinstance(image_size, int) else image_size
        super().__init__(
            root=str(FOLDER),
            bands=bands,
            gsd=gsd,
            image_size=image_size,
            samples_per_epoch=samples_per_epoch,
            fractions=fractions,
            split_seed=split_seed,
            eval_stride=eval_stride or max(1, min(sides) * pair_ratio // 2),
            eval_samples=None,
            pair_ratio=pair_ratio,
            on_error="stop",
            seed=seed,
            batch_size=batch_size,
            num_workers=num_workers,
        )
        self.name = "sample"
        self.num_classes = len(CLASSES)
        self.classes = CLASSES
        self.num_mask_classes, self.class_names = MIXED, CLASSES[:MIXED]
        if bands.mean is None:
            measured = sample_record()["bands"]
            order = match_names(self.bands.names, tuple(measured), "the embedded scene")
            figures = [list(measured.values())[i] for i in order]
            self.bands = self.bands.with_statistics([f["mean"] for f in figures], [f["std"] for f in figures])

    def prepare_scene(self, scene: Scene, files: dict[str, Source]) -> None:
        """Label the patches, whichever bands were chosen."""
        sources = [files[band_key(name)] for name in _LABEL_BANDS]
        grid: Grid = scene.grid
        pixels, _ = self.reader.read(sources, grid, 0, 0, grid.height, grid.width)
        green, red, nir, swir = pixels
        scene.classes = index_classes(green, red, nir, swir)
        scene.labels = patch_labels(scene.classes, self.patch_size, grid.snap)
