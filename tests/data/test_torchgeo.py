import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml
from jsonargparse import ArgumentParser
from rasterio.transform import from_origin
from torch.utils.data import Dataset
from torchgeo.datamodules import EuroSATDataModule, GeoDataModule
from torchgeo.datasets import SSL4EOS12, BigEarthNet, EuroSAT, RasterDataset, UCMerced
from torchgeo.samplers import GridGeoSampler

import xscale_lightning.data.folder  # noqa: F401  (makes ImageFolderData known by its short name)
from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.datamodule import XScaleDataModule
from xscale_lightning.data.samplers import begin_inside
from xscale_lightning.data.torchgeo import SplitNames, TorchGeoData
from xscale_lightning.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
CLASSES = ("AnnualCrop", "Forest")
FILE_ORDER = EuroSAT.all_band_names  # B8A comes last in the files


def write(path, array, crs="EPSG:32633", gsd=10.0, origin=(500_000, 5_000_000)):
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "count": len(array), "height": array.shape[1], "width": array.shape[2]}
    with rasterio.open(path, "w", dtype=array.dtype, crs=crs, transform=from_origin(*origin, gsd, gsd), **profile) as f:
        f.write(array)


@pytest.fixture(scope="module")
def eurosat(tmp_path_factory):
    """Four images a class and split; channel c of every image holds the value 100 (c + 1), label included in B01."""
    root = tmp_path_factory.mktemp("eurosat")
    values = 100 * np.arange(1, 14, dtype=np.uint16).reshape(13, 1, 1)
    for s, split in enumerate(("train", "val", "test")):
        names = []
        for name in CLASSES:
            for i in range(2):
                names.append(f"{name}_{10 * s + i}.jpg")
                write(
                    root / EuroSAT.base_dir / name / f"{name}_{10 * s + i}.tif", values + np.zeros((1, 8, 8), np.uint16)
                )
        (root / f"eurosat-{split}.txt").write_text("\n".join(names))
    return str(root)


def first(data, split="train"):
    return next(iter(data.probe_dataloader(split)))


def test_bands_come_by_name_not_by_position(eurosat):
    data = TorchGeoData(eurosat, EuroSAT, bands=BandSelection(names=["B8A", "B02", "B12"]), num_workers=0)
    data.setup("fit")
    batch = first(data)
    assert batch["image"].shape == (4, 3, 8, 8) and batch["image"].dtype == torch.float32
    expected = [100.0 * (FILE_ORDER.index(name) + 1) for name in ("B8A", "B02", "B12")]
    assert batch["image"][0, :, 0, 0].tolist() == expected  # raw values: nothing has normalised them
    assert batch["label"].tolist() == [0, 0, 1, 1]
    assert (data.name, data.num_classes, data.multilabel, data.image_size) == ("eurosat", 2, False, (8, 8))
    assert Path(batch["file"][0]).name.startswith("AnnualCrop_")


def test_all_thirteen_bands_follow_the_preset_and_splits_differ(eurosat):
    data = TorchGeoData(eurosat, EuroSAT, num_workers=0)
    assert first(data)["image"][0, 8:10, 0, 0].tolist() == [1300.0, 900.0]  # B8A, B09
    files = [set(first(data, split)["file"]) for split in ("train", "val", "test")]
    assert len(set.union(*files)) == 12


def test_missing_band_is_named(eurosat):
    data = TorchGeoData(eurosat, partial(EuroSAT, bands=("B02", "B03")), bands=BandSelection("sentinel2_rgb"))
    with pytest.raises(UserError, match="eurosat has no B04; it has B02, B03"):
        data.setup("fit")


def test_data_module_gives_raw_values_and_its_splits(eurosat):
    data = TorchGeoData(eurosat, datamodule=EuroSATDataModule(root="elsewhere"), num_workers=0, batch_size=2)
    data.setup("fit")
    assert first(data)["image"][0, :2, 0, 0].tolist() == [100.0, 200.0]
    assert data.name == "eurosat"
    assert len(first(data, "test")["label"]) == 2


def test_gsd_argument_beats_preset_and_resize_scales_it(eurosat):
    assert first(TorchGeoData(eurosat, EuroSAT, num_workers=0))["gsd"].tolist() == [10.0] * 4
    data = TorchGeoData(eurosat, EuroSAT, gsd=3.0, image_size=(4, 16), num_workers=0)
    batch = first(data)
    assert batch["image"].shape == (4, 13, 4, 16) and data.image_size == (4, 16)
    torch.testing.assert_close(batch["gsd"], torch.full((4,), 3.0))  # half as high, twice as wide
    batch = first(TorchGeoData(eurosat, EuroSAT, gsd=3.0, image_size=4, num_workers=0))
    torch.testing.assert_close(batch["gsd"], torch.full((4,), 6.0))


