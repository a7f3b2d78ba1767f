"""Pairs of dates with a map of what changed: folders of `A.tif B.tif label.png`, and OSCD through TorchGeo.

A batch has `image` and `image2` `[B, C, H, W]` in raw units and `mask` `[B, H, W]` int64: 0 unchanged, 1 changed, -1
not known. Scenes are cut into tiles; scenes, or blocks of one, belong to one split, so no pixel is in two. Of scenes
that are for evaluation alone, every pixel counts once: the last tiles are moved inwards and what they repeat is -1.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from xscale_lightning.data import change_scenes
from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.blocks import fixed_origins, split_blocks
from xscale_lightning.data.change_scenes import ChangeScene, Labels, Opener, undamaged
from xscale_lightning.data.datamodule import DEFAULT_BANDS, Split, XScaleDataModule
from xscale_lightning.data.ground import check_gsd
from xscale_lightning.data.reading import OnError, check_on_error
from xscale_lightning.errors import UserError

SPLITS: tuple[Split, ...] = ("train", "val", "test")
KEPT = 32  # scenes that a process keeps in memory
Shape = tuple[int, int]


@dataclass(frozen=True)
class Plane:
    """Size of a scene, as `data.blocks` wants it."""

    height: int
    width: int
    snap: int = 1


class ChangeTiles(Dataset[dict[str, Any]]):
    """Tiles of pairs of dates.

    Args:
        openers: read a scene each.
        origins: `[n, 5]` scene, row and column of every tile, and how many rows and columns of its mask do not count.
        size: height and width of a tile.
    """

    def __init__(self, openers: Sequence[Opener], origins: np.ndarray, size: Shape) -> None:
        self.openers, self.origins, self.size = list(openers), origins, size
        self._open: OrderedDict[int, ChangeScene] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # worker processes read for themselves

    def __len__(self) -> int:
        """Number of tiles."""
        return len(self.origins)

    def scene(self, index: int) -> ChangeScene:
        """Scene of an opener; the last ones used stay in memory."""
        if index not in self._open:
            self._open[index] = self.openers[index]()
            if len(self._open) > KEPT:
                self._open.popitem(last=False)
        self._open.move_to_end(index)
        return self._open[index]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Both images `[C, h, w]` float32, `mask` `[h, w]`, `gsd`, and `file`: the scene's name."""
        number, row, column, rows, columns = (int(value) for value in self.origins[index])
        scene, (height, width) = self.scene(number), self.size
        window = (slice(row, row + height), slice(column, column + width))
        first, second = (
            torch.from_numpy(part[(slice(None), *window)].astype(np.float32)) for part in (scene.first, scene.second)
        )
        mask = torch.from_numpy(scene.mask[window].astype(np.int64))
        mask[:rows], mask[:, :columns] = -1, -1
        sample = {"image": first, "image2": second, "mask": mask, "file": scene.name}
        return sample if scene.gsd is None else sample | {"gsd": torch.tensor(scene.gsd)}


@dataclass
class SceneSplit:
    """Names of the scenes of every split; null deals out blocks of all scenes by `fractions` instead."""

    train: list[str] = field(default_factory=list)
    """Scenes to train on."""
    val: list[str] = field(default_factory=list)
    """Scenes to validate on; without any, blocks of the training scenes (`fractions[1]` of them) are kept for it."""
    test: list[str] = field(default_factory=list)
    """Scenes to test on."""


