"""A plain folder of GeoTIFF scenes as training data: any size, any bands, one or several files per scene."""

import logging
import math
import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from xscale_lightning.data.band_checks import check_bands, refuse_blank
from xscale_lightning.data.bands import SENSORS, BandSelection, band_key
from xscale_lightning.data.blocks import BlockMap, fixed_origins, origin_cells, split_blocks
from xscale_lightning.data.datamodule import DEFAULT_BANDS, Split, XScaleDataModule
from xscale_lightning.data.geotiff import SUFFIXES, RasterReader, UnreadableFile, common_grid
from xscale_lightning.data.left_out import InOrder
from xscale_lightning.data.patches import EpochSampler, PatchDataset, collate, stop_message
from xscale_lightning.data.samplers import begin_worker
from xscale_lightning.data.scene import Scene
from xscale_lightning.data.scene_files import SceneBands, find_scenes
from xscale_lightning.errors import UserError

logger = logging.getLogger(__name__)
_SPLIT_NUMBER = {"train": 0, "val": 1, "test": 2}
_SHOWN = 10
MOST = 10**12  # samples of an epoch: no run gets there, and they are counted in 64 bits


class SceneFolder(XScaleDataModule):
    """Patches of all scenes in a folder and its sub-folders.

    A scene is one file with several bands (named by the files' band descriptions, or by `file_bands`) or several files
    whose names differ in the band only (`scene_B02.tif`, `B02_10m.jp2`). Bands of different native resolutions are
    brought to one grid patch by patch; patch origins lie on the pixel edges of the coarsest band. Training patches are
    drawn at random, a function of (seed, epoch, index); validation, test and probe patches are a fixed grid. The splits
    are geographic blocks and share no pixel.
    """

    def __init__(
        self,
        root: str,
        bands: BandSelection = DEFAULT_BANDS,
        gsd: float | None = None,
        image_size: int | tuple[int, int] = 64,
        samples_per_epoch: int = 8192,
        fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
        block_size: int | None = None,
        split_seed: int = 0,
        eval_stride: int | None = None,
        eval_samples: int | None = 2048,
        file_bands: list[str] | None = None,
        nodata: float | None = None,
        max_nodata: float = 0.1,
        validity: bool = False,
        pair_ratio: int = 1,
        on_error: Literal["skip", "stop"] = "skip",
        keep_constant: bool = False,
        cache_mb: int = 1024,
        cache_dir: str | None = None,
        seed: int = 0,
        batch_size: int = 64,
        num_workers: int | None = None,
    ) -> None:
        """Check the arguments; files are opened by `setup`.

        Args:
            root: folder with the scenes; sub-folders are searched too.
            bands: which bands to read, and their statistics.
            gsd: metres per pixel of the patches before any degradation; null takes the finest chosen band's.
            image_size: pixels, or [height, width], of `image`.
            samples_per_epoch: random patches that make a training epoch.
            fractions: shares of the area for train, val and test; 0 leaves a split out.
            block_size: side in pixels of the blocks dealt out to the splits; null chooses it from the area.
            split_seed: deals out the blocks; apart from `seed` so that runs with other seeds keep the split.
            eval_stride: pixels between the patches of the fixed grids; null sets them side by side.
            eval_samples: at most so many patches per fixed grid, drawn from it once; null takes all.
            file_bands: names of the bands in files that do not say them, in the files' order; null takes the sensor's
                order (or the `names` or `count` of a generic one) where the number of bands agrees; not for Sentinel-2.
            nodata: value that means "no data" in files that declare none.
            max_nodata: largest share of pixels without data in a patch; the rest is filled with the band's mean.
            validity: deliver `valid [B, h, w]` too: where every band has data.
            pair_ratio: above 1, deliver `image_hr`, `gsd_hr` too, `image` being their area mean (Wald's protocol).
            on_error: what a damaged file does: its scene is skipped and named, or the run stops.
            keep_constant: deliver scenes and patches of one value everywhere, too; else they count as damaged.
            cache_mb: memory per process in MB for whole scenes; the others are read by window, or memory-mapped.
            cache_dir: folder for decoded copies of scenes beyond `cache_mb`, made once and memory-mapped from then on.
            seed: of the random patches.
            batch_size: samples per device and step.
            num_workers: processes that read files; 0 reads in the training process, null chooses from the CPU count.

        Raises:
            UserError: if an argument is out of range.
        """
        super().__init__(bands, batch_size, num_workers)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        _require(min(height, width) >= 1, "image_size", image_size, "give at least 1 pixel")
        _require(gsd is None or 0 < gsd < math.inf, "gsd", gsd, "give metres per pixel above 0, or null")
        _require(1 <= samples_per_epoch <= MOST, "samples_per_epoch", samples_per_epoch, f"give 1 to {MOST}")
        _require(split_seed >= 0, "split_seed", split_seed, "give 0 or more")
        shares_fit = min(fractions) >= 0 and fractions[0] > 0 and abs(sum(fractions) - 1) < 1e-6
        _require(
            shares_fit, "fractions", list(fractions), "give train, val and test shares that sum to 1, train above 0"
        )
        _require(block_size is None or block_size >= 1, "block_size", block_size, "give pixels, or null")
        _require(eval_stride is None or eval_stride >= 1, "eval_stride", eval_stride, "give pixels, or null")
        _require(eval_samples is None or eval_samples >= 1, "eval_samples", eval_samples, "give at least 1, or null")
        _require(0 <= max_nodata < 1, "max_nodata", max_nodata, "give a share from 0 to below 1")
        _require(pair_ratio >= 1, "pair_ratio", pair_ratio, "give a whole number from 1 on")
        _require(on_error in ("skip", "stop"), "on_error", on_error, "give skip or stop")
        _require(cache_mb >= 0, "cache_mb", cache_mb, "give 0 or more")
        self.root, self.file_bands = root, file_bands
        self.known_bands = SENSORS[bands.sensor].names if bands.sensor in SENSORS else ()
        self.file_orders = bands.file_orders()
        self.image_size, self.pair_ratio = (height, width), pair_ratio
        self.patch_size = (height * pair_ratio, width * pair_ratio)
        self.target_gsd, self.samples_per_epoch, self.fractions = gsd, samples_per_epoch, fractions
        self.block_size, self.split_seed, self.seed = block_size, split_seed, seed
        self.eval_stride, self.eval_samples = eval_stride, eval_samples
        self.max_nodata, self.validity, self.on_error = max_nodata, validity, on_error
        self.keep_constant, self.cache_mb, self.cache_dir = keep_constant, cache_mb, cache_dir
        self.reader = RasterReader(nodata)
        self.name = os.path.basename(os.path.normpath(root)).lower() or "scenes"
        self._opened: tuple[list[Scene], list[BlockMap]] | None = None

    @property
    def scenes(self) -> list[Scene]:
        """The scenes, opened on first use."""
        return self._open()[0]

    def build_dataset(self, split: Split) -> Dataset[Any] | None:
        """Random patches of the training blocks, or the fixed grid of the validation or test blocks.

        Raises:
            UserError: if the folder, its files or the patch size do not fit; see `find_scenes` and `split_blocks`.
        """
        number = _SPLIT_NUMBER[split]
        if self.fractions[number] == 0:
            return None
        if split != "train":
            return self._grid_dataset(split)
        scenes, maps = self._open()
        cells = origin_cells(maps, number, self.patch_size)
        return self._patches(scenes, cells, samples=self.samples_per_epoch)

    def probe_dataloader(self, split: Split) -> DataLoader[Any]:
        """Fixed grid of patches of a split, in order, without augmentation.

        Raises:
            UserError: if there is no such split.
        """
        if split != "train":
            return super().probe_dataloader(split)
        if "probe_train" not in self._datasets:
            self._datasets["probe_train"] = self._grid_dataset("train")
        return self._loader(self._required_dataset("probe_train"))

    def _required_dataset(self, key: str) -> Dataset[Any]:
        dataset = self._datasets[key]
        assert dataset is not None
        return dataset

    def _grid_dataset(self, split: Split) -> PatchDataset:
        """Fixed grid of readable patches inside the blocks of a split, at most `eval_samples`."""
        scenes, maps = self._open()
        stride = self.eval_stride or min(self.patch_size)
        origins = fixed_origins(maps, _SPLIT_NUMBER[split], self.patch_size, stride)
        wanted = len(origins) if self.eval_samples is None else min(self.eval_samples, len(origins))
        patches = self._patches(scenes, origins)
        # In random order until there are enough, so that the rest of a large scene need not be read for its validity.
        order = np.random.default_rng(self.split_seed).permutation(len(origins))
        chosen: list[int] = []
        for start in range(0, len(order), 256):
            part = order[start : start + 256]
            chosen += part[patches.readable(origins[part])].tolist()
            if len(chosen) >= wanted:
                break
        if not chosen:
            raise UserError(
                f"data.max_nodata: no {split} patch has at most {self.max_nodata:.0%} of its pixels without data; "
                "raise data.max_nodata, or choose another data.split_seed or data.block_size."
            )
        patches.origins = origins[sorted(chosen[:wanted])]
        return patches

    def _patches(self, scenes: Sequence[Scene], origins: Any, samples: int | None = None) -> PatchDataset:
        return PatchDataset(
            scenes,
            origins,
            self.image_size,
            self.bands.means,
            samples=samples,
            seed=self.seed,
            max_nodata=self.max_nodata,
            stop_on_error=self.on_error == "stop",
            validity=self.validity,
            pair_ratio=self.pair_ratio,
            damage=self.damage,
            keep_constant=self.keep_constant,
        )

    def _open(self) -> tuple[list[Scene], list[BlockMap]]:
        """Find, check and load the scenes, and deal their area out to the splits; once per process."""
        if self._opened is None:
            found, self.left_out = self.find_files()
            if self.on_error == "stop":
                self._report_left_out([])
            scenes, small = [], ""
            memory = self.cache_mb * 10**6
            for name, files in found.items():
                try:
                    sources = [files[band_key(band)] for band in self.bands.names]
                    grid = common_grid([source.raster for source in sources], self.target_gsd)
                    scene = Scene(name, sources, grid, self.reader)
                    if problem := self._too_small(scene):
                        small = small or problem
                        raise UnreadableFile(sources[0].raster.path, f"smaller than data.image_size ({name})")
                    if scene.nbytes <= memory:
                        scene.load()
                        refuse_blank(scene, self.keep_constant)
                        memory -= scene.nbytes
                    elif self.cache_dir is not None:
                        scene.load(self.cache_dir)
                        refuse_blank(scene, self.keep_constant)
                    else:
                        scene.check(*self.patch_size)
                    self.prepare_scene(scene, found[name])
                    scenes.append(scene)
                except UnreadableFile as error:
                    self.left_out[error.path] = error.reason
            if small and (not scenes or self.on_error == "stop"):
                raise UserError(small)
            self._report_left_out(scenes)
            check_bands(scenes, self.bands.names, self.root)
            self._opened = scenes, self.split_area(scenes)
        return self._opened

    def find_files(self) -> tuple[dict[str, SceneBands], dict[str, str]]:
        """Scenes with all bands, by name, and why files were left out. Hook for subclasses."""
        return self.find_images()

    def find_images(
        self, files: str | None = None, suffixes: tuple[str, ...] = SUFFIXES
    ) -> tuple[dict[str, SceneBands], dict[str, str]]:
        """Scenes below `root` as `find_scenes` finds them; of all files those that fit the regular expression."""
        known, orders = self.known_bands, self.file_orders
        return find_scenes(self.root, self.bands.names, known, self.file_bands, orders, files, suffixes=suffixes)

    def split_area(self, scenes: Sequence[Scene]) -> list[BlockMap]:
        """Which part of which scene belongs to which split. Hook for subclasses."""
        grids = [scene.grid for scene in scenes]
        return split_blocks(grids, self.patch_size, self.fractions, self.block_size, self.split_seed)

    def prepare_scene(self, scene: Scene, files: dict[str, Any]) -> None:
        """Add to a scene that was opened; `files` says where to read each of its bands. Hook for subclasses."""

    def _too_small(self, scene: Scene) -> str:
        """What the user reads where a patch does not fit into a scene; "" where it does."""
        height, width = self.patch_size
        if scene.grid.height >= height and scene.grid.width >= width:
            return ""
        return (
            f"data.image_size: a patch of {height}x{width} pixels is larger than scene '{scene.name}' "
            f"({scene.grid.height}x{scene.grid.width} at {scene.grid.gsd:g} m); make it smaller or remove the scene."
            + f" It is data.pair_ratio ({self.pair_ratio}) times larger than asked for."
            * (self.pair_ratio > 1)
        )

    def _report_left_out(self, scenes: Sequence[Scene]) -> None:
        if self.left_out and (self.on_error == "stop" or not scenes):
            path, reason = next(iter(self.left_out.items()))
            if self.on_error == "stop":
                raise UserError(stop_message(path, reason))
            raise UserError(f"data.root: no scene in '{self.root}' can be read; {path}: {reason}.")
        for path, reason in list(self.left_out.items())[:_SHOWN]:
            if self.damage.first_time(path):
                logger.warning("Left out %s: %s.", path, reason)
        if len(self.left_out) > _SHOWN:
            logger.warning("Left out %d files and scenes of '%s' in all.", len(self.left_out), self.root)

    def _loader(self, dataset: Dataset[Any], *, training: bool = False, **options: Any) -> DataLoader[Any]:
        """Loader of whole batches, as `PatchDataset` fetches them."""
        if options.pop("shuffle", False) and isinstance(dataset, PatchDataset):
            options["sampler"] = EpochSampler(dataset)  # random patches need a count that goes on over epochs
        return (DataLoader if training else InOrder)(
            dataset,
            **options,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            worker_init_fn=begin_worker,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )


def _require(fits: bool, argument: str, value: object, remedy: str) -> None:
    if not fits:
        raise UserError(f"data.{argument}: {value} is not possible; {remedy}.")
