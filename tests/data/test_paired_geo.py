"""Pairs from two GeoDatasets: the ground to 1e-5, ratios, tiles without HR, times, splits, and what is refused."""

import logging
import types
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin
from torch.nn.functional import avg_pool2d
from torchgeo.datasets import NonGeoDataset, RasterDataset

from xscale_lightning.callbacks import alignment
from xscale_lightning.callbacks.alignment import PairAlignment
from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.paired_geo import PairedGeo
from xscale_lightning.errors import UserError

TOP = 5000000.0
LEFT = 300000.0
PERIODS = ((70.0, 110.0), (130.0, 50.0))  # metres along x and y, one pair a band


class Coarse(RasterDataset):
    filename_glob = "*.tif"
    filename_regex = r".*?(?P<date>\d{8}).tif"
    all_bands = ("A", "B")


class Fine(Coarse):
    all_bands = ("B", "A")


class Nameless(RasterDataset):
    filename_glob = "*.tif"


def averaged_sine(start, step, count, period):
    """Exact mean of sin(2 pi x / period) over each of `count` pixels."""
    edges = 2 * np.pi / period * (start + step * np.arange(count + 1))
    return np.diff(-np.cos(edges)) / np.diff(edges)


def ground(height, width, gsd, left=LEFT, top=TOP):
    """Area means of a function that is known everywhere, so any grid shows the same ground."""
    return np.stack(
        [
            np.outer(averaged_sine(TOP - top, gsd, height, py), averaged_sine(left - LEFT, gsd, width, px))
            for px, py in PERIODS
        ]
    ).astype(np.float32)


def write(path, array, gsd, left=LEFT, top=TOP, crs="EPSG:32632", **profile):
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = array.shape
    place = {"crs": crs, "transform": from_origin(left, top, gsd, gsd)}
    with rasterio.open(path, "w", "GTiff", width, height, count, dtype=array.dtype, **place, **profile) as file:
        file.write(array)


def tile(root, name="a_20200601", size=60, ratio=Fraction(2), gsd=10.0, dx=0.0, shift=0.0, hr=True):
    """An MR tile at `dx` metres and its HR tile, whose bands come in the other order; HR's content may be shifted."""
    write(root / "mr" / f"{name}.tif", ground(size, size, gsd, LEFT + dx), gsd, LEFT + dx)
    if hr:
        side, fine = int(size * ratio), gsd / float(ratio)
        values = ground(side, side, fine, LEFT + dx, TOP + shift * fine)[::-1]
        write(root / "hr" / f"{name}.tif", np.ascontiguousarray(values), fine, LEFT + dx)


def pairs(base, **options):
    options = {"image_size": 12, "samples_per_epoch": 16, "batch_size": 8, "num_workers": 0} | options
    selection = BandSelection("generic", names=["A", "B"], mean=[0.0, 0.0], std=[1.0, 1.0])
    return PairedGeo(
        **{"dataset": Coarse, "dataset_hr": Fine, "root": str(base / "mr"), "root_hr": str(base / "hr")}
        | {"bands": selection, "bands_hr": selection}
        | options
    )


def batches(data):
    data.setup("fit")
    return [*data.train_dataloader(), *data.val_dataloader(), *data.probe_dataloader("train")]


@pytest.mark.parametrize("cache_mb", [0, 100])
@pytest.mark.parametrize("ratio", [Fraction(2), Fraction(10, 3)])
def test_both_show_the_same_ground_to_a_hundred_thousandth(tmp_path, ratio, cache_mb):
    """Both are area means of one function of the coordinates, so whole blocks of the two must agree."""
    tile(tmp_path, ratio=ratio)
    data = pairs(tmp_path, cache_mb=cache_mb)
    unit, size = ratio.denominator, int(12 * ratio)
    for batch in batches(data):
        assert batch["image_hr"].shape[1:] == (2, size, size)
        assert torch.allclose(batch["gsd_hr"], torch.tensor(10 / float(ratio))) and (batch["gsd"] == 10).all()
        coarse, fine = avg_pool2d(batch["image"], unit), avg_pool2d(batch["image_hr"], ratio.numerator)
        assert (coarse - fine).abs().max() < 1e-5
        for image, hr, (_, row, col) in zip(batch["image"], batch["image_hr"], batch["origin"].tolist(), strict=True):
            place = {"left": LEFT + 10 * col, "top": TOP - 10 * row}
            assert np.abs(image.numpy() - ground(12, 12, 10.0, **place)).max() < 1e-5
            assert np.abs(hr.numpy() - ground(size, size, 10 / float(ratio), **place)).max() < 1e-5
    assert data.ratio == ratio and data.image_size_hr == (size, size) and data.name == "coarse_fine"


