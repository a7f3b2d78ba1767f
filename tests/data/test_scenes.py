import logging

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin

from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.blocks import fixed_origins, origin_cells, split_blocks
from xscale_lightning.data.geotiff import Grid
from xscale_lightning.data.ground import metres_per_degree
from xscale_lightning.data.scene_files import split_band
from xscale_lightning.data.scenes import SceneFolder
from xscale_lightning.errors import UserError

UTM = "EPSG:32632"


def pixels(count=2, height=96, width=96, dtype="uint16", seed=0):
    return np.random.default_rng(seed).integers(1, 4000, (count, height, width)).astype(dtype)


def write(path, array, names=None, gsd=10.0, crs=UTM, left=300000.0, top=5000000.0, **profile):
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = array.shape
    place = {"crs": crs, "transform": from_origin(left, top, gsd, gsd)} if gsd else {}
    with rasterio.open(
        path, "w", "GTiff", width, height, count, dtype=array.dtype, **{"tiled": True, "blockxsize": 32,
        "blockysize": 32} | place | profile,
    ) as file:  # fmt: skip
        file.write(array)
        if names:
            file.descriptions = names
    return array


def bands(*names, sensor="sentinel2_l1c"):
    return BandSelection(sensor=sensor, names=list(names))


def folder(root, *names, sensor="sentinel2_l1c", **options):
    options = {"image_size": 16, "samples_per_epoch": 24, "batch_size": 8, "num_workers": 0} | options
    return SceneFolder(str(root), bands(*names, sensor=sensor), **options)


def train_batches(data):
    data.setup("fit")
    return list(data.train_dataloader())


def assert_cut_from(batch, array):
    """Every patch of the batch is the window of `array [C, H, W]` that its origin says."""
    height, width = batch["image"].shape[-2:]
    for image, (_, row, col) in zip(batch["image"], batch["origin"].tolist(), strict=True):
        expected = array[:, row : row + height, col : col + width].astype(np.float32)
        assert np.array_equal(image.numpy(), expected)


@pytest.mark.parametrize("cache_mb", [0, 100])
def test_many_bands_per_file_in_the_asked_order(tmp_path, cache_mb):
    array = write(tmp_path / "a.tif", pixels(3), ("B02", "B03", "B8A"))
    for batch in train_batches(folder(tmp_path, "B8A", "B02", cache_mb=cache_mb)):
        assert batch["gsd"].tolist() == [10.0] * 8
        assert_cut_from(batch, array[[2, 0]])


def test_one_file_per_band(tmp_path):
    names = ("B02", "B03")
    for scene in ("x", "y"):
        for i, name in enumerate(names):
            write(tmp_path / f"{scene}_{name}.tif", pixels(1, seed=i + 10 * (scene == "y")))
    data = folder(tmp_path, *names)
    train_batches(data)
    assert [scene.name for scene in data.scenes] == ["x", "y"]
    expected = np.concatenate([pixels(1, seed=10), pixels(1, seed=11)])
    assert np.array_equal(data.scenes[1].read(8, 16, 16, 16)[0], expected[:, 8:24, 16:32])


def test_one_folder_per_scene_and_short_band_names(tmp_path):
    for scene in ("one", "two"):
        for name in ("B2", "B3"):
            write(tmp_path / scene / f"{name}.tif", pixels(1))
    data = folder(tmp_path, "B02", "B03")
    data.setup("fit")
    assert [scene.name for scene in data.scenes] == ["one", "two"]


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("T18SVG_20160101_B02_10m", ("T18SVG_20160101", "B02")),
        ("B8A", ("", "B8A")),
        ("LC08_SR_B4", ("LC08_SR", "B04")),
        ("scene", ("scene", None)),
        ("sentinel2_20m", ("sentinel2", None)),
    ],
)
def test_band_in_the_file_name(stem, expected):
    assert split_band(stem, ["B02", "B04", "B8A"]) == expected


def test_file_bands_name_what_the_files_do_not(tmp_path):
    array = write(tmp_path / "a.tif", pixels(3))
    with pytest.raises(UserError, match=r"do not say which bands.*data\.file_bands"):
        folder(tmp_path, "B04").setup("fit")
    for batch in train_batches(folder(tmp_path, "B04", file_bands=["B08", "B04", "B03"])):
        assert_cut_from(batch, array[[1]])


