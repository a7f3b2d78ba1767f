"""TreeSatAI-Time-Series as pairs: aerial images at 0.2 m and Sentinel-2 at 10 m of the same 60 m."""

import os
import re
from collections.abc import Sequence
from datetime import date as Date
from typing import Any, Literal

import numpy as np

from xscale_lightning.data.bands import BandSelection, match_names
from xscale_lightning.data.datamodule import check_folder
from xscale_lightning.data.geotiff import Grid, Raster, Source, UnreadableFile, common_grid, inspect
from xscale_lightning.data.pair_checks import PairImage
from xscale_lightning.data.paired import PairedFolders
from xscale_lightning.errors import UserError

# Order of the channels in the files, by the data set's card.
MR_BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
HR_BANDS = ("NIR", "G", "B", "R")  # as TorchGeo's TreeSatAI names them
MR_SELECTION = BandSelection("sentinel2_l2a", names=list(MR_BANDS))
# Wavelengths are nominal, the files say none. Measured on two images of forest, for want of more: measure your own.
HR_SELECTION = BandSelection(
    "generic", names=list(HR_BANDS), wavelengths=[0.85, 0.55, 0.47, 0.65],
    mean=[155.1, 84.7, 82.7, 72.9], std=[44.2, 28.2, 18.7, 27.7],
)  # fmt: skip
_SIZE, _GSD = 6, 10.0  # pixels, metres: what "60 m" is in the time series
_NAME = r"([^/]+?)(?:_\d{4})?$"  # the time series' names may end in the year
_PIXELS, _MASKS, _PRODUCTS = "sen-2-data", "sen-2-masks", "sen-2-products"
_CHANCES = (
    2  # the first two channels of the masks: chance of snow and of cloud in per cent; some files have empty others
)


