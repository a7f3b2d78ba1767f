"""`xscale pack` and `PackedData`: the same samples and losses as the data they were made of; damage is refused."""

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from rasterio.transform import from_origin

from xscale_lightning import cli
from xscale_lightning.commands import pack
from xscale_lightning.commands.embed_data import from_batch
from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.folder import ImageFolderData
from xscale_lightning.data.packed import PackedData
from xscale_lightning.data.shards import narrowest
from xscale_lightning.errors import UserError
from xscale_lightning.methods.mae import MAE
from xscale_lightning.models.registry import BackboneConfig

NAMES = ["B02", "B03", "B04", "B08"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """2 classes of 30 GeoTIFFs of four bands and 16 pixels; one file for validation cannot be read."""
    root, draws = tmp_path_factory.mktemp("folder") / "mini", np.random.default_rng(0)
    profile = {"driver": "GTiff", "count": 4, "height": 16, "width": 16, "dtype": "uint16", "crs": "EPSG:32633"}
    for label in ("Forest", "River"):
        (root / label).mkdir(parents=True)
        for i in range(30):
            values = draws.integers(0, 2900, (4, 16, 16)).astype(np.uint16)
            path, transform = root / label / f"{label}_{i}.tif", from_origin(0, 0, 10, 10)
            with rasterio.open(path, "w", transform=transform, **profile) as file:
                file.write(values)
    path = root / source(root).open_source("val").files[1]
    path.write_bytes(path.read_bytes()[:200])
    return root


def command(folder: Path, out: Path, *more: str) -> list[str]:
    options = [f"--data.root={folder}", "--data.bands.names=[B02, B03, B04, B08]", "--data.num_workers=0"]
    sizes = ["--batch-size", "8", "--shard-mb", "1", "--data.bands.sensor", "sentinel2_l1c"]
    return ["pack", str(out), "--data", "ImageFolderData", *options, *sizes, *more]


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "mini"
    assert cli.main(command(folder, out)) == 0
    return out


def source(folder: Path) -> ImageFolderData:
    bands = BandSelection(sensor="sentinel2_l1c", names=NAMES)
    return ImageFolderData(str(folder), bands=bands, batch_size=8, num_workers=0)


def test_splits_hold_the_samples_of_the_source(folder, packed):
    ours, theirs = PackedData(str(packed), batch_size=8, num_workers=0), source(folder)
    for split in ("train", "val", "test"):
        batches = list(zip(ours.probe_dataloader(split), theirs.probe_dataloader(split), strict=True))
        assert batches
        for mine, other in batches:
            assert mine.keys() == other.keys() and mine["file"] == other["file"]
            for key in ("image", "gsd", "label"):
                assert mine[key].dtype == other[key].dtype
                torch.testing.assert_close(mine[key], other[key], rtol=0, atol=0)
    assert (ours.bands, ours.name, ours.num_classes, ours.gsd) == (theirs.bands, "mini", 2, 10.0)
    about = json.loads((packed / "pack.json").read_text())
    assert about["splits"]["train"][0]["columns"]["image"]["stored"] == "<u2"
    assert str(folder) in json.dumps(about["source"]["data"])


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def train(data) -> list[float]:
    seed_everything(3)
    backbone = BackboneConfig("vit_tiny_patch8", depth=1)
    module = MAE(bands=data.bands, backbone=backbone, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    losses = Losses()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(
        max_epochs=2, accelerator="cpu", limit_val_batches=0, enable_model_summary=False, callbacks=losses, **quiet
    ).fit(module, datamodule=data)
    return losses.values


@pytest.mark.parametrize("on_device", [False, True])
def test_training_has_the_same_losses(folder, packed, on_device):
    data = PackedData(str(packed), batch_size=8, num_workers=0, cast_on_device=on_device)
    raw = next(iter(data.train_dataloader()))["image"]
    assert raw.dtype == (torch.uint16 if on_device else torch.float32)
    wanted = train(source(folder))
    assert train(data) == wanted and len(wanted) == 12


def test_bands_are_chosen_by_name(packed):
    chosen = PackedData(str(packed), names=["B08", "B2"], batch_size=4, num_workers=0)
    whole = PackedData(str(packed), batch_size=4, num_workers=0)
    assert chosen.bands.names == ("B08", "B02")
    mine, other = (next(iter(data.probe_dataloader("train")))["image"] for data in (chosen, whole))
    assert torch.equal(mine, other[:, [3, 0]])
    with pytest.raises(UserError, match="B05"):
        PackedData(str(packed), names=["B05"])


def test_worker_processes_map_the_files_themselves(packed):
    dataset = PackedData(str(packed), num_workers=0).dataset("train")
    assert dataset is not None
    dataset[0]
    assert len(pickle.dumps(dataset)) < 10_000
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def copy(packed: Path, to: Path) -> Path:
    to.mkdir()
    for path in packed.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("damage", ["short", "flipped", "missing"])
def test_damaged_shards_are_refused(packed, tmp_path, damage, capsys):
    out = copy(packed, tmp_path / "pack")
    path = out / "train-00000.image.npy"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.unlink() if damage == "missing" else path.write_bytes(content if damage == "flipped" else content[:-7])
    with pytest.raises(UserError, match=r"train-00000\.image\.npy"):
        PackedData(str(out)).setup("fit")
    if damage == "flipped":
        PackedData(str(out), verify="size").setup("fit")
    assert cli.main(["pack", str(out), "--check"]) == 2
    assert "train-00000.image.npy" in capsys.readouterr().err


def test_nothing_is_unpickled(packed, tmp_path):
    out = copy(packed, tmp_path / "pack")
    path = out / "train-00000.image.npy"
    size = path.stat().st_size
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    data = PackedData(str(out), verify="size", num_workers=0)
    with pytest.raises(UserError, match="damaged"):
        next(iter(data.probe_dataloader("train")))


def test_damaged_indexes_are_refused(packed, tmp_path):
    out = copy(packed, tmp_path / "pack")
    text = (out / "pack.json").read_text()
    for wrong in ("{", text.replace('"format": 1', '"format": 9'), text.replace("train-00000.image", "../image")):
        (out / "pack.json").write_text(wrong)
        with pytest.raises(UserError, match="damaged or of another version"):
            PackedData(str(out))
    with pytest.raises(UserError, match="no pack"):
        PackedData(str(tmp_path))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        *((("bands",), None), (("image_size",), 3), (("class_names",), 5), (("gsd",), "x")),
        *((("splits", "train", 0, "samples"), n) for n in (-1, 0, 10**12)),
        (("splits", "train", 0, "columns"), {}),
        *((("splits", "train", 0, "columns", "image", "delivered"), kind) for kind in ("O", "bogus", "str")),
    ],
)
def test_indexes_that_say_what_cannot_be_are_refused(packed, tmp_path, where, value):
    content = json.loads((packed / "pack.json").read_text())
    part = content
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    (tmp_path / "pack.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"damaged|band record"):
        PackedData(str(tmp_path))


def test_an_interrupted_pack_goes_on(folder, packed, tmp_path, monkeypatch):
    out, written = tmp_path / "pack", []

    def write(work, name, parts):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(name)
        return real(work, name, parts)

    real = pack.write_shard
    small = [*command(folder, out), "--shard-mb", "1"]
    monkeypatch.setattr(pack, "_bytes_per_shard", lambda args: 8 * 4 * 16 * 16 * 2)
    monkeypatch.setattr(pack, "write_shard", write)
    assert cli.main(small) == 130
    assert written == ["train-00000", "train-00001"] and not out.exists()
    monkeypatch.setattr(pack, "write_shard", real)
    assert cli.main([*small, "--batch-size", "4"]) == 2, "parts of other batches were taken"
    began = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pack.parts").glob("*.npy")}
    assert cli.main(small) == 0
    assert all((out / name).stat().st_mtime_ns == time for name, time in began.items()) and len(began) >= 6
    assert not (tmp_path / "pack.parts").exists() and {path.suffix for path in out.iterdir()} == {".npy", ".json"}
    for mine, other in zip(
        PackedData(str(out), num_workers=0).probe_dataloader("train"),
        PackedData(str(packed), num_workers=0).probe_dataloader("train"),
        strict=True,
    ):
        assert torch.equal(mine["image"], other["image"]) and mine["file"] == other["file"]


def test_wrong_input(folder, packed, tmp_path, capsys, monkeypatch):
    assert cli.main(command(folder, packed)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main(["pack", str(tmp_path / "a"), "--data", "SampleScene"]) == 2
    assert "cache_dir" in capsys.readouterr().err
    assert cli.main(["pack", str(tmp_path / "b")]) == 2
    monkeypatch.setattr(pack, "free_space", lambda folder: 10)
    assert cli.main(command(folder, tmp_path / "c")) == 2
    assert "has 10 bytes free" in capsys.readouterr().err
    assert not list(tmp_path.glob("c*")), "a refused pack leaves nothing behind"


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        (np.array([0, 255], np.float32), "uint8"),
        (np.array([0, 65535], np.float32), "uint16"),
        (np.array([-5, 3000], np.int64), "int16"),
        (np.array([0.5, 1], np.float32), "float32"),
        (np.array([0, 65536], np.float32), "float32"),
        (np.array([-0.0, 1], np.float32), "float32"),
        (np.array([np.nan, 1], np.float32), "float32"),
        (np.array([True]), "bool"),
    ],
)
def test_values_are_stored_narrow_and_without_loss(values, stored):
    narrow = narrowest(values)
    assert narrow.dtype == stored
    assert narrow.astype(values.dtype).tobytes() == values.tobytes()