class ChangeData(XScaleDataModule):
    """Base: tiles of scenes that subclasses find."""

    def __init__(
        self,
        bands: BandSelection = DEFAULT_BANDS,
        image_size: int = 64,
        stride: int | None = None,
        split: SceneSplit | None = None,
        fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
        block_size: int | None = None,
        gsd: float | None = None,
        name: str | None = None,
        on_error: OnError = "stop",
        keep_constant: bool = False,
        batch_size: int = 32,
        num_workers: int | None = None,
    ) -> None:
        """Check the arguments; files are opened by `setup`.

        Args:
            bands: bands to use, and their statistics.
            image_size: side of a tile in pixels.
            stride: pixels between the tiles of a training scene; null: the tile's side. Other splits never overlap.
            split: names of the scenes of every split; null deals out blocks by `fractions`.
            fractions: shares of the blocks for training, validation and testing.
            block_size: side of a block in pixels; null chooses it.
            gsd: metres per pixel; null takes the files', else the sensor preset's.
            name: short name for the log.
            on_error: what a damaged scene does: the run stops, or the scene is left out and named.
            keep_constant: take images that have one value in all pixels, too; else they count as damaged.
            batch_size: samples per device and step.
            num_workers: processes that read files; null chooses from the CPU count.

        Raises:
            UserError: naming the argument that does not fit.
        """
        super().__init__(bands, batch_size, num_workers)
        for key, value in {"image_size": image_size, "stride": stride, "block_size": block_size}.items():
            if value is not None and value < 1:
                raise UserError(f"data.{key}: {value} is not possible; give pixels, at least 1.")
        if min(fractions) < 0 or fractions[0] <= 0 or abs(sum(fractions) - 1) > 1e-6:
            raise UserError(f"data.fractions: {list(fractions)} is not possible; needs three shares that make up 1.")
        check_gsd(gsd)
        check_on_error(on_error)
        self.on_error, self.keep_constant = on_error, keep_constant
        self.image_size = (image_size, image_size)
        self.num_mask_classes, self.class_names, self.ignore_index = 2, ("unchanged", "changed"), -1
        self.name = name or self.name
        self.gsd = gsd or self.bands.gsd
        self._given_gsd, self._stride, self._split = gsd, stride or image_size, split
        self._fractions, self._block = fractions, block_size
        self._tiles: dict[Split, ChangeTiles | None] | None = None

    def find(self) -> dict[str, Opener]:
        """Readers of all scenes by name."""
        raise TypeError(f"{type(self).__name__} must implement find().")

    def scenes_of_splits(self, names: Sequence[str]) -> SceneSplit | None:
        """Which scenes belong to which split; None deals out blocks."""
        return self._split

    def build_dataset(self, split: Split) -> ChangeTiles | None:
        """Tiles of one split that have a label somewhere.

        Raises:
            UserError: no scenes, scenes smaller than a tile, or a split of scenes that are not there.
        """
        if self._tiles is None:
            self._tiles = self._cut()
        return self._tiles[split]

    def _cut(self) -> dict[Split, ChangeTiles | None]:
        found, self.left_out = undamaged(self.find(), self.on_error == "stop", self.keep_constant)
        chosen = self.scenes_of_splits(list(found))
        if chosen is None:
            owners: dict[str, Split | None] = dict.fromkeys(found)
        else:
            chosen_names = [name for split in SPLITS for name in getattr(chosen, split) if name not in self.left_out]
            owners = {name: split for split in SPLITS for name in getattr(chosen, split) if name in chosen_names}
            total = len(chosen_names)
            for name in owners:
                if name not in found:
                    raise UserError(f"data.split: there is no scene {name!r}; there are {', '.join(found)}.")
            if len(owners) < total:
                raise UserError("data.split: a scene is named in two splits; every scene belongs to one.")
        openers = [found[name] for name in owners]
        store = ChangeTiles(openers, np.zeros((0, 5), np.int64), self.image_size)
        origins: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
        whole: dict[Split, list[int]] = {split: [] for split in SPLITS}
        for index, owner in enumerate(owners.values()):
            whole[owner or "train"].append(index)
        if not whole["train"]:
            raise UserError("data.split: no scene to train on; name one in data.split.train.")
        if chosen is None:
            origins |= self._deal(store, whole["train"], self._fractions)
        elif chosen.val or not self._fractions[1]:
            origins["train"] = [self._windows(store, index, self._stride) for index in whole["train"]]
        else:
            held = self._fractions[1] / (self._fractions[0] + self._fractions[1])
            origins |= self._deal(store, whole["train"], (1 - held, held, 0.0))
        for split in ("val", "test"):
            origins[split] += [self._grid(store, index) for index in whole[split]]
        return {split: self._labelled(store, parts) for split, parts in origins.items()}

    def _deal(
        self, store: ChangeTiles, scenes: list[int], fractions: tuple[float, float, float]
    ) -> dict[Split, list[np.ndarray]]:
        """Tiles of scenes whose blocks are dealt out to the splits."""
        planes = [self._plane(store, index) for index in scenes]
        maps = split_blocks(planes, self.image_size, fractions, self._block)  # type: ignore[arg-type]
        dealt: dict[Split, list[np.ndarray]] = {}
        for number, split in enumerate(SPLITS):
            stride = self._stride if split == "train" else self.image_size[0]
            found = fixed_origins(maps, number, self.image_size, stride)
            found[:, 0] = np.array(scenes)[found[:, 0]]
            dealt[split] = [np.pad(found, ((0, 0), (0, 2)))]
        return dealt

    def _windows(self, store: ChangeTiles, index: int, stride: int) -> np.ndarray:
        """Tiles of a whole scene that may overlap."""
        plane, (height, width) = self._plane(store, index), self.image_size
        rows, columns = range(0, plane.height - height + 1, stride), range(0, plane.width - width + 1, stride)
        return np.array([(index, row, column, 0, 0) for row in rows for column in columns], np.int64)

    def _grid(self, store: ChangeTiles, index: int) -> np.ndarray:
        """Tiles of a whole scene that cover it, each of its pixels once."""
        plane, (height, width) = self._plane(store, index), self.image_size
        rows, columns = _cover(plane.height, height), _cover(plane.width, width)
        return np.array([(index, row, column, up, left) for row, up in rows for column, left in columns], np.int64)

    def _plane(self, store: ChangeTiles, index: int) -> Plane:
        scene = store.scene(index)
        height, width = scene.mask.shape
        if min(height - self.image_size[0], width - self.image_size[1]) < 0:
            side = self.image_size[0]
            raise UserError(f"data.image_size: {side} is more than scene {scene.name} has, {height} x {width} pixels.")
        return Plane(height, width)

    def _labelled(self, store: ChangeTiles, parts: list[np.ndarray]) -> ChangeTiles | None:
        origins = np.concatenate(parts) if parts else np.zeros((0, 5), np.int64)
        (height, width), kept = self.image_size, []
        for origin in origins:
            number, row, column, up, left = (int(value) for value in origin)
            mask = store.scene(number).mask[row + up : row + height, column + left : column + width]
            kept.append(bool((mask >= 0).any()))
        if not len(origins):
            return None
        if not any(kept):
            raise UserError(f"data: no tile of {self.name} has a labelled pixel; check data.labels and the files.")
        tiles = ChangeTiles(store.openers, origins[np.array(kept)], self.image_size)
        tiles._open = store._open
        return tiles