class TreeSatPairs(PairedFolders):
    """Pairs of TreeSatAI-Time-Series, ratio 50: `aerial/*.tif` (4 bands, 0.2 m), `sentinel-ts/*.h5` (10 bands, 10 m).

    Ahlswede et al., ESSD 15, 2023; time series by Astruc et al., ECCV 2024. The aerial images have 304 x 304 pixels,
    60.8 m; a Sentinel-2 image has 6 x 6 pixels, 60 m. The HDF5 files do not say where these lie, so both are taken to
    have the same centre, and the aerial image loses two pixels on each side. Sentinel-2's pixels lie on multiples of
    10 m, so the truth may be up to 5 m (half an MR pixel) beside that, and nothing in the files can tell.

    A year of acquisitions becomes one image: the median of those with the fewest clouds, or nearest to a day.

    Needs the package h5py (`pip install "xscale-lightning[hdf5]"`).
    """

    def __init__(
        self,
        root: str,
        bands: BandSelection = MR_SELECTION,
        bands_hr: BandSelection = HR_SELECTION,
        date: str | None = None,
        acquisitions: int = 1,
        max_cloud: float = 0.05,
        image_size: int | tuple[int, int] = _SIZE,
        on_missing: Literal["skip", "stop"] = "skip",
        **kwargs: Any,
    ) -> None:
        """Check the arguments; files are opened by `setup`.

        Args:
            root: folder with `aerial` and `sentinel-ts`.
            bands: which of the ten Sentinel-2 bands, and their statistics.
            bands_hr: which of the aerial bands NIR, G, B, R, and their statistics.
            date: day (MM-DD or YYYY-MM-DD) to take the nearest clear acquisitions to; null takes the clearest.
            acquisitions: so many make one image, by their median: one alone may have haze or shadow the masks miss.
            max_cloud: largest mean chance of cloud or snow in an acquisition, 0 to 1.
            image_size: Sentinel-2 pixels, or [height, width], of `image`; at most 6.
            on_missing: what a time series without an aerial image does: it is left out and counted, or the run stops.
            **kwargs: see `SceneFolder`.

        Raises:
            UserError: if an argument is out of range.
        """
        super().__init__(
            root=os.path.join(root, "sentinel-ts"),
            root_hr=os.path.join(root, "aerial"),
            bands=bands,
            bands_hr=bands_hr,
            files=None,
            files_hr=None,
            match="name",
            key=_NAME,
            ratio=None,
            resample=False,
            on_missing=on_missing,
            file_bands=None,
            file_bands_hr=list(HR_BANDS),
            gsd=None,
            image_size=image_size,
            **kwargs,
        )
        if acquisitions < 1:
            raise UserError(f"data.acquisitions: {acquisitions} is not possible; give at least 1.")
        if not 0 <= max_cloud <= 1:
            raise UserError(f"data.max_cloud: {max_cloud} is not possible; give a share from 0 to 1.")
        self.folder = root
        self.reader_hr = self.reader
        self.reader = TimeSeriesReader(day_of_year(date), acquisitions, max_cloud)  # type: ignore[assignment]
        self.name = "treesat"

    def _images(self, fine: bool) -> dict[str, PairImage]:
        """Aerial images, or time series placed where their aerial image lies, by name."""
        if fine:
            # By the files' own names: what looks like a band in a scene's name is a species or a place here.
            return {_stem(image.path): image for image in super()._images(fine).values()}
        check_folder("data.root", self.folder, "give the folder with aerial and sentinel-ts.")
        check_folder("data.root", self.root, "give the folder with aerial and sentinel-ts.")
        open_series = import_h5py()
        chosen = match_names(self.bands.names, MR_BANDS, "TreeSatAI-Time-Series")
        images = {}
        for name in sorted(entry for entry in os.listdir(self.root) if entry.endswith((".h5", ".hdf5"))):
            path, stem = os.path.join(self.root, name), _stem(name)
            aerial = os.path.join(self.root_hr, re.search(_NAME, stem)[1] + ".tif")  # type: ignore[index]
            try:
                check_series(open_series, path)
                raster = place_series(path, inspect(aerial) if os.path.exists(aerial) else None)
                images[stem] = PairImage({}, [Source(raster, i + 1) for i in chosen], common_grid([raster], None))
            except UnreadableFile as error:
                self.left_out[error.path] = error.reason
        if not images:
            why = next((f"; {path}: {reason}" for path, reason in self.left_out.items()), "")
            raise UserError(f"data.root: no time series (*.h5) in '{self.root}' can be used{why}.")
        if self.on_error == "stop":
            self._report_left_out([])
        return images


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def place_series(path: str, aerial: Raster | None) -> Raster:
    """Pixel grid of a time series: the aerial image's centre is its own; without one it lies nowhere in particular."""
    side, crs, centre = _SIZE * _GSD, None, (0.0, 0.0)
    if aerial is not None:
        if aerial.crs is None:
            raise UnreadableFile(aerial.path, "it has no coordinate system, so nothing says where its time series lies")
        centre = aerial.left + aerial.width * aerial.dx / 2, aerial.top - aerial.height * aerial.dy / 2
        crs = aerial.crs
    left, top = centre[0] - side / 2, centre[1] + side / 2
    return Raster(path, MR_BANDS, crs, left, top, _GSD, _GSD, _SIZE, _SIZE, "float32", _GSD, True)


