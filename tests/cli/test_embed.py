"""`xscale embed`: windows of scenes and samples of data sets, where they lie, what is missing, and going on."""

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from lightning.pytorch import Trainer
from rasterio.transform import from_origin

from xscale_lightning import cli, load_backbone
from xscale_lightning.commands import embed_data, embed_scenes
from xscale_lightning.data.bands import SENSORS
from xscale_lightning.data.scene_windows import Strip, Tiling, merge
from xscale_lightning.methods.mae import MAE
from xscale_lightning.models.registry import BackboneConfig

pq = pytest.importorskip("pyarrow.parquet")
shapely = pytest.importorskip("shapely")

BANDS = SENSORS["sentinel2_rgb"]
NODATA = 0


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    backbone = BackboneConfig("vit_tiny_patch8", dim=16, depth=1, num_heads=2, image_size=16)
    module = MAE(bands=BANDS, backbone=backbone, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    path = tmp_path_factory.mktemp("model") / "mae.ckpt"
    trainer.save_checkpoint(path)
    return path


def scene(
    path: Path, height: int = 44, width: int = 56, hole: tuple[slice, slice] | None = None, **options
) -> np.ndarray:
    pixels = np.random.default_rng(1).integers(500, 3000, (3, height, width)).astype("uint16")
    if hole:
        pixels[:, hole[0], hole[1]] = NODATA
    profile = {"driver": "GTiff", "count": 3, "height": height, "width": width, "dtype": "uint16", "nodata": NODATA}
    profile |= {"crs": "EPSG:32633", "transform": from_origin(400000, 5800000, 10, 10)}
    with rasterio.open(path, "w", **{**profile, **options}) as file:
        file.write(pixels)
        file.descriptions = BANDS.names
    return pixels


def run(*words: object) -> int:
    return cli.main(["embed", *map(str, words), "--debug"])


def refused(capsys, *words: object) -> str:
    assert cli.main(["embed", *map(str, words)]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    message = message[message.index("xscale: error: ") :]
    assert len(message.strip().splitlines()) <= 2
    return message


def table(path: Path) -> tuple[dict, dict]:
    read = pq.read_table(path)
    columns = read.to_pydict()
    columns["embedding"] = np.asarray(columns["embedding"], np.float32)
    return columns, {k.decode(): json.loads(v) for k, v in read.schema.metadata.items() if k in (b"geo", b"xscale")}


def test_every_window_has_its_features_and_its_footprint(model, tmp_path):
    pixels = scene(tmp_path / "a.tif")
    out = tmp_path / "a.parquet"
    assert run(model, tmp_path / "a.tif", "--output", out, "--size", 16, "--batch-size", 3) == 0
    columns, about = table(out)
    assert (
        columns["row"] == [0] * 4 + [16] * 4 + [24] * 4
    )  # 44 pixels are five patches: the last windows are moved back
    assert columns["col"] == [0, 16, 32, 40] * 3
    backbone = load_backbone(model)
    for i, (row, col) in enumerate(zip(columns["row"], columns["col"], strict=True)):
        window = torch.from_numpy(pixels[None, :, row : row + 16, col : col + 16].astype(np.float32))
        assert np.allclose(columns["embedding"][i], backbone.features(window, 10.0)[0], atol=1e-5)
    box = shapely.from_wkb(columns["geometry"][5])
    assert box.bounds == (400160.0, 5799680.0, 400320.0, 5799840.0)
    assert about["geo"]["columns"]["geometry"]["crs"]["id"] == {"authority": "EPSG", "code": 32633}
    assert about["xscale"]["bands"] == list(BANDS.names) and set(columns["gsd"]) == {10.0}
    assert pq.read_schema(out).field("embedding").type.list_size == 16
    assert not (tmp_path / "a.parquet.parts").exists()


def test_the_map_lies_where_the_scene_does(model, tmp_path):
    pixels = scene(tmp_path / "a.tif")
    assert run(model, tmp_path / "a.tif", "--map", tmp_path / "m.tif", "--size", 16, "--stride", 16) == 0
    with rasterio.open(tmp_path / "m.tif") as file:
        assert file.shape == (5, 7) and file.count == 16 and np.isnan(file.nodata)
        assert file.transform == from_origin(400000, 5800000, 80, 80) and file.crs.to_epsg() == 32633
        values = file.read()
    window = torch.from_numpy(pixels[None, :, :16, :16].astype(np.float32))
    expected = load_backbone(model).patch_features(window, 10.0)[0].numpy()
    assert np.allclose(values[:, :2, :2], expected, atol=1e-5) and np.isfinite(values).all()


def test_nodata_stays_nodata(model, tmp_path):
    scene(tmp_path / "a.tif", hole=(slice(0, 24), slice(0, 24)))
    out, where = tmp_path / "a.parquet", ("--size", 16, "--stride", 8)
    assert run(model, tmp_path / "a.tif", "--output", out, "--map", tmp_path / "m.tif", *where) == 0
    columns, _ = table(out)
    places = list(zip(columns["row"], columns["col"], strict=True))
    assert (0, 0) not in places and (8, 8) not in places and (16, 16) in places
    assert columns["valid"][places.index((16, 16))] == 0.75 and columns["valid"][-1] == 1.0
    values = rasterio.open(tmp_path / "m.tif").read()
    assert (
        np.isnan(values[:, :3, :3]).all() and np.isfinite(values[:, 3:]).all() and np.isfinite(values[:, :, 3:]).all()
    )
    # A window's vector is the mean of its patches with data.
    assert np.isfinite(columns["embedding"]).all()


def test_a_hole_does_not_count_in_the_mean(model):
    backbone, windows = load_backbone(model), 2000 * torch.rand(2, 3, 16, 16)
    valid = torch.tensor([[[True, True], [True, True]], [[True, False], [True, True]]])
    vectors, maps = embed_scenes.encode(backbone, windows, valid, 10.0)
    torch.testing.assert_close(vectors[0], backbone.features(windows[:1], 10.0)[0])  # kernels sum in another order
    patches = maps[1].flatten(1)
    assert torch.allclose(vectors[1], patches[:, [0, 2, 3]].mean(1), atol=1e-6)


def test_strips_merge_to_the_mean_over_windows():
    rng, dim = np.random.default_rng(0), 3
    total, count = np.zeros((dim, 7, 4)), np.zeros((7, 4))
    strips = []
    for first in (0, 2, 4):
        strip = Strip.empty(first, dim, 3, 4)
        for col in (0, 1, 2):
            values, valid = rng.random((dim, 3, 2)).astype(np.float32), rng.random((3, 2)) > 0.3
            strip.add(col, values, valid)
            total[:, first : first + 3, col : col + 2] += values * valid
            count[first : first + 3, col : col + 2] += valid
        strips.append(strip)
    rows = list(merge(iter(strips), 7))
    assert [first for first, _ in rows] == [0, 2, 4]
    merged = np.concatenate([values for _, values in rows], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        assert np.allclose(merged, total / count, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("length", "size", "stride"), [(44, 16, 8), (64, 64, 64), (71, 24, 16), (16, 16, 8)])
def test_windows_cover_every_whole_patch(length, size, stride):
    tiling = Tiling(length, length, size, stride, 8)
    seen = np.zeros(length // 8, bool)
    for row in tiling.rows:
        assert row % 8 == 0 and row + size <= length
        seen[row // 8 : (row + size) // 8] = True
    assert seen.all() and tiling.rows == sorted(set(tiling.rows))


def test_principal_components(model, tmp_path):
    scene(tmp_path / "a.tif", hole=(slice(0, 8), slice(0, 8)))
    for name, extra in (("all", ()), ("pca", ("--pca", 3))):
        assert run(model, tmp_path / "a.tif", "--map", tmp_path / f"{name}.tif", "--size", 16, *extra) == 0
    every, few = (rasterio.open(tmp_path / f"{name}.tif") for name in ("all", "pca"))
    values = every.read().reshape(16, -1).T
    known = np.isfinite(values[:, 0])
    centred = values[known] - values[known].mean(0)
    _, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    ours = few.read().reshape(3, -1).T
    assert np.isnan(ours[~known]).all() and (~known).sum() == 1
    assert np.allclose(np.linalg.norm(ours[known], axis=0), sizes[:3], rtol=1e-4)
    share = sizes[0] ** 2 / (sizes**2).sum()
    assert few.descriptions[0] == f"PC1 ({share:.1%} of the variance)"


def test_an_interrupted_run_goes_on_and_gives_the_same(model, tmp_path, monkeypatch, capsys):
    scene(tmp_path / "a.tif")
    words = (model, tmp_path / "a.tif", "--size", 16, "--stride", 8, "--output", tmp_path / "b.parquet")
    words += ("--map", tmp_path / "b.tif")
    assert run(*words[:-3], tmp_path / "whole.parquet", "--map", tmp_path / "whole.tif") == 0
    embed_row, seen = embed_scenes.embed_row, []

    def dies(args, model, image, tiling, row):
        if row == 16 and len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(row)
        return embed_row(args, model, image, tiling, row)

    monkeypatch.setattr(embed_scenes, "embed_row", dies)
    capsys.readouterr()
    assert cli.main(["embed", *map(str, words)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "b.parquet").exists() and not (tmp_path / "b.tif").exists()
    message = refused(capsys, *words, "--min-valid", "0.9")
    assert "were begun with min-valid 0.5, and now it is 0.9" in message and "--restart" in message
    seen.append(-1)
    assert run(*words) == 0
    assert seen == [0, 8, -1, 16, 24]  # rows 0 and 8 were kept
    assert (tmp_path / "b.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()
    assert np.array_equal(
        table(tmp_path / "b.parquet")[0]["embedding"], table(tmp_path / "whole.parquet")[0]["embedding"]
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "b.parquet", "b.tif", "whole.parquet", "whole.tif"]


def test_several_scenes_of_several_zones(model, tmp_path):
    scene(tmp_path / "a.tif")
    scene(tmp_path / "b.tif", crs="EPSG:32634")
    sources = (tmp_path / "a.tif", tmp_path / "b.tif")
    assert run(model, *sources, "--output", tmp_path / "t.parquet", "--map", tmp_path / "maps", "--size", 16) == 0
    columns, about = table(tmp_path / "t.parquet")
    assert {Path(file).name for file in columns["file"]} == {"a.tif", "b.tif"}
    assert about["geo"]["columns"]["geometry"]["crs"]["id"]["code"] == 4326
    west, east = (shapely.from_wkb(columns["geometry"][i]).centroid.x for i in (0, -1))
    assert 13 < west < 14 and 19 < east < 20
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == ["a_features.tif", "b_features.tif"]


def test_a_data_set_with_labels_and_places(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "data.yaml").write_text(
        "data:\n  class_path: SampleScene\n  init_args:\n    image_size: 64\n    num_workers: 0\n"
        "    bands: {sensor: sentinel2_l1c, names: [B04, B03, B02]}\n"
    )
    words = (model, "--data", tmp_path / "data.yaml", "--split", "val", "--batch-size", 16)
    assert run(*words, "--output", tmp_path / "whole.parquet") == 0
    columns, about = table(tmp_path / "whole.parquet")
    assert len(columns["label"]) == len(columns["embedding"]) > 32 and about["xscale"]["split"] == "val"
    assert shapely.from_wkb(columns["geometry"][0]).area == pytest.approx(640.0**2)
    monkeypatch.setattr(embed_data, "GROUP", 16)
    embed_batch, calls = embed_data.embed_batch, []

    def dies(model, batch):
        calls.append(len(batch["image"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed_batch(model, batch)

    monkeypatch.setattr(embed_data, "embed_batch", dies)
    output = ("--output", tmp_path / "b.parquet")
    assert cli.main(["embed", *map(str, (*words, *output))]) == 130
    capsys.readouterr()
    other = refused(capsys, *words[:-1], 8, *output)
    assert "begun with batch-size 16, and now it is 8" in other
    first = len(calls)
    assert run(*words, *output) == 0
    assert sum(calls[first:]) == len(columns["embedding"]) - 32  # two groups were kept
    again, _ = table(tmp_path / "b.parquet")
    assert np.array_equal(again["embedding"], columns["embedding"]) and again["label"] == columns["label"]


def test_damaged_samples_of_a_data_set_are_told(model, tmp_path, capsys):
    for number in range(10):
        path = tmp_path / "images" / ("Forest", "River")[number // 5] / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        scene(path, 16, 16)
        if number % 2:
            path.write_bytes(path.read_bytes()[:200])
    data = ("--data", "ImageFolderData", "--data.root", tmp_path / "images", "--data.bands.sensor", "sentinel2_rgb")
    output = ("--split", "train", "--output", tmp_path / "a.parquet")
    assert run(model, *data, "--data.num_workers", 0, *output) == 0
    assert "damaged samples were left out" in capsys.readouterr().out


def test_wrong_input_is_told_in_a_line_and_leaves_nothing(model, tmp_path, capsys, monkeypatch):
    scene(tmp_path / "a.tif")
    (tmp_path / "old.parquet").write_text("x")
    (tmp_path / "bad.yaml").write_text("model: {}\n")
    before = sorted(p.name for p in tmp_path.iterdir())
    a, out = tmp_path / "a.tif", ("--output", tmp_path / "o.parquet")
    data = ("--data", "SampleScene", *out)
    cases = (
        ((model, *out), "give either scenes"),
        ((model, a), "nothing to write"),
        ((model, a, "--output", tmp_path / "o.csv"), "must end in .parquet"),
        ((model, a, "--output", tmp_path / "old.parquet"), "--overwrite"),
        ((model, a, "--output", tmp_path / "none" / "o.parquet"), "does not exist; make it"),
        ((model, a, a, "--map", tmp_path / "m.tif"), "2 scenes need a folder"),
        ((model, a, *out, "--size", "20"), "--size 20 is no multiple of the patch of 8"),
        ((model, a, *out, "--size", "128"), "larger than the image of 44 x 56"),
        ((model, a, *out, "--size", "16", "--stride", "24"), "leaves gaps"),
        ((model, a, *out, "--min-valid", "0"), "--min-valid 0 is not possible"),
        ((model, a, *out, "--pca", "3"), "give --map"),
        ((model, a, *out, "--crs", "nowhere"), "no coordinate reference system"),
        ((model, a, *out, "--data.root", "x"), "needs --data"),
        ((model, tmp_path / "absent.tif", *out), "does not exist"),
        ((tmp_path / "absent.ckpt", a, *out), "does not exist"),
        ((model, a, *out, "--frobnicate"), "xscale embed --help"),
        ((model, *data), "its bands are not those of"),
        ((model, *data, "--map", "m.tif"), "--map is for scenes"),
        ((model, "--data", tmp_path / "bad.yaml", *out), "has no data section"),
        ((model, "--data", tmp_path / "none.yaml", *out), "cannot be read"),
        ((model, *data, "--data.image_sice", "64"), "did you mean"),
    )
    for words, message in cases:
        assert message in refused(capsys, *words), words
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    assert "pip install 'xscale-lightning[parquet]'" in refused(capsys, model, a, *out)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_scene_without_data_is_told(model, tmp_path, capsys):
    scene(tmp_path / "a.tif", hole=(slice(None), slice(None)))
    assert "lower --min-valid" in refused(
        capsys, model, tmp_path / "a.tif", "--output", tmp_path / "o.parquet", "--size", 16
    )