@pytest.mark.parametrize("cache_mb", [0, 100])
def test_10_20_60_metres_nest(tmp_path, cache_mb):
    coarse = {gsd: pixels(1, 960 // gsd, 960 // gsd, seed=gsd) for gsd in (10, 20, 60)}
    for (gsd, array), name in zip(coarse.items(), ("B02", "B05", "B01"), strict=True):
        write(tmp_path / f"s_{name}.tif", array, gsd=float(gsd))
    data = folder(tmp_path, "B02", "B05", "B01", image_size=12, cache_mb=cache_mb)
    (grid,) = {scene.grid for scene in data.scenes}
    assert (grid.snap, grid.gsd, grid.width) == (6, 10.0, 96)
    for batch in train_batches(data):
        assert (batch["origin"][:, 1:] % 6 == 0).all()
        assert_cut_from({"image": batch["image"][:, :1], "origin": batch["origin"]}, coarse[10])
    # At the coarsest resolution every pixel is the mean of the fine pixels it covers, and the coarse band is untouched.
    at_60 = folder(tmp_path, "B02", "B01", image_size=4, gsd=60.0, cache_mb=cache_mb).scenes[0].read(4, 8, 4, 4)[0]
    assert np.array_equal(at_60[1], coarse[60][0, 4:8, 8:12])
    means = coarse[10][0, 24:48, 48:72].reshape(4, 6, 4, 6).mean(axis=(1, 3))
    assert np.abs(at_60[0] - means).max() <= 0.5


def test_windows_and_cache_give_the_same_pixels(tmp_path):
    write(tmp_path / "s_B02.tif", pixels(1, 96, 96))
    write(tmp_path / "s_B05.tif", pixels(1, 48, 48), gsd=20.0)
    batches = [train_batches(folder(tmp_path, "B02", "B05", cache_mb=mb)) for mb in (0, 100)]
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a["image"], b["image"])


def test_grids_that_do_not_start_together_are_cut_to_the_common_area(tmp_path):
    write(tmp_path / "s_B02.tif", pixels(1, 96, 96), left=300010.0)
    array = write(tmp_path / "s_B05.tif", pixels(1, 48, 48), gsd=20.0)
    grid = folder(tmp_path, "B02", "B05").scenes[0].grid
    assert (grid.left, grid.width) == (300020.0, 94)
    read = folder(tmp_path, "B05", gsd=20.0).scenes[0].read(0, 0, 16, 16)[0]
    assert np.array_equal(read[0], array[0, :16, :16])


@pytest.mark.parametrize("cache_mb", [0, 100])
@pytest.mark.parametrize(("dtype", "empty"), [("uint16", 0), ("float32", np.nan)])
def test_nodata_is_avoided_filled_and_told(tmp_path, dtype, empty, cache_mb):
    array = pixels(1, 128, 128, dtype)
    array[:, :, :70] = empty
    array[:, ::9, ::9] = empty
    write(tmp_path / "a.tif", array, ("B02",), **({"nodata": 0} if dtype == "uint16" else {}))
    data = folder(tmp_path, "B02", max_nodata=0.2, validity=True, fractions=(0.6, 0.2, 0.2), cache_mb=cache_mb)
    mean = np.float32(data.bands.means[0])
    for batch in [*train_batches(data), *data.val_dataloader(), *data.probe_dataloader("train")]:
        for image, valid, (_, row, col) in zip(batch["image"], batch["valid"], batch["origin"].tolist(), strict=True):
            window = array[0, row : row + 16, col : col + 16]
            there = ~np.isnan(window) if dtype == "float32" else window > 0
            assert np.array_equal(valid.numpy(), there)
            assert 1 - there.mean() <= 0.2
            assert np.array_equal(image[0].numpy(), np.where(there, window.astype(np.float32), mean))


def test_nodata_value_can_be_given(tmp_path):
    array = pixels(1, 96, 96)
    array[:, :, :48] = 0
    write(tmp_path / "a.tif", array, ("B02",))
    batches = train_batches(folder(tmp_path, "B02", nodata=0, max_nodata=0.0))
    assert all((batch["origin"][:, 2] >= 48).all() and (batch["image"] > 0).all() for batch in batches)


def test_nothing_but_nodata_is_refused(tmp_path):
    write(tmp_path / "a.tif", np.zeros((1, 64, 64), np.uint16), ("B02",), nodata=0)
    with pytest.raises(UserError, match=r"max_nodata"):
        folder(tmp_path, "B02").setup("fit")


def damage(path, kind):
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": content[: len(content) // 3], "no raster": b"hello"}[kind])


@pytest.mark.parametrize("cache_mb", [0, 100])
@pytest.mark.parametrize("kind", ["empty", "truncated", "no raster"])
def test_a_damaged_file_is_named_and_skipped_or_stops_the_run(tmp_path, caplog, kind, cache_mb):
    good = write(tmp_path / "good.tif", pixels(1), ("B02",))
    write(tmp_path / "bad.tif", pixels(1, 200, 200), ("B02",))
    damage(tmp_path / "bad.tif", kind)
    data = folder(tmp_path, "B02", cache_mb=cache_mb)
    with caplog.at_level(logging.WARNING):
        for batch in train_batches(data):
            assert_cut_from(batch, good)
    assert caplog.text.count("bad.tif") == 1
    assert list(data.left_out) == [str(tmp_path / "bad.tif")] and data.skipped == 0
    with pytest.raises(UserError, match=r"bad\.tif: .*data\.on_error"):
        folder(tmp_path, "B02", on_error="stop", cache_mb=cache_mb).setup("fit")


def test_damage_that_shows_only_while_training_never_gives_an_empty_image(tmp_path, caplog):
    array = write(tmp_path / "B02.tif", pixels(1, 256, 256))
    data = folder(tmp_path, "B02", cache_mb=0)
    data.setup("fit")
    damage(tmp_path / "B02.tif", "truncated")
    data.reader._files.clear()
    with caplog.at_level(logging.WARNING):
        for batch in train_batches(data):
            assert_cut_from(data.on_after_batch_transfer(batch, 0), array)
    assert data.skipped > 0
    assert caplog.text.count("Skipped a patch") == 1  # named once, counted always
    held_out, scene = data.dataset("val"), data.scenes[0]
    rows = [(0, row, 0) for row in range(0, 240, 16)]  # those further down are gone
    held_out.origins = np.array(rows, np.int64)
    seen = [tuple(place) for batch in data.val_dataloader() for place in batch["origin"].tolist()]
    assert seen == rows[: len(seen)] and 0 < len(seen) < 8, "a batch of damaged patches alone does not come"
    assert data.left_out_samples == {"val": len(rows) - len(seen)} and scene.held is None
    stopping = data.dataset("train")
    stopping.stop_on_error = True
    with pytest.raises(UserError, match=r"B02\.tif: cannot be read"):
        list(data.train_dataloader())


def test_all_files_damaged(tmp_path):
    write(tmp_path / "a.tif", pixels(1), ("B02",))
    damage(tmp_path / "a.tif", "empty")
    with pytest.raises(UserError, match=r"a\.tif: the file is empty"):
        folder(tmp_path, "B02").setup("fit")


@pytest.mark.parametrize("on_error", ["skip", "stop"])
def test_the_damaged_file_of_the_only_scene_is_named_first(tmp_path, on_error):
    write(tmp_path / "x_B02.tif", pixels(1))
    write(tmp_path / "x_B03.tif", pixels(1))
    damage(tmp_path / "x_B03.tif", "empty")
    with pytest.raises(UserError, match=r"^data\.root: .*x_B03\.tif: the file is empty.*mend or remove") as error:
        folder(tmp_path, "B02", "B03", on_error=on_error).setup("fit")
    assert len(str(error.value).splitlines()) == 2 and "have no B03" in str(error.value)


def test_stop_names_the_damaged_file_before_other_complaints(tmp_path):
    write(tmp_path / "tiny.tif", pixels(1, 20, 30), ("B02",))
    write(tmp_path / "bad.tif", pixels(1), ("B02",))
    damage(tmp_path / "bad.tif", "empty")
    with pytest.raises(UserError, match=r"bad\.tif: the file is empty"):
        folder(tmp_path, "B02", image_size=32, on_error="stop").setup("fit")


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match=r"data\.root: folder .* does not exist"):
        folder(tmp_path / "nowhere", "B02").setup("fit")
    with pytest.raises(UserError, match=r"data\.root: folder .* holds no raster"):
        folder(tmp_path, "B02").setup("fit")


