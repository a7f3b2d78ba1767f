"""Patches of scenes: read, validated, filled and stacked into batches, drawn at random or from a fixed list.

Which patch a random sample shows is a function of (seed, epoch, index) alone, computed with a counter-based generator:
no state, so it is the same whatever the number of worker processes, and a resumed run continues where it stopped.
"""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from xscale_lightning.data.blocks import OriginCells
from xscale_lightning.data.damage import DamageLog, is_constant
from xscale_lightning.data.degrade import degrade
from xscale_lightning.data.geotiff import UnreadableFile
from xscale_lightning.data.left_out import SKIPPED, LeftOut
from xscale_lightning.data.samplers import ResumableSampler, replicas_and_rank
from xscale_lightning.data.scene import Scene
from xscale_lightning.errors import UserError

logger = logging.getLogger(__name__)
MAX_DRAWS = 64


def _mix(x: np.ndarray) -> np.ndarray:
    """Mix 64-bit integers: the output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform_numbers(seed: int, index: np.ndarray, draw: int, total: int) -> np.ndarray:
    """Pseudo-random integers `[B]` in [0, total), a pure function of (seed, index, draw)."""
    key = _mix(np.array([seed % 2**32 + draw * 2**32 + 1], np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    bits = _mix(_mix(index.astype(np.uint64) + key) + key)
    return np.minimum((bits >> np.uint64(11)) * 2.0**-53 * total, total - 1).astype(np.int64)


class PatchDataset(Dataset[dict[str, Tensor]]):
    """Patches of the scenes; whole batches are fetched at once.

    A sample is a dict: `image [C, h, w]` float32 in raw units, `gsd` (metres per pixel), `origin [3]` (scene number,
    row, column), and where asked for or known `label`, `valid [h, w]` (bool: no band is without data), `image_hr` and
    `gsd_hr`; in lists, not in random patches, `mask` (int64, the class of every pixel of the finest image). Pixels
    without data hold the band's `fill` value. Unreadable, constant or mostly empty patches are never delivered: a
    random sample is drawn anew, a listed one is left out of its batch. A batch says how many of its samples were drawn
    anew because of a damaged file, if any (`SKIPPED`); one of which nothing is left is `{}`.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        origins: OriginCells | np.ndarray,
        size: tuple[int, int],
        fill: Sequence[float],
        *,
        samples: int | None = None,
        seed: int = 0,
        max_nodata: float = 0.1,
        stop_on_error: bool = False,
        validity: bool = False,
        pair_ratio: int = 1,
        damage: DamageLog | None = None,
        keep_constant: bool = False,
    ) -> None:
        """Choose between random patches and a list.

        Args:
            scenes: what to read from.
            origins: cells to draw from, or a list `[n, 3]` (scene, row, column).
            size: (height, width) of `image` in pixels; `image_hr` is `pair_ratio` times larger.
            fill: value per band for pixels without data.
            samples: length of an epoch of random patches.
            seed: of the random patches.
            max_nodata: largest share of pixels without data in a patch.
            stop_on_error: whether an unreadable file ends the run.
            validity: whether to deliver `valid`.
            pair_ratio: above 1, the patch is delivered as `image_hr` and degraded by this factor as `image`.
            damage: the data module's list of damaged files; null makes one.
            keep_constant: deliver patches with one value everywhere, too.
        """
        self.scenes, self.origins, self.pair_ratio = list(scenes), origins, pair_ratio
        self.size = (size[0] * pair_ratio, size[1] * pair_ratio)
        self.fill = np.asarray(fill, np.float32)
        self.samples, self.seed, self.max_nodata = samples, seed, max_nodata
        self.stop_on_error, self.validity = stop_on_error, validity
        self.keep_constant = keep_constant
        self.labelled = all(scene.labels is not None for scene in scenes)
        self.classed = isinstance(origins, np.ndarray) and all(scene.classes is not None for scene in scenes)
        self.damage = DamageLog() if damage is None else damage
        self.failed = torch.zeros(len(self.scenes), dtype=torch.uint8).share_memory_()
        """`[scenes]` 1 where a read has failed; shared by all worker processes."""
        self.blank = torch.zeros_like(self.failed).share_memory_()  # the same for patches with one value everywhere
        self.left_out = LeftOut(len(self))
        """Listed patches whose read has failed; shared by all worker processes."""
        self._failed_now = False

    def __len__(self) -> int:
        """Number of samples in an epoch."""
        return len(self.origins) if isinstance(self.origins, np.ndarray) else self.samples or 0

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sample; an index beyond the length belongs to a later epoch."""
        batch = self.__getitems__([index])
        if not batch:
            raise UserError(self._nothing_to_deliver())
        return {key: value[0] for key, value in batch.items() if key != SKIPPED}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the batch of these samples, stacked: `image [B, C, h, w]` and so on.

        Raises:
            UserError: if a file is unreadable and that is to stop the run, or random patches find nothing to deliver.
        """
        index = np.asarray(indices, np.int64)
        shape = (len(index), len(self.fill), *self.size)
        images = np.empty(shape, np.float32)
        valid = np.ones((len(index), *self.size), bool) if self.validity else None
        places = np.zeros((len(index), 3), np.int64)
        waiting, damaged = np.arange(len(index)), set[int]()
        for draw in range(MAX_DRAWS):
            if isinstance(self.origins, np.ndarray):
                places[waiting] = self.origins[index[waiting]]
            else:
                places[waiting] = self.origins.locate(
                    uniform_numbers(self.seed, index[waiting], draw, self.origins.total)
                )
            done = []
            for b in waiting:
                self._failed_now = False
                done.append(self._fetch(images[b], places[b], None if valid is None else valid[b]))
                if self._failed_now:
                    damaged.add(int(b))
            waiting = waiting[~np.array(done, bool)]
            if not len(waiting) or isinstance(self.origins, np.ndarray):
                break
        if not isinstance(self.origins, np.ndarray):
            if len(waiting):
                raise UserError(self._nothing_to_deliver())
            batch = self._batch(images, places, valid)
            return {**batch, SKIPPED: len(damaged)} if damaged else batch  # type: ignore[dict-item]
        for b in damaged:
            self.left_out.note(int(index[b]))
        kept = np.setdiff1d(np.arange(len(index)), waiting)
        if len(waiting):
            images, places, valid = images[kept], places[kept], None if valid is None else valid[kept]
        return self._batch(images, places, valid) if len(kept) else {}

    def readable(self, origins: np.ndarray) -> np.ndarray:
        """Which origins `[n, 3]` can be delivered, `[n]` bool."""
        patch = np.empty((len(self.fill), *self.size), np.float32)
        can_fail = [scene.masked or not self.keep_constant for scene in self.scenes]
        return np.array([not can_fail[place[0]] or self._fetch(patch, place, None) for place in origins], bool)

    def _fetch(self, image: np.ndarray, place: np.ndarray, valid: np.ndarray | None) -> bool:
        """Write one patch into `image [C, h, w]` (and `valid [h, w]`); False if it cannot be delivered."""
        scene = self.scenes[place[0]]
        try:
            pixels, mask = scene.read(int(place[1]), int(place[2]), *self.size)
        except UnreadableFile as error:
            if self.stop_on_error:
                raise UserError(stop_message(error.path, error.reason)) from None
            self.report(error, int(place[0]))
            return False
        image[...] = pixels
        if mask is not None:
            present = self.present(mask)
            if 1.0 - present.mean() > self.max_nodata:
                return False
            if not mask.all():
                np.copyto(image, self.fill[:, None, None], where=~mask)
            if valid is not None:
                valid[...] = present
        if self.keep_constant or not is_constant(pixels):
            return True
        self.blank[place[0]] = 1
        return False

    def present(self, valid: np.ndarray) -> np.ndarray:
        """Which pixels `[h, w]` count as having data, from the validity `[C, h, w]` of their bands."""
        return np.asarray(valid.all(axis=0))

    def report(self, error: UnreadableFile, scene: int) -> None:
        """Count a patch that could not be read, and name its file once."""
        if self.damage.first_time(error.path):
            logger.warning("Skipped a patch of %s. Others of this file are skipped without a message.", error)
        self.failed[scene] = 1
        self._failed_now = True

    def _batch(self, images: np.ndarray, places: np.ndarray, valid: np.ndarray | None) -> dict[str, Tensor]:
        gsd = torch.tensor([self.scenes[scene].grid.gsd for scene in places[:, 0]], dtype=torch.float32)
        batch = {"image": torch.from_numpy(images), "gsd": gsd}
        if self.pair_ratio > 1:
            batch["image_hr"], batch["gsd_hr"] = batch["image"], gsd
            batch["image"], batch["gsd"] = degrade(batch["image"], self.pair_ratio, gsd)
        if valid is not None:
            batch["valid"] = torch.from_numpy(valid)
        if self.labelled:
            batch["label"] = torch.tensor([self._label(*place) for place in places.tolist()])
        if self.classed:
            batch["mask"] = torch.stack([self._mask(*place) for place in places.tolist()])
        batch["origin"] = torch.from_numpy(places)
        return batch

    def _mask(self, scene: int, row: int, col: int) -> Tensor:
        classes = self.scenes[scene].classes
        assert classes is not None
        return torch.from_numpy(classes[row : row + self.size[0], col : col + self.size[1]].astype(np.int64))

    def _label(self, scene: int, row: int, col: int) -> int:
        snap, labels = self.scenes[scene].grid.snap, self.scenes[scene].labels
        return -1 if labels is None else int(labels[row // snap, col // snap])

    def _nothing_to_deliver(self) -> str:
        failed = [scene.name for scene, flag in zip(self.scenes, self.failed.tolist(), strict=True) if flag]
        if failed:
            return f"data.root: {len(failed)} scene(s) cannot be read ({', '.join(failed[:3])}); mend or remove them."
        if self.blank.any():
            name = self.scenes[int(self.blank.argmax())].name
            return f"data.root: patches of scene '{name}' have one value everywhere (data.keep_constant takes them)."
        return (
            f"data.max_nodata: no patch with at most {self.max_nodata:.0%} of its pixels without data was found in "
            f"{MAX_DRAWS} draws; raise data.max_nodata or make data.image_size smaller."
        )


def stop_message(path: str, reason: str) -> str:
    """What the user reads when an unreadable file ends the run."""
    return f"data.root: {path}: {reason}; mend or remove it, or set data.on_error: skip."


def collate(samples: dict[str, Tensor] | Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return a batch as `PatchDataset` fetched it, or stack single samples."""
    if isinstance(samples, dict):
        return samples
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


class EpochSampler(ResumableSampler):
    """Indices that go on counting from epoch to epoch, so that worker processes know the epoch from the index.

    Every process takes every n-th index, n being the number of processes. Lightning calls `set_epoch`.
    """

    def __init__(self, dataset: PatchDataset) -> None:
        """Take rank and number of processes from torch.distributed where it runs."""
        replicas, rank = replicas_and_rank()
        super().__init__(dataset, num_replicas=replicas, rank=rank, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        """Yield this process's indices of the present epoch."""
        samples = self.num_samples * self.num_replicas
        return iter(
            range(self.epoch * samples + self.rank, (self.epoch + 1) * samples, self.num_replicas)[self.first :]
        )