def test_batches_of_damaged_samples_alone(folder, tmp_path, capsys):
    """They come to nothing in a pack, an embedding or a shard, also where a command goes on after them."""
    root = tmp_path / "mini"
    shutil.copytree(folder, root)
    files = source(root).dataset("train").source.files[8:16]
    for file in files:
        (root / file).write_bytes(b"")
    assert cli.main([*command(root, tmp_path / "pack"), "--splits", "train"]) == 0
    assert "8 damaged samples were left out" in " ".join(capsys.readouterr().out.split())
    whole = source(root).dataset("train")
    left = [path for path in whole.source.files if (root / path).stat().st_size > 200]
    packs = PackedData(str(tmp_path / "pack"), batch_size=8, num_workers=0)
    got = [name for batch in packs.probe_dataloader("train") for name in batch["file"]]
    assert got == left and len(got) == len(whole) - 8
    data = source(root)
    numbered = list(from_batch(data, "train", data.dataset("train"), 1))
    assert numbered[0] == {} and numbered[1]["file"][0] == left[8], "batch 1 is the one of nothing"
    for file in whole.source.files:
        (root / file).write_bytes(b"")
    good = source(folder).dataset("train").source.files[0]
    shutil.copy(folder / good, root / good)  # one sample, by which bands and size are known
    assert cli.main([*command(root, tmp_path / "one"), "--splits", "train"]) == 0
    assert len(PackedData(str(tmp_path / "one"), num_workers=0).dataset("train")) == 1


