"""Samples that `xscale pack` wrote, read from memory-mapped shards: no decoding, whole batches at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from xscale_lightning.data.bands import Bands, band_key
from xscale_lightning.data.datamodule import Batch, Split, XScaleDataModule
from xscale_lightning.data.patches import collate
from xscale_lightning.data.shards import INDEX, Shard, check_shards, open_column, read_index
from xscale_lightning.errors import UserError

IMAGES = ("image", "image_hr")
MOST_CLASSES, LONGEST = 100_000, 200  # characters of a name
HASHED = 2 * 10**9  # bytes; packs up to this size are hashed whenever they are opened (about a second)


def _name(text: Any) -> str:
    if not isinstance(text, str) or len(text) > LONGEST or not text.isprintable():
        raise ValueError(f"{str(text)[:40]!r} is no name")
    return text


class PackedSamples(Dataset[dict[str, Any]]):
    """The samples of one split, in the order they were packed; whole batches are fetched at once.

    Args:
        root: folder of the pack.
        shards: of the split.
        channels: channels of `image` to take, in order; None takes all.
        cast: whether images become float32 here; else they are delivered as stored.
    """

    def __init__(
        self, root: str, shards: Sequence[Shard], channels: Sequence[int] | None = None, cast: bool = True
    ) -> None:
        self.root, self.shards, self.cast = root, list(shards), cast
        self.channels = None if channels is None else list(channels)
        self.ends = np.cumsum([shard.samples for shard in shards])
        self.columns = list(shards[0].columns)
        self._maps: dict[str, list[np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes map the files themselves: a pickled map would be a copy of the data."""
        return {**self.__dict__, "_maps": {}}

    def __len__(self) -> int:
        """Number of samples."""
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: `image [C, H, W]`, `gsd` and what else was packed."""
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The batch of these samples, stacked: `image [B, C, H, W]`, `gsd [B]`, and what else was packed.

        Raises:
            UserError: a file is damaged.
            IndexError: there is no such sample.
        """
        index = np.asarray(indices, np.int64)
        if len(index) and not (index.min() >= 0 and index.max() < len(self)):
            raise IndexError(f"samples {index.min()} to {index.max()} of {len(self)}")
        which = np.searchsorted(self.ends, index, side="right")
        rows = index - np.concatenate([[0], self.ends])[which]
        return {key: self._gather(key, which, rows) for key in self.columns}

    def _gather(self, key: str, which: np.ndarray, rows: np.ndarray) -> Tensor | list[str]:
        maps, column = self._opened(key), self.shards[0].columns[key]
        if column.delivered == "str":
            return [maps[s][row].decode() for s, row in zip(which, rows, strict=True)]
        dtype = np.dtype(column.delivered)
        if key in IMAGES and not self.cast:
            dtype = np.result_type(*{values.dtype for values in maps})
        channels = self.channels if key == "image" else None
        shape = column.shape if channels is None else (len(channels), *column.shape[1:])
        batch = np.empty((len(rows), *shape), dtype)
        for place, (s, row) in enumerate(zip(which, rows, strict=True)):
            batch[place] = maps[s][row] if channels is None else maps[s][row][channels]
        return torch.from_numpy(batch)

    def _opened(self, key: str) -> list[np.ndarray]:
        if key not in self._maps:
            self._maps[key] = [open_column(self.root, shard, key) for shard in self.shards]
        return self._maps[key]

    def as_stored(self) -> "PackedSamples":
        """The same samples with images in the type of the files."""
        return PackedSamples(self.root, self.shards, self.channels, cast=False)


