"""Statistics of bands over a data set in one pass: mean, deviation, range, percentiles, share without data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xscale_lightning.data.band_names import band_key
from xscale_lightning.data.bands import SENSORS, Bands

PERCENTILES = (1.0, 50.0, 99.0)
KEPT_VALUES = 2**24  # over all bands; 64 MB in float32
# A band fits a preset when its mean lies within so many of the preset's deviations, its deviation within this factor.
FITTING_MEAN, FITTING_STD = 2.0, 10.0


@dataclass(frozen=True)
class BandFigures:
    """What was measured of one band, in raw units."""

    count: int
    """Pixels with data."""
    without: int
    """Pixels without data."""
    mean: float
    """Mean; NaN without any data, as all that follow."""
    std: float
    """Standard deviation, of the population (divided by the count)."""
    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    percentiles: tuple[float, ...]
    """Values below which `PERCENTILES` of the pixels lie; see `BandStatistics` for how exact they are."""

    @property
    def empty_share(self) -> float:
        """Share of the pixels that has no data, in [0, 1]."""
        return self.without / max(self.count + self.without, 1)


class BandStatistics:
    """Statistics of `bands` bands, batch by batch, in float64.

    Mean and deviation are exact: batches are merged by the formulas of Chan, Golub and LeVeque (1983), which lose no
    digits where the mean is large beside the deviation. Percentiles are exact as long as a band has no more than
    `limit` values; of more, every second, fourth, eighth ... value is kept, evenly over the whole data set.

    Args:
        bands: number of bands C.
        limit: values kept per band for the percentiles; null: 16.8 million over all bands.
    """

    def __init__(self, bands: int, limit: int | None = None) -> None:
        self.limit = max(2, KEPT_VALUES // bands if limit is None else limit)
        self._count = np.zeros(bands, np.int64)
        self._without = np.zeros(bands, np.int64)
        self._mean, self._squares = np.zeros(bands), np.zeros(bands)
        self._low, self._high = np.full(bands, np.inf), np.full(bands, -np.inf)
        self._kept = [_Thinned(self.limit) for _ in range(bands)]

    def update(self, images: np.ndarray, valid: np.ndarray | None = None) -> None:
        """Take in a batch.

        Args:
            images: `[B, C, H, W]` in raw units; values that are not finite count as without data.
            valid: bool, `[B, H, W]` or `[B, C, H, W]`: which pixels have data; null: all.
        """
        for band in range(images.shape[1]):
            plane = images[:, band]
            good = np.isfinite(plane)
            if valid is not None:
                good &= valid if valid.ndim == 3 else valid[:, band]
            values = plane[good].astype(np.float64)
            self._without[band] += good.size - values.size
            if values.size:
                self._merge(band, values)

    def _merge(self, band: int, values: np.ndarray) -> None:
        count, mean = values.size, values.mean()
        squares, total = np.square(values - mean).sum(), self._count[band] + values.size
        step = mean - self._mean[band]
        self._squares[band] += squares + step * step * (self._count[band] * count / total)
        self._mean[band] += step * (count / total)
        self._count[band] = total
        self._low[band] = min(self._low[band], values.min())
        self._high[band] = max(self._high[band], values.max())
        self._kept[band].add(values.astype(np.float32))

    @property
    def exact_percentiles(self) -> bool:
        """Whether the percentiles are of all values."""
        return all(kept.step == 1 for kept in self._kept)

    def figures(self) -> list[BandFigures]:
        """What was measured, band by band."""
        found, nan = [], math.nan
        for band, count in enumerate(self._count.tolist()):
            without = int(self._without[band])
            if not count:
                found.append(BandFigures(0, without, nan, nan, nan, nan, (nan,) * len(PERCENTILES)))
                continue
            shares = np.percentile(self._kept[band].values().astype(np.float64), PERCENTILES)
            std = math.sqrt(self._squares[band] / count)
            figures = (float(self._mean[band]), std, float(self._low[band]), float(self._high[band]))
            found.append(BandFigures(count, without, *figures, tuple(shares.tolist())))
        return found


class _Thinned:
    """At most `limit` values, evenly from all that came: every `step`-th one."""

    def __init__(self, limit: int) -> None:
        self.limit, self.step = limit, 1
        self._seen = 0
        self._parts: list[np.ndarray] = []
        self._held = 0

    def add(self, values: np.ndarray) -> None:
        chosen = values[-self._seen % self.step :: self.step]
        self._seen += len(values)
        self._parts.append(chosen)
        self._held += len(chosen)
        while self._held > self.limit:
            self._parts, self.step = [self.values()[::2]], self.step * 2
            self._held = len(self._parts[0])

    def values(self) -> np.ndarray:
        return np.concatenate(self._parts)


def misfits(bands: Bands, figures: Sequence[BandFigures]) -> list[str]:
    """Names of the bands whose figures are far from the statistics of `bands`."""
    return [b.name for b, found in zip(bands.bands, figures, strict=True) if not _fits(b.mean, b.std, found)]


def _fits(mean: float, std: float, found: BandFigures) -> bool:
    near = abs(found.mean - mean) <= FITTING_MEAN * std
    return near and std / FITTING_STD <= found.std <= std * FITTING_STD


def fitting_presets(bands: Bands, figures: Sequence[BandFigures]) -> list[str]:
    """Sensor presets that have these bands, by name, and whose statistics fit; the nearest first.

    Bands without names (`band1` ...) are compared in order with the presets that have as many.
    """
    numbered = all(name == f"band{i + 1}" for i, name in enumerate(bands.names))
    found = []
    for sensor, preset in SENSORS.items():
        known = {band_key(name) for name in preset.names}
        if numbered and len(preset) == len(bands):
            candidate = preset
        elif not numbered and all(band_key(name) in known for name in bands.names):
            candidate = preset.select(bands.names)
        else:
            continue
        if not misfits(candidate, figures):
            distance = [abs(f.mean - b.mean) / b.std for b, f in zip(candidate.bands, figures, strict=True)]
            found.append((sum(distance) / len(distance), sensor))
    return [sensor for _, sensor in sorted(found)]
