"""Any TorchGeo dataset or data module as our batches: bands by name, raw values, gsd in metres."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, random_split

from xscale_lightning.data import sources
from xscale_lightning.data.datamodule import Split
from xscale_lightning.data.reading import MAX_SUBSTITUTES
from xscale_lightning.data.wrapped import WrappedData
from xscale_lightning.errors import UserError

DatasetFactory = Callable[[], Dataset]
MAX_LOOKED = 10**6  # windows among which a readable one is looked for, where the first is damaged


@dataclass
class SplitNames:
    """What the dataset calls its splits; null where it has no such split."""

    train: str | None = "train"
    """Value of the split argument for training."""
    val: str | None = "val"
    """Value of the split argument for validation."""
    test: str | None = "test"
    """Value of the split argument for testing."""


DEFAULT_SPLITS = SplitNames()


class TorchGeoData(WrappedData):
    """Wraps a TorchGeo dataset (or any dataset with `image` and `label`), or a whole TorchGeo data module.

    Give one of `dataset` (opened once per split), `train`/`val`/`test`, or `datamodule`. Values stay raw: TorchGeo's
    own normalisation and augmentation are not used. Bands are picked by name, whatever order the files have.
    """

    def __init__(
        self,
        root: str | None = None,
        dataset: DatasetFactory | None = None,
        train: DatasetFactory | Dataset | None = None,
        val: DatasetFactory | Dataset | None = None,
        test: DatasetFactory | Dataset | None = None,
        datamodule: LightningDataModule | None = None,
        download: bool = False,
        split_argument: str | None = "split",
        splits: SplitNames = DEFAULT_SPLITS,
        holdout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        """Check the arguments; files are opened by `setup`.

        Args:
            root: folder of the data, handed to the dataset (or data module) as its `root` or `paths`.
            dataset: dataset class and its arguments; the split is filled in.
            train: dataset of the training split, where the splits are different datasets.
            val: dataset of the validation split.
            test: dataset of the test split.
            datamodule: TorchGeo data module whose datasets and samplers are used.
            download: let the dataset download itself into root where it can.
            split_argument: name of the dataset's split argument; null if it has none.
            splits: what the dataset calls its splits.
            holdout: share of the training samples to validate on, for datasets without a validation split.
            **kwargs: see `WrappedData`.

        Raises:
            UserError: naming the argument that does not fit.
        """
        super().__init__(**kwargs)
        self._explicit: dict[str, Any] = {"train": train, "val": val, "test": test}
        forms = [dataset is not None, any(part is not None for part in self._explicit.values()), datamodule is not None]
        if sum(forms) != 1:
            raise UserError("data: give exactly one of data.dataset, data.train/val/test, and data.datamodule.")
        if not 0 <= holdout < 1:
            raise UserError(f"data.holdout: {holdout} is not possible; needs 0 <= holdout < 1.")
        self._root, self._download = root, download
        self.downloads = download
        self._dataset, self._datamodule = dataset, datamodule
        self._split_argument, self._splits, self._holdout = split_argument, splits, holdout
        self._samplers: dict[str, dict[str, Any]] = {}
        self._ready: set[str] = set()
        if not kwargs.get("name"):
            given = (dataset, *self._explicit.values(), datamodule)
            self.name = next(sources.short_name(form) for form in given if form is not None)

    def prepare_data(self) -> None:
        """Download, on one process only, where `download` is set."""
        if not self._download:
            return
        if self._datamodule is not None:
            sources.set_up(self._datamodule, "prepare", self._root, self._download, self.name)
            return
        splits: tuple[Split, ...] = ("train", "val", "test")
        for split in splits:
            self.open_source(split)

    def open_source(self, split: Split) -> Dataset[Any] | None:
        """Open the wrapped dataset of a split, or return None if there is none.

        Raises:
            UserError: if the folder is missing, empty or holds something else.
        """
        if self._datamodule is not None:
            return self._from_datamodule(self._datamodule, split)
        if self._dataset is None:
            part = self._explicit[split]
            return self._build(part) if sources.is_factory(part) else part
        names = {"train": self._splits.train, "val": self._splits.val, "test": self._splits.test}
        from_training = split == "val" and self._holdout > 0
        wanted = "train" if from_training else split
        options: dict[str, Any] = {}
        known = sources.arguments(self._dataset)
        if self._split_argument not in (None, "split", *known):
            raise UserError(f"data.split_argument: {self.name} has no argument '{self._split_argument}'; name its own.")
        if self._split_argument is not None and self._split_argument in known:
            options[self._split_argument] = names[wanted]
        elif wanted != "train":
            return None
        if names[wanted] is None:
            return None
        source = self._build(self._dataset, **options)
        if self._holdout > 0 and wanted == "train":
            shares = [1 - self._holdout, self._holdout]
            return random_split(source, shares, torch.Generator().manual_seed(0))[int(from_training)]
        return source

    def some_indices(self, split: Split, source: Dataset[Any]) -> Iterator[Any]:
        """Indices of some samples: of a GeoDataset windows of its sampler, the first one and others all over it."""
        if split not in self._samplers:
            yield from super().some_indices(split, source)
            return
        ((kind, sampler),) = self._samplers[split].items()

        def window(entry: Any) -> Any:
            return entry[0] if kind == "batch_sampler" else entry

        yield window(next(iter(sampler)))
        drawn = list(itertools.islice(sampler, MAX_LOOKED))
        yield from (window(entry) for entry in drawn[:: max(1, len(drawn) // MAX_SUBSTITUTES)])

    def _from_datamodule(self, module: LightningDataModule, split: Split) -> Dataset[Any] | None:
        stage = "test" if split == "test" else "fit"
        if stage not in self._ready:
            module.batch_size = self.batch_size  # type: ignore[attr-defined]  # TorchGeo's batch samplers take it from there
            sources.set_up(module, stage, self._root, self._download, self.name)
            self._ready.add(stage)
        source, sampler = sources.from_datamodule(module, split)
        self._samplers |= {split: sampler} if sampler else {}
        return source

    def _build(self, factory: DatasetFactory, **options: Any) -> Dataset[Any]:
        return sources.build(factory, self.name, self._root, self._download, **options)

    def _loader(self, dataset: Dataset[Any], *, training: bool = False, **options: Any) -> DataLoader[Any]:
        split = next((key for key, value in self._datasets.items() if value is dataset), "")
        # Windows of a GeoDataset: their sampler decides order and number.
        return super()._loader(dataset, training=training, **self._samplers.get(split, options))