class PackedData(XScaleDataModule):
    """What `xscale pack` wrote: bit for bit the samples of the data module it was made from, without decoding."""

    def __init__(
        self,
        root: str,
        names: list[str] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        cast_on_device: bool | None = None,
        verify: Literal["auto", "size", "hash"] = "auto",
        batch_size: int = 64,
        num_workers: int | None = None,
    ) -> None:
        """Read the index; shards are checked and mapped by `setup`.

        Args:
            root: folder that `xscale pack` wrote.
            names: bands to use, by name and in this order; null takes all.
            mean: mean per chosen band in raw units; null takes those the pack was made with.
            std: standard deviation per chosen band.
            cast_on_device: send training images as stored (uint16: half the bytes) and make them float32 on the device;
                null does so where there is CUDA.
            verify: compare the files' `size`, or their SHA-256 (`hash`), with the index; `auto` hashes up to 2 GB.
            batch_size: samples per device and step.
            num_workers: processes that read files; 0 reads in the training process, null chooses from the CPU count.

        Raises:
            UserError: there is no pack, its index is damaged, or it lacks a band.
        """
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        about, self.splits = read_index(root)
        self.root, self.cast_on_device, self.verify = root, cast_on_device, verify
        packed = self._take(about)
        self.channels = None
        self.bands = packed
        if names is not None:
            self.channels = packed.index(names)
            self.bands = replace(packed, bands=tuple(packed.bands[i] for i in self.channels))
            paired = any("image_hr" in shard.columns for shards in self.splits.values() for shard in shards)
            if paired and [band_key(n) for n in names] != [band_key(n) for n in packed.names]:
                raise UserError("data.names: this pack holds pairs, whose bands cannot be chosen; leave it null.")
        if (mean is None) != (std is None):
            raise UserError("data.mean and data.std: give both or neither.")
        if mean is not None and std is not None:
            self.bands = self.bands.with_statistics(mean, std)

    def _take(self, about: Mapping[str, Any]) -> Bands:
        """Take over what a pack says of its samples; returns its bands."""
        classes, masks, gsd = (about.get(key) for key in ("num_classes", "num_mask_classes", "gsd"))
        try:
            self.name, size, names = _name(about["name"]), about["image_size"], about["class_names"]
            if max(int(number or 0) for number in (classes, masks)) > MOST_CLASSES:
                raise ValueError("it has more classes than any data set")
            self.image_size = (int(size[0]), int(size[1]))
            self.num_classes, self.multilabel = None if classes is None else int(classes), bool(about["multilabel"])
            self.num_mask_classes, self.ignore_index = None if masks is None else int(masks), int(about["ignore_index"])
            self.class_names = None if names is None else tuple(map(_name, names))
            self.gsd = None if gsd is None else float(gsd)
            return Bands.from_dict(about["bands"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            problem = f"{type(error).__name__}: {str(error)[:80]}"
        raise UserError(f"data.root: '{INDEX}' in '{self.root}' is damaged ({problem}); write the pack again.")

    def build_dataset(self, split: Split) -> PackedSamples | None:
        """Check and map the shards of a split.

        Raises:
            UserError: a file is missing, cut short or changed.
        """
        shards = self.splits.get(split)
        if not shards:
            return None
        size = sum(column.bytes for shard in shards for column in shard.columns.values())
        check_shards(self.root, shards, self.verify == "hash" or (self.verify == "auto" and size <= HASHED))
        return PackedSamples(self.root, shards, self.channels)

    def train_dataloader(self) -> DataLoader[Any]:
        """As the base; images as they are stored where the device makes them float32."""
        dataset = self._required("train")
        assert isinstance(dataset, PackedSamples)
        on_device = torch.cuda.is_available() if self.cast_on_device is None else self.cast_on_device
        drop_last = len(dataset) > self.batch_size
        options = {"shuffle": True, "drop_last": drop_last}
        return self._loader(dataset.as_stored() if on_device else dataset, training=True, **options)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Images that were sent as stored become float32, on the device."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if isinstance(batch, Mapping):
            return {key: value.float() if key in IMAGES else value for key, value in batch.items()}
        return batch

    def _collate(self) -> Callable[[Any], Batch]:
        return collate
