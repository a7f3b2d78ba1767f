"""A folder of labelled pictures, one sub-folder per class: jpg, png or GeoTIFF, unpacked or inside a zip file."""

import io
import os
import random
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.datamodule import Split, check_folder
from xscale_lightning.data.wrapped import WrappedData
from xscale_lightning.errors import UserError

PICTURES = (".jpg", ".jpeg", ".png")
GEOTIFFS = (".tif", ".tiff")
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
RGB_BANDS = BandSelection(sensor="rgb")
_REMEDY = "give a folder (or zip file) with one sub-folder of images per class."


class FileStore:
    """Lists and reads files below a folder or inside a zip file, by their path relative to it.

    A zip file is opened anew in every process: an open handle must not be shared between workers.
    """

    def __init__(self, root: str) -> None:
        """Remember the folder or zip file.

        Raises:
            UserError: if there is no such folder or file, or the folder is empty.
        """
        self.root = root
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        if not os.path.isfile(root):
            check_folder("data.root", root, _REMEDY)

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_archive": None}

    def paths(self) -> list[str]:
        """Relative paths of all images, sorted, with "/" between folders."""
        if os.path.isdir(self.root):
            found = [path.relative_to(self.root).as_posix() for path in Path(self.root).rglob("*") if path.is_file()]
        else:
            found = self._open().namelist()
        return sorted(path for path in found if path.lower().endswith(PICTURES + GEOTIFFS))

    def read(self, path: str) -> bytes:
        """Content of one file."""
        if os.path.isdir(self.root):
            return Path(self.root, path).read_bytes()
        return self._open().read(path)

    def _open(self) -> zipfile.ZipFile:
        if self._archive is None or self._archive[0] != os.getpid():
            try:
                self._archive = (os.getpid(), zipfile.ZipFile(self.root))
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"data.root: '{self.root}' is no readable zip file ({error}); {_REMEDY}") from None
        return self._archive[1]


class LabelledFiles(Dataset[dict[str, Any]]):
    """Images of a `FileStore` with the number of their class, which is the name of their folder."""

    def __init__(self, store: FileStore, files: Sequence[str], classes: Sequence[str]) -> None:
        """Remember which files to read."""
        numbers = {name: number for number, name in enumerate(classes)}
        self.store, self.files, self.classes = store, list(files), list(classes)
        self.labels = [numbers[class_of(path)] for path in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image [C, H, W]` float32 in raw values, `label` and, where a GeoTIFF says it, `gsd`."""
        path = self.files[index]
        image, gsd = decode(path, self.store.read(path))
        sample = {"image": image, "label": torch.tensor(self.labels[index])}
        return sample if gsd is None else sample | {"gsd": gsd}


def decode(path: str, content: bytes) -> tuple[Tensor, float | None]:
    """Decode one image to `[C, H, W]` float32, and its gsd in metres per pixel (None where the file does not say it).

    jpg and png are read by Pillow (palettes become RGB, an alpha channel stays), GeoTIFFs by rasterio.
    """
    if path.lower().endswith(PICTURES):
        from PIL import Image

        with Image.open(io.BytesIO(content)) as picture:
            array = np.array(picture.convert("RGB") if picture.mode in ("P", "CMYK", "YCbCr") else picture, np.float32)
        return torch.from_numpy(array.reshape(*array.shape[:2], -1)).permute(2, 0, 1), None
    import rasterio

    with rasterio.MemoryFile(content) as memory, memory.open() as source:
        crs = source.crs
        gsd = None
        if crs is not None and crs.is_projected:
            gsd = (source.res[0] * source.res[1]) ** 0.5 * crs.linear_units_factor[1]
        return torch.from_numpy(source.read().astype(np.float32)), gsd


def class_of(path: str) -> str:
    """Name of the folder an image lies in."""
    return PurePosixPath(path).parent.name


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
        **kwargs: Any,
    ) -> None:
        """Check the arguments; files are listed by `setup`.

        Args:
            root: folder with one sub-folder of images per class, or a zip file of it.
            train_list: text file with one image name per line, endings ignored; a path, or a name in or beside root.
            val_list: the same for validation.
            test_list: the same for testing.
            holdout: share of every class for validation, and again for testing, where nothing else says the splits.
            bands: bands to use, and their statistics.
            **kwargs: see `WrappedData`.

        Raises:
            UserError: naming the argument that does not fit.
        """
        super().__init__(bands=bands, **kwargs)
        if not 0 < holdout < 0.5:
            raise UserError(f"data.holdout: {holdout} is not possible; needs 0 < holdout < 0.5.")
        self._root, self._holdout = root, holdout
        self._lists: dict[str, str | None] = {"train": train_list, "val": val_list, "test": test_list}
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
        elif any(_split_of(path) for path in paths):
            chosen = [path for path in paths if _split_of(path) == split]
        else:
            chosen = self._from_holdout(split, paths, classes)
        return LabelledFiles(store, chosen, classes) if chosen else None

    def _files(self) -> tuple[FileStore, list[str], list[str]]:
        if self._found is None:
            store = FileStore(self._root)
            paths = store.paths()
            if not paths:
                endings = ", ".join(PICTURES + GEOTIFFS)
                raise UserError(f"data.root: '{self._root}' holds no image ({endings}); {_REMEDY}")
            classes = sorted({class_of(path) for path in paths})
            if len(classes) < 2:
                raise UserError(f"data.root: '{self._root}' has images in one folder only ({classes[0]!r}); {_REMEDY}")
            self._found = (store, paths, classes)
        return self._found

    def _from_list(self, split: Split, paths: list[str]) -> list[str]:
        given = self._lists[split]
        if given is None:
            return []
        places = [given, os.path.join(self._root, given), os.path.join(os.path.dirname(self._root) or ".", given)]
        place = next((place for place in places if os.path.isfile(place)), None)
        if place is None:
            raise UserError(
                f"data.{split}_list: no file '{given}' here, in '{self._root}' or beside it; give its path."
            )
        names = {Path(line.strip()).stem for line in Path(place).read_text().splitlines() if line.strip()}
        chosen = [path for path in paths if PurePosixPath(path).stem in names]
        if not chosen:
            raise UserError(
                f"data.{split}_list: none of the {len(names)} images named in '{place}' is in '{self._root}'."
            )
        return chosen

    def _from_holdout(self, split: Split, paths: list[str], classes: list[str]) -> list[str]:
        chosen = []
        for name in classes:
            members = [path for path in paths if class_of(path) == name]
            random.Random(0).shuffle(members)
            count = max(1, round(self._holdout * len(members))) if len(members) > 2 else 0
            parts = {"val": members[:count], "test": members[count : 2 * count], "train": members[2 * count :]}
            chosen += parts[split]
        return sorted(chosen)


def _split_of(path: str) -> str | None:
    folders = {part.lower() for part in PurePosixPath(path).parts[:-2]}
    return next((split for split, names in SPLIT_FOLDERS.items() if folders.intersection(names)), None)
