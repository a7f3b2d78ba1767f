"""Pairs of dates: folders, splits without shared pixels, label values; OSCD's and UC Merced's layouts."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin

from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.change import ChangeFolder, SceneSplit
from xscale_lightning.data.change_scenes import Labels
from xscale_lightning.errors import UserError

BANDS = BandSelection(sensor="generic", names=["red", "nir"])


def write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "count": len(values), "height": values.shape[1], "width": values.shape[2]}
    with rasterio.open(
        path, "w", dtype=values.dtype, crs="EPSG:32650", transform=from_origin(0, 0, 30, 30), **profile
    ) as file:
        file.write(values)


def scene(folder: Path, height: int, width: int, number: int) -> None:
    """The first band counts the pixels, so a tile says where it is from."""
    where = (np.arange(height * width) + 10_000 * number).reshape(height, width)
    write(folder / "A.tif", np.stack([where, where]).astype(np.int32))
    write(folder / "B.tif", np.stack([where, where + 1]).astype(np.int32))
    Image.fromarray(np.tile(np.array([1, 2], np.uint8), (height, width // 2))).save(folder / "label.png")


@pytest.fixture
def root(tmp_path) -> Path:
    scene(tmp_path / "one", 20, 22, 1)
    scene(tmp_path / "two", 18, 16, 2)
    return tmp_path


def make(root: Path, **options) -> ChangeFolder:
    return ChangeFolder(str(root), **{"bands": BANDS, "image_size": 8, "batch_size": 4, "num_workers": 0, **options})


def pixels(data: ChangeFolder, split: str) -> list[int]:
    """Numbers of the pixels that have a label, over all tiles of a split."""
    dataset = data.dataset(split)
    parts = [dataset[i]["image"][0][dataset[i]["mask"] >= 0] for i in range(len(dataset))]
    return torch.cat(parts).int().tolist()


def test_a_batch(root):
    data = make(root)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == batch["image2"].shape == (4, 2, 8, 8) and batch["image"].dtype == torch.float32
    assert torch.equal(batch["image2"][:, 1], batch["image"][:, 1] + 1)
    assert batch["mask"].dtype == torch.int64 and batch["mask"].unique().tolist() == [0, 1]
    assert batch["gsd"].tolist() == [30.0] * 4
    assert (data.num_mask_classes, data.class_names, data.ignore_index) == (2, ("unchanged", "changed"), -1)


def test_blocks_of_different_splits_share_no_pixel(root):
    data = make(root, fractions=(0.4, 0.3, 0.3))
    found = [set(pixels(data, split)) for split in ("train", "val", "test")]
    assert all(found) and not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])


def test_every_pixel_of_a_test_scene_counts_once(root):
    data = make(root, split=SceneSplit(train=["two"], test=["one"]), fractions=(0.5, 0.5, 0.0))
    assert sorted(pixels(data, "test")) == [10_000 + i for i in range(20 * 22)]
    own = set(range(20_000, 20_000 + 18 * 16))
    train, val = set(pixels(data, "train")), set(pixels(data, "val"))
    assert train <= own and val <= own and not train & val


def test_training_tiles_overlap_as_the_stride_says(root):
    data = make(root, split=SceneSplit(train=["one"], val=["two"]), stride=4)
    assert len(data.dataset("train")) == 4 * 4
    assert data.dataset("test") is None


def test_tiles_without_a_label_are_left_out(root):
    values = np.zeros((20, 22), np.uint8)
    values[0, 0] = 2
    Image.fromarray(values).save(root / "one" / "label.png")
    data = make(root, split=SceneSplit(train=["two"], test=["one"]))
    assert len(data.dataset("test")) == 1
    assert (data.dataset("test")[0]["mask"] >= 0).sum() == 1


def test_bands_by_name(root):
    data = make(root, bands=BandSelection(sensor="generic", names=["nir"]), channels=["red", "nir"])
    sample = data.dataset("train")[0]
    assert sample["image"].shape[0] == 1 and torch.equal(sample["image2"], sample["image"] + 1)


def test_one_folder_is_one_scene(root):
    assert set(make(root / "one", fractions=(0.5, 0.25, 0.25)).find()) == {"one"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": SceneSplit(train=["three"])}, "there is no scene 'three'; there are one, two"),
        ({"split": SceneSplit(train=["one"], test=["one"])}, "named in two splits"),
        ({"split": SceneSplit(test=["one"])}, "no scene to train on"),
        ({"image_size": 19}, "more than scene two has, 18 x 16"),
        ({"labels": Labels(0, 1, 3)}, r"has the values \[2\]"),
        ({"bands": BandSelection(sensor="generic", names=["red"])}, "has 2 bands, and 1 are named"),
        ({"stride": 0}, "data.stride: 0 is not possible"),
        ({"fractions": (0.5, 0.1, 0.1)}, "needs three shares"),
    ],
)
def test_wrong_input_is_named(root, options, message):
    with pytest.raises(UserError, match=message):
        make(root, **options).setup("fit")


def test_sizes_that_differ_are_named(root):
    scene(root / "three", 16, 16, 3)
    Image.fromarray(np.ones((16, 8), np.uint8)).save(root / "three" / "label.png")
    with pytest.raises(UserError, match=r"scene three: .* differ in size \(16 x 16, 16 x 16, 16 x 8\)"):
        make(root).setup("fit")


def test_folders_without_pairs_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        make(tmp_path / "nowhere").setup("fit")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no pair"):
        make(tmp_path).setup("fit")


def oscd(root: Path, cities: dict[str, str]) -> None:
    """The layout of OSCD with cities of 16 x 24 pixels."""
    from torchgeo.datasets import OSCD

    name = "Onera Satellite Change Detection dataset - "
    for number, (city, split) in enumerate(cities.items()):
        for date in (1, 2):
            folder = root / f"{name}Images" / city / f"imgs_{date}_rect"
            folder.mkdir(parents=True)
            for i, band in enumerate(OSCD.all_bands):
                values = np.full((16, 24), 1000 * number + 10 * i + date, np.int32)
                Image.fromarray(values).save(folder / f"{band}.tif")
        (root / f"{name}Images" / city / "dates.txt").write_text("date_1: 20160101\ndate_2: 20170101\n")
        folder = root / f"{name}{split} Labels" / city / "cm"
        folder.mkdir(parents=True)
        Image.fromarray(np.tile(np.array([0, 255], np.uint8), (16, 12))).save(folder / "cm.png")


def test_oscd_keeps_cities_for_validation(tmp_path):
    from xscale_lightning.data.oscd import OSCDData

    oscd(tmp_path, {"beta": "Train", "alpha": "Train", "gamma": "Test"})
    bands = BandSelection("sentinel2_l1c", names=["B03", "B02"])
    data = OSCDData(str(tmp_path), bands, validation=1, image_size=16, num_workers=0)
    cities = {
        split: [data.dataset(split)[i] for i in range(len(data.dataset(split)))] for split in ("train", "val", "test")
    }
    assert {split: {tile["file"] for tile in tiles} for split, tiles in cities.items()} == {
        "train": {"alpha"},
        "val": {"beta"},
        "test": {"gamma"},
    }
    first = cities["train"][0]
    assert first["image"][:, 0, 0].tolist() == [1021.0, 1011.0] and first["image2"][:, 0, 0].tolist() == [
        1022.0,
        1012.0,
    ]
    assert sum(int((tile["mask"] >= 0).sum()) for tile in cities["test"]) == 16 * 24
    with pytest.raises(UserError, match="leave none to train"):
        OSCDData(str(tmp_path), bands, validation=2, image_size=16).setup("fit")


def test_ucmerced_has_several_labels(tmp_path):
    from xscale_lightning.data.ucmerced import UCMercedMultiLabel

    folder = tmp_path / "UCMerced_LandUse" / "Images" / "beach"
    folder.mkdir(parents=True)
    for i in range(2):
        Image.fromarray(np.full((256, 256, 3), i, np.uint8)).save(folder / f"beach0{i}.tif")
    (tmp_path / "uc_merced-train.txt").write_text("beach01.tif\n")
    table = tmp_path / "LandUse_Multilabeled.txt"
    table.write_bytes(b"IMAGE\\LABEL\tsand\tsea\tcars\r\nbeach00\t1\t0\t0\r\nbeach01\t1\t1\t0\r\n")
    data = UCMercedMultiLabel(str(tmp_path), "train")
    assert data.names == ["sand", "sea", "cars"] and data.num_classes == 3 and len(data) == 1
    assert data[0]["label"].tolist() == [1, 1, 0] and data[0]["image"].shape == (3, 256, 256)
    table.write_text("IMAGE\\LABEL\tsand\nbeach00\t1\n")
    with pytest.raises(UserError, match="has no line for image beach01"):
        UCMercedMultiLabel(str(tmp_path), "train")
    table.unlink()
    with pytest.raises(UserError, match="does not exist; the labels of Chaudhuri"):
        UCMercedMultiLabel(str(tmp_path), "train")
