"""Two folders of matched files as training data: the same ground at medium (MR) and at high resolution (HR)."""

import logging
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

from xscale_lightning.data.band_checks import check_bands, refuse_blank
from xscale_lightning.data.bands import SENSORS, Bands, BandSelection, band_key
from xscale_lightning.data.blocks import BlockMap
from xscale_lightning.data.datamodule import DEFAULT_BANDS
from xscale_lightning.data.footprint import Footprint, Misfit
from xscale_lightning.data.geotiff import UnreadableFile, common_grid
from xscale_lightning.data.pair_checks import PairImage, pair_footprint, settle_ratio
from xscale_lightning.data.pair_files import (
    check_pattern,
    key_of,
    match_by_name,
    match_by_place,
    overlapping_groups,
    smallest_gap,
)
from xscale_lightning.data.pair_patches import PairDataset, PairScene
from xscale_lightning.data.pair_splits import split_groups
from xscale_lightning.data.patches import PatchDataset
from xscale_lightning.data.scene import Scene
from xscale_lightning.data.scene_files import find_scenes
from xscale_lightning.data.scenes import SceneFolder
from xscale_lightning.errors import UserError

logger = logging.getLogger(__name__)
_NAMED = 3


class PairedFolders(SceneFolder):
    """Pairs of crops of the same ground from a folder of MR images and a folder of HR images.

    Crops are chosen on MR's pixel grid and their edges multiplied by one affine per pair, so both show the same ground
    to the pixel. With a ratio that is a whole number, or a fraction such as 10/3, and grids whose pixel edges meet, the
    pixels are the files' own; otherwise `resample` allows to resample HR. MR and HR may have different bands. Splits
    are made on the ground, jointly for both, and images that share ground stay in one split.

    A batch has `image [B, C, H, W]`, `gsd [B]`, `image_hr [B, C', H * ratio, W * ratio]`, `gsd_hr [B]`.

    Attributes:
        bands_hr: record of the channels of `image_hr`.
        ratio: HR pixels along one MR pixel in a batch; known after `setup` unless given.
        missing_hr: MR images that have no HR image and were left out.
        worst_disagreement: largest distance between the edges of the two images of a pair, in MR pixels.
    """

    def __init__(
        self,
        root: str,
        root_hr: str,
        bands: BandSelection = DEFAULT_BANDS,
        bands_hr: BandSelection = DEFAULT_BANDS,
        files: str | None = None,
        files_hr: str | None = None,
        match: Literal["name", "place"] = "name",
        key: str | None = None,
        group: str | None = None,
        ratio: float | None = None,
        resample: bool = False,
        min_shared: float = 0.9,
        on_missing: Literal["skip", "stop"] = "skip",
        file_bands_hr: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the arguments; files are opened by `setup`.

        Args:
            root: folder with the MR images; sub-folders are searched too.
            root_hr: folder with the HR images; may be the same one.
            bands: which MR bands to read, and their statistics.
            bands_hr: which HR bands to read, and their statistics.
            files: regular expression for the MR files' paths below `root`, for example "_10m[.]tif$"; null takes all.
            files_hr: the same for the HR files below `root_hr`.
            match: "name" pairs images of the same name (without band and resolution), "place" those that share ground.
            key: regular expression whose groups are what the two names share; null compares whole names.
            group: regular expression whose groups name what must stay in one split (a site, for example); null: what
                shares ground.
            ratio: HR pixels along one MR pixel in a batch; null takes that of the files.
            resample: whether HR may be resampled where its pixels do not fit into MR's, or `ratio` is not the files'.
            min_shared: least share of the smaller image that both images of a pair must show; "place" needs none.
            on_missing: what an MR image without HR does: it is left out and counted, or the run stops.
            file_bands_hr: names of the bands in HR files that do not say them, in the files' order.
            **kwargs: see `SceneFolder`; sizes and strides are in MR pixels.

        Raises:
            UserError: if an argument is out of range.
        """
        super().__init__(root, bands, pair_ratio=1, **kwargs)
        for argument, value, allowed in (
            ("match", match, ("name", "place")),
            ("on_missing", on_missing, ("skip", "stop")),
        ):
            if value not in allowed:
                raise UserError(f"data.{argument}: {value} is not possible; give {' or '.join(allowed)}.")
        if ratio is not None and not 1 <= ratio < math.inf:
            raise UserError(f"data.ratio: {ratio} is not possible; give HR pixels per MR pixel, at least 1, or null.")
        if not 0 <= min_shared <= 1:
            raise UserError(f"data.min_shared: {min_shared} is not possible; give a share from 0 to 1.")
        self.root_hr, self.files, self.files_hr = root_hr, files, files_hr
        self.reader_hr = self.reader
        self.bands_hr: Bands = bands_hr.resolve()
        self._selection_hr, self.file_bands_hr = bands_hr, file_bands_hr
        self.match, self.key, self.group = match, check_pattern(key), check_pattern(group)
        self.resample, self.min_shared, self.on_missing = resample, min_shared, on_missing
        self.ratio = None if ratio is None else Fraction(ratio).limit_denominator(100)
        self.missing_hr, self.worst_disagreement = 0, 0.0

    @property
    def image_size_hr(self) -> tuple[int, int]:
        """(height, width) of `image_hr` in pixels; opens the files."""
        self._open()
        assert self.ratio is not None
        height, width = self.image_size
        return int(height * self.ratio), int(width * self.ratio)

    def _patches(self, scenes: Sequence[Scene], origins: Any, samples: int | None = None) -> PatchDataset:
        assert self.ratio is not None
        return PairDataset(
            [scene for scene in scenes if isinstance(scene, PairScene)],
            origins,
            self.image_size,
            self.bands.means,
            self.bands_hr.means,
            self.ratio,
            samples=samples,
            seed=self.seed,
            max_nodata=self.max_nodata,
            stop_on_error=self.on_error == "stop",
            validity=self.validity,
            damage=self.damage,
            keep_constant=self.keep_constant,
        )

    def _open(self) -> tuple[list[Scene], list[BlockMap]]:
        """Find the images, pair them, check that they show the same ground, and deal it out; once per process."""
        if self._opened is None:
            mr, hr = self._images(False), self._images(True)
            pairs = self._match(mr, hr)
            found = self._footprints(pairs, mr, hr)
            parts = [part for _, _, part in found]
            self.ratio = settle_ratio(parts, self.ratio, self.image_size, self.resample)
            scenes = self._load(found, mr, hr)
            self._report_left_out(scenes)
            check_bands(scenes, self.bands.names, self.root)
            check_bands([scene.hr for scene in scenes], self.bands_hr.names, self.root_hr)
            text = "%d pairs, ratio %s; the edges of their images are at most %.3g MR pixels (%.3g m) apart."
            metres = self.worst_disagreement * scenes[0].grid.gsd
            logger.info(text, len(scenes), self.ratio, self.worst_disagreement, metres)
            grids = [scene.grid for scene in scenes]
            crs = [scene.sources[0].raster.crs for scene in scenes]
            keys = [key_of(scene.name, self.group) if self.group else "" for scene in scenes]
            groups = overlapping_groups(grids, crs, keys)
            maps = split_groups(
                grids, groups, self.group is not None, self.patch_size, self.fractions, self.block_size,
                self.split_seed,
            )  # fmt: skip
            self._opened = list(scenes), maps
        return self._opened

    def _images(self, fine: bool) -> dict[str, PairImage]:
        """The images of one folder that have all chosen bands, by name."""
        bands = self.bands_hr if fine else self.bands
        selection = self._selection_hr if fine else None
        known = SENSORS[bands.sensor].names if bands.sensor in SENSORS else ()
        found, left_out = find_scenes(
            self.root_hr if fine else self.root,
            bands.names,
            known,
            self.file_bands_hr if fine else self.file_bands,
            selection.file_orders() if selection is not None else self.file_orders,
            self.files_hr if fine else self.files,
            "root_hr" if fine else "root",
        )
        self.left_out.update(left_out)
        images = {}
        for name, files in found.items():
            sources = [files[band_key(band)] for band in bands.names]
            try:
                # HR's resolution follows from its files or, where these do not say it, from MR's: 1 serves until then.
                unknown = sources[0].raster.metres is None
                gsd = (1.0 if unknown else None) if fine else self.target_gsd
                images[name] = PairImage(files, sources, common_grid([s.raster for s in sources], gsd))
            except UnreadableFile as error:
                self.left_out[error.path] = error.reason
        if self.on_error == "stop":
            self._report_left_out([])
        return images

    def _match(self, mr: dict[str, PairImage], hr: dict[str, PairImage]) -> list[tuple[str, str]]:
        """Pair the images.

        Raises:
            UserError: if nothing fits together, or an MR image has no HR image and that is to stop the run.
        """
        if self.match == "name":
            pairs, missing, unused = match_by_name(mr, hr, self.key)
        else:
            if any(image.crs is None for image in (*mr.values(), *hr.values())):
                raise UserError("data.match: place needs images with a coordinate system; match by name instead.")
            grids, grids_hr = ({name: image.grid for name, image in part.items()} for part in (mr, hr))
            systems, systems_hr = ({name: str(image.crs) for name, image in part.items()} for part in (mr, hr))
            pairs, missing, unused = match_by_place(grids, grids_hr, systems, systems_hr, self.suits)
        if not pairs:
            if self.match == "name":
                names = f"such as {next(iter(mr), '-')} and {next(iter(hr), '-')}"
                reason = f"by name ({names}); check data.key, data.files and data.files_hr"
            else:
                reason = self._far_apart(mr, hr)
            counts = f"none of the {len(hr)} HR images belongs to one of the {len(mr)} MR images"
            raise UserError(f"data.root_hr: {counts} {reason}.")
        self._report_missing([name if name.strip("./\\") else mr[name].path for name in missing], len(mr))
        if unused:
            logger.warning("%d of %d HR images belong to no MR image and are not used.", len(unused), len(hr))
        return pairs

    def suits(self, mr: str, hr: str) -> bool:
        """Whether two images that share ground may make a pair. Hook for subclasses."""
        return True

    def _far_apart(self, mr: dict[str, PairImage], hr: dict[str, PairImage]) -> str:
        """Why no two images share ground."""
        systems = [sorted({str(image.crs) for image in part.values()}) for part in (hr, mr)]
        if not set(systems[0]) & set(systems[1]):
            return f"by place: HR is in {', '.join(systems[0])}, MR in {', '.join(systems[1])}; warp one to the other's"
        gap = smallest_gap([image.grid for image in mr.values()], [image.grid for image in hr.values()])
        return f"by place: the nearest two lie {gap:.6g} m apart; give images of the same ground"

    def _report_missing(self, missing: Sequence[str], total: int) -> None:
        """Count MR images without HR and name some of them, or stop the run."""
        self.missing_hr += len(missing)
        if not missing:
            return
        shown = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        if self.on_missing == "stop":
            raise UserError(
                f"data.on_missing: {len(missing)} of {total} MR images have no HR image ({shown}); add them, "
                "or set data.on_missing: skip."
            )
        logger.warning("%d of %d MR images have no HR image and are left out: %s.", len(missing), total, shown)

    def _footprints(
        self, pairs: list[tuple[str, str]], mr: dict[str, PairImage], hr: dict[str, PairImage]
    ) -> list[tuple[str, str, Footprint]]:
        """The ground each pair shares; pairs that share too little are left out, or stop the run."""
        found, slivers = [], {}
        for name, partner in pairs:
            coarse, fine = mr[name], hr[partner]
            path = fine.sources[0].raster.path
            try:
                least = self.min_shared if self.match == "name" else 0.0
                part = pair_footprint(coarse, fine, least, self.patch_size)
            except Misfit as error:
                # By place, neighbours that only just overlap are no mistake of the files: other pairs have that ground.
                if self.on_error == "stop" and self.match == "name":
                    raise UserError(f"data.root_hr: {path}: {error}; or set data.on_error: skip.") from None
                slivers[path] = str(error)
                continue
            self.worst_disagreement = max(self.worst_disagreement, part.disagreement)
            found.append((name, partner, part))
        if not found:
            path, reason = next(iter({**slivers, **self.left_out}.items()))
            raise UserError(f"data.root_hr: no two images make a pair; {path}: {reason}.")
        if self.match == "name":
            self.left_out.update(slivers)
        else:
            used = {name for name, _, _ in found}
            self._report_missing(sorted({name for name, _ in pairs} - used), len(mr))
        return found

    def _load(
        self, found: list[tuple[str, str, Footprint]], mr: dict[str, PairImage], hr: dict[str, PairImage]
    ) -> list[PairScene]:
        """Open the pairs: into memory while there is room, by window after that."""
        assert self.ratio is not None
        scenes, memory = [], self.cache_mb * 10**6
        for name, partner, part in found:
            coarse = Scene(name, mr[name].sources, part.grid, self.reader)
            fine = Scene(partner, hr[partner].sources, hr[partner].grid, self.reader_hr)
            pair = PairScene(name if self.match == "name" else f"{name} + {partner}", coarse, fine, part, self.ratio)
            try:
                if pair.nbytes <= memory:
                    pair.load()
                    for part_of in (pair, pair.hr):
                        refuse_blank(part_of, self.keep_constant)
                    memory -= pair.nbytes
                else:
                    pair.check(*self.patch_size)
                self.prepare_scene(pair, mr[name].bands)
                scenes.append(pair)
            except UnreadableFile as error:
                self.left_out[error.path] = error.reason
        if self.on_error == "stop":
            self._report_left_out(scenes)
        return scenes