def test_the_doctor_looks_through_a_pack(packed, tmp_path, capsys):
    pack, report = tmp_path / "pack", tmp_path / "report.json"
    shutil.copytree(packed, pack)
    words = ["doctor", "--data", "PackedData", "--data.root", str(pack), "--report", str(report)]

    def kinds() -> dict[str, str]:
        return {Path(row["path"]).name: row["kind"] for row in json.loads(report.read_text()) if row["kind"]}

    assert cli.main(words) == 0 and not kinds()
    assert "none is damaged" in capsys.readouterr().out
    images = np.load(pack / "train-00000.image.npy")
    images[3] = 7
    np.save(pack / "train-00000.image.npy", images)
    cut = pack / "val-00000.image.npy"
    cut.write_bytes(cut.read_bytes()[:-100])
    (pack / "test-00000.label.npy").unlink()
    assert cli.main(words) == 1
    found = kinds()
    (sample,) = [name for name in found if " sample " in name or name.endswith(".tif)")]
    assert found.pop(sample) == "constant"
    wanted = {"train-00000.image.npy": "checksum", "val-00000.image.npy": "truncated"}
    assert found == {**wanted, "test-00000.label.npy": "missing"}
    assert "train-00000.image.npy sample 3" in capsys.readouterr().out


def test_a_damaged_file_is_told_by_its_own_name(folder, caplog):
    """GDAL's own messages know the file in memory alone; none of them says its name there."""
    data = source(folder)
    list(data.val_dataloader())
    (record,) = [record.getMessage() for record in caplog.records if "is not readable" in record.getMessage()]
    assert not re.search("[0-9a-f]{8}-[0-9a-f]{4}", caplog.text) and "vsimem" not in caplog.text
    assert data.open_source("val").files[1] in record


@pytest.mark.parametrize(
    "change",
    [
        {"name": "\x1b[2Jx"}, {"name": "a" * 10**6}, {"num_classes": 10**12}, {"num_mask_classes": 10**12},
        {"class_names": ["a", 7]}, {"class_names": ["\x1b[2J"]}, None, "deep", "terabyte",
    ],
)  # fmt: skip
def test_indexes_of_strangers(packed, tmp_path, capsys, change):
    shutil.copy(packed / "pack.json", tmp_path / "pack.json")
    if change == "deep" or change is None:
        (tmp_path / "pack.json").write_text("[" * 100_000 if change else '{"a": NaN}')
    elif change == "terabyte":
        with (tmp_path / "pack.json").open("wb") as file:
            file.truncate(2**40)
    else:
        content = {**json.loads((packed / "pack.json").read_text()), **change}
        (tmp_path / "pack.json").write_text(json.dumps(content))
    assert cli.main(["doctor", "--data", "PackedData", "--data.root", str(tmp_path)]) == 2
    text = capsys.readouterr().err.strip()
    assert (
        "damaged" in text and len(text.splitlines()) <= 2 and len(text) < 600 and text.replace("\n", "").isprintable()
    )