def _cover(length: int, tile: int) -> list[tuple[int, int]]:
    """Starts of tiles that cover `length`, and how much of each the one before has covered."""
    starts = [(start, 0) for start in range(0, length - tile + 1, tile)]
    rest = length - starts[-1][0] - tile
    return [*starts, (length - tile, tile - rest)] if rest else starts


class ChangeFolder(ChangeData):
    """Folders with two images and a map of the changes each: `A.tif`, `B.tif`, `label.png`.

    `root` is such a folder, or has them as sub-folders, whose names are the scenes' names.
    """

    def __init__(
        self,
        root: str,
        bands: BandSelection = DEFAULT_BANDS,
        channels: list[str] | None = None,
        first: str = "A.tif",
        second: str = "B.tif",
        label: str = "label.png",
        labels: Labels = Labels(),  # noqa: B008 (never changed; shown as default in --help)
        **kwargs: Any,
    ) -> None:
        """Check the arguments; files are opened by `setup`.

        Args:
            root: folder of one scene, or of several.
            bands: bands to use, and their statistics.
            channels: names of all channels of the files, in order, where `bands` takes only some of them.
            first: name of the earlier image in a scene's folder.
            second: name of the later image.
            label: name of the map of the changes.
            labels: what its values mean.
            **kwargs: see `ChangeData`.

        Raises:
            UserError: naming the argument that does not fit.
        """
        super().__init__(bands, **kwargs)
        self._root, self._files, self._labels = root, (first, second, label), labels
        self._channels = channels
        if not kwargs.get("name"):
            self.name = Path(root).name.lower() or self.name

    def find(self) -> dict[str, Opener]:
        """Readers of the folders that have all three files."""
        return change_scenes.folders(
            self._root, self._files, self.bands.names, self._channels, self._labels, self._given_gsd
        )
