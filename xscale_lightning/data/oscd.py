"""OSCD, the Onera Satellite Change Detection data set (Caye Daudt et al. 2018), through TorchGeo's class."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torchgeo.datasets import OSCD

from xscale_lightning.data import sources
from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.change import ChangeData, SceneSplit
from xscale_lightning.data.change_scenes import Opener, read_oscd
from xscale_lightning.data.datamodule import DEFAULT_BANDS
from xscale_lightning.errors import UserError


class OSCDData(ChangeData):
    """Sentinel-2 Level-1C pairs of 24 cities, 14 to train and 10 to test; 13 bands on the 10 m grid.

    Validation takes whole cities of the 14, so that no place is in two splits.
    """

    def __init__(
        self,
        root: str = "data/oscd",
        bands: BandSelection = DEFAULT_BANDS,
        validation: int = 3,
        download: bool = False,
        **kwargs: Any,
    ) -> None:
        """Check the arguments; files are opened by `setup`.

        Args:
            root: folder of the data.
            bands: bands to use, and their statistics.
            validation: how many of the training cities, the last in alphabetical order, are kept for validation; 0
                keeps blocks of all of them instead.
            download: let TorchGeo download the data into root.
            **kwargs: see `ChangeData`.

        Raises:
            UserError: naming the argument that does not fit.
        """
        super().__init__(bands, **kwargs)
        self.name = kwargs.get("name") or "oscd"
        self.gsd = self._given_gsd = kwargs.get("gsd") or 10.0
        if validation < 0:
            raise UserError(f"data.validation: {validation} is not possible; give 0 or more cities.")
        self._root, self._validation, self.downloads = root, validation, download
        self._cities: dict[str, str] = {}

    def prepare_data(self) -> None:
        """Download, on one process only, where `download` is set."""
        if self.downloads:
            self._open("train")

    def _open(self, split: str) -> Any:
        return sources.build(OSCD, "OSCD", self._root, self.downloads, split=split, bands=self._names())

    def _names(self) -> list[str]:
        unknown = [name for name in self.bands.names if name not in OSCD.all_bands]
        if unknown:
            raise UserError(f"data.bands: OSCD has no band {unknown[0]}; it has {', '.join(OSCD.all_bands)}.")
        return list(self.bands.names)

    def find(self) -> dict[str, Opener]:
        """Readers of all cities, in alphabetical order."""
        openers: dict[str, Opener] = {}
        for split in ("train", "test"):
            source = self._open(split)
            cities = sorted((str(entry["region"]), index) for index, entry in enumerate(source.files))
            for city, index in cities:
                self._cities[city] = split
                openers[city] = partial(read_oscd, source, index, city, self._given_gsd)
        return openers

    def scenes_of_splits(self, names: Sequence[str]) -> SceneSplit | None:
        """The published split, its training cities divided for validation."""
        if self._split is not None:
            return self._split
        train = [name for name in names if self._cities[name] == "train"]
        if self._validation >= len(train):
            raise UserError(
                f"data.validation: {self._validation} of {len(train)} training cities leave none to train on."
            )
        count = len(train) - self._validation
        return SceneSplit(train[:count], train[count:], [name for name in names if self._cities[name] == "test"])
