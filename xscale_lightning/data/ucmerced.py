"""UC Merced with 17 labels per image (Chaudhuri et al. 2018), on TorchGeo's images and split."""

import csv
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchgeo.datasets import UCMerced

from xscale_lightning.errors import UserError

FILE = "LandUse_Multilabeled.txt"


class UCMercedMultiLabel(UCMerced):
    """TorchGeo's `UCMerced` with `label` `[17]` of 0 and 1, from `LandUse_Multilabeled.txt` in `root`.

    The file has one line per image: its name and 17 columns, after a line with the names of the labels. It belongs to
    Chaudhuri et al. 2018 ("Multilabel remote sensing image retrieval using a semisupervised graph-theoretic method")
    and is not part of TorchGeo's download.

    Args:
        root: folder of the data.
        split: train, val or test.
        download: let TorchGeo download the images.
        labels: name of the file in root, or a path.

    Raises:
        UserError: no such file, or one that does not name an image of the split.
    """

    def __init__(self, root: str = "data", split: str = "train", download: bool = False, labels: str = FILE) -> None:
        super().__init__(root, split, None, download)
        self.names, table = read_labels(Path(root, labels))
        self.num_classes = len(self.names)
        self.labels: list[Tensor] = []
        for path, _ in self.samples:
            name = Path(str(path)).stem
            if name not in table:
                raise UserError(f"data: '{os.path.join(root, labels)}' has no line for image {name}.")
            self.labels.append(table[name])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`image [3, 256, 256]`, `label [17]`."""
        return {**super().__getitem__(index), "label": self.labels[index]}


def read_labels(path: Path) -> tuple[list[str], dict[str, Tensor]]:
    """Names of the labels, and the labels of every image `[K]` by name.

    Raises:
        UserError: no such file, or no table of 0 and 1.
    """
    if not path.is_file():
        raise UserError(
            f"data: '{path}' does not exist; the labels of Chaudhuri et al. 2018 are a download of their own."
        )
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file, delimiter="\t") if row]
    names, table = rows[0][1:], {}
    for row in rows[1:]:
        if len(row) != len(names) + 1 or not set(row[1:]) <= {"0", "1"}:
            raise UserError(f"data: '{path}': the line of {row[0]} does not have {len(names)} columns of 0 and 1.")
        table[row[0]] = torch.tensor([int(value) for value in row[1:]])
    return names, table