def test_a_scene_smaller_than_a_patch_says_both_sizes(tmp_path):
    write(tmp_path / "tiny.tif", pixels(1, 20, 30), ("B02",))
    with pytest.raises(UserError, match=r"32x32 .*'tiny' \(20x30"):
        folder(tmp_path, "B02", image_size=32).setup("fit")


def test_missing_band_lists_those_found(tmp_path):
    write(tmp_path / "a.tif", pixels(2), ("B02", "B03"))
    with pytest.raises(UserError, match=r"have no B08; they have B02, B03"):
        folder(tmp_path, "B02", "B08").setup("fit")


def test_a_scene_that_lacks_a_band_is_left_out_by_name(tmp_path):
    write(tmp_path / "whole.tif", pixels(2), ("B02", "B03"))
    write(tmp_path / "part.tif", pixels(1), ("B02",))
    data = folder(tmp_path, "B02", "B03")
    data.setup("fit")
    assert [scene.name for scene in data.scenes] == ["whole"]
    assert data.left_out == {str(tmp_path / "part"): "the scene lacks B03"}


def test_degrees_become_metres_at_their_latitude(tmp_path):
    write(tmp_path / "a.tif", pixels(1), ("B02",), gsd=1e-4, crs="EPSG:4326", left=10.0, top=60.0)
    (batch, *_) = train_batches(folder(tmp_path, "B02"))
    along, across = metres_per_degree(60.0)
    assert (along, across) == (pytest.approx(55800, rel=1e-3), pytest.approx(111412, rel=1e-3))
    assert batch["gsd"][0].item() == pytest.approx(1e-4 * (along * across) ** 0.5, rel=1e-4)
    halved = folder(tmp_path, "B02", gsd=2 * batch["gsd"][0].item()).scenes[0].grid
    assert (halved.height, halved.width) == (48, 48)