@pytest.mark.parametrize("dataset", [EuroSAT, UCMerced, BigEarthNet, SSL4EOS12])
def test_missing_and_empty_folders_are_named_before_any_download(tmp_path, monkeypatch, dataset):
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: pytest.fail("tried to download"))
    options = {"split_argument": None} if dataset is SSL4EOS12 else {}
    for root, message in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "is empty")):
        data = TorchGeoData(str(root), dataset, **options)
        data.prepare_data()
        with pytest.raises(UserError, match=rf"data.root: folder '{root}' {message}.*data.download") as error:
            data.setup("fit")
        assert len(str(error.value).splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_folder_with_something_else_is_named(tmp_path):
    (tmp_path / "holiday.txt").write_text("sun")
    with pytest.raises(UserError, match=r"holds no usable eurosat data \(Dataset not found"):
        TorchGeoData(str(tmp_path), EuroSAT).setup("fit")
    with pytest.raises(UserError, match="holds no usable eurosat data"):
        TorchGeoData(str(tmp_path), datamodule=EuroSATDataModule()).setup("fit")


def test_download_is_handed_on_once(tmp_path):
    calls = []

    class Downloadable(Listed):
        def __init__(self, root="data", split="train", download=False):
            calls.append((root, split, download))
            super().__init__(torch.zeros(3, 4, 4))

    root = str(tmp_path / "new")
    data = TorchGeoData(root, Downloadable, bands=BandSelection("sentinel2_rgb"), download=True)
    data.prepare_data()
    assert calls == [(root, "train", True), (root, "val", True), (root, "test", True)]
    with pytest.raises(UserError, match=r"data\.download: unsplit cannot download"):
        TorchGeoData(str(tmp_path), Unsplit, download=True).prepare_data()


@pytest.mark.parametrize("content", [b"", None])
def test_damaged_files_are_replaced_left_out_or_stop_the_run(tmp_path, eurosat, content):
    root = tmp_path / "copy"
    shutil.copytree(eurosat, root)
    damaged = root / EuroSAT.base_dir / "Forest" / "Forest_0.tif"
    damaged.write_bytes(damaged.read_bytes()[:700] if content is None else content)
    data = TorchGeoData(str(root), EuroSAT, num_workers=0)
    data.setup("fit")
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert data.skipped == 1 and len(batch["image"]) == 4 and batch["image"].min() == 100  # another, not a black one
    assert damaged.name not in {Path(file).name for file in batch["file"]}
    batch = first(data)
    assert data.left_out_samples == {"train": 1} and len(batch["image"]) == 3
    assert damaged.name not in {Path(file).name for file in batch["file"]}
    with pytest.raises(UserError, match=r"Forest_0.tif is not readable"):
        first(TorchGeoData(str(root), EuroSAT, on_error="stop", num_workers=0))


class Listed(Dataset):
    """Eight copies of one image; `extra` is merged into every sample."""

    def __init__(self, image, **extra):
        self.image, self.extra = image, extra

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if not 0 <= index < 8:
            raise IndexError(index)
        return {"image": self.image + index, **self.extra}


class Unsplit(Listed):
    def __init__(self, root="data"):
        super().__init__(torch.zeros(3, 4, 4))


RGB = BandSelection("sentinel2_rgb")


def test_given_datasets_are_the_splits():
    data = TorchGeoData(
        train=Listed(torch.zeros(3, 4, 4)), val=partial(Listed, torch.ones(3, 4, 4)), bands=RGB, num_workers=0
    )
    assert first(data)["image"].mean() == 3.5 and first(data, "val")["image"].mean() == 4.5
    assert data.dataset("test") is None and data.num_classes is None and "label" not in first(data)


def test_unknown_bands_must_match_in_number():
    data = TorchGeoData(train=Listed(torch.zeros(4, 4, 4)), bands=RGB, num_workers=0)
    with pytest.raises(UserError, match=r"listed delivers images of shape \(4, 4, 4\), but 3 bands are named"):
        data.setup("fit")
    channels = ["B02", "B03", "B04", "B08"]
    image = torch.arange(4.0).view(4, 1, 1).expand(4, 4, 4)
    data = TorchGeoData(train=Listed(image), bands=RGB, channels=channels, num_workers=0)
    assert first(data)["image"][0, :, 0, 0].tolist() == [2.0, 1.0, 0.0]


def test_multilabel_is_seen():
    data = TorchGeoData(train=Listed(torch.zeros(3, 4, 4), label=torch.tensor([0, 1, 1])), bands=RGB, num_workers=0)
    batch = first(data)
    assert data.multilabel and batch["label"].shape == (8, 3) and batch["label"].dtype == torch.int64


def test_data_without_split_is_held_out_from(tmp_path):
    (tmp_path / "x").touch()
    data = TorchGeoData(str(tmp_path), Unsplit, bands=RGB, holdout=0.25, num_workers=0)
    train, val = (set(first(data, split)["image"][:, 0, 0, 0].tolist()) for split in ("train", "val"))
    assert (len(train), len(val)) == (6, 2) and not train & val
    assert data.dataset("test") is None
    assert TorchGeoData(str(tmp_path), Unsplit, bands=RGB, num_workers=0).val_dataloader() == []


def test_splits_may_have_other_names(tmp_path):
    class Renamed(Listed):
        def __init__(self, subset="training"):
            assert subset in ("training", "evaluation")
            super().__init__(torch.full((3, 4, 4), float(len(subset))))

    data = TorchGeoData(
        dataset=Renamed,
        split_argument="subset",
        splits=SplitNames("training", "evaluation", None),
        bands=RGB,
        num_workers=0,
    )
    assert first(data, "val")["image"].min() == 10.0
    assert data.dataset("test") is None


def test_gsd_in_the_sample_and_unknown_gsd():
    bands = BandSelection("rgb")
    assert (
        first(TorchGeoData(train=Listed(torch.zeros(3, 4, 4), res=torch.tensor(30)), bands=bands, num_workers=0))[
            "gsd"
        ].tolist()
        == [30.0] * 8
    )
    with pytest.raises(UserError, match=r"data.gsd"):
        TorchGeoData(train=Listed(torch.zeros(3, 4, 4)), bands=bands).setup("fit")


class Scenes(RasterDataset):
    filename_glob = "*.tif"
    all_bands = ("R", "G", "B", "NIR")
    bands = all_bands


class ScenesDataModule(GeoDataModule):
    def setup(self, stage: str) -> None:
        self.train_dataset = self.val_dataset = Scenes(self.kwargs["paths"])
        self.train_sampler = self.val_sampler = GridGeoSampler(self.train_dataset, 16, 16)


@pytest.mark.parametrize(
    ("crs", "step", "origin", "gsd"),
    [
        ("EPSG:32633", 0.6, (500_000, 5_000_000), 0.6),
        ("EPSG:4326", 1e-4, (15.0, 60.0), 1e-4 * 111_320 * math.sqrt(math.cos(math.radians(60)))),
        ("EPSG:2263", 2.0, (1_000_000, 200_000), 2.0 * 1200 / 3937),  # US survey feet
    ],
)
def test_windows_of_geodatasets_have_their_gsd_in_metres(tmp_path, crs, step, origin, gsd):
    image = np.arange(1, 5, dtype=np.uint8).reshape(4, 1, 1) + np.zeros((1, 48, 48), np.uint8)
    write(tmp_path / "scene.tif", image, crs, step, origin)
    module = ScenesDataModule(Scenes, patch_size=16, paths=str(tmp_path))
    data = TorchGeoData(datamodule=module, bands=BandSelection("naip", ["NIR", "R"]), batch_size=4, num_workers=0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 2, 16, 16) and batch["image"][0, :, 0, 0].tolist() == [4.0, 1.0]
    torch.testing.assert_close(batch["gsd"], torch.full((4,), gsd), rtol=1e-3, atol=0)
    assert set(batch) == {"image", "gsd"}
    with pytest.raises(UserError, match=r"data\.datamodule"):
        TorchGeoData(str(tmp_path), Scenes).setup("fit")


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_damaged_tile_of_a_geodataset_is_passed_over(tmp_path, name, caplog):
    """Also where it is the first, by which bands and size are learned; and what stands for it has no history."""
    image = np.random.default_rng(0).integers(1, 250, (4, 48, 48)).astype(np.uint8)
    for number, tile in enumerate("abc"):
        write(tmp_path / f"{tile}.tif", image, "EPSG:32633", 1.0, (500_000 + 1000 * number, 5_000_000))
    damaged = tmp_path / f"{name}.tif"
    damaged.write_bytes(damaged.read_bytes()[:700])
    options = {"bands": BandSelection("naip", ["NIR", "R"]), "batch_size": 4, "num_workers": 0}

    def opened(**more):
        return TorchGeoData(datamodule=ScenesDataModule(Scenes, patch_size=16, paths=str(tmp_path)), **options, **more)

    data = opened()
    data.setup("fit")
    for loader in (data.val_dataloader(), data.probe_dataloader("train")):
        assert sum(len(batch["image"]) for batch in loader) == 18  # of 27 windows, those of the other two tiles
    assert data.left_out_samples == {"val": 9, "train": 9} and data.skipped == 0
    loader = data.train_dataloader()
    images = [data.on_after_batch_transfer(batch, 0)["image"] for batch in loader]
    assert sum(map(len, images)) == 27 and data.skipped == 9
    again = data.train_dataloader()
    assert begin_inside(again, 0, 4)
    assert all(torch.equal(one, two["image"]) for one, two in zip(images[4:], again, strict=True))
    assert caplog.text.count(f"{damaged} is not readable") == 1
    with pytest.raises(UserError, match="is not readable"):
        stopping = opened(on_error="stop")
        stopping.setup("fit")
        list(stopping.train_dataloader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of"),
        ({"dataset": EuroSAT, "datamodule": EuroSATDataModule()}, "exactly one of"),
        ({"dataset": EuroSAT, "holdout": 1.0}, r"data\.holdout: 1.0"),
        ({"dataset": EuroSAT, "batch_size": 0}, r"data\.batch_size: 0"),
        ({"dataset": EuroSAT, "on_error": "pass"}, r"data\.on_error"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        TorchGeoData(**arguments)


def parser():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(XScaleDataModule, "data")
    return parser


SHIPPED = [
    "eurosat",
    "eurosat_rgb",
    "eurosat_jpg",
    "ucmerced",
    "ucmerced_multilabel",
    "resisc45",
    "bigearthnet",
    "ssl4eo_s12",
]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_are_valid_and_their_statistics_fit(name):
    path = CONFIGS / f"{name}.yaml"
    arguments = yaml.safe_load(path.read_text())["data"]["init_args"]
    config = parser().parse_args(["--config", str(path), "--data.root", "nowhere", "--data.num_workers", "0"])
    data = parser().instantiate(config).data
    assert list(data.bands.names) == arguments["bands"]["names"]
    assert data.bands.means == arguments["bands"].get("mean", data.bands.means)
    assert data.image_size == tuple(arguments["image_size"]) and data.gsd == arguments["gsd"]
    with pytest.raises(UserError, match="nowhere"):
        data.setup("fit")


def test_configuration_composes_with_the_users_root(eurosat):
    arguments = ["--config", str(CONFIGS / "eurosat_rgb.yaml"), "--data.root", eurosat, "--data.num_workers", "0"]
    data = parser().instantiate(parser().parse_args(arguments)).data
    data.setup("fit")
    batch = first(data)
    assert batch["image"].shape == (4, 3, 64, 64)
    torch.testing.assert_close(batch["image"][0, :, 0, 0], torch.tensor([400.0, 300.0, 200.0]))
    torch.testing.assert_close(batch["gsd"], torch.full((4,), 1.25))  # 8 pixels of 10 m resized to 64


def test_typing_errors_in_a_configuration_are_refused(tmp_path):
    text = (CONFIGS / "eurosat.yaml").read_text()
    for wrong in (text.replace("sensor:", "senzor:"), text.replace("datasets.EuroSAT", "datasets.EuroZAT")):
        (tmp_path / "wrong.yaml").write_text(wrong)
        with pytest.raises(Exception, match=r"senzor|EuroZAT"):
            parser().parse_args(["--config", str(tmp_path / "wrong.yaml")])


def test_bigearthnet_and_ssl4eo_layouts(tmp_path):
    bands = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
    size = {name: 60 if name in ("B02", "B03", "B04", "B08") else 20 for name in bands}
    ben = tmp_path / "ben"
    for split in ("train", "val", "test"):
        (ben / "BigEarthNet-v1.0" / split).mkdir(parents=True)
        (ben / f"bigearthnet-{split}.csv").write_text(f"{split},none\n")
        labels = '{"labels": ["Pastures", "Sea and ocean"]}'
        (ben / "BigEarthNet-v1.0" / split / "labels_metadata.json").write_text(labels)
        for i, name in enumerate(bands):
            write(
                ben / "BigEarthNet-v1.0" / split / f"{split}_{name}.tif",
                np.full((1, size[name], size[name]), i, np.uint16),
            )
    arguments = ["--config", str(CONFIGS / "bigearthnet.yaml"), "--data.root", str(ben), "--data.num_workers", "0"]
    data = parser().instantiate(parser().parse_args(arguments)).data
    batch = first(data)
    assert batch["image"][0, :, 5, 5].tolist() == list(range(12))  # B8A before B09, as named
    assert data.multilabel and batch["label"].nonzero().tolist() == [[0, 4], [0, 18]]

    ssl4eo = tmp_path / "ssl4eo"
    for place in range(2):
        for i, name in enumerate(SSL4EOS12.metadata["s2c"]["bands"]):
            write(
                ssl4eo / "s2c" / f"{place:07}" / "20200101T000000_x" / f"{name}.tif",
                np.full((1, 264, 264), i, np.uint16),
            )
    factory: Callable[[], Dataset] = partial(SSL4EOS12, split="s2c")
    data = TorchGeoData(
        str(ssl4eo), factory, split_argument=None, bands=BandSelection(names=["B8A", "B10"]), num_workers=0
    )
    sample = data.dataset("train")[1]
    assert sample["image"][:, 0, 0].tolist() == [8.0, 10.0] and float(sample["gsd"]) == 10.0
