"""Synthetic imagery: smooth random fields of any band count and size, for the doctor, the contract suite and tests."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.datamodule import DEFAULT_BANDS, Split, XScaleDataModule
from xscale_lightning.data.ground import check_gsd
from xscale_lightning.errors import UserError

MOST = 10**9


class SyntheticDataset(Dataset[dict[str, Any]]):
    """`length` images `[C, H, W]` in raw units; a sample depends on (seed, index) alone.

    The label is which of `classes` spatial frequencies the field has, so an encoder can tell the classes apart.
    """

    def __init__(
        self, means: Tensor, stds: Tensor, size: tuple[int, int], length: int, classes: int, seed: int
    ) -> None:
        """Remember the recipe; nothing is stored."""
        self.means, self.stds = means.view(-1, 1, 1), stds.view(-1, 1, 1)
        self.size, self.length, self.classes, self.seed = size, length, classes, seed

    def __len__(self) -> int:
        """Number of images."""
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Image `index` and its label."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        label = index % self.classes
        cells = 2 + 3 * label
        field = torch.randn(1, len(self.means), cells, cells, generator=generator)
        smooth = F.interpolate(field, size=self.size, mode="bicubic", align_corners=False)[0]
        return {"image": self.means + self.stds * smooth, "label": label}


class SyntheticData(XScaleDataModule):
    """Synthetic images in the units of any band selection.

    Args:
        bands: which bands to imitate.
        image_height: pixels.
        image_width: pixels.
        length: training images; validation and test have a quarter of them each.
        classes: number of classes.
        gsd: metres per pixel; null takes the sensor's.
        seed: seed of the images.
        batch_size: samples per device and step.
        num_workers: loader processes.

    Raises:
        UserError: a size or length below 1.
    """

    def __init__(
        self,
        bands: BandSelection = DEFAULT_BANDS,
        image_height: int = 64,
        image_width: int = 64,
        length: int = 256,
        classes: int = 4,
        gsd: float | None = None,
        seed: int = 0,
        batch_size: int = 16,
        num_workers: int | None = 0,
    ) -> None:
        super().__init__(bands, batch_size, num_workers)
        values = {"image_height": image_height, "image_width": image_width, "length": length, "classes": classes}
        for name, value in values.items():
            if not 1 <= value <= MOST:
                raise UserError(f"data.{name}: {value} is not possible; give 1 to {MOST}.")
        if not 0 <= seed < 2**32:
            raise UserError(f"data.seed: {seed} is not possible; give 0 to 2^32 - 1.")
        check_gsd(gsd)
        self.name = "synthetic"
        self.image_size = (image_height, image_width)
        self.length, self.num_classes, self.seed = length, classes, seed
        self.gsd = gsd or self.bands.gsd or 10.0

    def build_dataset(self, split: Split) -> SyntheticDataset:
        """Images of one split; the splits share no image."""
        length = self.length if split == "train" else max(1, self.length // 4)
        seed = 3 * self.seed + ("train", "val", "test").index(split)
        means, stds = torch.tensor(self.bands.means), torch.tensor(self.bands.stds)
        return SyntheticDataset(means, stds, self.image_size, length, self.num_classes or 1, seed)
