"""Two TorchGeo GeoDatasets as pairs: the same ground at medium (MR) and at high resolution (HR)."""

from typing import Any, Literal

from xscale_lightning.data import describe, sources
from xscale_lightning.data.bands import BandSelection, match_names
from xscale_lightning.data.datamodule import DEFAULT_BANDS
from xscale_lightning.data.geo_reader import GeoReader, Tile, tile_grid, tiles_of
from xscale_lightning.data.geotiff import Source
from xscale_lightning.data.pair_checks import PairImage
from xscale_lightning.data.paired import PairedFolders
from xscale_lightning.data.torchgeo import DatasetFactory
from xscale_lightning.errors import UserError


class PairedGeo(PairedFolders):
    """Pairs of crops of the same ground from two TorchGeo GeoDatasets, each read at its own resolution.

    TorchGeo's own intersection of two data sets resamples one to the other's resolution. Here each tile of one is
    paired with the tiles of the other that show the same ground, crops are chosen on MR's pixel grid and their edges
    multiplied by one affine per pair, and each data set is asked for its own pixels: see `PairedFolders`, whose batch,
    splits and checks are the same.

    Neither data set may warp or resample, so leave `crs` and `res` of the data sets' arguments alone where you can:
    TorchGeo warps with the nearest neighbour, which moves the ground by up to half a pixel.
    """

    def __init__(
        self,
        dataset: DatasetFactory,
        dataset_hr: DatasetFactory,
        root: str | None = None,
        root_hr: str | None = None,
        bands: BandSelection = DEFAULT_BANDS,
        bands_hr: BandSelection = DEFAULT_BANDS,
        channels: list[str] | None = None,
        channels_hr: list[str] | None = None,
        days: float | None = None,
        ratio: float | None = None,
        resample: bool = False,
        on_missing: Literal["skip", "stop"] = "skip",
        **kwargs: Any,
    ) -> None:
        """Check the arguments; files are opened by `setup`.

        Args:
            dataset: GeoDataset class of MR and its arguments.
            dataset_hr: GeoDataset class of HR and its arguments.
            root: folder of MR, handed to the dataset as its `paths` (or `root`); null leaves the dataset's own.
            root_hr: the same of HR.
            bands: which MR bands to use, and their statistics.
            bands_hr: which HR bands to use, and their statistics.
            channels: names of all channels MR delivers, in its order, where the dataset does not say them itself.
            channels_hr: the same of HR.
            days: at most so many days between the two images of a pair; null pairs images of any times.
            ratio: HR pixels along one MR pixel in a batch; null takes that of the data sets.
            resample: whether HR may be resampled where its pixels do not fit into MR's, or `ratio` is another one.
            on_missing: what an MR tile without HR does: it is left out and counted, or the run stops.
            **kwargs: see `SceneFolder`; sizes and strides are in MR pixels.

        Raises:
            UserError: if an argument is out of range.
        """
        if days is not None and not days >= 0:
            raise UserError(f"data.days: {days} is not possible; give a number of days from 0 on, or null.")
        super().__init__(
            root=root or "",
            root_hr=root_hr or "",
            bands=bands,
            bands_hr=bands_hr,
            files=None,
            files_hr=None,
            match="place",
            key=None,
            group=None,
            ratio=ratio,
            resample=resample,
            min_shared=0.0,
            on_missing=on_missing,
            file_bands_hr=None,
            file_bands=None,
            gsd=None,
            **kwargs,
        )
        self._parts = (dataset, root, channels), (dataset_hr, root_hr, channels_hr)
        self.days, self._nodata = days, self.reader.nodata
        self._tiles: tuple[dict[str, Tile], dict[str, Tile]] = {}, {}
        self.name = f"{sources.short_name(dataset)}_{sources.short_name(dataset_hr)}"

    def _images(self, fine: bool) -> dict[str, PairImage]:
        """The tiles of one dataset, by name.

        Raises:
            UserError: if the dataset cannot be opened or lacks a band.
        """
        factory, root, channels = self._parts[fine]
        bands = self.bands_hr if fine else self.bands
        owner = sources.short_name(factory)
        argument = "data.root_hr" if fine else "data.root"
        dataset = sources.build(factory, owner, root, False, windows=True, argument=argument)
        names = channels or describe.band_names(dataset) or list(bands.names)
        chosen = match_names(bands.names, names, owner, "bands_hr" if fine else "bands")
        tiles = tiles_of(dataset, names, owner)
        reader = GeoReader(dataset, tiles, self._nodata, owner)
        if fine:
            self.reader_hr = reader
        else:
            self.reader = reader
        images = {}
        for tile in tiles:
            name = tile.raster.path
            self._tiles[fine][name] = tile
            read = [Source(tile.raster, channel + 1) for channel in chosen]
            images[name] = PairImage({}, read, tile_grid(tile))
        return images

    def suits(self, mr: str, hr: str) -> bool:
        """Whether two tiles that share ground are of the same time, as far as `days` asks."""
        return self.days is None or self._tiles[0][mr].days_from(self._tiles[1][hr]) <= self.days

    def _far_apart(self, mr: dict[str, PairImage], hr: dict[str, PairImage]) -> str:
        """Why no two tiles make a pair."""
        reason = super()._far_apart(mr, hr)
        return reason if self.days is None else f"{reason}, or raise data.days ({self.days:g})"
