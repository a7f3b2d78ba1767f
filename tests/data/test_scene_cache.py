"""Scenes beyond `cache_mb`: decoded once into `cache_dir`, the same patches as from memory."""

import os

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
from rasterio.transform import from_origin

from xscale_lightning.data import scene_cache
from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.scenes import SceneFolder
from xscale_lightning.errors import UserError
from xscale_lightning.locks import lock_file

BANDS = BandSelection(sensor="sentinel2_l1c", names=["B02", "B05"])


def write(folder, name, size, gsd, seed, nodata=None):
    values = np.random.default_rng(seed).integers(1, 4000, (1, size, size)).astype(np.uint16)
    values[:, : size // 8, : size // 8] = 0
    profile = {"driver": "GTiff", "count": 1, "height": size, "width": size, "dtype": "uint16", "nodata": nodata}
    with rasterio.open(
        folder / name, "w", crs="EPSG:32632", transform=from_origin(300000, 5000000, gsd, gsd), **profile
    ) as file:
        file.write(values)


@pytest.fixture
def scenes(tmp_path):
    """Two scenes of two bands of different pixel size, one with pixels without data."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    for number, nodata in enumerate((None, 0)):
        write(folder, f"s{number}_B02.tif", 96, 10.0, number, nodata)
        write(folder, f"s{number}_B05.tif", 48, 20.0, number + 5, nodata)
    return folder


def open_folder(scenes, **options):
    options = {"image_size": 16, "samples_per_epoch": 32, "batch_size": 16, "num_workers": 0} | options
    data = SceneFolder(str(scenes), BANDS, **options)
    data.setup("fit")
    return data


def batches(data):
    return [*data.train_dataloader(), *data.probe_dataloader("train")]


def test_patches_are_those_of_scenes_in_memory(scenes, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    wanted = batches(open_folder(scenes))
    for _ in range(2):
        data = open_folder(scenes, cache_mb=0, cache_dir=str(cache))
        for mine, other in zip(batches(data), wanted, strict=True):
            assert mine.keys() == other.keys()
            assert all(torch.equal(mine[key], other[key]) for key in mine)
        held = [scene.held for scene in data.scenes]
        assert all(isinstance(pixels.base, np.memmap) for pixels, _ in held)
        assert sorted(valid is None for _, valid in held) == [False, True]
        # The second time nothing is decoded, nothing written.
        monkeypatch.setattr(scene_cache, "write_array", lambda *a: pytest.fail("the copy was made again"))
    assert len(list(cache.iterdir())) == 4


def test_changed_files_and_cut_copies_are_read_anew(scenes, tmp_path):
    cache = tmp_path / "cache"
    options = {"cache_mb": 0, "cache_dir": str(cache)}
    open_folder(scenes, **options)
    write(scenes, "s0_B02.tif", 96, 10.0, 77)
    for copy in cache.glob("*.npy"):
        copy.write_bytes(copy.read_bytes()[:-5])
    for mine, other in zip(batches(open_folder(scenes, **options)), batches(open_folder(scenes)), strict=True):
        assert torch.equal(mine["image"], other["image"])


def test_files_behind_a_virtual_raster_count(scenes, tmp_path):
    virtual = tmp_path / "virtual"
    virtual.mkdir()
    for band in ("B02", "B05"):
        rasterio.shutil.copy(scenes / f"s0_{band}.tif", virtual / f"s0_{band}.vrt", driver="VRT")
    options = {"cache_mb": 0, "cache_dir": str(tmp_path / "cache")}
    before = batches(open_folder(virtual, **options))
    write(scenes, "s0_B02.tif", 96, 10.0, 77)
    after, wanted = batches(open_folder(virtual, **options)), batches(open_folder(virtual))
    assert not torch.equal(before[0]["image"], after[0]["image"])
    assert all(torch.equal(mine["image"], other["image"]) for mine, other in zip(after, wanted, strict=True))


def test_no_room_for_a_copy(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(scene_cache.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match="cache_dir"):
        open_folder(scenes, cache_mb=0, cache_dir=str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())


def test_what_killed_writers_have_left_goes_and_what_others_write_stays(scenes, tmp_path, monkeypatch):
    cache, beside = tmp_path / "cache", tmp_path / "beside"
    cache.mkdir()
    beside.write_bytes(b"not ours")
    names = (".tmp_dead.part", ".tmp_new.part", ".tmp_held.part")
    for name in names:
        (cache / name).write_bytes(b"x" * 1000)
    (cache / ".tmp_link.part").symlink_to(beside)
    for name in (names[0], names[2]):
        os.utime(cache / name, (1, 1))
    with (cache / names[2]).open("ab") as file:  # another process is writing
        lock_file(file.fileno())
        open_folder(scenes, cache_mb=0, cache_dir=str(cache))
    assert [(cache / name).exists() for name in names] == [False, True, True]
    assert beside.read_bytes() == b"not ours"