def measure(data, monkeypatch):
    """What the alignment check of a run finds."""
    data.setup("fit")
    monkeypatch.setattr(alignment, "held_out_loader", lambda trainer: data.val_dataloader())
    monkeypatch.setattr(alignment, "evaluation_split", lambda trainer: "val")
    monkeypatch.setattr(alignment, "publish_picture", lambda *_, **__: True)
    callback = PairAlignment(action="stop")
    callback.probe(SimpleNamespace(datamodule=data), SimpleNamespace())
    return callback.found


@pytest.mark.parametrize("ratio", [Fraction(2), Fraction(10, 3)])
def test_hr_shifted_by_one_pixel_fires(tmp_path, monkeypatch, ratio):
    tile(tmp_path / "good", size=96, ratio=ratio)
    found = measure(pairs(tmp_path / "good", image_size=24, fractions=(0.5, 0.5, 0.0)), monkeypatch)
    assert found.pixels < 0.25
    tile(tmp_path / "bad", size=96, ratio=ratio, shift=1.0)
    with pytest.raises(UserError, match=r"HR lies \+[01]\.\d\d rows and [+-]0\.\d\d columns of HR .* beside MR"):
        measure(pairs(tmp_path / "bad", image_size=24, fractions=(0.5, 0.5, 0.0)), monkeypatch)


def test_neighbouring_tiles_and_workers(tmp_path):
    """Windows at the border of two tiles, read by another process."""
    for i in range(2):
        tile(tmp_path, f"t{i}_20200601", size=48, dx=480.0 * i)
    data = pairs(tmp_path, num_workers=1, cache_mb=0, fractions=(1.0, 0.0, 0.0), eval_stride=12)
    data.setup("fit")
    seen = [batch for batch in data.probe_dataloader("train")]
    assert sum(len(batch["image"]) for batch in seen) == 2 * 16
    for batch in seen:
        assert (batch["image"] - avg_pool2d(batch["image_hr"], 2)).abs().max() < 1e-5


def test_half_a_pixel_needs_leave_and_keeps_the_ground(tmp_path):
    """Landsat's panchromatic band starts half a pixel outside."""
    write(tmp_path / "mr" / "a_20200601.tif", ground(60, 60, 30.0), 30.0)
    place = {"left": LEFT - 7.5, "top": TOP + 7.5}
    write(
        tmp_path / "hr" / "a_20200601.tif", np.ascontiguousarray(ground(122, 122, 15.0, **place)[::-1]), 15.0, **place
    )
    with pytest.raises(UserError, match=r"pixel edges lie 0\.5 HR pixels beside.*data\.resample: true"):
        pairs(tmp_path).setup("fit")
    periods = 2 * np.pi * 7.5 / min(min(pair) for pair in PERIODS)
    for batch in batches(pairs(tmp_path, resample=True)):
        fine = avg_pool2d(batch["image_hr"], 2)[..., 1:-1, 1:-1]
        # What linear interpolation between area means loses of such short waves.
        assert (batch["image"][..., 1:-1, 1:-1] - fine).abs().max() < periods**2


def test_tiles_without_hr_are_counted_or_stop(tmp_path, caplog):
    for i in range(3):
        tile(tmp_path, f"t{i}_20200601", size=48, dx=1000.0 * i, hr=i != 1)
    data = pairs(tmp_path)
    data.setup("fit")
    assert data.missing_hr == 1 and len(data.scenes) == 2
    assert "1 of 3 MR images have no HR image and are left out" in caplog.text
    with pytest.raises(UserError, match=r"data\.on_missing: 1 of 3 MR images have no HR image \(.*t1_20200601\.tif\)"):
        pairs(tmp_path, on_missing="stop").setup("fit")


def test_an_overlap_smaller_than_a_crop_counts_as_missing(tmp_path, caplog):
    tile(tmp_path, "t0_20200601", size=48)
    tile(tmp_path, "t1_20200601", size=48, dx=430.0, hr=False)  # shares five pixels with the first HR tile
    data = pairs(tmp_path, on_error="stop")
    data.setup("fit")
    assert data.missing_hr == 1 and len(data.scenes) == 1
    with pytest.raises(UserError, match=r"1 of 2 MR images have no HR image"):
        pairs(tmp_path, on_missing="stop").setup("fit")


def test_times_are_matched(tmp_path):
    tile(tmp_path, "a_20200601", size=48)
    tile(tmp_path, "b_20210601", size=48, dx=1000.0)
    (tmp_path / "hr" / "b_20210601.tif").rename(tmp_path / "hr" / "b_20210610.tif")
    assert len(pairs(tmp_path, days=10).scenes) == 2 and len(pairs(tmp_path).scenes) == 2
    near = pairs(tmp_path, days=5)
    assert len(near.scenes) == 1 and near.missing_hr == 1


