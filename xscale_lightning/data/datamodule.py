"""The data module every `data:` section of a configuration names: our batch, loaders and their checks.

A batch is a dict: `image [B, C, H, W]` float32 in raw sensor units (normalisation happens once, inside the model),
`gsd [B]` float32 in metres per pixel, where there are labels `label [B]` int64 or `[B, K]` (multi-label), and where
there are masks `mask [B, H, W]` int64, the class of every pixel or `ignore_index`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.damage import DamageLog
from xscale_lightning.data.left_out import SKIPPED, InOrder, LeftOut, checked_state, pop_skipped
from xscale_lightning.data.samplers import begin_worker, make_resumable
from xscale_lightning.errors import UserError

Split = Literal["train", "val", "test"]
Batch = dict[str, Any]
DEFAULT_BANDS = BandSelection()
MAX_DEFAULT_WORKERS = 8


def default_num_workers() -> int:
    """Worker processes that leave one of this process's CPU cores to the training loop, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(MAX_DEFAULT_WORKERS, cores - 1))


def check_folder(argument: str, folder: str | os.PathLike[str], remedy: str) -> None:
    """Refuse a folder that is missing or empty.

    Raises:
        UserError: naming the argument, the folder and the remedy.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{argument}: folder '{folder}' does not exist; {remedy}")
    if not os.listdir(folder):
        raise UserError(f"{argument}: folder '{folder}' is empty; {remedy}")


class Collate:
    """Turns samples into a batch: tensors stacked, numbers made tensors, strings kept as lists, `gsd [B]` added.

    Only keys that every sample has are kept; values of other types (coordinate systems, slices) are dropped, because
    they cannot go to a device. Of no samples comes `{}`.
    """

    def __init__(self, gsd: float | None = None) -> None:
        """Remember the gsd (m/px) of samples that bring none."""
        self.gsd = gsd

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        """Collate B samples with `image [C, H, W]` into one batch with `image [B, C, H, W]` float32.

        Raises:
            UserError: if the images differ in size, or neither sample nor data module knows the gsd.
        """
        if not samples:
            return {}
        shared = [key for key in samples[0] if key != SKIPPED and all(key in sample for sample in samples)]
        batch: Batch = {key: value for key in shared if (value := _gather(key, [s[key] for s in samples])) is not None}
        if "image" in batch:
            batch["image"] = batch["image"].float()
        if "gsd" not in batch:
            if self.gsd is None:
                raise UserError("gsd: neither the files nor the sensor preset say it; set data.gsd (metres per pixel).")
            batch["gsd"] = torch.full((len(samples),), self.gsd)
        batch["gsd"] = batch["gsd"].float()
        if skipped := sum(sample.get(SKIPPED, 0) for sample in samples):
            batch[SKIPPED] = skipped
        return batch


def _gather(key: str, values: list[Any]) -> Tensor | list[str] | None:
    """Stack, list or drop one key's values."""
    first = values[0]
    if isinstance(first, Tensor):
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            shown = ", ".join(str(shape) for shape in sorted(shapes)[:3])
            raise UserError(f"data: '{key}' comes in different shapes ({shown}); set data.image_size to make them one.")
        return torch.stack(values)
    if isinstance(first, str):
        return [str(value) for value in values]
    if isinstance(first, (bool, Number)) or getattr(first, "shape", None) == ():
        return torch.as_tensor(values)
    if hasattr(first, "__array__"):
        return _gather(key, [torch.as_tensor(value) for value in values])
    return None


