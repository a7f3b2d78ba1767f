"""Bands by name: what a channel is, where it lies in the spectrum, and how it is normalised.

A `Bands` record travels with every batch producer, checkpoint and export. Units: wavelength in micrometres, gsd in
metres per pixel, mean and std in the raw unit of the files (`Bands.unit`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from xscale_lightning.data import sensors
from xscale_lightning.data.band_names import band_key as band_key
from xscale_lightning.data.band_names import check_wavelengths, listed, match_names
from xscale_lightning.errors import UserError

_RGB_WAVELENGTHS = (0.665, 0.560, 0.490)
_NIR_WAVELENGTH = 0.842


@dataclass(frozen=True)
class Band:
    """One spectral band."""

    name: str
    """Name as printed on the product, for example "B8A"."""
    wavelength: float | None
    """Centre wavelength in micrometres; None if unknown."""
    gsd: float | None
    """Native ground sample distance in metres per pixel; None if it varies or is unknown."""
    mean: float
    """Mean in raw units."""
    std: float
    """Standard deviation in raw units."""


@dataclass(frozen=True)
class Bands:
    """The ordered bands of an image `[B, C, H, W]`: channel c is `bands[c]`."""

    sensor: str
    """Name of the sensor preset, or "generic"."""
    unit: str
    """Unit of the raw values, for example "reflectance x 10000"."""
    bands: tuple[Band, ...]

    def __post_init__(self) -> None:
        """Refuse empty records, repeated names and statistics that cannot normalise anything."""
        if not self.bands:
            raise UserError(f"bands: sensor '{self.sensor}' was given no band; name at least one.")
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise UserError(f"bands.names: {listed(repeated)} given more than once; name every band once.")
        for band in self.bands:
            if not (math.isfinite(band.mean) and math.isfinite(band.std) and band.std > 0):
                raise UserError(
                    f"bands: band {band.name} has mean {band.mean} and std {band.std}; "
                    "the mean must be finite and the std above 0."
                )

    def __len__(self) -> int:
        """Return the number of bands C."""
        return len(self.bands)

    @property
    def names(self) -> tuple[str, ...]:
        """Band names in channel order."""
        return tuple(band.name for band in self.bands)

    @property
    def means(self) -> list[float]:
        """Mean per band, raw units."""
        return [band.mean for band in self.bands]

    @property
    def stds(self) -> list[float]:
        """Standard deviation per band, raw units."""
        return [band.std for band in self.bands]

    @property
    def wavelengths(self) -> list[float | None]:
        """Centre wavelength per band in micrometres."""
        return [band.wavelength for band in self.bands]

    @property
    def gsd(self) -> float | None:
        """Finest native gsd among the bands (m/px): the grid products are usually resampled to. None if unknown."""
        known = [band.gsd for band in self.bands if band.gsd is not None]
        return min(known) if known else None

    def index(self, names: Sequence[str]) -> list[int]:
        """Channel index of each named band.

        Raises:
            UserError: naming the bands that are not here, and those that are.
        """
        return match_names(names, self.names, f"sensor '{self.sensor}'")

    def select(self, names: Sequence[str]) -> "Bands":
        """Return the named bands, in the given order.

        Raises:
            UserError: naming the bands that are not here, and those that are.
        """
        return replace(self, bands=tuple(self.bands[i] for i in self.index(names)))

    def with_statistics(self, mean: Sequence[float], std: Sequence[float]) -> "Bands":
        """Return the same bands with other statistics, one value per band (raw units).

        Raises:
            UserError: if the number of values is not the number of bands, or a std is not above 0.
        """
        for argument, values in (("mean", mean), ("std", std)):
            if len(values) != len(self):
                raise UserError(
                    f"bands.{argument}: {len(values)} values for {len(self)} bands ({listed(self.names)}); "
                    "give one value per band."
                )
        pairs = zip(self.bands, mean, std, strict=True)
        return replace(self, bands=tuple(replace(band, mean=float(m), std=float(s)) for band, m, s in pairs))

    def with_wavelengths(self, wavelengths: Sequence[float]) -> "Bands":
        """Return the same bands with other centre wavelengths in micrometres, one value per band.

        Raises:
            UserError: if the number of values is not the number of bands, or one is no wavelength in micrometres.
        """
        check_wavelengths(wavelengths, self.names)
        pairs = zip(self.bands, wavelengths, strict=True)
        return replace(self, bands=tuple(replace(band, wavelength=float(value)) for band, value in pairs))

    @property
    def rgb(self) -> tuple[int, int, int]:
        """Channels to show as red, green, blue: nearest to 0.665, 0.560 and 0.490 um.

        Without three usable wavelengths the first three channels, and with fewer than three bands channel 0 thrice.
        """
        if len(self) < 3:
            return (0, 0, 0)
        nearest = [self._nearest(target) for target in _RGB_WAVELENGTHS]
        if None in nearest or len(set(nearest)) < 3:  # for example three infrared bands: any three tell more than one
            return (0, 1, 2)
        red, green, blue = nearest
        return (red, green, blue)  # type: ignore[return-value]

    @property
    def false_colour(self) -> tuple[int, int, int] | None:
        """Channels of the near infrared, red and green bands, or None where one of them is missing."""
        limits = ((_NIR_WAVELENGTH, 0.09), (_RGB_WAVELENGTHS[0], 0.045), (_RGB_WAVELENGTHS[1], 0.045))
        nearest = [self._nearest(target, within) for target, within in limits]
        if None in nearest:
            return None
        nir, red, green = nearest
        return (nir, red, green)  # type: ignore[return-value]

    def _nearest(self, target: float, within: float = math.inf) -> int | None:
        distances = [(abs(w - target), i) for i, w in enumerate(self.wavelengths) if w is not None]
        distance, index = min(distances, default=(math.inf, -1))
        return index if index >= 0 and distance <= within else None

    def difference(self, other: "Bands") -> str:
        """Say how `other` differs in sensor or bands; "" if sensor and names (in order) are the same."""
        parts = []
        if self.sensor != other.sensor:
            parts.append(f"sensor {self.sensor} against {other.sensor}")
        missing = [name for name in self.names if name not in other.names]
        extra = [name for name in other.names if name not in self.names]
        if missing:
            parts.append(f"missing {listed(missing)}")
        if extra:
            parts.append(f"additional {listed(extra)}")
        if not missing and not extra and self.names != other.names:
            parts.append(f"order {listed(self.names)} against {listed(other.names)}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, object]:
        """Plain types only, so a checkpoint that holds it opens with `weights_only=True`."""
        return {"sensor": self.sensor, "unit": self.unit, "bands": [asdict(band) for band in self.bands]}

    @classmethod
    def from_dict(cls, record: Mapping[str, object]) -> "Bands":
        """Inverse of `to_dict`.

        Raises:
            UserError: if the record was not written by `to_dict`.
        """
        try:
            bands = tuple(Band(**band) for band in record["bands"])  # type: ignore[attr-defined]
            return cls(sensor=str(record["sensor"]), unit=str(record["unit"]), bands=bands)
        except (KeyError, TypeError) as error:
            raise UserError(f"bands: not a band record ({error}); expected the keys sensor, unit and bands.") from None


def generic(n: int, names: Sequence[str] | None = None) -> Bands:
    """Record of n bands about which nothing is known: mean 0 and std 1, names band1..bandn unless given.

    Raises:
        UserError: if n is not at least 1.
    """
    if n < 1:
        raise UserError(f"bands: {n} bands asked for; at least 1 is needed.")
    labels = names if names is not None else [f"band{i + 1}" for i in range(n)]
    return Bands("generic", "unknown", tuple(Band(name, None, None, 0.0, 1.0) for name in labels))


def _preset(sensor: str, unit: str, rows: tuple[sensors.Row, ...]) -> Bands:
    return Bands(sensor, unit, tuple(Band(*row) for row in rows))


_REFLECTANCE = "reflectance x 10000"
_L1C = _preset("sentinel2_l1c", _REFLECTANCE, sensors.SENTINEL2_L1C)
_ENMAP = _preset("enmap", _REFLECTANCE, sensors.ENMAP)

SENSORS: dict[str, Bands] = {
    preset.sensor: preset
    for preset in (
        _L1C,
        replace(_L1C, sensor="sentinel2_l1c_12", bands=tuple(band for band in _L1C.bands if band.name != "B10")),
        _preset("sentinel2_l2a", _REFLECTANCE, sensors.SENTINEL2_L2A),
        replace(_L1C.select(sensors.SENTINEL2_10), sensor="sentinel2_10"),
        replace(_L1C.select(("B04", "B03", "B02")), sensor="sentinel2_rgb"),
        _preset("landsat8", "Collection 2 Level-1 digital number", sensors.LANDSAT_L1),
        _preset("landsat9", "Collection 2 Level-1 digital number", sensors.LANDSAT_L1),
        _preset("landsat8_sr", "Collection 2 Level-2 digital number", sensors.LANDSAT_SR),
        _preset("landsat9_sr", "Collection 2 Level-2 digital number", sensors.LANDSAT_SR),
        _preset("naip", "uint8", sensors.NAIP),
        _preset("planet", _REFLECTANCE, sensors.PLANET),
        _preset("venus", _REFLECTANCE, sensors.VENUS),
        _preset("rgb", "uint8", sensors.RGB),
        _preset("fmow_rgb", "uint8", sensors.FMOW_RGB),
        _ENMAP,
        replace(_ENMAP.select(sensors.ENMAP_202), sensor="enmap_202"),
    )
}
"""Sensor presets by name; `data.sensors` holds the tables and says where their statistics come from."""


@dataclass
class BandSelection:
    """Which bands to read, their statistics and wavelengths."""

    sensor: str = "sentinel2_l1c"
    """Sensor preset: its band names, wavelengths, gsd and default statistics. "generic" takes `names` or a `count`."""
    names: list[str] | None = None
    """Bands to use, by name and in this order; all bands of the sensor if null."""
    mean: list[float] | None = None
    """Mean per chosen band in raw units; the preset's if null."""
    std: list[float] | None = None
    """Standard deviation per chosen band in raw units; the preset's if null."""
    count: int | None = None
    """Number of bands of a "generic" sensor whose bands have no names: band1, band2, ..."""
    wavelengths: list[float] | None = None
    """Centre wavelength per chosen band in micrometres; the preset's if null."""

    def resolve(self) -> Bands:
        """Return the band record this selection describes.

        Raises:
            UserError: unknown sensor, unknown band name, or count, statistics or wavelengths that do not fit.
        """
        bands = self._chosen()
        if (self.mean is None) != (self.std is None):
            given, missing = ("mean", "std") if self.std is None else ("std", "mean")
            raise UserError(f"bands.{missing}: missing although bands.{given} is given; give both or neither.")
        if self.mean is not None and self.std is not None:
            bands = bands.with_statistics(self.mean, self.std)
        return bands if self.wavelengths is None else bands.with_wavelengths(self.wavelengths)

    def _chosen(self) -> Bands:
        if self.sensor == "generic":
            if self.count is not None and self.names:
                raise UserError(
                    f"bands.count: {self.count} and also {len(self.names)} bands.names; give one of the two."
                )
            if self.count is None and not self.names:
                raise UserError("bands.names: sensor 'generic' needs names, for example [red, nir], or bands.count.")
            return generic(len(self.names) if self.names else self.count or 0, self.names)
        if self.sensor not in SENSORS:
            raise UserError(f"bands.sensor: '{self.sensor}' is unknown; choose from generic, {', '.join(SENSORS)}.")
        preset = SENSORS[self.sensor]
        if self.count is not None:
            raise UserError(
                f"bands.count: {self.count} is for sensor 'generic'; '{self.sensor}' has its own {len(preset)} bands, "
                "of which bands.names chooses."
            )
        return preset if self.names is None else preset.select(self.names)

    def file_orders(self) -> list[tuple[str, ...]]:
        """Band orders in which files that name no bands may be taken to hold them, one per possible band count.

        None for Sentinel-2, whose bands are stacked in several orders (EuroSAT's end with B8A): there it must be said.
        """
        if self.sensor == "generic":
            return [self.resolve().names]
        if self.sensor.startswith("sentinel2"):
            return []
        product = "enmap" if self.sensor.startswith("enmap") else self.sensor
        return [SENSORS[product].names, SENSORS[self.sensor].names]
