"""Damages that a look at the pixels does not show: told ahead of time, and none of them reaches the model."""

import sys
from pathlib import Path

import numpy as np
import pytest

from xscale_lightning.commands.doctor_data import check_all
from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.change import ChangeFolder
from xscale_lightning.data.folder import ImageFolderData
from xscale_lightning.data.geotiff import UnreadableFile, inspect
from xscale_lightning.data.image_files import FileStore, decode
from xscale_lightning.data.inventory import items_of
from xscale_lightning.data.mask_folder import MaskFolder
from xscale_lightning.data.scenes import SceneFolder

sys.path.insert(0, str(Path(__file__).parent))
import make_damage
from make_damage import SIDE, fabricate, write
from make_more_damage import OUTCOMES, picture, set_tag

RGB = BandSelection("generic", names=["R", "G", "B"], mean=[1700.0] * 3, std=[700.0] * 3)
OPTIONS = {"bands": RGB, "batch_size": 4, "num_workers": 0}


@pytest.fixture
def kind(request, monkeypatch):
    monkeypatch.setitem(make_damage.KINDS, request.param, OUTCOMES[request.param][0])
    return request.param


def sound(data):
    """Images of every batch: never black, constant or not finite."""
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            images = batch["image"].flatten(1)
            assert images.isfinite().all() and (images.std(1) > 1).all() and (images == 0).float().mean() < 0.2


@pytest.mark.parametrize("kind", OUTCOMES, indirect=True)
def test_every_damage_is_told_and_none_reaches_the_model(kind, tmp_path):
    expected = fabricate(tmp_path / "a", 3, 14, (kind,))
    fabricate(tmp_path / "b", 0, 14)
    scenes = SceneFolder(
        str(tmp_path / "a"), file_bands=["R", "G", "B"], image_size=SIDE, samples_per_epoch=32, **OPTIONS
    )
    labelled = ImageFolderData(str(tmp_path), channels=["R", "G", "B"], gsd=10.0, image_size=SIDE, **OPTIONS)
    for data in (scenes, labelled):
        found = {f.path: f.kind for f in check_all(items_of(data), workers=2)}
        told = {found.get(path, "absent") for path in expected}
        assert told <= OUTCOMES[kind][1], told
        assert not any(value for path, value in found.items() if "good" in path)
        sound(data)


def test_a_header_with_too_few_bits_per_value(tmp_path):
    bits = {name: tmp_path / "a" / f"{name}.tif" for name in ("flipped", "true")}
    write(bits["flipped"], make_damage.good(np.random.default_rng(0)))
    set_tag(bits["flipped"], 258, [1] * 3)
    write(bits["true"], np.random.default_rng(0).integers(0, 2, (3, SIDE, SIDE)).astype("uint8"), nbits=1)
    content = {name: path.read_bytes() for name, path in bits.items()}
    with pytest.raises(ValueError, match="1 bits per value"):
        decode("flipped.tif", content["flipped"])
    assert decode("true.tif", content["true"])[0].max() == 1


def test_a_folder_whose_first_files_are_damaged_is_read(tmp_path):
    fabricate(tmp_path / "a", 40, 40, ("empty",))  # sorted before the good ones
    fabricate(tmp_path / "b", 0, 40)
    sound(ImageFolderData(str(tmp_path), channels=["R", "G", "B"], gsd=10.0, image_size=SIDE, **OPTIONS))


def test_tiles_that_were_never_written_are_no_data_where_the_file_says_so(tmp_path):
    OUTCOMES["sparse"][0](tmp_path / "a.tif", np.random.default_rng(0))
    assert inspect(str(tmp_path / "a.tif")).unwritten
    options = {"file_bands": ["R", "G", "B"], "image_size": 8, "samples_per_epoch": 16, "fractions": (1.0, 0.0, 0.0)}
    sound(SceneFolder(str(tmp_path), nodata=0, **options, **OPTIONS))
    found = check_all(items_of(SceneFolder(str(tmp_path), nodata=0, **options, **OPTIONS)), workers=1)
    assert [f.kind for f in found] == [None]


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_cut_pictures(ending, tmp_path):
    whole = picture({"png": "png", "jpg": "jpeg"}[ending])
    (tmp_path / f"whole.{ending}").write_bytes(whole)
    (tmp_path / f"cut.{ending}").write_bytes(whole[: len(whole) - 60])
    assert inspect(str(tmp_path / f"whole.{ending}")).width == SIDE
    with pytest.raises(UnreadableFile):
        raster = inspect(str(tmp_path / f"cut.{ending}"))
        from xscale_lightning.data.geotiff import RasterReader, Source, common_grid

        RasterReader().read([Source(raster, 1)], common_grid([raster], 1.0), 0, 0, SIDE, SIDE)


def test_what_has_no_end_is_not_read(tmp_path):
    OUTCOMES["pipe"][0](tmp_path / "a.tif", None)
    OUTCOMES["device"][0](tmp_path / "b.tif", None)
    for name in ("a.tif", "b.tif"):
        with pytest.raises(OSError, match="no file"):
            FileStore(str(tmp_path)).read(name)


def test_masks_are_looked_at_with_their_images(tmp_path):
    rng = np.random.default_rng(0)
    fabricate(tmp_path / "images", 0, 12)
    for number, path in enumerate(sorted((tmp_path / "images").iterdir())):
        classes = rng.integers(0, 2, (1, SIDE, SIDE + (number == 3))).astype("uint8")
        classes[0, 0, 0] = 7 if number == 5 else 1
        write(tmp_path / "masks" / path.name, classes)
        place = tmp_path / "changes" / path.stem
        for name in ("A.tif", "B.tif"):
            write(place / name, make_damage.good(rng))
        write(place / "label.tif", classes)
    masks = MaskFolder(
        str(tmp_path / "images"), str(tmp_path / "masks"), file_bands=["R", "G", "B"], num_classes=2, **OPTIONS
    )
    changes = ChangeFolder(str(tmp_path / "changes"), label="label.tif", **OPTIONS)
    for data in (masks, changes):
        found = [f for f in check_all(items_of(data), workers=2) if f.kind]
        assert [(f.kind, "0003" in f.path, "0005" in f.path) for f in found] == [
            ("size", True, False),
            ("classes", False, True),
        ]
