"""Aerial images with Sentinel-2 time series: one centre, the chosen day, and what is left out or refused."""

import sys

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin

from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.treesat import MR_BANDS, TreeSatPairs, choose, day_of_year
from xscale_lightning.errors import UserError

h5py = pytest.importorskip("h5py")
DAYS = ("20200115", "20200602", "20200703", "20200720")
CLOUD = (0.0, 0.0, 90.0, 3.0)


def series(folder, name, days=DAYS, cloud=CLOUD, channels=2, bands=10):
    """Value of a pixel: 100 * day + band + row / 10 + column / 100."""
    folder.mkdir(parents=True, exist_ok=True)
    row, col = np.mgrid[:6, :6]
    values = 100 * np.arange(len(days))[:, None, None, None] + np.arange(bands)[:, None, None] + row / 10 + col / 100
    masks = np.zeros((len(days), channels, 6, 6), np.float32)
    masks[:, 1] = np.array(cloud)[:, None, None]
    with h5py.File(folder / f"{name}.h5", "w") as file:
        file["sen-2-data"], file["sen-2-masks"] = values.astype(np.float32), masks
        names = [f"S2A_MSIL2A_{day}T102421_N0213_R065_T32UNC_20200102T115419" for day in days]
        file.create_dataset("sen-2-products", data=names, dtype=h5py.string_dtype())


def aerial(folder, name, left=565642.6, crs="EPSG:32632"):
    folder.mkdir(parents=True, exist_ok=True)
    values = np.stack([np.add.outer(np.arange(304), np.arange(304)) % 200 + band for band in range(4)]).astype(np.uint8)
    place = {"transform": from_origin(left, 5770980.4, 0.2, 0.2), "crs": crs} if crs else {}
    with rasterio.open(folder / f"{name}.tif", "w", "GTiff", 304, 304, 4, dtype="uint8", **place) as file:
        file.write(values)
    return values


def spots(root, count=4):
    for i in range(count):
        name = f"{'Betula_spec.' if i == 1 else 'Abies_alba'}_1_{i}_WEFL_NLF"
        series(root / "sentinel-ts", name + ("_2020" if i % 2 else ""))
        values = aerial(root / "aerial", name, 565642.6 + 1000 * i)
    return values


def pairs(root, **options):
    options = {"fractions": (0.5, 0.5, 0.0), "samples_per_epoch": 4, "batch_size": 2, "num_workers": 0} | options
    return TreeSatPairs(str(root), **options)


def test_both_have_one_centre(tmp_path):
    values = spots(tmp_path)
    data = pairs(tmp_path)
    data.setup("fit")
    assert len(data.scenes) == 4 and data.ratio == 50 and data.image_size_hr == (300, 300)
    for batch in [*data.train_dataloader(), *data.val_dataloader()]:
        assert batch["image"].shape[1:] == (10, 6, 6) and batch["image_hr"].shape[1:] == (4, 300, 300)
        assert torch.allclose(batch["gsd_hr"], torch.tensor(0.2)) and (batch["gsd"] == 10).all()
        for image in batch["image_hr"].numpy():
            assert np.array_equal(image, values[:, 2:302, 2:302].astype(np.float32))
        row, col = np.mgrid[:6, :6]
        assert np.allclose(batch["image"][0, 3], 3 + row / 10 + col / 100)  # the first of the clear days


def test_bands_by_name_and_parts_of_an_image(tmp_path):
    spots(tmp_path)
    bands, bands_hr = BandSelection("sentinel2_l2a", names=["B08", "B02"]), BandSelection("generic", names=["R"])
    data = pairs(tmp_path, bands=bands, bands_hr=bands_hr, image_size=3)
    data.setup("fit")
    for batch in data.train_dataloader():
        assert batch["image_hr"].shape[1:] == (1, 150, 150)
        for image, (_, row, col) in zip(batch["image"], batch["origin"].tolist(), strict=True):
            assert np.allclose(image[:, 0, 0], np.array([MR_BANDS.index("B08"), 0]) + row / 10 + col / 100)
    with pytest.raises(UserError, match="B01"):
        pairs(tmp_path, bands=BandSelection("sentinel2_l2a", names=["B01"])).setup("fit")


