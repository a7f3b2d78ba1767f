"""A folder of images and a folder of masks, matched by name, as tiles with a class for every pixel."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.blocks import BlockMap
from xscale_lightning.data.datamodule import DEFAULT_BANDS
from xscale_lightning.data.folder import find_list
from xscale_lightning.data.geotiff import SUFFIXES, RasterReader, Source, UnreadableFile, common_grid, inspect
from xscale_lightning.data.labels import IGNORED, LabelMap, refusal, settle_classes
from xscale_lightning.data.pair_files import check_pattern, key_of
from xscale_lightning.data.patches import PatchDataset, stop_message
from xscale_lightning.data.scene import Scene
from xscale_lightning.data.scene_files import SceneBands, list_rasters
from xscale_lightning.data.scenes import SceneFolder
from xscale_lightning.errors import UserError

logger = logging.getLogger(__name__)
READ = (*SUFFIXES, ".png", ".jpg", ".jpeg")
_NAMED = 3
_SHIFT = 0.5  # pixels that image and mask may lie apart


class MaskPatches(PatchDataset):
    """Patches with `mask [B, h, w]` int64: class numbers, `IGNORED` where mask or image say nothing."""

    def __init__(self, *args: Any, masks: Sequence[Scene], label_map: LabelMap, **kwargs: Any) -> None:
        """Take one mask per scene; otherwise as `PatchDataset`."""
        self.deliver_validity = kwargs.pop("validity", False)
        super().__init__(*args, validity=True, **kwargs)
        self.masks, self.label_map = list(masks), label_map
        self._found: dict[tuple[int, ...], np.ndarray] = {}

    def present(self, valid: np.ndarray) -> np.ndarray:
        """A pixel has data if one of its bands has: published masks are scored there too."""
        return np.asarray(valid.any(axis=0))

    def _fetch(self, image: np.ndarray, place: np.ndarray, valid: np.ndarray | None) -> bool:
        if not super()._fetch(image, place, valid):
            return False
        if valid is None:  # only asked whether the image can be delivered
            return True
        scene, row, col = (int(number) for number in place)
        try:
            self._found[scene, row, col] = read_classes(self.masks[scene], self.label_map, row, col, *self.size)
        except UnreadableFile as error:
            if self.stop_on_error:
                raise UserError(stop_message(error.path, error.reason)) from None
            self.report(error, scene)
            return False
        return True

    def _batch(self, images: np.ndarray, places: np.ndarray, valid: np.ndarray | None) -> dict[str, torch.Tensor]:
        assert valid is not None
        masks = np.stack([self._found[tuple(place)] for place in places.tolist()])
        self._found.clear()
        batch = super()._batch(images, places, valid if self.deliver_validity else None)
        batch["mask"] = torch.from_numpy(np.where(valid, masks, IGNORED)).long()
        return batch


def read_classes(mask: Scene, label_map: LabelMap, row: int, col: int, height: int, width: int) -> np.ndarray:
    """Class numbers `[height, width]` of a window; `IGNORED` where the file has no data there.

    Raises:
        UnreadableFile: if this part of the file cannot be read, or has a value that is no class.
    """
    values, valid = mask.read(row, col, height, width)
    path = mask.sources[0].raster.path
    try:
        return label_map(values[0], path, None if valid is None else valid[0])
    except UserError as error:
        reason = refusal(error, path)
    raise UnreadableFile(path, reason)


class MaskFolder(SceneFolder):
    """Tiles of images with the class of every pixel: `image [B, C, H, W]`, `gsd [B]` and `mask [B, H, W]`.

    Images are found, read and cut as by `SceneFolder`; every image belongs to the mask of the same name (without folder
    and ending), or of the same `key`. Training tiles are drawn at random, those of all other loaders are a fixed grid.
    The splits are lists of names, or blocks of the images: whole images where there are many, parts of them where
    there are few; no two splits share a pixel. Pixels where no band has data are ignored.
    """

    def __init__(
        self,
        root: str,
        root_masks: str | None = None,
        bands: BandSelection = DEFAULT_BANDS,
        files: str | None = None,
        files_masks: str | None = None,
        key: str | None = None,
        labels: dict[int, int] | None = None,
        ignore: list[int] = [],  # noqa: B006 (never changed; shown as default in --help)
        class_names: list[str] | None = None,
        num_classes: int | None = None,
        train_list: str | None = None,
        val_list: str | None = None,
        test_list: str | None = None,
        fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
        max_nodata: float = 0.99,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the arguments; files are opened by `setup`.

        Args:
            root: folder with the images; sub-folders are searched too.
            root_masks: folder with the masks, one band of class values each; null takes `root`.
            bands: which bands to read, and their statistics.
            files: regular expression for the images' paths below `root`, for example "S2Hand/"; null takes all.
            files_masks: the same for the masks.
            key: regular expression whose groups are what the names of image and mask share; null compares file names.
            labels: class number by value in the masks, such as {10: 0, 20: 1}; null takes the values themselves.
            ignore: values of pixels that do not count.
            class_names: names of the classes, in order.
            num_classes: number of classes, where neither `labels` nor `class_names` say it.
            train_list: text file with names of the training images, one per line or in columns with commas; a path, or
                a name in or beside root. Images in no list are left out.
            val_list: the same for validation.
            test_list: the same for testing.
            fractions: without lists, shares of the area for train, val and test; 0 leaves a split out.
            max_nodata: largest share of pixels without any data in a tile; these are ignored.
            name: short name for the log; null takes the folder's.
            **kwargs: see `SceneFolder`; `image_size` is the size of the tiles.

        Raises:
            UserError: if an argument is out of range.
        """
        super().__init__(root, bands, fractions=fractions, max_nodata=max_nodata, pair_ratio=1, **kwargs)
        self.label_map, names = settle_classes(labels, class_names, num_classes, ignore)
        self.num_mask_classes, self.class_names, self.ignore_index = len(names), names, IGNORED
        self.root_masks, self.files, self.files_masks = root_masks or root, files, files_masks
        self.key = check_pattern(key)
        self.name = name or self.name
        self._lists = {"train": train_list, "val": val_list, "test": test_list}
        if any(self._lists.values()):
            shares = [float(given is not None) for given in self._lists.values()]
            self.fractions = shares[0], shares[1], shares[2]
        self._mask_files: dict[str, str] = {}
        self._masks: dict[str, Scene] = {}
        self._mask_reader = RasterReader()

    def find_files(self) -> tuple[dict[str, SceneBands], dict[str, str]]:
        """The images that have a mask.

        Raises:
            UserError: if there are no images or masks, none belong together, or which ones do would be a guess.
        """
        found, left_out = self.find_images(self.files, READ)
        images = {path for bands in found.values() for path in (source.raster.path for source in bands.values())}
        masks: dict[str, str] = {}
        for path in list_rasters(self.root_masks, self.files_masks, "root_masks", READ):
            key = self._key(os.path.relpath(path, self.root_masks))
            if path in images or not key:
                continue
            if key in masks:
                raise UserError(
                    f"data.key: masks {masks[key]} and {path} both have the key '{key}'; make data.key tell them "
                    "apart, or narrow data.files_masks."
                )
            masks[key] = path
        self._mask_files = {
            name: masks[key] for name, bands in found.items() if (key := self._image_key(name, bands)) in masks
        }
        missing = [name for name in found if name not in self._mask_files]
        if not self._mask_files:
            example = next(iter(masks.values()), None)
            raise UserError(
                f"data.root_masks: no masks found in '{self.root_masks}' for the {len(found)} images in '{self.root}' "
                f"({missing[0]}{f'; a mask is {example}' if example else ''}); set data.root_masks, data.files_masks "
                "or data.key."
            )
        if missing:
            shown = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
            logger.warning("%d of %d images have no mask and are left out: %s.", len(missing), len(found), shown)
        return {name: bands for name, bands in found.items() if name in self._mask_files}, left_out

    def prepare_scene(self, scene: Scene, files: SceneBands) -> None:
        """Open the mask of an image.

        Raises:
            UnreadableFile: if it cannot be read, does not lie on the image's pixels, or holds a value that is no class.
        """
        path, image = self._mask_files[scene.name], scene.sources[0].raster
        raster, grid = inspect(path), scene.grid
        if len(raster.descriptions) != 1:
            raise UnreadableFile(path, f"the mask has {len(raster.descriptions)} bands; give class values in one band")
        if (raster.height, raster.width) != (grid.height, grid.width):
            raise UnreadableFile(
                path,
                f"the mask has {raster.height} x {raster.width} pixels, its image {image.path} "
                f"{grid.height} x {grid.width}; both must have the same (with data.gsd null, where images say theirs)",
            )
        if raster.crs and image.crs:
            apart = max(abs(raster.left - grid.left) / grid.dx, abs(raster.top - grid.top) / grid.dy)
            if raster.crs != image.crs or apart > _SHIFT:
                how = (
                    f"{apart:.3g} pixels beside it" if raster.crs == image.crs else f"in {raster.crs}, not {image.crs}"
                )
                raise UnreadableFile(path, f"the mask does not lie on its image {image.path} but {how}")
        own = common_grid([raster], grid.gsd if raster.metres is None else None)
        mask = Scene(scene.name, [Source(raster, 1)], own, self._mask_reader)
        if scene.held is not None:
            mask.load()
            read_classes(mask, self.label_map, 0, 0, own.height, own.width)  # a wrong value is found before training
        self._masks[scene.name] = mask

    def split_area(self, scenes: Sequence[Scene]) -> list[BlockMap]:
        """Whole images by the lists, else blocks as by `SceneFolder`.

        Raises:
            UserError: if a list names no image, or two lists name the same one.
        """
        if not any(self._lists.values()):
            return super().split_area(scenes)
        owner: dict[str, int] = {}
        keys = {
            scene.name: self._image_key(scene.name, {str(i): s for i, s in enumerate(scene.sources)})
            for scene in scenes
        }
        for number, (split, given) in enumerate(self._lists.items()):
            if given is None:
                continue
            place = find_list(split, given, self.root)
            listed = self._listed(place)
            chosen = [name for name, key in keys.items() if key in listed]
            if not chosen:
                raise UserError(f"data.{split}_list: none of the images in '{self.root}' is named in '{place}'.")
            twice = next((name for name in chosen if name in owner), None)
            if twice is not None:
                raise UserError(f"data.{split}_list: {twice} is in another list too; one image can be in one split.")
            owner |= dict.fromkeys(chosen, number)
        return [
            BlockMap(
                np.array([0, scene.grid.height]),
                np.array([0, scene.grid.width]),
                np.array([[owner.get(scene.name, -1)]], np.int8),
                scene.grid.snap,
            )
            for scene in scenes
        ]

    def _patches(self, scenes: Sequence[Scene], origins: Any, samples: int | None = None) -> PatchDataset:
        return MaskPatches(
            scenes,
            origins,
            self.image_size,
            self.bands.means,
            masks=[self._masks[scene.name] for scene in scenes],
            label_map=self.label_map,
            samples=samples,
            seed=self.seed,
            max_nodata=self.max_nodata,
            stop_on_error=self.on_error == "stop",
            validity=self.validity,
            damage=self.damage,
            keep_constant=self.keep_constant,
        )

    def _key(self, path: str) -> str:
        """What an image and its mask share: by `key` in the path without ending, else the file name."""
        stem = os.path.splitext(path)[0].replace(os.sep, "/")
        return key_of(stem, self.key) if self.key else stem.rsplit("/", 1)[-1]

    def _image_key(self, name: str, bands: Mapping[str, Source]) -> str:
        """Key of an image: of its file, or where it has one file per band of the name these share."""
        paths = {source.raster.path for source in bands.values()}
        return self._key(os.path.relpath(paths.pop(), self.root) if len(paths) == 1 else f"{name}.")

    def _listed(self, place: str) -> set[str]:
        with open(place, encoding="utf-8") as file:
            words = [word.strip().strip('"') for line in file for word in line.split(",")]
        return {
            self._key(word) if os.path.splitext(word)[1].lower() in READ else self._key(f"{word}.") for word in words
        }
