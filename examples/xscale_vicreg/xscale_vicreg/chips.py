"""A data source: a folder of NumPy files, one chip `[C, H, W]` each."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.datamodule import XScaleDataModule, check_folder
from xscale_lightning.errors import UserError

TENTH = {"val": 8, "test": 9}  # number of the part; all others train


def part_of(name: str) -> int:
    """One of ten parts, a function of the file's name alone: new files move no old ones to another split."""
    return hashlib.sha256(name.encode()).digest()[0] % 10


class Chips(Dataset):
    """Samples of the files, in raw units."""

    def __init__(self, files: list[Path], bands: int) -> None:
        self.files, self.bands = files, bands

    def __len__(self) -> int:
        """Number of chips."""
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        """`image [C, H, W]` float32 and the path of the file."""
        values = np.load(self.files[index], allow_pickle=False)
        if values.ndim != 3 or values.shape[0] != self.bands:
            raise UserError(
                f"data.root: {self.files[index]} is {values.shape}, not [{self.bands}, H, W]: fit data.bands."
            )
        return {"image": torch.from_numpy(values.astype(np.float32)), "file": str(self.files[index])}


class NumpyChips(XScaleDataModule):
    """Chips `[C, H, W]` in `.npy` files, all of one size; a tenth each for validation and test.

    Args:
        root: folder with the files; sub-folders are searched too.
        bands: their bands, in order, and the statistics.
        gsd: metres per pixel; null takes the sensor preset's.
        batch_size: samples per device and step.
        num_workers: processes that read files.

    Raises:
        UserError: no such folder, no files, or a number of bands that is not that of `bands`.
    """

    def __init__(
        self,
        root: str,
        bands: BandSelection,
        gsd: float | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
    ) -> None:
        super().__init__(bands, batch_size, num_workers)
        self.root, self.gsd = root, gsd or self.bands.gsd
        self.name = Path(root).name.lower() or "chips"

    def build_dataset(self, split):
        """Chips of one split; None if it has none."""
        check_folder("data.root", self.root, "give the folder of your .npy files.")
        files = sorted(Path(self.root).rglob("*.npy"))
        if not files:
            raise UserError(f"data.root: no .npy file in '{self.root}': give the folder of your chips.")
        parts = {path: part_of(path.relative_to(self.root).as_posix()) for path in files}
        chosen = [p for p in files if parts[p] == TENTH.get(split) or (split == "train" and parts[p] < 8)]
        if not chosen:
            return None
        dataset = Chips(chosen, len(self.bands))
        height, width = dataset[0]["image"].shape[1:]
        self.image_size = (height, width)
        return dataset
