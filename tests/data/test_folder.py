import shutil

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin

from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.folder import ImageFolderData
from xscale_lightning.errors import UserError

CLASSES = ("Forest", "River", "Sea Lake")


def picture(path, value, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def geotiff(path, array, crs="EPSG:32633", gsd=10.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "height": array.shape[1], "width": array.shape[2], "count": len(array)}
    transform = from_origin(500_000, 5_000_000, gsd, gsd)
    with rasterio.open(path, "w", dtype=array.dtype, crs=crs, transform=transform, **profile) as file:
        file.write(array)


@pytest.fixture
def root(tmp_path):
    """3 classes of 10 png pictures; the red value is the class, the green one the number of the picture."""
    folder = tmp_path / "EuroMini"
    for number, name in enumerate(CLASSES):
        for i in range(10):
            picture(folder / "2750" / name / f"{name}_{i}.png", (number, i, 255))
    return folder


def samples(data, split):
    batches = list(data.probe_dataloader(split))
    files = [file for batch in batches for file in batch["file"]]
    return torch.cat([b["image"] for b in batches]), torch.cat([b["label"] for b in batches]), files


def test_folder_is_read_with_raw_values_and_labels(root):
    data = ImageFolderData(str(root), gsd=10.0, batch_size=7, num_workers=0)
    data.setup("fit")
    images, numbers, files = samples(data, "train")
    assert (data.name, data.num_classes, data.image_size, data.multilabel) == ("euromini", 3, (8, 8), False)
    assert images.shape == (24, 3, 8, 8)
    assert torch.equal(images[:, 0, 0, 0].long(), numbers)
    assert (images[:, 2] == 255).all()
    assert files[0].endswith(".png")


def test_fixed_random_splits_are_disjoint_and_complete(root):
    names = [set(samples(ImageFolderData(str(root), gsd=1.0, num_workers=0), s)[2]) for s in ("train", "val", "test")]
    assert [len(part) for part in names] == [24, 3, 3]
    assert len(set.union(*names)) == 30
    assert set(samples(ImageFolderData(str(root), gsd=1.0, num_workers=0), "val")[2]) == names[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_zip_file_reads_like_its_folder(root, workers):
    archive = shutil.make_archive(str(root), "zip", root)
    unpacked = samples(ImageFolderData(str(root), gsd=10.0, num_workers=0), "train")
    packed = samples(ImageFolderData(archive, gsd=10.0, batch_size=5, num_workers=workers), "train")
    assert torch.equal(unpacked[0], packed[0]) and torch.equal(unpacked[1], packed[1])


def test_lists_make_the_splits(root):
    (root.parent / "train.txt").write_text("Forest_0.jpg\nRiver_3.jpg\nSea Lake_1.jpg\n")
    (root / "val.txt").write_text("River_4.png\n")
    data = ImageFolderData(str(root), train_list="train.txt", val_list="val.txt", gsd=1.0, num_workers=0)
    assert sorted(samples(data, "train")[2]) == [
        f"2750/{n}.png" for n in ("Forest/Forest_0", "River/River_3", "Sea Lake/Sea Lake_1")
    ]
    assert samples(data, "val")[1].tolist() == [1]
    assert data.dataset("test") is None


def test_folders_called_train_and_val_make_the_splits(tmp_path):
    for split, count in (("train", 3), ("valid", 1)):
        for name in ("a", "b"):
            for i in range(count):
                picture(tmp_path / split / name / f"{i}.jpg", (0, 0, 0))
    data = ImageFolderData(str(tmp_path), gsd=1.0, num_workers=0)
    assert (len(data.dataset("train")), len(data.dataset("val")), data.dataset("test")) == (6, 2, None)


def test_geotiffs_bring_bands_by_name_and_gsd(tmp_path):
    for name in ("a", "b"):
        for i in range(3):
            geotiff(
                tmp_path / name / f"{i}.tif",
                np.arange(4, dtype=np.uint16).reshape(4, 1, 1) * np.ones((1, 6, 5), np.uint16),
                gsd=2.5,
            )
    bands = BandSelection("planet", ["NIR", "Red"])
    data = ImageFolderData(str(tmp_path), bands=bands, channels=["Blue", "Green", "Red", "NIR"], num_workers=0)
    batch = next(iter(data.probe_dataloader("train")))
    assert batch["image"].shape[1:] == (2, 6, 5)
    assert (batch["image"][:, 0] == 3).all() and (batch["image"][:, 1] == 2).all()
    assert torch.equal(batch["gsd"], torch.full_like(batch["gsd"], 2.5))


def test_different_sizes_are_resized_and_gsd_follows(tmp_path):
    for name in ("a", "b"):
        for i, size in enumerate([(8, 8), (16, 16), (32, 8)]):  # (width, height)
            picture(tmp_path / name / f"{i}.png", (50, 60, 70), size)
    (tmp_path / "all.txt").write_text("0\n1\n2\n")
    data = ImageFolderData(str(tmp_path), train_list="all.txt", gsd=1.0, image_size=8, num_workers=0)
    batch = next(iter(data.probe_dataloader("train")))
    assert batch["image"].shape == (6, 3, 8, 8)
    assert batch["gsd"].tolist() == [1.0, 2.0, 2.0, 1.0, 2.0, 2.0]
    torch.testing.assert_close(batch["image"], torch.tensor([50.0, 60.0, 70.0]).view(1, 3, 1, 1).expand(6, 3, 8, 8))
    unsized = ImageFolderData(str(tmp_path), train_list="all.txt", gsd=1.0, num_workers=0)
    with pytest.raises(UserError, match=r"data.image_size"):
        next(iter(unsized.probe_dataloader("train")))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\nbroken"])
def test_damaged_pictures_are_left_out_or_stop_the_run(root, content):
    broken = sorted((root / "2750" / "River").glob("*.png"))
    for path in broken:
        path.write_bytes(content)
    data = ImageFolderData(str(root), gsd=1.0, num_workers=0)
    images, numbers, _ = samples(data, "train")
    assert len(images) == 16 and 1 not in numbers and data.left_out_samples == {"train": 8}
    assert (images[:, 2] == 255).all()  # never a black image
    data = ImageFolderData(str(root), gsd=1.0, on_error="stop", num_workers=0)
    with pytest.raises(UserError, match=r"River/River_\d.png is not readable"):
        samples(data, "train")


def test_truncated_geotiff_is_named(tmp_path):
    for name in ("a", "b"):
        for i in range(3):
            geotiff(tmp_path / name / f"{i}.tif", np.ones((3, 64, 64), np.uint16))
    path = tmp_path / "b" / "2.tif"
    path.write_bytes(path.read_bytes()[:2000])
    (tmp_path / "all.txt").write_text("0\n1\n2\n")
    data = ImageFolderData(str(tmp_path), train_list="all.txt", on_error="stop", num_workers=0)
    with pytest.raises(UserError, match=r"b/2.tif is not readable"):
        samples(data, "train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"root": "nowhere"}, "data.root: folder 'nowhere' does not exist"),
        ({"class_level": 0}, "class_level: 0"),
        ({"holdout": 0.5}, "data.holdout"),
        ({"gsd": 0.0}, "data.gsd"),
        ({"image_size": 0}, "data.image_size"),
        ({"on_error": "ignore"}, "data.on_error"),
        ({"train_list": "none.txt"}, "data.train_list: no file 'none.txt'"),
        ({"gsd": None}, "data.gsd"),
        ({"bands": BandSelection("naip")}, "4 bands are named"),
        ({"bands": BandSelection("rgb", ["R", "X"])}, "no X; it has R, G, B"),
    ],
)
def test_wrong_arguments_are_named(root, arguments, message):
    arguments = {"root": str(root), "gsd": 1.0, "num_workers": 0} | arguments
    with pytest.raises(UserError, match=message) as error:
        ImageFolderData(**arguments).setup("fit")
    assert len(str(error.value).splitlines()) <= 2


def test_folders_that_are_no_labelled_pictures_are_refused(tmp_path):
    with pytest.raises(UserError, match="is empty"):
        ImageFolderData(str(tmp_path), gsd=1.0).setup("fit")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="holds no image"):
        ImageFolderData(str(tmp_path), gsd=1.0).setup("fit")
    with pytest.raises(UserError, match="no readable zip file"):
        ImageFolderData(str(tmp_path / "notes.txt"), gsd=1.0).setup("fit")
    picture(tmp_path / "only" / "0.png", (1, 2, 3))
    with pytest.raises(UserError, match="one folder only"):
        ImageFolderData(str(tmp_path), gsd=1.0).setup("fit")