def test_web_mercator_is_not_taken_for_metres_on_the_ground(tmp_path):
    write(tmp_path / "a.tif", pixels(1), ("B02",), crs="EPSG:3857", left=0.0, top=8399737.9)  # 60 degrees north
    assert folder(tmp_path, "B02").scenes[0].grid.gsd == pytest.approx(5.0, rel=1e-2)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_without_crs_the_gsd_must_be_given(tmp_path):
    array = write(tmp_path / "a.tif", pixels(1), ("B02",), gsd=None)
    with pytest.raises(UserError, match=r"has no CRS.*data\.gsd"):
        folder(tmp_path, "B02").setup("fit")
    for batch in train_batches(folder(tmp_path, "B02", gsd=0.5)):
        assert batch["gsd"][0] == 0.5
        assert_cut_from(batch, array)


def test_scenes_of_several_crs_go_together_but_not_bands(tmp_path):
    write(tmp_path / "a.tif", pixels(1), ("B02",))
    write(tmp_path / "b.tif", pixels(1), ("B02",), crs="EPSG:32633")
    data = folder(tmp_path, "B02", on_error="stop")
    data.setup("fit")
    assert len(data.scenes) == 2
    write(tmp_path / "c" / "B02.tif", pixels(1))
    write(tmp_path / "c" / "B03.tif", pixels(1), crs="EPSG:32633")
    with pytest.raises(UserError, match=r"its CRS EPSG:32633 is not that of"):
        folder(tmp_path / "c", "B02", "B03").setup("fit")


def test_patches_need_not_be_square(tmp_path):
    array = write(tmp_path / "a.tif", pixels(1, 80, 120), ("B02",))
    data = folder(tmp_path, "B02", image_size=(8, 24))
    for batch in train_batches(data):
        assert batch["image"].shape[-2:] == (8, 24)
        assert_cut_from(batch, array)


