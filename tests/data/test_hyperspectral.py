"""Scenes with hundreds of bands in files that do not name them: order, splits of small tiles, no data, empty bands."""

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin

from xscale_lightning.data.band_names import says_its_bands
from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.scenes import SceneFolder
from xscale_lightning.errors import UserError

ENMAP = BandSelection(sensor="enmap")


def write(path, array, names=None, **profile):
    """Write `[C, H, W]` at 30 m; `names` become band descriptions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = {"count": len(array), "height": array.shape[1], "width": array.shape[2], "dtype": array.dtype}
    place = {"crs": "EPSG:32633", "transform": from_origin(300000, 5000000, 30, 30)}
    with rasterio.open(path, "w", driver="GTiff", **shape, **place, **profile) as file:
        file.write(array)
        if names is not None:
            file.descriptions = names
    return array


def tile(bands=224, size=8, first=0):
    """Band c holds c * 10 and noise of one digit, int16, with negative values in the first band."""
    noise = np.random.default_rng(first).integers(0, 10, (bands, size, size))
    array = (noise + 10 * np.arange(bands)[:, None, None]).astype(np.int16)
    array[0] -= 20
    return array


def tiles(root, count, **options):
    return [write(root / f"tile_{i}_{i * 32}.tif", tile(first=i, **options)) for i in range(count)]


def folder(root, bands=ENMAP, **options):
    options = {"image_size": 8, "batch_size": 2, "num_workers": 0, "samples_per_epoch": 16} | options
    data = SceneFolder(str(root), bands, **options)
    data.setup("fit")
    return data


def test_files_without_names_have_the_order_of_the_product_and_the_log_says_so_once(tmp_path, caplog):
    arrays = tiles(tmp_path / "images", 5)
    for i in range(5):  # masks beside them, with one band
        write(tmp_path / "labels" / f"tile_{i}.tif", np.zeros((1, 8, 8), np.uint8))
    data = folder(tmp_path, BandSelection(sensor="enmap", names=["B200", "B1", "B92"]))
    assert len(data.scenes) == 5
    for batch in data.train_dataloader():
        for image, (scene, _, _) in zip(batch["image"], batch["origin"].tolist(), strict=True):
            assert np.array_equal(image.numpy(), arrays[scene][[199, 0, 91]])
    told = [record.getMessage() for record in caplog.records if "taken in order" in record.getMessage()]
    assert len(told) == 1 and "5 files" in told[0] and "B1, B2, B3, ..., B224" in told[0]


def test_a_file_of_only_the_chosen_bands_is_taken_too(tmp_path):
    arrays = tiles(tmp_path, 4, bands=202)
    data = folder(tmp_path, BandSelection(sensor="enmap_202"))
    assert np.array_equal(data.scenes[0].read(0, 0, 8, 8)[0], arrays[0])


@pytest.mark.parametrize("bands", [{"count": 30}, {"names": [f"c{i}" for i in range(30)]}])
def test_generic_bands_are_in_the_files_order(tmp_path, bands):
    arrays = tiles(tmp_path, 3, bands=30)
    data = folder(tmp_path, BandSelection(sensor="generic", **bands))
    assert np.array_equal(data.scenes[2].read(0, 0, 8, 8)[0], arrays[2])
    assert min(float(batch["image"].min()) for batch in data.train_dataloader()) < 0


@pytest.mark.parametrize(
    ("bands", "count", "options", "message"),
    [
        (BandSelection(sensor="generic", count=31), 30, {}, r"\(30 bands each\).*the 31 of data\.bands do not fit"),
        (ENMAP, 30, {}, "the 224 of data.bands do not fit"),
        (BandSelection(sensor="sentinel2_l1c"), 13, {}, r"name them in order with data\.file_bands"),
        (ENMAP, 30, {"file_bands": ["B1", "B2"]}, r"data\.file_bands: 2 names, but .* have 30 bands"),
        (ENMAP, 30, {"file_bands": [f"B{i + 1}" for i in range(30)]}, r"no B31, B32, B33, \.\.\., B224"),
    ],
)
def test_other_counts_and_ambiguous_sensors_are_refused(tmp_path, bands, count, options, message):
    tiles(tmp_path, 3, bands=count)
    with pytest.raises(UserError, match=message) as caught:
        folder(tmp_path, bands, **options)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("texts", "known", "says"),
    [
        (("", ""), ("B1", "B2"), False),
        (("Band 1", "Band_2"), ("B1", "B2"), False),
        (("band 8 (424.0 Nanometers)",), ("B1",), False),
        (("B01", ""), ("B1", "B2"), True),
        (("red", "nir"), ("B1", "B2"), True),  # other names are names: taking them in order would mix up bands
        (("band1", "band2"), ("band1", "band2"), True),
    ],
)
def test_descriptions_that_only_number_the_bands_are_no_names(texts, known, says):
    assert says_its_bands(texts, known) is says


def test_numbered_descriptions_do_not_stop_the_order_and_names_do(tmp_path):
    array = tile(bands=3)
    for i in range(3):
        write(tmp_path / f"a{i}.tif", array, ("Band 1", "Band 2", "Band 3"))
    assert np.array_equal(folder(tmp_path, BandSelection(sensor="rgb")).scenes[0].read(0, 0, 8, 8)[0], array)
    for i in range(3):
        write(tmp_path / f"a{i}.tif", array, ("nir", "R", "G"))
    with pytest.raises(UserError, match="have no B; they have g, nir, r"):
        folder(tmp_path, BandSelection(sensor="rgb"))


@pytest.mark.parametrize(("count", "size"), [(18, 32), (85, 20)])
def test_small_tiles_are_split_whole(tmp_path, count, size):
    tiles(tmp_path, count, bands=3, size=size)
    data = folder(tmp_path, BandSelection(sensor="generic", count=3), image_size=size, samples_per_epoch=200)
    share = round(0.1 * count)
    loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
    seen = {split: {int(o[0]) for b in loader for o in b["origin"]} for split, loader in loaders.items()}
    assert {len(seen["val"]), len(seen["test"])} == {share}
    assert not seen["train"] & seen["val"] and not seen["train"] & seen["test"] and not seen["val"] & seen["test"]
    probe = {int(o[0]) for b in data.probe_dataloader("train") for o in b["origin"]}
    assert len(probe) == count - 2 * share and seen["train"] <= probe


@pytest.mark.parametrize("cache_mb", [0, 100])
def test_no_data_is_filled_band_by_band_and_negative_values_stay(tmp_path, cache_mb):
    for i in range(3):
        array = tile(bands=30, first=i)
        array[7, 0, 0] = -32768
        write(tmp_path / f"t{i}.tif", array)
    bands = BandSelection(sensor="generic", count=30, mean=[5.0] * 30, std=[1.0] * 30)
    batch = next(iter(folder(tmp_path, bands, nodata=-32768, cache_mb=cache_mb, validity=True).train_dataloader()))
    assert (batch["image"][:, 7, 0, 0] == 5.0).all() and not batch["valid"][:, 0, 0].any()
    assert batch["valid"].sum() == 2 * 63
    assert (batch["image"][:, 0] < 0).all() and (batch["image"][:, 6, 0, 0] >= 60).all()


def test_bands_without_any_data_are_named(tmp_path):
    for i in range(3):
        array = tile(first=i)
        array[129:135] = -32768
        write(tmp_path / f"t{i}.tif", array)
    with pytest.raises(UserError, match=r"B130, B131, B132, B133, B134, B135 hold no data .* enmap_202"):
        folder(tmp_path, nodata=-32768)
    images = [
        batch["image"]
        for batch in folder(tmp_path, BandSelection(sensor="enmap_202"), nodata=-32768).train_dataloader()
    ]
    assert torch.cat(images).min() > -32768


def test_constant_bands_are_named_in_the_log(tmp_path, caplog):
    for i in range(3):
        array = tile(bands=4, first=i)
        array[2] = 7
        array[3] = i  # constant in every file, but not the same
        write(tmp_path / f"t{i}.tif", array)
    folder(tmp_path, BandSelection(sensor="generic", count=4))
    told = [record.getMessage() for record in caplog.records if "one value" in record.getMessage()]
    assert len(told) == 1 and told[0].startswith("band3: one value (7) in all scenes")


def test_reading_asks_for_the_masks_of_hundreds_of_bands_once_per_file(tmp_path, monkeypatch):
    """Asking per band and window took 0.5 s per tile of 369 bands: the answer is a list over all bands each time."""
    from xscale_lightning.data import geotiff

    asked = []
    original = geotiff._masked_bands
    monkeypatch.setattr(geotiff, "_masked_bands", lambda source: asked.append(source) or original(source))
    tiles(tmp_path, 3)
    data = folder(tmp_path, cache_mb=0)
    for _ in data.train_dataloader():
        pass
    assert len(asked) == 2 * 3  # the header, and the file that stays open
