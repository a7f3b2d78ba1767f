"""Damaged files: each told by its kind ahead of time, and none of them reaches the model, whatever reads it."""

import csv
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from xscale_lightning import cli
from xscale_lightning.commands.doctor_data import check_all
from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.change import ChangeFolder
from xscale_lightning.data.folder import ImageFolderData
from xscale_lightning.data.inventory import items_of
from xscale_lightning.data.mask_folder import MaskFolder
from xscale_lightning.data.paired import PairedFolders
from xscale_lightning.data.scenes import SceneFolder
from xscale_lightning.data.torchgeo import TorchGeoData
from xscale_lightning.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))  # the maker of the files is a script of its own, too
import make_damage
from make_damage import BANDS, HARD, SIDE, fabricate, write

RGB = BandSelection("generic", names=["R", "G", "B"], mean=[1700.0] * 3, std=[700.0] * 3)
EACH = 3
IN_TRAINING = tuple(kind for kind in HARD)  # the other kinds hold real images; only their neighbours tell


def scenes(root, **options):
    return SceneFolder(
        str(root),
        RGB,
        file_bands=["R", "G", "B"],
        **{"image_size": SIDE, "batch_size": 4, "num_workers": 0, "samples_per_epoch": 400, **options},
    )


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    root = tmp_path_factory.mktemp("damaged") / "tiles"
    return root, fabricate(root, EACH, 120)


def test_every_kind_is_told(damaged):
    root, expected = damaged
    found = {f.path: f.kind for f in check_all(items_of(scenes(root)), workers=2)}
    assert len(found) == len(expected) + 120
    assert {path: found[path] for path in expected} == expected
    assert {kind for path, kind in found.items() if path not in expected} == {None}


@pytest.mark.parametrize("ending", ["json", "csv"])
def test_the_command_and_its_report(damaged, tmp_path, capsys, ending):
    root, expected = damaged
    report = tmp_path / f"report.{ending}"
    options = ["--data", "SceneFolder", "--data.root", str(root), "--data.file_bands", "[R, G, B]"]
    options += ["--data.bands.sensor", "generic", "--data.bands.names", "[R, G, B]"]
    options += ["--data.bands.mean", "[1, 1, 1]", "--data.bands.std", "[1, 1, 1]", "--report", str(report)]
    assert cli.main(["doctor", *options]) == 1
    out = capsys.readouterr().out
    assert f"{len(expected)} of {len(expected) + 120} files are damaged" in out
    assert "truncated" in out and "truncated0000.tif" in out
    with report.open() as file:
        rows = json.load(file) if ending == "json" else list(csv.DictReader(file))
    assert {row["path"]: row["kind"] for row in rows if row["kind"]} == expected
    ignored = ",".join(make_damage.KINDS)
    assert cli.main(["doctor", *options, "--ignore", ignored]) == 0


def test_wrong_options_are_named(tmp_path, capsys):
    for words, named in (
        (["--report", "x.txt"], "--report"),
        (["--ignore", "nonsense"], "--ignore"),
        (["--workers", "0"], "--workers"),
        (["--data.root", str(tmp_path / "nowhere")], "data.root"),
    ):
        given = ["doctor", "--data", "SceneFolder", "--data.root", str(tmp_path), *words]
        assert cli.main(given) == 2
        assert named in capsys.readouterr().err


def test_scenes_deliver_none_of_them(tmp_path, caplog):
    expected = fabricate(tmp_path / "tiles", 2, 40, IN_TRAINING)
    data = scenes(tmp_path / "tiles")
    data.setup("fit")
    paths = [scene.sources[0].raster.path for scene in data.scenes]
    kept = {path for path in paths if path in expected}  # those that are mostly NaN are kept from the model by window
    assert len(paths) == 40 + len(kept) and {expected[path] for path in kept} <= {"not finite"}
    assert set(data.left_out) == set(expected) - kept
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            assert batch["image"].min() >= make_damage.PIXELS[0]
    with pytest.raises(UserError, match=r"data.on_error"):
        scenes(tmp_path / "tiles", on_error="stop").setup("fit")


@pytest.mark.parametrize("kind", IN_TRAINING)
def test_scenes_read_by_window_deliver_none_of_them(tmp_path, kind):
    fabricate(tmp_path / "tiles", 4, 12, (kind,))
    data = scenes(tmp_path / "tiles", cache_mb=0, samples_per_epoch=64)
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            assert batch["image"].min() >= make_damage.PIXELS[0]


