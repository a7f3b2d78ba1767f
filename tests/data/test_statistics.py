"""One pass over a data set gives the statistics that numpy gives of all of it."""

import math

import numpy as np
import pytest

from xscale_lightning.data.bands import SENSORS, generic
from xscale_lightning.data.statistics import PERCENTILES, BandFigures, BandStatistics, fitting_presets, misfits


def measured(images: np.ndarray, sizes: list[int], valid: np.ndarray | None = None, **options) -> BandStatistics:
    statistics, start = BandStatistics(images.shape[1], **options), 0
    for size in sizes:
        part = slice(start, start + size)
        statistics.update(images[part], None if valid is None else valid[part])
        start += size
    return statistics


@pytest.fixture
def images() -> np.ndarray:
    """Means that are large beside the deviations, where a sum of squares would lose digits."""
    noise = np.random.default_rng(0).standard_normal((12, 3, 9, 7))
    return (noise * np.array([3.0, 0.01, 900.0])[:, None, None] + np.array([2e4, 5e3, -3.0])[:, None, None]).astype(
        "f4"
    )


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 6, 1]])
def test_figures_are_numpys_whatever_the_batches(images, sizes):
    statistics = measured(images, sizes)
    assert statistics.exact_percentiles
    for band, found in enumerate(statistics.figures()):
        values = images[:, band].astype(np.float64)
        assert found.mean == pytest.approx(values.mean(), rel=1e-12)
        assert found.std == pytest.approx(values.std(), rel=1e-9)
        assert (found.low, found.high, found.count, found.without) == (values.min(), values.max(), values.size, 0)
        assert found.percentiles == pytest.approx(np.percentile(values, PERCENTILES), rel=1e-12)


def test_pixels_without_data_do_not_count(images):
    valid = np.random.default_rng(1).random((12, 9, 7)) > 0.3
    holes = images.copy()
    holes[0, 1, 0, :3] = [np.nan, np.inf, -np.inf]
    found = measured(holes, [7, 5], valid).figures()
    for band in range(3):
        kept = images[:, band][valid & np.isfinite(holes[:, band])].astype(np.float64)
        assert found[band].mean == pytest.approx(kept.mean(), rel=1e-12)
        assert found[band].std == pytest.approx(kept.std(), rel=1e-9)
        assert found[band].empty_share == pytest.approx(1 - kept.size / valid.size)
    per_band = np.broadcast_to(valid[:, None], images.shape).copy()
    per_band[:, 2] = False
    assert measured(images, [12], per_band).figures()[2].count == 0


def test_a_band_without_data_has_no_figures(images):
    found = measured(images, [12], np.zeros((12, 9, 7), bool)).figures()[0]
    assert found.count == 0 and found.empty_share == 1 and math.isnan(found.mean)


def test_percentiles_of_much_data_come_from_an_even_part_of_it():
    values = np.arange(100_000, dtype=np.float32).reshape(100, 1, 25, 40)  # sorted: an uneven part would show
    statistics = measured(values, [7] * 14 + [2], limit=1000)
    (found,) = statistics.figures()
    assert not statistics.exact_percentiles
    assert found.percentiles == pytest.approx([1000, 50_000, 99_000], abs=200)
    assert found.mean == pytest.approx(49_999.5, rel=1e-12) and found.high == 99_999


def figures_like(bands, shift: float = 0.0) -> list[BandFigures]:
    return [BandFigures(9, 0, b.mean + shift * b.std, b.std, 0.0, 1.0, (0.0, 0.0, 0.0)) for b in bands.bands]


def test_presets_are_suggested_by_names_and_figures():
    landsat = SENSORS["landsat8_sr"]
    assert misfits(landsat, figures_like(landsat)) == []
    assert misfits(landsat, figures_like(landsat, 3.0)) == list(landsat.names)
    assert fitting_presets(landsat, figures_like(landsat))[0] == "landsat8_sr"
    assert fitting_presets(generic(len(landsat)), figures_like(landsat))[0] == "landsat8_sr"
    chosen = landsat.select(["B4", "B5"])
    assert fitting_presets(generic(2, ["SR_B4", "SR_B5"]), figures_like(chosen))[0].startswith("landsat")
    assert fitting_presets(generic(2, ["x", "y"]), figures_like(chosen)) == []
