"""Which files, or samples, a data module would read: what `xscale doctor --data` looks at."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from xscale_lightning.data.change import ChangeFolder
from xscale_lightning.data.damage import without_path
from xscale_lightning.data.datamodule import Split, XScaleDataModule
from xscale_lightning.data.folder import ImageFolderData
from xscale_lightning.data.image_files import FileStore
from xscale_lightning.data.inspection import Finding, check_file, check_sample
from xscale_lightning.data.mask_checks import check_classes
from xscale_lightning.data.mask_folder import READ, MaskFolder
from xscale_lightning.data.pack_inventory import pack_findings
from xscale_lightning.data.packed import PackedData
from xscale_lightning.data.paired import PairedFolders
from xscale_lightning.data.reading import Reader
from xscale_lightning.data.scene_files import list_rasters, split_band
from xscale_lightning.data.scenes import SceneFolder
from xscale_lightning.errors import UserError

SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass
class Item:
    """One file or sample to look at."""

    finding: Finding
    read: Callable[[], bytes] | None = None
    """Gives its content, where it is no file of its own."""
    check: Callable[[], Finding] | None = None
    """Looks at it, where it can be read by a dataset alone."""


def items_of(data: XScaleDataModule) -> list[Item]:
    """Everything that a data module would read; nothing is opened yet.

    Raises:
        UserError: the folder is missing or holds no image, or the data has no files.
    """
    if isinstance(data, MaskFolder):
        return _masks(data)
    if isinstance(data, PairedFolders) and os.path.isdir(data.root) and os.path.isdir(data.root_hr):
        coarse = _rasters(data, data.root, data.files, "root", "MR")
        return coarse + _rasters(data, data.root_hr, data.files_hr, "root_hr", "HR")
    if isinstance(data, SceneFolder) and not isinstance(data, PairedFolders):
        return _rasters(data, data.root, None, "root", "image")
    if isinstance(data, ImageFolderData):
        store = FileStore(data._root)
        if os.path.isdir(data._root):
            return [Item(Finding(os.path.join(data._root, path))) for path in store.paths()]
        return [Item(Finding(path), partial(store.read, path)) for path in store.paths()]
    if isinstance(data, ChangeFolder):
        return _changes(data)
    if isinstance(data, PackedData):
        return [Item(finding, check=check) for finding, check in pack_findings(data)]
    return _samples(data)


def _rasters(data: SceneFolder, root: str, files: str | None, argument: str, group: str) -> list[Item]:
    """Files of scenes; those of one band each are compared with the others of their band."""
    keys = {*(name.lower() for name in data.bands.names), *(name.lower() for name in data.known_bands)}
    found = []
    for path in list_rasters(root, files, argument):
        band = split_band(os.path.splitext(os.path.basename(path))[0], keys)[1]
        finding = Finding(path, group=f"{group} {band}" if band else group)
        found.append(Item(finding, check=partial(check_file, finding, nodata=data.reader.nodata, scene=True)))
    return found


def _masks(data: MaskFolder) -> list[Item]:
    masks = set(list_rasters(data.root_masks, data.files_masks, "root_masks", READ))
    images = list_rasters(data.root, data.files, "root", READ)
    if set(images) <= masks:  # one folder for both, and no pattern for the masks: what is no image is a mask
        found = data.find_files()[0]
        named = {source.raster.path for bands in found.values() for source in bands.values()}
        masks = {path for path in masks if path not in named and path in set(data._mask_files.values())}
    checked = [Item(Finding(path)) for path in images if path not in masks]
    images_of = _images_of(data)
    for path in sorted(masks):
        finding = Finding(path, role="mask", group="mask")
        classes = partial(_classes, data, path)
        checked.append(Item(finding, check=partial(check_classes, finding, images_of.get(path), classes)))
    return checked


def _images_of(data: MaskFolder) -> dict[str, str]:
    """Image of every mask, where it is one file whose pixels are taken as they are."""
    found = {}
    with contextlib.suppress(UserError):  # of the files as a whole: `fit` says it, too
        found = data.find_files()[0]
    files = {name: {source.raster.path for source in bands.values()} for name, bands in found.items()}
    alone = {name: paths.pop() for name, paths in files.items() if len(paths) == 1 and data.target_gsd is None}
    return {data._mask_files[name]: path for name, path in alone.items()}


def _classes(data: MaskFolder, path: str, values: np.ndarray, valid: np.ndarray) -> None:
    data.label_map(values, path, valid)


def _changed(data: ChangeFolder, path: str, values: np.ndarray, valid: np.ndarray) -> None:
    data._labels.classes(values, path)


def _changes(data: ChangeFolder) -> list[Item]:
    first, second, label = data._files
    places = [place for place in (Path(data._root), *sorted(Path(data._root).iterdir())) if place.is_dir()]
    found = []
    for place in places:
        if any(os.path.lexists(place / name) for name in data._files):
            found += [Item(Finding(str(place / name), group=name)) for name in (first, second)]
            path = str(place / label)
            finding = Finding(path, role="mask", group=label)
            classes = partial(_changed, data, path)
            found.append(Item(finding, check=partial(check_classes, finding, str(place / first), classes)))
    if not found:
        raise UserError(f"data.root: '{data._root}' holds no folder with {', '.join(data._files)}.")
    return found


def _samples(data: XScaleDataModule) -> list[Item]:
    """Samples of a dataset that is not ours, each read as it would be in training."""
    data.prepare_data()
    found = []
    for split in SPLITS:
        reader = data.dataset(split)
        if not isinstance(reader, Reader) or getattr(data, "_samplers", {}).get(split):
            continue
        for index in range(len(reader)):
            name = reader.file_of(index) or f"{split} sample {index}"
            finding = Finding(name, group=split)
            found.append(Item(finding, check=partial(_read, reader, index, finding)))
    if not found:
        raise UserError(f"--data: {data.name} has no files that could be looked at one by one.")
    return found


def _read(reader: Reader, index: int, finding: Finding) -> Finding:
    try:
        return check_sample(finding, reader.prepare(reader.source[index], index))
    except Exception as error:  # whatever its library raises: this sample cannot be used
        finding.kind, finding.detail = "sample", without_path(str(error), finding.path)
        return finding