@pytest.mark.parametrize("kind", [kind for kind in IN_TRAINING if kind != "size"])
def test_labelled_folders_deliver_none_of_them(tmp_path, kind, caplog):
    for name in ("a", "b"):
        fabricate(tmp_path / "set" / name, 3, 12, (kind,))
    options = {"bands": RGB, "channels": ["R", "G", "B"], "num_workers": 0, "batch_size": 4, "gsd": 10.0}
    data = ImageFolderData(str(tmp_path / "set"), image_size=SIDE, **options)
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
        batches = [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]
        batches += data.val_dataloader()
    assert all(batch["image"].min() >= make_damage.PIXELS[0] for batch in batches)
    assert all(batch["image"].isfinite().all() for batch in batches)
    assert data.skipped > 0 and "another sample takes its place" in caplog.text
    stopping = ImageFolderData(str(tmp_path / "set"), image_size=SIDE, on_error="stop", **options)
    with pytest.raises(UserError, match=r"set data.on_error to skip"):
        stopping.setup("fit")
        list(stopping.train_dataloader())
    findings = check_all(items_of(data), workers=2)
    assert sorted(f.kind for f in findings if f.kind) == [kind] * 6


@pytest.mark.parametrize("kind", [kind for kind in IN_TRAINING if kind != "size"])
def test_masks_and_pairs_and_changes(tmp_path, kind):
    rng = np.random.default_rng(1)
    classes = rng.integers(0, 2, (1, SIDE, SIDE)).astype("uint8")
    expected = fabricate(tmp_path / "images", 2, 10, (kind,))
    for path in (tmp_path / "images").iterdir():
        write(tmp_path / "masks" / path.name, classes)
        write(tmp_path / "fine" / path.name, make_damage.good(rng, side=2 * SIDE), gsd=5.0)
    options = {"file_bands": ["R", "G", "B"], "image_size": SIDE, "num_workers": 0, "samples_per_epoch": 32}
    masks = MaskFolder(str(tmp_path / "images"), str(tmp_path / "masks"), RGB, num_classes=2, batch_size=4, **options)
    pairs = PairedFolders(
        str(tmp_path / "images"), str(tmp_path / "fine"), RGB, RGB, file_bands_hr=["R", "G", "B"], batch_size=4,
        fractions=(1.0, 0.0, 0.0), **options,
    )  # fmt: skip
    for data in (masks, pairs):
        data.setup("fit")
        for batch in [*data.train_dataloader(), *data.val_dataloader()]:
            assert batch["image"].min() >= make_damage.PIXELS[0]
        found = {f.path: f.kind for f in check_all(items_of(data), workers=2)}
        assert {path: found[path] for path in expected} == expected
        assert sum(value is not None for value in found.values()) == len(expected)
    for number, path in enumerate(sorted((tmp_path / "images").iterdir())):
        place = tmp_path / "changes" / f"s{number:02d}"
        place.mkdir(parents=True)
        path.rename(place / "A.tif")
        write(place / "B.tif", make_damage.good(rng))
        write(place / "label.tif", classes + 1)
    changes = {"label": "label.tif", "image_size": 8, "batch_size": 4, "num_workers": 0}
    data = ChangeFolder(str(tmp_path / "changes"), RGB, on_error="skip", **changes)
    data.setup("fit")
    for batch in data.train_dataloader():
        assert min(batch["image"].min(), batch["image2"].min()) >= make_damage.PIXELS[0]
    assert len(data.left_out) == 2 or kind == "missing"  # a scene without its file is no scene
    found = [f.kind for f in check_all(items_of(data), workers=2) if f.kind]
    assert found == [kind] * 2
    if kind != "missing":
        with pytest.raises(UserError, match=r"data\.on_error: skip"):
            ChangeFolder(str(tmp_path / "changes"), RGB, **changes).setup("fit")


class Samples(torch.utils.data.Dataset):
    """Somebody else's dataset, some of whose samples are broken."""

    def __init__(self, split: str = "train") -> None:
        self.bad = {1: torch.zeros(BANDS, SIDE, SIDE), 3: torch.full((BANDS, SIDE, SIDE), float("nan"))}

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index):
        torch.manual_seed(index)
        partly = torch.rand(BANDS, SIDE, SIDE) * 1000 + 500
        partly[0, 0, 0] = float("nan") if index == 5 else 700.0
        return {"image": self.bad.get(index, partly), "label": index % 2}


def test_datasets_of_others(caplog):
    data = TorchGeoData(dataset=Samples, bands=RGB, gsd=10.0, num_classes=2, num_workers=0, batch_size=4)
    data.setup("fit")
    with caplog.at_level(logging.WARNING):
        batches = [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]
    assert all(batch["image"].isfinite().all() and batch["image"].min() >= 500 for batch in batches)
    assert data.skipped == 2
    kinds = {f.path: f.kind for f in check_all(items_of(data), workers=1) if f.path.startswith("train")}
    assert [kinds[f"train sample {i}"] is None for i in range(8)] == [True, False, True, False] + [True] * 4


def test_a_constant_image_can_be_meant(tmp_path):
    fabricate(tmp_path / "tiles", 3, 3, ("constant",))
    data = scenes(tmp_path / "tiles", keep_constant=True)
    assert len(data.scenes) == 6
