"""A folder of labelled pictures, one sub-folder per class: jpg, png or GeoTIFF, unpacked or inside a zip file."""

import csv
import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.utils.data import Dataset

from xscale_lightning.data.band_names import listed, says_its_bands
from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.datamodule import Split
from xscale_lightning.data.image_files import GEOTIFFS, PICTURES, REMEDY, FileStore, decode, descriptions
from xscale_lightning.data.wrapped import WrappedData
from xscale_lightning.errors import UserError

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing", "test_gt"),
}
MAX_UNNAMED = 4  # bands of a GeoTIFF whose order goes without saying
RGB_BANDS = BandSelection(sensor="rgb")
logger = logging.getLogger(__name__)


class LabelledFiles(Dataset[dict[str, Any]]):
    """Images of a `FileStore` with the number of their class, which is the name of a folder above them."""

    def __init__(
        self,
        store: FileStore,
        files: Sequence[str],
        classes: Sequence[str],
        level: int = 1,
        bands: Sequence[str] | None = None,
    ) -> None:
        """Remember which files to read.

        Args:
            store: where they are.
            files: their paths in it.
            classes: names of the classes, in order.
            level: how many folders up the class is, see `class_of`.
            bands: names of the bands every file holds, in order; null if that is not known.
        """
        numbers = {name: number for number, name in enumerate(classes)}
        self.store, self.files, self.classes = store, list(files), list(classes)
        self.labels = [numbers[class_of(path, level)] for path in self.files]
        self.bands = None if bands is None else list(bands)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image [C, H, W]` float32 in raw values, `label` and, where a GeoTIFF says it, `gsd`.

        Raises:
            ValueError: if the file has another number of bands than it should, or no usable pixel in one of them.
        """
        path = self.files[index]
        image, gsd = decode(path, self.store.read(path))
        if self.bands is not None and len(image) != len(self.bands):
            raise ValueError(f"it has {len(image)} bands where data.channels names {len(self.bands)}")
        sample = {"image": image, "label": torch.tensor(self.labels[index])}
        return sample if gsd is None else sample | {"gsd": gsd}


def class_of(path: str, level: int = 1) -> str:
    """Name of the folder an image lies in, or with `level` 2, 3, ... of the one above that, and so on."""
    folders = PurePosixPath(path).parts[:-1]
    return folders[-level] if level <= len(folders) else ""


class ImageFolderData(WrappedData):
    """Labelled images in one sub-folder per class, at any depth below `root`, which may be a zip file.

    Splits come from lists of file names (`train_list` ...), else from folders named train, val and test, else from
    `holdout`: a fixed random share of every class for validation, and another for testing.
    """

    def __init__(
        self,
        root: str,
        train_list: str | None = None,
        val_list: str | None = None,
        test_list: str | None = None,
        holdout: float = 0.1,
        bands: BandSelection = RGB_BANDS,
        class_level: int = 1,
        **kwargs: Any,
    ) -> None:
        """Check the arguments; files are listed by `setup`.

        Args:
            root: folder with one sub-folder of images per class, or a zip file of it.
            train_list: text file with one image name per line, endings ignored, or a csv file with the columns
                category, location_id and image_id (fMoW-Sentinel); a path, or a name in or beside root.
            val_list: the same for validation.
            test_list: the same for testing.
            holdout: share of every class for validation, and again for testing, where nothing else says the splits.
            bands: bands to use, and their statistics.
            class_level: how many folders above a file its class is: 1 the folder it lies in, 2 the one above that.
            **kwargs: see `WrappedData`.

        Raises:
            UserError: naming the argument that does not fit.
        """
        super().__init__(bands=bands, **kwargs)
        if not 0 < holdout < 0.5:
            raise UserError(f"data.holdout: {holdout} is not possible; needs 0 < holdout < 0.5.")
        if class_level < 1:
            raise UserError(f"data.class_level: {class_level} is not possible; give 1 or more folders up.")
        self._root, self._holdout, self._level = root, holdout, class_level
        self._lists: dict[str, str | None] = {"train": train_list, "val": val_list, "test": test_list}
        self._warned = False
        self._found: tuple[FileStore, list[str], list[str]] | None = None
        if not kwargs.get("name"):
            self.name = Path(root).stem.lower()

    def open_source(self, split: Split) -> LabelledFiles | None:
        """List the images of a split, or return None if there is none.

        Raises:
            UserError: if root or list is missing, or holds no image.
        """
        store, paths, classes = self._files()
        if any(self._lists.values()):
            chosen = self._from_list(split, paths)
        elif any(self._split_of(path) for path in paths):
            chosen = [path for path in paths if self._split_of(path) == split]
        else:
            chosen = self._from_holdout(split, paths, classes)
        if not chosen:
            return None
        return LabelledFiles(store, chosen, classes, self._level, self._channels or self._said(store, chosen))

    def _said(self, store: FileStore, chosen: list[str]) -> list[str] | None:
        """Band names of the first readable GeoTIFF if it says them; if not, say once that their order is trusted."""
        for path in chosen[:8]:
            try:
                texts = descriptions(path, store.read(path))
            except Exception:  # damaged: whatever rasterio raises; reading it later names the file
                continue
            if texts and says_its_bands(texts, self.bands.names):
                return list(texts)
            if len(texts) > MAX_UNNAMED and not self._warned:
                self._warned = True
                text = (
                    "The files of '%s' do not say which bands they hold; taken in order as %s (or set data.channels)."
                )
                logger.warning(text, self._root, listed(self.bands.names))
            return None
        return None

    def _files(self) -> tuple[FileStore, list[str], list[str]]:
        if self._found is None:
            store = FileStore(self._root)
            paths = store.paths()
            if not paths:
                endings = ", ".join(PICTURES + GEOTIFFS)
                raise UserError(f"data.root: '{self._root}' holds no image ({endings}); {REMEDY}")
            classes = sorted({class_of(path, self._level) for path in paths})
            if len(classes) < 2:
                raise UserError(f"data.root: '{self._root}' has images in one folder only ({classes[0]!r}); {REMEDY}")
            self._found = (store, paths, classes)
        return self._found

    def _from_list(self, split: Split, paths: list[str]) -> list[str]:
        given = self._lists[split]
        if given is None:
            return []
        place = find_list(split, given, self._root)
        names = _names_in(place)
        chosen = [path for path in paths if PurePosixPath(path).stem in names]
        own = [path for path in chosen if self._split_of(path) == split]
        chosen = own or chosen  # a name can stand for another image in each split's folder (fMoW numbers places anew)
        if not chosen:
            raise UserError(
                f"data.{split}_list: none of the {len(names)} images named in '{place}' is in '{self._root}'."
            )
        return chosen

    def _from_holdout(self, split: Split, paths: list[str], classes: list[str]) -> list[str]:
        chosen = []
        for name in classes:
            members = [path for path in paths if class_of(path, self._level) == name]
            random.Random(0).shuffle(members)
            count = max(1, round(self._holdout * len(members))) if len(members) > 2 else 0
            parts = {"val": members[:count], "test": members[count : 2 * count], "train": members[2 * count :]}
            chosen += parts[split]
        return sorted(chosen)

    def _split_of(self, path: str) -> str | None:
        folders = {part.lower() for part in PurePosixPath(path).parts[: -1 - self._level]}
        return next((split for split, names in SPLIT_FOLDERS.items() if folders.intersection(names)), None)


def find_list(split: str, given: str, root: str) -> str:
    """Path of a split's list file: as given, or in or beside the data's folder.

    Raises:
        UserError: if there is none.
    """
    places = [given, os.path.join(root, given), os.path.join(os.path.dirname(root) or ".", given)]
    place = next((place for place in places if os.path.isfile(place)), None)
    if place is None:
        raise UserError(f"data.{split}_list: no file '{given}' here, in '{root}' or beside it; give its path.")
    return place


def _names_in(place: str) -> set[str]:
    """Image names without endings in a list: one per line, or in a csv file those made of its columns."""
    with open(place, newline="") as file:
        if place.lower().endswith(".csv"):
            table = csv.DictReader(file)
            parts = ("category", "location_id", "image_id")
            if set(parts) <= set(table.fieldnames or ()):
                return {"_".join(row[part] for part in parts) for row in table}
            file.seek(0)
        return {Path(line.strip()).stem for line in file if line.strip()}
