"""Pairs from two folders: the footprint to the pixel, ratios, offsets, joint splits, and what is refused."""

import logging
from fractions import Fraction

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin

from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.footprint import Misfit, footprint, read_resampled
from xscale_lightning.data.geotiff import Grid
from xscale_lightning.data.pair_files import overlapping_groups
from xscale_lightning.data.paired import PairedFolders
from xscale_lightning.errors import UserError

TOP = 5000000.0
LEFT = 300000.0


def write(path, array, gsd, left=LEFT, top=TOP, crs="EPSG:32632", **profile):
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = array.shape
    place = {"crs": crs, "transform": from_origin(left, top, gsd, gsd)} if crs else {}
    with rasterio.open(path, "w", "GTiff", width, height, count, dtype=array.dtype, **place, **profile) as file:
        file.write(array)
    return array


def noise(count, height, width, seed=0):
    return np.random.default_rng(seed).integers(1, 4000, (count, height, width)).astype(np.uint16)


def pooled(array, ratio):
    count, height, width = array.shape
    return array.reshape(count, height // ratio, ratio, width // ratio, ratio).mean(axis=(2, 4))


def nested(root, name="a", size=48, ratio=2, gsd=10.0, seed=0, bands=2, **place):
    """HR of noise and its exact area mean as MR."""
    hr = write(root / "hr" / f"{name}.tif", noise(bands, size * ratio, size * ratio, seed), gsd / ratio, **place)
    return write(root / "mr" / f"{name}.tif", pooled(hr, ratio).astype(np.float32), gsd, **place), hr


def pairs(base, bands=2, bands_hr=None, **options):
    options = {"image_size": 12, "samples_per_epoch": 16, "batch_size": 8, "num_workers": 0} | options
    selections = [BandSelection("generic", count=n) for n in (bands, bands if bands_hr is None else bands_hr)]
    folders = {"root": str(base / "mr"), "root_hr": str(base / "hr")} | {
        key: options.pop(key) for key in ("root", "root_hr") if key in options
    }
    return PairedFolders(bands=selections[0], bands_hr=selections[1], **folders, **options)


def train_batches(data):
    data.setup("fit")
    return list(data.train_dataloader())


@pytest.mark.parametrize("cache_mb", [0, 100])
@pytest.mark.parametrize("ratio", [2, 5])
def test_hr_is_the_ground_of_mr_to_the_pixel(tmp_path, ratio, cache_mb):
    _, hr = nested(tmp_path, ratio=ratio)
    data = pairs(tmp_path, cache_mb=cache_mb)
    for batch in [*train_batches(data), *data.val_dataloader(), *data.probe_dataloader("train")]:
        assert batch["image_hr"].shape[1:] == (2, 12 * ratio, 12 * ratio)
        assert torch.allclose(torch.nn.functional.avg_pool2d(batch["image_hr"], ratio), batch["image"], atol=0.01)
        for image, (_, row, col) in zip(batch["image_hr"], batch["origin"].tolist(), strict=True):
            window = hr[:, row * ratio : (row + 12) * ratio, col * ratio : (col + 12) * ratio]
            assert np.array_equal(image.numpy(), window.astype(np.float32))
        assert (batch["gsd"] == 10).all() and torch.allclose(batch["gsd_hr"], torch.tensor(10.0 / ratio))
    assert data.ratio == ratio and data.image_size_hr == (12 * ratio, 12 * ratio)


def test_a_fraction_as_ratio_is_cut_without_resampling(tmp_path):
    """10 m and 3 m (RapidAI4EO): every third MR edge is an HR edge, and crops start and end there."""
    hr = write(tmp_path / "hr" / "a.tif", noise(1, 200, 200), 3.0)
    write(tmp_path / "mr" / "a.tif", noise(1, 60, 60, 1), 10.0)
    data = pairs(tmp_path, 1)
    for batch in train_batches(data):
        assert batch["image_hr"].shape[-2:] == (40, 40)
        for image, (_, row, col) in zip(batch["image_hr"], batch["origin"].tolist(), strict=True):
            assert row % 3 == 0 and col % 3 == 0
            window = hr[0, row * 10 // 3 : row * 10 // 3 + 40, col * 10 // 3 : col * 10 // 3 + 40]
            assert np.array_equal(image[0].numpy(), window)
    assert data.ratio == Fraction(10, 3)
    with pytest.raises(UserError, match=r"data\.image_size: 16 MR pixels are 53\.33.* multiple of 3"):
        pairs(tmp_path, 1, image_size=16).setup("fit")


def ramp(height, width, gsd, left=LEFT, top=TOP):
    """Bands that say where their pixel centres lie, in metres east and south of the corner."""
    x = left - LEFT + gsd * (np.arange(width) + 0.5)
    y = TOP - top + gsd * (np.arange(height) + 0.5)
    return np.stack(np.broadcast_arrays(x[None, :], y[:, None])).astype(np.float32)


@pytest.mark.parametrize(
    ("hr_gsd", "shift", "ratio"), [(15.0, 7.5, None), (15.0, 7.5, 3), (9.0, 4.0, 2), (7.0, 0.0, 4), (15.0, 0.0, 1)]
)
@pytest.mark.parametrize("cache_mb", [0, 100])
def test_one_affine_for_any_ratio_and_offset(tmp_path, hr_gsd, shift, ratio, cache_mb):
    """Landsat: the pan grid starts half a pan pixel outside; other ratios lie anywhere. The ground stays the same."""
    write(tmp_path / "mr" / "a.tif", ramp(60, 60, 30.0), 30.0)
    place = {"left": LEFT - shift, "top": TOP + shift}
    side = int(1830 / hr_gsd)
    write(tmp_path / "hr" / "a.tif", ramp(side, side, hr_gsd, **place), hr_gsd, **place)
    data = pairs(tmp_path, ratio=ratio, resample=True, cache_mb=cache_mb)
    inner = slice(2, -2)  # at the rim of the image the linear interpolation has nothing to lean on
    for batch in train_batches(data):
        size = int(12 * data.ratio)
        assert batch["image_hr"].shape[-2:] == (size, size)
        assert torch.allclose(batch["gsd_hr"], torch.tensor(30 / float(data.ratio)))
        for mr, hr in zip(batch["image"], batch["image_hr"], strict=True):
            edge = mr[:, 0, 0] - 15  # upper left corner of the crop
            centres = edge[:, None] + (torch.arange(size) + 0.5) * 30 / float(data.ratio)
            step = 30 / float(data.ratio) / hr_gsd
            for found, wanted in ((hr[0, size // 2, inner], centres[0]), (hr[1, inner, size // 2], centres[1])):
                beside = (found - wanted[inner]) / hr_gsd  # HR pixels
                # An area mean weighs whole pixels, so single ones are off by a fraction of one, but not all together.
                assert beside.abs().max() < (0.002 if step <= 1 else 0.26) and beside.mean().abs() < 0.05


def test_what_needs_resampling_is_refused_with_the_amount(tmp_path):
    write(tmp_path / "mr" / "a.tif", noise(1, 60, 60), 30.0)
    write(tmp_path / "hr" / "a.tif", noise(1, 122, 122), 15.0, left=LEFT - 7.5, top=TOP + 7.5)
    with pytest.raises(UserError, match=r"pixel edges lie 0\.5 HR pixels beside.*data\.resample: true"):
        pairs(tmp_path, 1).setup("fit")
    with pytest.raises(UserError, match=r"HR has 2 pixels along one MR pixel, and 4 are asked for"):
        pairs(tmp_path, 1, ratio=4).setup("fit")


def test_area_mean_where_new_pixels_are_larger():
    values = noise(1, 12, 12).astype(np.float32)
    valid = np.ones(values.shape, bool)
    valid[0, 5, 5] = False

    def read(row, col, height, width):
        window = (slice(None), slice(row, row + height), slice(col, col + width))
        return values[window], valid[window]

    result, kept = read_resampled(read, (12, 12), (2, 2, 8, 8), (2, 2))
    assert np.allclose(result[0, 1, 1], values[0, 6:10, 6:10].mean())
    assert kept is not None and kept[0].tolist() == [[False, True], [True, True]]
    half, _ = read_resampled(lambda *w: (read(*w)[0], None), (12, 12), (2.5, 3, 2, 2), (2, 2))
    assert np.allclose(half[0], (values[0, 2:4, 3:5] + values[0, 3:5, 3:5]) / 2)


def test_different_bands_and_sensors(tmp_path):
    write(tmp_path / "mr" / "a.tif", noise(5, 40, 40), 1.0)
    write(tmp_path / "hr" / "a.tif", noise(3, 400, 400).astype(np.uint8), 0.1)
    data = pairs(tmp_path, 5, 3, image_size=8)
    batch = train_batches(data)[0]
    assert batch["image"].shape[1:] == (5, 8, 8) and batch["image_hr"].shape[1:] == (3, 80, 80)
    assert len(data.bands) == 5 and len(data.bands_hr) == 3


def test_without_a_georeference_the_corners_are_the_same(tmp_path):
    hr = write(tmp_path / "hr" / "a.tif", noise(1, 96, 96), 0, crs=None)
    write(tmp_path / "mr" / "a.tif", pooled(hr, 2).astype(np.float32), 0, crs=None)
    data = pairs(tmp_path, 1, gsd=10.0)
    for batch in train_batches(data):
        assert torch.allclose(torch.nn.functional.avg_pool2d(batch["image_hr"], 2), batch["image"], atol=0.01)
        assert (batch["gsd_hr"] == 5).all()
    write(tmp_path / "hr" / "a.tif", noise(1, 96, 100), 0, crs=None)
    with pytest.raises(UserError, match=r"2 times in height and 2\.08333 times in width"):
        pairs(tmp_path, 1, gsd=10.0).setup("fit")


def test_only_the_shared_ground_is_used_and_its_size_is_told(tmp_path, caplog):
    hr = write(tmp_path / "hr" / "a.tif", noise(1, 96, 96), 5.0)
    write(tmp_path / "mr" / "a.tif", noise(1, 48, 48, 1), 10.0, left=LEFT - 30, top=TOP + 20)
    with caplog.at_level(logging.INFO):
        data = pairs(tmp_path, 1, min_shared=0.8)
        batches = train_batches(data)
    (scene,) = data.scenes
    assert (scene.grid.left, scene.grid.top, scene.grid.width, scene.grid.height) == (LEFT, TOP, 45, 46)
    assert data.worst_disagreement == 3 and "3 MR pixels (30 m) apart" in caplog.text
    for batch in batches:
        for image, (_, row, col) in zip(batch["image_hr"], batch["origin"].tolist(), strict=True):
            assert np.array_equal(image[0].numpy(), hr[0, row * 2 : row * 2 + 24, col * 2 : col * 2 + 24])
    with pytest.raises(UserError, match=r"shares only 89\.8% of the ground.*30 m or 3 MR pixels apart"):
        pairs(tmp_path, 1).setup("fit")


def test_pairs_apart_say_how_far(tmp_path):
    nested(tmp_path)
    write(tmp_path / "hr" / "b.tif", noise(2, 96, 96), 5.0, left=LEFT + 1000)
    write(tmp_path / "mr" / "b.tif", noise(2, 48, 48).astype(np.float32), 10.0)
    data = pairs(tmp_path)
    train_batches(data)
    assert [scene.name for scene in data.scenes] == ["a"]
    assert list(data.left_out.values()) == ["HR and MR share no ground: they lie 520 m apart"]
    with pytest.raises(UserError, match=r"b\.tif: HR and MR share no ground: they lie 520 m apart"):
        pairs(tmp_path, on_error="stop").setup("fit")
    write(tmp_path / "hr" / "b.tif", noise(2, 96, 96), 5.0, crs="EPSG:32633")
    with pytest.raises(UserError, match=r"EPSG:32633 and MR EPSG:32632"):
        pairs(tmp_path, on_error="stop").setup("fit")


def test_swapped_folders_are_refused(tmp_path):
    nested(tmp_path)
    with pytest.raises(UserError, match=r"HR is coarser than MR \(2 times\)"):
        pairs(tmp_path, root=str(tmp_path / "hr"), root_hr=str(tmp_path / "mr")).setup("fit")


def test_missing_hr_is_counted_or_stops(tmp_path, caplog):
    for i, name in enumerate("abc"):
        nested(tmp_path, name, seed=i, left=LEFT + 1000 * i)
    (tmp_path / "hr" / "b.tif").unlink()
    data = pairs(tmp_path)
    data.setup("fit")
    assert data.missing_hr == 1 and [scene.name for scene in data.scenes] == ["a", "c"]
    assert "1 of 3 MR images have no HR image and are left out: b" in caplog.text
    with pytest.raises(UserError, match=r"1 of 3 MR images have no HR image \(b\)"):
        pairs(tmp_path, on_missing="stop").setup("fit")


def test_names_are_matched_by_their_common_part(tmp_path):
    for i in range(3):
        place = {"left": LEFT + 1000 * i}
        write(tmp_path / f"SITE{i}_20200101_05m.tif", noise(1, 96, 96, i), 5.0, **place)
        write(tmp_path / f"SITE{i}_20200101_10m.tif", noise(1, 48, 48, i), 10.0, **place)
    root = {"root": str(tmp_path), "root_hr": str(tmp_path), "files": "_10m[.]tif$", "files_hr": "_05m[.]tif$"}
    data = pairs(tmp_path, 1, **root)
    assert [scene.name for scene in data.scenes] == [f"SITE{i}_20200101" for i in range(3)]
    assert all(scene.hr.name == scene.name for scene in data.scenes)
    assert len(pairs(tmp_path, 1, key=r"(SITE\d)", **root).scenes) == 3
    with pytest.raises(UserError, match=r"both fit MR image SITE0_20200101 \(key '20200101'\)"):
        pairs(tmp_path, 1, key=r"SITE\d_(\d+)", **root).setup("fit")
    with pytest.raises(UserError, match=r"none of the 3 HR images belongs to one of the 3 MR images by name"):
        pairs(tmp_path, 1, key="(nothing)", **root).setup("fit")
    with pytest.raises(UserError, match="has no group"):
        pairs(tmp_path, 1, key="SITE", **root)
    with pytest.raises(UserError, match=r"data\.root_hr: none of the 6 rasters in .* fits 'xyz'"):
        pairs(tmp_path, 1, **(root | {"files_hr": "xyz"})).setup("fit")


def test_places_are_matched_whatever_the_names(tmp_path):
    """One MR scene and HR tiles inside it; one tile reaches beyond it and one lies elsewhere."""
    mr = write(tmp_path / "mr" / "scene.tif", noise(1, 96, 96), 10.0)
    for i, (dx, dy) in enumerate([(0, 0), (500, 200), (800, 0), (5000, 0)]):
        write(tmp_path / "hr" / f"tile{i}.tif", noise(1, 80, 80, i), 5.0, left=LEFT + dx, top=TOP - dy)
    data = pairs(tmp_path, 1, match="place", fractions=(1.0, 0.0, 0.0))
    batches = train_batches(data)
    assert [(s.hr.name, s.grid.width) for s in data.scenes] == [("tile0", 40), ("tile1", 40), ("tile2", 16)]
    for batch in batches:
        for image, (scene, row, col) in zip(batch["image"], batch["origin"].tolist(), strict=True):
            y, x = row + [0, 20, 0][scene], col + [0, 50, 80][scene]
            assert np.array_equal(image[0].numpy(), mr[0, y : y + 12, x : x + 12])


def touched(data, split):
    """Ground (10 m cells) that the split's crops can show."""
    cells = set()
    batches = data.probe_dataloader(split) if split != "train" else data.train_dataloader()
    for batch in batches:
        for scene, row, col in batch["origin"].tolist():
            grid = data.scenes[scene].grid
            x0, y0 = round(grid.left / 10) + col, -round(grid.top / 10) + row
            cells |= {(x, y) for x in range(x0, x0 + 12) for y in range(y0, y0 + 12)}
    return cells


@pytest.mark.parametrize("shift", [0.0, 200.0])
def test_splits_share_no_ground_even_between_dates(tmp_path, shift):
    """The same place at three dates (exactly, or shifted by 20 pixels), and two other places."""
    for i in range(3):
        nested(tmp_path, f"t{i}", size=60, seed=i, left=LEFT + shift * i)
    for i in range(3):
        nested(tmp_path, f"far{i}", size=60, seed=9 + i, left=LEFT + 5000 * (i + 1))
    data = pairs(tmp_path, fractions=(0.6, 0.2, 0.2), samples_per_epoch=400)
    data.setup("fit")
    ground = {split: touched(data, split) for split in ("train", "val", "test")}
    assert all(ground.values())
    assert not (ground["train"] & ground["val"] or ground["train"] & ground["test"] or ground["val"] & ground["test"])


def test_named_groups_stay_together(tmp_path):
    for i in range(6):
        nested(tmp_path, f"{'ABC'[i // 2]}_{i}", size=24, seed=i, left=LEFT + 1000 * i)
    data = pairs(tmp_path, group="(^[A-Z])", fractions=(0.34, 0.33, 0.33))
    data.setup("fit")
    splits = {}
    for split in ("train", "val", "test"):
        for batch in data.probe_dataloader(split):
            for scene in batch["origin"][:, 0].tolist():
                splits.setdefault(data.scenes[scene].name[0], set()).add(split)
    assert sorted(map(sorted, splits.values())) == [["test"], ["train"], ["val"]]
    with pytest.raises(UserError, match=r"make 1 separate group"):
        pairs(tmp_path, group="(_)").setup("fit")


def test_groups_join_through_others():
    def grid(left):
        return Grid(left, 0.0, 1.0, 1.0, 10, 10, 1, 1.0)

    grids = [grid(0.0), grid(18.0), grid(9.0), grid(100.0), grid(28.0)]
    assert overlapping_groups(grids, ["a"] * 5, [""] * 5) == [0, 0, 0, 1, 2]
    assert overlapping_groups(grids, ["a", "a", "b", "a", "a"], ["", "", "", "x", "x"]) == [0, 1, 2, 3, 3]


def test_no_data_of_hr_is_avoided_and_filled(tmp_path):
    _, hr = nested(tmp_path, bands=1, size=72)
    hr = hr.copy()
    hr[0, :, :70], hr[0, ::9, ::9] = 0, 0
    write(tmp_path / "hr" / "a.tif", hr, 5.0, nodata=0)
    data = pairs(tmp_path, 1, max_nodata=0.2)
    for batch in [*train_batches(data), *data.val_dataloader()]:
        for image, (_, row, col) in zip(batch["image_hr"], batch["origin"].tolist(), strict=True):
            window = hr[0, row * 2 : row * 2 + 24, col * 2 : col * 2 + 24]
            assert (window == 0).mean() <= 0.2 and np.array_equal(image[0].numpy(), window)  # the mean is 0 here


def test_damaged_hr_is_skipped_by_name(tmp_path, caplog):
    for i, name in enumerate("ab"):
        nested(tmp_path, name, seed=i, left=LEFT + 1000 * i)
    path = tmp_path / "hr" / "b.tif"
    path.write_bytes(path.read_bytes()[:2000])
    data = pairs(tmp_path)
    train_batches(data)
    assert [scene.name for scene in data.scenes] == ["a"] and str(path) in data.left_out
    with pytest.raises(UserError, match=r"b\.tif: .*data\.on_error"):
        pairs(tmp_path, on_error="stop").setup("fit")


@pytest.mark.parametrize(
    ("argument", "value"),
    [("ratio", 0.5), ("min_shared", 1.5), ("match", "guess"), ("on_missing", "never"), ("key", "(")],
)
def test_impossible_arguments_are_named(tmp_path, argument, value):
    with pytest.raises(UserError, match=rf"data\.{argument}: "):
        pairs(tmp_path, **{argument: value})


def test_a_grid_beside_another_shares_nothing():
    a, b = Grid(0.0, 100.0, 10.0, 10.0, 10, 10, 1, 10.0), Grid(100.0, 100.0, 5.0, 5.0, 20, 20, 1, 5.0)
    with pytest.raises(Misfit, match="they lie 0 m apart"):
        footprint(a, b, True)