class XScaleDataModule(LightningDataModule):
    """Base of all data modules: subclasses implement `build_dataset` and set what they know about it.

    Attributes:
        bands: record of the channels of `image`, in order.
        name: short name, used in log names such as `knn/<name>/top1`.
        image_size: (height, width) of the images in pixels.
        num_classes: number of classes, or None without labels.
        multilabel: whether `label` is `[B, K]` with one column per class.
        num_mask_classes: number of classes of `mask`, or None without masks.
        class_names: names of the classes of `mask`, or None if they have none.
        ignore_index: value in `mask` of pixels that do not count.
        gsd: metres per pixel of samples that do not bring their own, or None.
        downloads: whether `prepare_data` fetches files, so that nothing can be opened before it.
        damage: the damaged files met so far.
        left_out: files and scenes left out when the data was opened, with the reason.
    """

    def __init__(
        self, bands: BandSelection = DEFAULT_BANDS, batch_size: int = 64, num_workers: int | None = None
    ) -> None:
        """Check the arguments that all data modules share.

        Args:
            bands: which bands to use, and their statistics.
            batch_size: samples per device and step.
            num_workers: processes that read files; 0 reads in the training process, null chooses from the CPU count.

        Raises:
            UserError: if a number is out of range, or the band selection does not fit its sensor.
        """
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size: {batch_size} is not possible; give at least 1.")
        if num_workers is not None and num_workers < 0:
            raise UserError(f"data.num_workers: {num_workers} is not possible; give 0 or more, or null.")
        self.bands = bands.resolve()
        self.batch_size = batch_size
        self.num_workers = default_num_workers() if num_workers is None else num_workers
        self.name: str = type(self).__name__.lower()
        self.image_size: tuple[int, int] = (0, 0)
        self.num_classes: int | None = None
        self.multilabel = False
        self.num_mask_classes: int | None = None
        self.class_names: tuple[str, ...] | None = None
        self.ignore_index = -1
        self.gsd: float | None = self.bands.gsd
        self.downloads = False
        self.damage = DamageLog()
        self.left_out: dict[str, str] = {}
        self._skipped = [0, 0]  # in this process, and in the others when they were last asked
        self._recalled: dict[str, list[int]] = {}  # what a checkpoint says of splits that are not open yet
        self._datasets: dict[str, Dataset[Any] | None] = {}

    def build_dataset(self, split: Split) -> Dataset[Any] | None:
        """Open one split; None if the data has no such split. Called once per split and process.

        Samples are dicts with `image [C, H, W]` in raw units and `self.bands` order, and optionally `gsd`, `label`.
        """
        raise TypeError(f"{type(self).__name__} must implement build_dataset(split).")

    def dataset(self, split: Split) -> Dataset[Any] | None:
        """Return the split's dataset, opened on first use; None if the data has no such split."""
        if split not in self._datasets:
            self._datasets[split] = self.build_dataset(split)
        return self._datasets[split]

    # ---- damaged samples; see `left_out` ---------------------------------------------------------------------------

    @property
    def skipped(self) -> int:
        """Damaged samples that training has replaced so far; of other processes when they were last asked."""
        return sum(self._skipped)

    @property
    def left_out_samples(self) -> dict[str, int]:
        """Damaged samples that everything but training has left out so far, by split; each counts once."""
        return {split: len(slots) for split, slots in self._left_out_slots().items()}

    def _left_out_slots(self) -> dict[str, list[int]]:
        found = {key: set(slots) for key, slots in self._recalled.items()}
        for key, dataset in self._datasets.items():
            if isinstance(noted := getattr(dataset, "left_out", None), LeftOut):
                found.setdefault(key.removeprefix("probe_"), set()).update(noted.slots)
        return {split: sorted(slots) for split, slots in found.items() if slots}

    def count_skipped(self) -> int:
        """Ask the other processes for their part of `skipped`, which is returned; all of them must call this."""
        trainer = self.trainer
        if trainer is not None and trainer.world_size > 1:
            own = torch.tensor(self._skipped[0], device=trainer.strategy.root_device)
            self._skipped[1] = int(trainer.strategy.reduce(own, reduce_op="sum")) - self._skipped[0]
        return self.skipped

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count the damaged samples that were replaced in a training batch."""
        batch, skipped = pop_skipped(batch)
        self._skipped[0] += skipped
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Counts of damaged samples; called by all processes."""
        self.count_skipped()
        return {"skipped": self.skipped, "left_out": self._left_out_slots()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where a checkpoint was written; commands other than `fit` count for themselves.

        Raises:
            UserError: the state is none of ours.
        """
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            skipped, self._recalled = checked_state(state_dict)
            first = self.trainer is None or self.trainer.is_global_zero
            self._skipped = [skipped, 0] if first else [0, skipped]

    def setup(self, stage: str | None = None) -> None:
        """Open the splits the stage needs, so that bad input is refused before training starts."""
        splits: dict[str | None, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for split in splits.get(stage, ()):
            self.dataset(split)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches of the training split; the last, incomplete batch is dropped if there is another.

        Raises:
            UserError: if there is no training split.
        """
        dataset = self._required("train")
        return self._loader(dataset, training=True, shuffle=True, drop_last=_length(dataset) > self.batch_size)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Batches of the validation split in order; an empty list if there is none."""
        dataset = self.dataset("val")
        return [] if dataset is None else self._loader(dataset)

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split in order.

        Raises:
            UserError: if there is no test split.
        """
        return self._loader(self._required("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches to embed, in order: the test split, else the validation split, else the training split."""
        for split in ("test", "val"):
            dataset = self.dataset(split)
            if dataset is not None:
                return self._loader(dataset)
        return self._loader(self._required("train"))

    def probe_dataloader(self, split: Split) -> DataLoader[Any]:
        """Every sample of a split once, in order, with labels and without augmentation.

        Raises:
            UserError: if there is no such split.
        """
        return self._loader(self._required(split))

    def _required(self, split: Split) -> Dataset[Any]:
        dataset = self.dataset(split)
        if dataset is None:
            raise UserError(
                f"data: {self.name} has no {split} split; choose another split or other data "
                "(train_list, val_list, test_list, splits and fractions say which there are)."
            )
        return dataset

    def _loader(self, dataset: Dataset[Any], *, training: bool = False, **options: Any) -> DataLoader[Any]:
        """Loader with what all loaders share; `options` (shuffle, drop_last, sampler ...) go to `DataLoader`.

        In `training` damaged samples are replaced by others, else they are left out.
        """
        if "batch_sampler" not in options:
            options["batch_size"] = self.batch_size
        training = training or bool(options.get("shuffle"))
        dataset = make_resumable(dataset, options, training)
        return (DataLoader if training else InOrder)(
            dataset,
            **options,
            num_workers=self.num_workers,
            worker_init_fn=begin_worker,
            collate_fn=self._collate(),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def _collate(self) -> Callable[[Any], Batch]:
        """What makes a batch of samples. Hook for datasets that fetch whole batches."""
        return Collate(self.gsd)


def _length(dataset: Dataset[Any]) -> int:
    return len(dataset)  # type: ignore[arg-type]
