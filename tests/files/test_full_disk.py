"""A disk that gets full while a map is written: GDAL does not say so where it happens at the end."""

import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from xscale_lightning.data import feature_map
from xscale_lightning.data.feature_map import write_feature_map
from xscale_lightning.errors import UserError

rasterio = pytest.importorskip("rasterio")
BANDS, SIDE = 96, 56
TILING = SimpleNamespace(grid=(SIDE, SIDE), patch=8)
IMAGE = SimpleNamespace(grid=SimpleNamespace(left=0.0, top=0.0, dx=10.0, dy=10.0), crs="EPSG:32633")


def rows():
    values = np.random.default_rng(0).normal(size=(BANDS, SIDE, SIDE)).astype(np.float32)
    values[:, 3] = np.nan
    return ((row, values[:, row : row + 1]) for row in range(SIDE))


def write(path):
    write_feature_map(path, rows, IMAGE, TILING, [str(i) for i in range(BANDS)], None)


def test_a_map_is_read_once_more_before_it_gets_its_name(tmp_path, monkeypatch):
    write(tmp_path / "a.tif")
    good = (tmp_path / "a.tif").read_bytes()
    with rasterio.open(tmp_path / "a.tif") as file:
        assert np.isnan(file.read(1)[3]).all() and file.descriptions[5] == "5"
    real = feature_map._difference

    def cut(part, width, sums):
        part.write_bytes(part.read_bytes()[:-30_000])  # as a full disk does
        return real(part, width, sums)

    def change(part, width, sums):
        with rasterio.open(part, "r+") as file:
            file.write(file.read(1) + 1, 1)
        return real(part, width, sums)

    for damage, message in ((cut, r"a.tif' cannot be written \("), (change, "row 0 is not as it was written")):
        monkeypatch.setattr(feature_map, "_difference", damage)
        with pytest.raises(UserError, match=message):
            write(tmp_path / "a.tif")
        assert (tmp_path / "a.tif").read_bytes() == good and [p.name for p in tmp_path.iterdir()] == ["a.tif"]


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mount is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_map_on_a_disk_that_gets_full(small_disk, tmp_path):
    write(tmp_path / "whole.tif")
    size = (tmp_path / "whole.tif").stat().st_size
    message = r"--map .* \(No space left on device: .* free\); make room and run it again"
    for missing in (size // 2, 200_000, 40_000, 20_000):  # the last two are missed when GDAL closes the file
        room = size - missing
        (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - room))
        with pytest.raises(UserError, match=message):
            write(small_disk / "a.tif")
        assert [p.name for p in small_disk.iterdir()] == ["filler"]
        (small_disk / "filler").unlink()