def import_h5py() -> Any:
    """Import the package h5py.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise UserError(
            'data: TreeSatPairs reads HDF5 files with the package h5py; pip install "xscale-lightning[hdf5]".'
        ) from None
    return h5py


def check_series(h5py: Any, path: str) -> None:
    """Refuse a file that is no time series of ten bands.

    Raises:
        UnreadableFile: saying what is wrong.
    """
    try:
        with h5py.File(path) as file:
            shape, count = file[_PIXELS].shape, len(file[_PRODUCTS])
            if len(shape) != 4 or shape[1:] != (len(MR_BANDS), _SIZE, _SIZE) or count != shape[0]:
                wanted = f"[{count}, {len(MR_BANDS)}, {_SIZE}, {_SIZE}]"
                raise UnreadableFile(path, f"{_PIXELS} has the shape {list(shape)} instead of {wanted}")
    except (OSError, KeyError) as error:
        raise UnreadableFile(path, f"cannot be read as a time series ({str(error).strip()[:120]})") from None


class TimeSeriesReader:
    """Reads the chosen image of a year; takes the place of a `RasterReader`."""

    nodata = None

    def __init__(self, day: int | None, acquisitions: int, max_cloud: float) -> None:
        """Set what to choose: the clearest, or those nearest to a day of the year."""
        self.day, self.acquisitions, self.max_cloud = day, acquisitions, max_cloud

    def read(
        self, sources: Sequence[Source], grid: Grid, row: int, col: int, height: int, width: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Read one window: pixels `[C, height, width]` float32, and their validity (None: all valid).

        Raises:
            UnreadableFile: if the file cannot be read, or has no clear acquisition.
        """
        raster = sources[0].raster
        h5py = import_h5py()
        try:
            with h5py.File(raster.path) as file:
                products = [str(name, "utf-8") if isinstance(name, bytes) else str(name) for name in file[_PRODUCTS]]
                chances = file[_MASKS][:, :_CHANCES]
                chosen = choose(chances, products, self.day, self.acquisitions, self.max_cloud)
                pixels = file[_PIXELS][sorted(chosen)]
        except (OSError, KeyError, ValueError) as error:
            raise UnreadableFile(raster.path, f"cannot be used ({str(error).strip()[:160]})") from None
        top = round((raster.top - grid.top) / raster.dy) + row
        left = round((grid.left - raster.left) / raster.dx) + col
        image = np.median(pixels, axis=0)[[source.index - 1 for source in sources]].astype(np.float32)
        image = image[:, top : top + height, left : left + width]
        valid = np.isfinite(image)
        return (image, None) if valid.all() else (image, valid)


def choose(
    chances: np.ndarray, products: Sequence[str], day: int | None, acquisitions: int, max_cloud: float
) -> list[int]:
    """Positions of the acquisitions to use.

    Args:
        chances: `[T, 2, h, w]` chance of snow and of cloud in per cent.
        products: `[T]` Sentinel-2 product names, which hold the date.
        day: day of the year to be near to; None takes the clearest, and of equally clear ones the first.
        acquisitions: how many.
        max_cloud: largest mean chance, 0 to 1.

    Raises:
        ValueError: if none is clear enough, or a product's name has no date.
    """
    cloud = chances.max(axis=1).mean(axis=(1, 2)) / 100
    clear = np.flatnonzero(cloud <= max_cloud)
    if not len(clear):
        raise ValueError(
            f"none of {len(cloud)} acquisitions has at most {max_cloud:.0%} of cloud and snow, the clearest "
            f"{cloud.min():.0%}; raise data.max_cloud"
        )
    if day is None:
        order = np.argsort(cloud[clear], kind="stable")
    else:
        apart = np.abs(np.array([_day_of_product(products[i]) for i in clear.tolist()]) - day)
        order = np.argsort(np.minimum(apart, 365 - apart), kind="stable")
    return clear[order][:acquisitions].tolist()


def _day_of_product(name: str) -> int:
    found = re.search(r"_(\d{4})(\d{2})(\d{2})T", name)
    if found is None:
        raise ValueError(f"product '{name}' has no date")
    return Date(*map(int, found.groups())).timetuple().tm_yday


def day_of_year(text: str | None) -> int | None:
    """Day of the year of "MM-DD" or "YYYY-MM-DD".

    Raises:
        UserError: if it is no day.
    """
    if text is None:
        return None
    try:
        return Date.fromisoformat(text if len(text) == 10 else f"2000-{text}").timetuple().tm_yday
    except ValueError:
        raise UserError(f"data.date: '{text}' is no day; give MM-DD or YYYY-MM-DD, or null.") from None