def test_splits_share_no_ground(tmp_path):
    """Two dates of one place, and neighbours that overlap it."""
    for i, (name, dx) in enumerate([("a_20200601", 0.0), ("a_20210601", 0.0), ("b_20200601", 2000.0)]):
        tile(tmp_path, f"{i}{name}", size=72, dx=dx)
    data = pairs(tmp_path, days=0.5, fractions=(0.6, 0.2, 0.2), samples_per_epoch=200)
    data.setup("fit")
    cells = {}
    for split in ("train", "val", "test"):
        loader = data.train_dataloader() if split == "train" else data.probe_dataloader(split)
        origins = torch.cat([batch["origin"] for batch in loader]).tolist()
        corner = [data.scenes[scene].grid.left // 10 for scene, _, _ in origins]
        cells[split] = {
            (x + col + i, row + j)
            for x, (_, row, col) in zip(corner, origins, strict=True)
            for i in range(12)
            for j in range(12)
        }
    assert all(cells.values())
    assert not (cells["train"] & cells["val"] or cells["train"] & cells["test"] or cells["val"] & cells["test"])


def test_no_ground_and_other_systems_are_refused_with_the_amount(tmp_path):
    tile(tmp_path)
    write(tmp_path / "far" / "a_20200601.tif", ground(120, 120, 5.0), 5.0, left=LEFT + 900)
    with pytest.raises(UserError, match=r"none of the 1 HR images .* the nearest two lie 300 m apart"):
        pairs(tmp_path, root_hr=str(tmp_path / "far")).setup("fit")
    write(tmp_path / "zone" / "a_20200601.tif", ground(120, 120, 5.0), 5.0, crs="EPSG:32633")
    with pytest.raises(UserError, match=r"HR is in EPSG:32633, MR in EPSG:32632; warp"):
        pairs(tmp_path, root_hr=str(tmp_path / "zone")).setup("fit")
    write(tmp_path / "odd" / "a_20200601.tif", ground(200, 200, 4.0), 4.0)
    with pytest.raises(UserError, match=r"25 pixels are|HR has 2\.5 pixels along one MR pixel, and 2 are asked for"):
        pairs(tmp_path, root_hr=str(tmp_path / "odd"), ratio=2).setup("fit")
    with pytest.raises(UserError, match=r"data\.image_size: 11 MR pixels are 27\.5 HR pixels"):
        pairs(tmp_path, root_hr=str(tmp_path / "odd"), image_size=11).setup("fit")
    with pytest.raises(UserError, match=r"HR is coarser than MR \(2 times\)"):
        pairs(tmp_path, root=str(tmp_path / "hr"), root_hr=str(tmp_path / "mr")).setup("fit")


def test_bands_and_folders_are_checked(tmp_path):
    tile(tmp_path)
    with pytest.raises(UserError, match=r"coarse.*B12|B12.*coarse"):
        pairs(tmp_path, bands=BandSelection("sentinel2_l2a", names=["B12"])).setup("fit")
    with pytest.raises(UserError, match=r"data\.channels: nameless delivers 2 channels, but 1 are named"):
        pairs(tmp_path, dataset=Nameless, channels=["A"], bands=BandSelection("generic", names=["A"])).setup("fit")
    with pytest.raises(UserError, match=r"data\.root_hr: folder '.*nowhere' does not exist"):
        pairs(tmp_path, root_hr=str(tmp_path / "nowhere")).setup("fit")
    with pytest.raises(UserError, match=r"data\.days: -1 is not possible"):
        pairs(tmp_path, days=-1)
    plain = types.new_class("Plain", (NonGeoDataset,), exec_body=lambda body: body.update(__len__=lambda self: 1))
    plain.__getitem__ = lambda self, index: {}
    plain.__abstractmethods__ = frozenset()
    with pytest.raises(UserError, match=r"plain is no GeoDataset"):
        pairs(tmp_path, dataset=plain, root=None).setup("fit")


def test_nameless_channels_and_paths_of_the_dataset(tmp_path):
    tile(tmp_path)
    data = pairs(
        tmp_path,
        dataset=partial(Nameless, paths=str(tmp_path / "mr" / "a_20200601.tif")),
        root=None,
        channels=["A", "B"],
        bands=BandSelection("generic", names=["B"]),
    )
    for batch in batches(data):
        assert (batch["image"][:, 0] - avg_pool2d(batch["image_hr"], 2)[:, 1]).abs().max() < 1e-5


def test_no_data_is_avoided(tmp_path, caplog):
    tile(tmp_path, size=72)
    path = tmp_path / "hr" / "a_20200601.tif"
    with rasterio.open(path) as file:
        values = file.read()
    values[:, :, :70] = -9.0
    write(path, values, 5.0, nodata=-9.0)
    with caplog.at_level(logging.INFO):
        for batch in batches(pairs(tmp_path, max_nodata=0.0)):
            assert (batch["image_hr"] > -2).all() and (batch["origin"][:, 2] >= 35).all()