def test_acquisitions_are_chosen_by_cloud_and_day():
    chances = np.zeros((4, 2, 6, 6))
    chances[:, 1] = np.array(CLOUD)[:, None, None]
    products = [f"S2A_MSIL2A_{day}T102421" for day in DAYS]
    assert choose(chances, products, None, 1, 0.05) == [0]
    assert choose(chances, products, None, 3, 0.05) == [0, 1, 3]
    assert choose(chances, products, day_of_year("07-01"), 2, 0.05) == [3, 1]
    assert choose(chances, products, day_of_year("2019-12-20"), 1, 0.05) == [0]  # 26 days, over the turn of the year
    assert choose(chances, products, day_of_year("07-01"), 1, 1.0) == [2]
    chances[:, 0, :3] = 40  # half of the pixels are snow
    with pytest.raises(ValueError, match=r"none of 4 acquisitions has at most 5% .* the clearest 20%"):
        choose(chances, products, None, 1, 0.05)


def test_the_median_of_several(tmp_path):
    spots(tmp_path)
    data = pairs(tmp_path, date="06-20", acquisitions=3)
    data.setup("fit")
    image = next(iter(data.val_dataloader()))["image"]
    assert np.allclose(image[0, 0, 0, 0], 100)  # days 0, 1 and 3


def test_what_cannot_be_used_is_counted_or_stops(tmp_path, caplog):
    spots(tmp_path)
    folder = tmp_path / "sentinel-ts"
    series(folder, "Betula_1_9_NLF")  # no aerial image
    series(folder, "Abies_alba_1_7_WEFL_NLF", cloud=(50.0,) * 4)
    aerial(tmp_path / "aerial", "Abies_alba_1_7_WEFL_NLF", 575642.6)
    series(folder, "Abies_alba_1_8_WEFL_NLF", bands=9)
    (folder / "Abies_alba_1_6_WEFL_NLF.h5").write_bytes(b"no HDF5")
    data = pairs(tmp_path)
    data.setup("fit")
    assert len(data.scenes) == 4 and data.missing_hr == 1
    assert "1 of 6 MR images have no HR image and are left out: Betula_1_9_NLF" in caplog.text
    reasons = " ".join(data.left_out.values())
    assert "the clearest 50%" in reasons and "[4, 9, 6, 6] instead of [4, 10, 6, 6]" in reasons
    with pytest.raises(UserError, match=r"1 of 6 MR images have no HR image \(Betula_1_9_NLF\)"):
        pairs(tmp_path, on_missing="stop").setup("fit")
    with pytest.raises(UserError, match=r"Abies_alba_1_6_WEFL_NLF\.h5: cannot be read as a time series"):
        pairs(tmp_path, on_error="stop").setup("fit")


def test_masks_with_empty_channels(tmp_path):
    """Some published files have ten mask channels, eight of them empty."""
    for i in range(2):
        series(tmp_path / "sentinel-ts", f"a_{i}_NLF", cloud=(60.0, 60.0, 60.0, 0.0), channels=10)
        aerial(tmp_path / "aerial", f"a_{i}_NLF", 565642.6 + 1000 * i)
    data = pairs(tmp_path)
    data.setup("fit")
    assert next(iter(data.val_dataloader()))["image"].min() >= 300


def test_wrong_arguments_and_a_missing_package(tmp_path, monkeypatch):
    for argument, value in (("date", "31-12"), ("acquisitions", 0), ("max_cloud", 2.0)):
        with pytest.raises(UserError, match=rf"data\.{argument}: "):
            pairs(tmp_path, **{argument: value})
    with pytest.raises(UserError, match=r"data\.root: folder '.*nowhere' does not exist"):
        pairs(tmp_path / "nowhere").setup("fit")
    spots(tmp_path)
    with pytest.raises(UserError, match=r"data\.image_size"):
        pairs(tmp_path, image_size=7).setup("fit")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"package h5py; pip install"):
        pairs(tmp_path).setup("fit")