@pytest.mark.parametrize("cache_mb", [0, 100])
def test_workers_do_not_change_the_patches_and_epochs_do(tmp_path, cache_mb):
    write(tmp_path / "a.tif", pixels(1), ("B02",))
    epochs = {}
    for workers in (0, 2):
        loader = (data := folder(tmp_path, "B02", num_workers=workers, cache_mb=cache_mb)).train_dataloader()
        assert data.num_workers == workers
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            epochs[workers, epoch] = torch.cat([batch["origin"] for batch in loader])
    assert torch.equal(epochs[0, 0], epochs[2, 0])
    assert torch.equal(epochs[0, 1], epochs[2, 1])
    assert not torch.equal(epochs[0, 0], epochs[0, 1])
    other = torch.cat([batch["origin"] for batch in folder(tmp_path, "B02", seed=1).train_dataloader()])
    assert not torch.equal(other, epochs[0, 0])


def test_random_patches_reach_every_origin_about_equally(tmp_path):
    write(tmp_path / "a.tif", pixels(1, 24, 24), ("B02",))
    data = folder(tmp_path, "B02", image_size=16, fractions=(1.0, 0.0, 0.0), samples_per_epoch=8100)
    origins = torch.cat([batch["origin"] for batch in data.train_dataloader()])[:, 1:]
    counts = torch.bincount(origins[:, 0] * 9 + origins[:, 1], minlength=81).float()
    assert counts.min() > 60 and counts.max() < 145  # 100 expected, standard deviation 10
    assert data.dataset("val") is None


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("size", "snap", "block"), [((16, 16), 1, None), ((12, 30), 6, 40), ((20, 20), 3, None)])
def test_splits_share_no_pixel(seed, size, snap, block):
    rng = np.random.default_rng(seed)
    grids = [Grid(0, 0, 10, 10, *rng.integers(60, 200, 2).tolist(), snap, 10.0) for _ in range(2)]
    maps = split_blocks(grids, size, (0.6, 0.2, 0.2), block, seed)
    owner = [np.full((grid.height, grid.width), -1) for grid in grids]
    for split in range(3):
        cells = origin_cells(maps, split, size)
        everything = np.concatenate([cells.locate(np.arange(cells.total)), fixed_origins(maps, split, size, 8)])
        assert len(everything)
        for scene, row, col in everything:
            assert row % snap == 0 and col % snap == 0
            window = owner[scene][row : row + size[0], col : col + size[1]]
            assert window.shape == size
            assert ((window == -1) | (window == split)).all()
            window[...] = split


def test_too_little_imagery_for_a_split(tmp_path):
    write(tmp_path / "a.tif", pixels(1, 20, 20), ("B02",))
    with pytest.raises(UserError, match=r"data\.fractions: the imagery holds 1 separate block"):
        folder(tmp_path, "B02").setup("fit")


def test_fixed_grids_are_limited_in_number_and_always_the_same(tmp_path):
    write(tmp_path / "a.tif", pixels(1, 200, 200), ("B02",))
    grids = []
    for seed in (0, 1):
        data = folder(tmp_path, "B02", eval_samples=7, eval_stride=4, seed=seed)
        grids.append(torch.cat([batch["origin"] for batch in data.probe_dataloader("train")]).tolist())
    assert grids[0] == grids[1]
    assert len({tuple(origin) for origin in grids[0]}) == 7


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 0},
        {"gsd": -1.0},
        {"samples_per_epoch": 0},
        {"fractions": (0.5, 0.1, 0.1)},
        {"fractions": (0.0, 0.5, 0.5)},
        {"max_nodata": 1.0},
        {"pair_ratio": 0},
        {"on_error": "ignore"},
        {"cache_mb": -1},
        {"block_size": 0},
        {"eval_stride": 0},
        {"eval_samples": 0},
    ],
)
def test_arguments_out_of_range_are_refused_before_files_are_opened(tmp_path, options):
    name = next(iter(options))
    with pytest.raises(UserError, match=rf"data\.{name}: .* is not possible"):
        folder(tmp_path / "nowhere", "B02", **options)
