"""Pairs of crops of two co-registered images: the same ground at two resolutions."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xscale_lightning.data.damage import is_constant
from xscale_lightning.data.footprint import Footprint, read_resampled
from xscale_lightning.data.geotiff import UnreadableFile
from xscale_lightning.data.patches import PatchDataset, stop_message
from xscale_lightning.data.scene import Scene
from xscale_lightning.errors import UserError


class PairScene(Scene):
    """One MR image and its HR image. `read` gives MR, `read_hr` the same ground of HR."""

    def __init__(self, name: str, mr: Scene, hr: Scene, footprint: Footprint, ratio: Fraction) -> None:
        """Join two scenes.

        Args:
            name: of the pair.
            mr: the coarse scene, on the footprint's grid.
            hr: the fine scene, on its own grid.
            footprint: ground that both show.
            ratio: HR pixels along one MR pixel in what is delivered.
        """
        super().__init__(name, mr.sources, footprint.grid, mr.reader)
        self.hr, self.footprint, self.ratio = hr, footprint, ratio
        place = footprint.placement
        self.exact = place.exact and place.step_y == place.step_x == ratio

    @property
    def nbytes(self) -> int:
        """Size of both images in memory, in bytes."""
        return super().nbytes + self.hr.nbytes

    @property
    def masked(self) -> bool:
        """Whether pixels of either image can be without data."""
        return super().masked or self.hr.masked

    def load(self) -> None:
        """Read both images into memory.

        Raises:
            UnreadableFile: if any part of a file cannot be read.
        """
        super().load()
        self.hr.load()

    def check(self, height: int, width: int) -> None:
        """Read the first and the last pair of patches.

        Raises:
            UnreadableFile: if one of them cannot be read.
        """
        super().check(height, width)
        for row, col in ((0, 0), self._last(height, width)):
            self.read_hr(row, col, height, width)

    def _last(self, height: int, width: int) -> tuple[int, int]:
        snap = self.grid.snap
        return (self.grid.height - height) // snap * snap, (self.grid.width - width) // snap * snap

    def read_hr(self, row: int, col: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        """HR pixels `[C, height * ratio, width * ratio]` of the ground of an MR window, and their validity.

        The pixels are the file's own where HR's pixel edges lie on MR's; otherwise they are resampled by the pair's
        affine.

        Raises:
            UnreadableFile: if this part of a file cannot be read.
        """
        window = self.footprint.placement.window(row, col, height, width)
        if self.exact:
            return self.hr.read(*(round(side) for side in window))
        size = (int(height * self.ratio), int(width * self.ratio))
        return read_resampled(self.hr.read, (self.hr.grid.height, self.hr.grid.width), window, size)


class PairDataset(PatchDataset):
    """Patches of `PairScene`s: what `PatchDataset` delivers, and `image_hr [C, H * ratio, W * ratio]`, `gsd_hr`."""

    def __init__(
        self, scenes: Sequence[PairScene], origins: Any, size: tuple[int, int], fill: Sequence[float],
        fill_hr: Sequence[float], ratio: Fraction, **options: Any,
    ) -> None:  # fmt: skip
        """Describe the samples.

        Args:
            scenes: the pairs.
            origins: as for `PatchDataset`, in MR pixels.
            size: (height, width) of `image`.
            fill: value per band for MR pixels without data.
            fill_hr: value per band for HR pixels without data.
            ratio: HR pixels along one MR pixel.
            **options: see `PatchDataset`.
        """
        super().__init__(scenes, origins, size, fill, **options)
        self.pairs, self.ratio = list(scenes), ratio
        self.fill_hr = np.asarray(fill_hr, np.float32)
        self._fetched: dict[tuple[int, ...], np.ndarray] = {}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the batch of these samples, stacked.

        Raises:
            UserError: if a file is unreadable and that is to stop the run, or nothing can be delivered.
        """
        self._fetched.clear()
        return super().__getitems__(indices)

    def readable(self, origins: np.ndarray) -> np.ndarray:
        """Which origins `[n, 3]` can be delivered, `[n]` bool."""
        found = super().readable(origins)
        self._fetched.clear()
        return found

    def _fetch(self, image: np.ndarray, place: np.ndarray, valid: np.ndarray | None) -> bool:
        """Read both crops; the pair is delivered only if both can be."""
        if not super()._fetch(image, place, valid):
            return False
        pair = self.pairs[place[0]]
        try:
            pixels, mask = pair.read_hr(int(place[1]), int(place[2]), *self.size)
        except UnreadableFile as error:
            if self.stop_on_error:
                raise UserError(stop_message(error.path, error.reason)) from None
            self.report(error, int(place[0]))
            return False
        values = pixels.astype(np.float32)
        if mask is not None:
            every_band = mask.all(axis=0)
            if 1.0 - every_band.mean() > self.max_nodata:
                return False
            np.copyto(values, self.fill_hr[:, None, None], where=~mask)
        if not self.keep_constant and is_constant(pixels):
            self.blank[place[0]] = 1
            return False
        self._fetched[tuple(place.tolist())] = values
        return True

    def _batch(self, images: np.ndarray, places: np.ndarray, valid: np.ndarray | None) -> dict[str, Tensor]:
        batch = super()._batch(images, places, valid)
        batch["image_hr"] = torch.from_numpy(np.stack([self._fetched[tuple(place)] for place in places.tolist()]))
        batch["gsd_hr"] = batch["gsd"] / float(self.ratio)
        return batch
