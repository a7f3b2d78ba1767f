"""Folders of images and masks: matched, cut, split, mapped to classes, and refused where they do not fit."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin

from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.mask_folder import MaskFolder
from xscale_lightning.errors import UserError

BANDS = BandSelection("generic", names=["a", "b"], mean=[100.0, 200.0], std=[30.0, 30.0])


def write(path: Path, values: np.ndarray, left: float = 500_000, nodata: float | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "count": len(values), "height": values.shape[1], "width": values.shape[2]}
    place = {"crs": "EPSG:32633", "transform": from_origin(left, 5_000_000, 10, 10), "nodata": nodata}
    with rasterio.open(path, "w", dtype=values.dtype, **place, **profile) as file:
        file.write(values)


def scene(size: int = 32, number: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Image and mask that say the same: pixel (row, column) has value 1000 number + 2 * (row + column) + class."""
    mask = (np.indices((size, size)).sum(0) // 8 % 3).astype(np.uint8)
    image = (1000 * number + 30 * mask + 10 + np.zeros((2, size, size))).astype(np.int16)
    return image, mask[None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(6):
        image, mask = scene(number=0)
        write(tmp_path / "images" / f"tile_{i}.tif", image)
        write(tmp_path / "labels" / f"tile_{i}.tif", mask)
    return tmp_path


def data(root: Path, **options) -> MaskFolder:
    given = {"bands": BANDS, "files": "images/", "files_masks": "labels/", "num_classes": 3, "image_size": 16}
    return MaskFolder(str(root), num_workers=0, batch_size=5, **{**given, **options})


def all_of(module: MaskFolder, split: str) -> dict[str, torch.Tensor]:
    batches = list(module.probe_dataloader(split))
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def test_every_pixel_has_its_class(folder):
    module = data(folder)
    module.setup("fit")
    module.setup("test")
    assert module.num_mask_classes == 3 and module.class_names == ("0", "1", "2") and module.ignore_index == -1
    assert module.num_classes is None
    places = []
    for split in ("train", "val", "test"):
        batch = all_of(module, split)
        assert batch["mask"].dtype == torch.int64 and batch["mask"].shape == (len(batch["image"]), 16, 16)
        assert torch.equal(batch["image"][:, 0], 30.0 * batch["mask"] + 10)  # cut from the same place
        assert batch["gsd"].unique().tolist() == [10.0]
        places += [tuple(place) for place in batch["origin"].tolist()]
    assert len(places) == len(set(places)) == 24
    batch = next(iter(module.train_dataloader()))
    assert torch.equal(batch["image"][:, 0], 30.0 * batch["mask"] + 10)
    again = data(folder)
    assert torch.equal(all_of(again, "val")["origin"], all_of(module, "val")["origin"])


def test_one_large_image_is_split_into_blocks(tmp_path):
    image, mask = scene(96)
    write(tmp_path / "images" / "chip.tif", image)
    write(tmp_path / "labels" / "chip.tif", mask)
    module = data(tmp_path)
    counts = [len(all_of(module, split)["mask"]) for split in ("train", "val", "test")]
    assert sum(counts) == 36 and min(counts) >= 7


def test_files_too_large_for_memory_are_read_by_window(folder):
    held, read = all_of(data(folder), "train"), all_of(data(folder, cache_mb=0), "train")
    assert torch.equal(held["mask"], read["mask"]) and torch.equal(held["image"], read["image"])


def test_labels_are_mapped_and_ignored(folder):
    module = data(folder, num_classes=None, labels={2: 0, 0: 1}, ignore=[1])
    plain = all_of(data(folder), "train")["mask"]
    expected = torch.tensor([1, -1, 0])[plain]
    assert torch.equal(all_of(module, "train")["mask"], expected)
    assert module.class_names == ("2", "0")


def test_pixels_without_data_are_ignored(tmp_path):
    for i in range(4):
        image, mask = scene()
        image[:, :4] = -9  # no band has data
        image[0, 8:12] = -9  # one has
        write(tmp_path / "images" / f"{i}.tif", image, nodata=-9)
        write(tmp_path / "labels" / f"{i}.tif", mask, nodata=0)  # a class stays one, whatever the file says
    batch = all_of(data(tmp_path, image_size=32), "train")
    assert bool((batch["mask"][:, :4] == -1).all()) and bool((batch["mask"][:, 4:] >= 0).all())
    assert bool((batch["image"][:, 0, 8:12] == 100).all())  # filled with the band's mean
    assert "valid" not in batch


def test_png_masks_and_pictures(tmp_path):
    for i in range(6):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "masks").mkdir(exist_ok=True)
        mask = scene()[1][0]
        Image.fromarray(np.stack([60 * mask] * 3, axis=-1)).save(tmp_path / "images" / f"p-{i}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"p-{i}.png")
    module = data(tmp_path, bands=BandSelection("rgb"), files_masks="masks/", gsd=0.5)
    batch = all_of(module, "train")
    assert torch.equal(batch["image"][:, 2], 60.0 * batch["mask"]) and batch["gsd"].unique().tolist() == [0.5]


def test_lists_of_names_make_the_splits(folder):
    (folder / "train.csv").write_text("tile_0.tif,tile_0.tif\ntile_1.tif,tile_1.tif\n")
    (folder / "val.txt").write_text("tile_2\n")
    module = data(folder, train_list="train.csv", val_list="val.txt", image_size=32)
    assert len(all_of(module, "train")["mask"]) == 2 and len(all_of(module, "val")["mask"]) == 1
    assert module.dataset("test") is None
    with pytest.raises(UserError, match=r"data.val_list: images/tile_0 is in another list"):
        data(folder, train_list="train.csv", val_list="train.csv").setup("fit")
    (folder / "other.txt").write_text("nothing\n")
    with pytest.raises(UserError, match=r"data.val_list: none of the images"):
        data(folder, train_list="train.csv", val_list="other.txt").setup("fit")
    with pytest.raises(UserError, match=r"data.train_list: no file 'gone.txt'"):
        data(folder, train_list="gone.txt").setup("fit")


def test_names_share_a_key(tmp_path, caplog):
    for i in range(3):
        image, mask = scene()
        write(tmp_path / "S2" / f"place_{i}_S2.tif", image)
        if i:
            write(tmp_path / "L" / f"place_{i}_Label.tif", mask)
    module = data(tmp_path, files="S2/", files_masks="L/", key="(place_[0-9]+)", fractions=(1.0, 0.0, 0.0))
    assert len(all_of(module, "train")["mask"]) == 8
    assert "1 of 3 images have no mask" in caplog.text
    with pytest.raises(UserError, match="both have the key 'place'"):
        data(tmp_path, files="S2/", files_masks="L/", key="(place)").setup("fit")


@pytest.mark.parametrize("cache_mb", [1024, 0])
def test_a_value_that_is_no_class_is_named_with_its_file_and_skipped(folder, cache_mb, caplog):
    _, mask = scene()
    mask[0, 3, 3] = 7
    for i in range(6):
        options = {"cache_mb": cache_mb, "image_size": 32, "fractions": (1.0, 0.0, 0.0)}
        write(folder / "labels" / f"tile_{i}.tif", mask)
        if i == 0:
            assert all_of(data(folder, **options), "train")["mask"].max() == 2
            assert "tile_0.tif: value 7 is no class (classes: 0, 1, 2; ignored: none)" in caplog.text
            with pytest.raises(UserError, match=r"tile_0.tif: value 7 is no class .* data.on_error: skip"):
                all_of(data(folder, on_error="stop", **options), "train")
    with pytest.raises(UserError, match="value 7 is no class" if cache_mb else "files are named above"):
        all_of(data(folder, **options), "train")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: write(p, np.zeros((1, 31, 40), np.uint8)),
            r"tile_3.tif: the mask has 31 x 40 pixels, its image .*32 x 32",
        ),
        (lambda p: write(p, np.zeros((3, 32, 32), np.uint8)), "tile_3.tif: the mask has 3 bands"),
        (lambda p: write(p, np.zeros((1, 32, 32), np.uint8), left=500_030), "3 pixels beside"),
    ],
)
def test_masks_that_do_not_lie_on_their_image(folder, damage, message, caplog):
    damage(folder / "labels" / "tile_3.tif")
    with pytest.raises(UserError, match=message):
        data(folder, on_error="stop").setup("fit")
    module = data(folder)
    module.setup("fit")
    assert set(module.left_out) == {str(folder / "labels" / "tile_3.tif")} and "tile_3.tif: the mask" in caplog.text


def test_an_unreadable_mask_is_left_out(folder, caplog):
    (folder / "labels" / "tile_3.tif").write_bytes(b"no raster")
    module = data(folder, fractions=(1.0, 0.0, 0.0))
    assert len(all_of(module, "train")["mask"]) == 20 and "tile_3.tif" in caplog.text
    with pytest.raises(UserError, match=r"tile_3.tif"):
        data(folder, on_error="stop").setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files_masks": "nothing"}, "fits 'nothing'"),
        ({"key": "_([0-9]+)x"}, "no masks found"),
        ({"root_masks": "/nowhere"}, "data.root_masks: folder '/nowhere' does not exist"),
        ({"num_classes": None}, "data.num_classes: nothing says"),
        ({"class_names": ["a", "b"]}, r"class_names 2, data.num_classes 3"),
        ({"labels": {0: 0, 1: 2}, "num_classes": None}, r"classes \[0, 2\] are not possible"),
        ({"labels": {0: 0, 1: 1, 2: 2}, "ignore": [2]}, "data.ignore: 2 is a class"),
    ],
)
def test_wrong_arguments(folder, options, message):
    with pytest.raises(UserError, match=message):
        data(folder, **options).setup("fit")