S2 = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12"]
NO_CIRRUS = BandSelection(sensor="sentinel2_l1c_12")


@pytest.fixture
def fmow(tmp_path):
    """fMoW-Sentinel's layout: splits, classes, places; band c holds 100 * c; sizes vary, and one download failed."""
    sizes = iter(range(20, 120, 3))
    for split, places in (("train", (0, 1)), ("val", (0,)), ("test_gt", (0,))):
        for label in ("airport", "zoo"):
            for place in places:
                for number in (3, 107):
                    array = np.tile(100 * np.arange(13, dtype=np.uint16)[:, None, None], (1, next(sizes), 30))
                    if split == "train" and label == "zoo" and place == 1 and number == 107:
                        array = array[:1]
                    name = f"{label}_{place}"
                    geotiff(tmp_path / "fmow" / split / label / name / f"{name}_{number}.tif", array, crs="EPSG:4326")
    rows = [
        "category,location_id,image_id,timestamp,polygon",
        'airport,0,3,2016-01-01T00:00:00Z,"POLYGON ((1 2, 3 4))"',
    ]
    (tmp_path / "fmow" / "train.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "fmow"


def fmow_data(root, **options):
    return ImageFolderData(
        str(root), bands=NO_CIRRUS, channels=S2, class_level=2, gsd=10.0, image_size=24, num_workers=0, **options
    )


def test_fmow_sentinel_is_read_by_name_resized_and_labelled_by_the_second_folder(fmow):
    data = fmow_data(fmow)
    data.setup("fit")
    assert (data.num_classes, data.image_size) == (2, (24, 24))
    images, labels, files = samples(data, "val")
    assert images.shape == (4, 12, 24, 24) and labels.tolist() == [0, 0, 1, 1]
    expected = [100.0 * S2.index(name) for name in data.bands.names]  # no 1000, which is B10
    assert images.mean(dim=(2, 3)).allclose(torch.tensor(expected)) and 1000.0 not in expected
    assert all("/val/" in f"/{file}" for file in files)
    assert all("test_gt" in file for file in samples(data, "test")[2])
    gsd = next(iter(data.val_dataloader()))["gsd"]
    height = rasterio.open(fmow / files[0]).height
    assert gsd[0] == pytest.approx(10 * (height * 30 / 24**2) ** 0.5)


def test_a_failed_download_with_one_band_is_named_and_left_out(fmow, caplog):
    data = fmow_data(fmow)
    images, _, _ = samples(data, "train")
    assert images.shape == (7, 12, 24, 24) and images[:, 1].min() > 99
    assert data.left_out_samples == {"train": 1}
    assert "zoo_1_107.tif is not readable" in caplog.text and "1 bands where data.channels names 13" in caplog.text


def test_a_csv_list_chooses_within_the_folder_of_its_split(fmow):
    data = fmow_data(fmow, train_list="train.csv")
    assert samples(data, "train")[2] == ["train/airport/airport_0/airport_0_3.tif"]  # not val's of the same name


def test_a_csv_without_those_columns_is_a_list_of_names(root):
    (root / "part.csv").write_text("Forest_1.png\nRiver_2\n")
    data = ImageFolderData(str(root), gsd=1.0, num_workers=0, train_list="part.csv")
    assert len(samples(data, "train")[2]) == 2


def test_the_order_of_many_unnamed_bands_is_said_once_and_names_in_the_files_win(tmp_path, caplog):
    for named in (False, True):
        root = tmp_path / f"set{named}"
        for label in ("a", "b"):
            for i in range(3):
                path = root / label / f"{label}{i}.tif"
                geotiff(path, np.tile(np.arange(13, dtype=np.uint16)[:, None, None], (1, 8, 8)))
                if named:
                    with rasterio.open(path, "r+") as file:
                        file.descriptions = [*S2[:8], *S2[9:], "B8A"]  # EuroSAT's order
        data = ImageFolderData(str(root), bands=BandSelection(sensor="sentinel2_l1c"), num_workers=0)
        data.setup("fit")
        images, _, _ = samples(data, "train")
        assert images[0, 8, 0, 0] == (12 if named else 8)
    told = [record.getMessage() for record in caplog.records if "taken in order" in record.getMessage()]
    assert len(told) == 1 and "setFalse" in told[0]


def test_pixels_that_are_not_finite_get_the_mean_of_their_band(tmp_path, caplog):
    for label in ("a", "b"):
        for i in range(4):
            array = np.full((3, 4, 4), 5.0, np.float32)
            array[1, :2], array[1, 2:] = 1.0, 3.0
            array[1, 0, 0] = np.nan
            if (label, i) == ("b", 2):
                array[0] = np.nan
            geotiff(tmp_path / "set" / label / f"{label}{i}.tif", array)
    data = ImageFolderData(str(tmp_path / "set"), num_workers=0, on_error="skip")
    images = torch.cat([samples(data, split)[0] for split in ("train", "val", "test")])
    assert images.isfinite().all() and len(images) == 7
    assert images[0, 1, 0, 0] == pytest.approx((7 + 24) / 15)
    assert sum(data.left_out_samples.values()) == 1 and "a band has no finite pixel" in caplog.text
