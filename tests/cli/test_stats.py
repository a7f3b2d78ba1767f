"""`xscale stats`: figures of a data set, and an overlay that trains."""

import json

import numpy as np
import pytest
import rasterio
import yaml
from rasterio.transform import from_origin

from xscale_lightning import cli

pytestmark = pytest.mark.usefixtures("process")
GENERIC = ["--data.bands.sensor", "generic", "--data.bands.names", "[red, nir]"]
SMALL = ["--data.image_size", "16", "--data.num_workers", "0"]
HOLE = 7


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A folder with one scene of two bands far from 0 and 1; a corner has no data."""
    root = tmp_path_factory.mktemp("scenes")
    noise = np.random.default_rng(0).standard_normal((2, 96, 128))
    values = (np.array([20_000.0, 900.0])[:, None, None] + np.array([300.0, 40.0])[:, None, None] * noise).astype("u2")
    values[:, :16, :8] = HOLE
    profile = {"driver": "GTiff", "count": 2, "height": 96, "width": 128, "dtype": "uint16", "nodata": HOLE}
    transform = from_origin(500_000, 5_000_000, 10, 10)
    with rasterio.open(root / "a.tif", "w", crs="EPSG:32633", transform=transform, **profile) as file:
        file.write(values)
        file.descriptions = ("red", "nir")
    return root, values


def stats(*words: str) -> int:
    return cli.main(["stats", *words])


def everything(root) -> list[str]:
    """The whole scene as one split of patches side by side."""
    area = ["--data.fractions", "[1.0, 0.0, 0.0]", "--data.max_nodata", "0.9", "--data.gsd", "10"]
    return ["--data", "SceneFolder", "--data.root", str(root), *GENERIC, *SMALL, *area]


def test_figures_are_those_of_the_pixels_with_data(scene, tmp_path, capsys):
    root, values = scene
    file = tmp_path / "bands.yaml"
    assert stats(*everything(root), "--write", str(file)) == 0
    shown = capsys.readouterr()
    assert "48 samples of 16 x 16 from 1 scene, 12288 pixels per band" in " ".join(shown.out.split())
    assert "1.04%" in shown.out and "batches: 1 of 1" in shown.err
    bands = yaml.safe_load(file.read_text())["data"]["init_args"]["bands"]
    assert bands["sensor"] == "generic" and bands["names"] == ["red", "nir"]
    known = values.astype(np.float64)[:, values[0] != HOLE]
    assert bands["mean"] == pytest.approx(known.mean(1), rel=1e-6)
    assert bands["std"] == pytest.approx(known.std(1), rel=1e-6)


def test_the_overlay_trains_where_the_defaults_are_refused(scene, tmp_path, capsys):
    root, _ = scene
    recipe = {
        "model": {
            "class_path": "mae",
            "init_args": {
                "decoder_dim": 16,
                "decoder_depth": 1,
                "decoder_heads": 2,
                "backbone": {"name": "vit_tiny_patch8", "depth": 1, "dim": 16, "num_heads": 2},
            },
        },
        "data": {
            "class_path": "SceneFolder",
            "init_args": {"root": str(root), "bands": {"sensor": "generic", "names": ["red", "nir"]}, "gsd": 10.0},
        },
        "trainer": {"max_steps": 1, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
        "knn": {"every_n_epochs": 0},
    }
    recipe["data"]["init_args"] |= {"image_size": 16, "batch_size": 4, "num_workers": 0, "samples_per_epoch": 8}
    config, overlay = tmp_path / "recipe.yaml", tmp_path / "bands.yaml"
    config.write_text(yaml.safe_dump(recipe))
    fit = ["fit", "-c", str(config), "--output", str(tmp_path / "runs")]
    assert cli.main(fit) == 2
    assert "set data.bands.mean" in capsys.readouterr().err
    assert stats("-c", str(config), "--write", str(overlay)) == 0
    assert cli.main([*fit, "-c", str(overlay), "--debug"]) == 0


def test_later_configurations_and_options_win(scene, tmp_path, capsys):
    root, _ = scene
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(yaml.safe_dump({"data": {"class_path": "SampleScene", "init_args": {"samples_per_epoch": 8}}}))
    second.write_text(yaml.safe_dump({"data": {"init_args": {"bands": {"names": ["B02", "B03"]}, "image_size": 32}}}))
    assert stats("-c", str(first), "-c", str(second), "--samples", "3", "--data.image_size", "16") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "sample, train split: 3 samples of 16 x 16" in shown and "names: [B02, B03]" in shown
    assert stats("-c", str(first), "-c", str(second), *everything(root)) == 0
    assert "names: [red, nir]" in capsys.readouterr().out


def test_bands_without_names_keep_their_count(tmp_path, capsys):
    data = [
        "--data",
        "SyntheticData",
        "--data.bands.sensor",
        "generic",
        "--data.bands.count",
        "3",
        "--data.length",
        "4",
    ]
    file = tmp_path / "bands.yaml"
    assert stats(*data, "--data.image_height", "16", "--data.image_width", "16", "--write", str(file)) == 0
    bands = yaml.safe_load(file.read_text())["data"]["init_args"]["bands"]
    assert (bands["count"], bands["names"], len(bands["mean"])) == (3, None, 3)


def test_other_units_than_the_presets_are_noticed(tmp_path, capsys):
    data = {
        "class_path": "SyntheticData",
        "init_args": {"length": 4, "bands": {"mean": [0.1] * 13, "std": [0.05] * 13}},
    }
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"data": data}))
    assert stats("-c", str(config)) == 0
    assert "Far from the statistics of sensor preset sentinel2_l1c in B01" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "missing: the data"),
        (["--data", "SampleScene", "--samples", "0"], "--samples 0 is not possible"),
        (["--data", "SampleScene", "--write", "x.txt"], "must end in .yaml"),
        (["--data", "SampleScene", "--write", "nowhere/x.yaml"], "does not exist"),
        (["-c", "nowhere.yaml"], "cannot be read"),
        (["--data", "NoSuchData"], "NoSuchData"),
    ],
)
def test_wrong_input_is_refused_in_words(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert stats(*words) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_constant_band_is_refused_and_nothing_written(tmp_path, scene, capsys):
    root = tmp_path / "flat"
    root.mkdir()
    with rasterio.open(scene[0] / "a.tif") as source:
        profile, values = source.profile, source.read()
    values[1] = 5
    with rasterio.open(root / "a.tif", "w", **profile) as file:
        file.write(values)
        file.descriptions = ("red", "nir")
    file = tmp_path / "bands.yaml"
    assert stats(*everything(root), "--write", str(file)) == 2
    assert "bands nir have one value everywhere" in capsys.readouterr().err and not file.exists()
    file.write_text("mine")
    assert stats(*everything(scene[0]), "--write", str(file)) == 2
    assert "exists" in capsys.readouterr().err and file.read_text() == "mine"
