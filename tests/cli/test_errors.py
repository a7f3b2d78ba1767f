"""Wrong input ends in one or two lines that name argument, value and remedy; nothing is written, no traceback."""

import sys

import lightning.pytorch  # noqa: F401 (its log handler must not be bound to one test's captured stderr)
import numpy as np
import pytest
import rasterio
import torch
import yaml
from rasterio.transform import from_origin

from xscale_lightning import cli
from xscale_lightning.commands.train import claim
from xscale_lightning.errors import UserError, describe, find_user_error

BASE = {
    "model": {
        "class_path": "mae",
        "init_args": {
            "decoder_dim": 16,
            "decoder_depth": 1,
            "decoder_heads": 2,
            "backbone": {"name": "vit_tiny_patch8", "depth": 1},
        },
    },
    "data": {"class_path": "SyntheticData", "init_args": {"length": 8, "batch_size": 4, "image_height": 32}},
    "trainer": {"max_steps": 1, "accelerator": "cpu", "devices": 1, "enable_model_summary": False},
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run `xscale fit` on the small configuration with further arguments; returns (exit code, error text, output)."""
    monkeypatch.setattr(sys, "argv", ["xscale"])
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "base.yaml"
    config.write_text(yaml.safe_dump(BASE))
    output = tmp_path / "out"

    def call(*args, verb="fit", config=config):
        code = cli.main([verb, "--config", str(config), "--output", str(output), *args])
        return code, capsys.readouterr().err, output

    return call


def refused(result, *words):
    code, err, output = result
    message = err[err.index("xscale: error: ") :].strip()
    assert code != 0
    assert "Traceback" not in err
    assert len(message.splitlines()) <= 2, message
    for word in words:
        assert word in message, message
    assert not output.exists(), list(output.rglob("*"))


def scene(folder, name="scene.tif", size=64, bands=3):
    folder.mkdir(exist_ok=True)
    values = np.random.default_rng(0).integers(1, 4000, (bands, size, size)).astype("uint16")
    options = {"driver": "GTiff", "height": size, "width": size, "count": bands, "dtype": "uint16"}
    path = folder / name
    with rasterio.open(path, "w", crs="EPSG:32618", transform=from_origin(4e5, 4e6, 10, 10), **options) as file:
        file.write(values)
        for i, band in enumerate(("B04", "B03", "B02")[:bands]):
            file.set_band_description(i + 1, band)
    return path


SCENES = ("--data.class_path", "SceneFolder", "--data.bands.names", "[B04,B03,B02]", "--data.image_size", "16")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model.init_args.mask_ration", "0.5"], ["mask_ration", "mask_ratio"]),
        (["--model.backbone.nmae", "x"], ["backbone.nmae", "name"]),
        (["--trainer.max_epoch", "3"], ["max_epoch", "max_epochs"]),
        (["--trainer.limit_train_batches", "0"], ["trainer.limit_train_batches", "nothing to train on"]),
        (["--model", "NoSuchMethod"], ["NoSuchMethod", "MAE"]),
        (["--data", "NoSuchData"], ["NoSuchData", "SceneFolder"]),
        (["--model.optimizer.lr", "fast"], ["optimizer.lr", "fast"]),
        (["--model.backbone.name", "vit_tny_patch8"], ["vit_tny_patch8", "vit_tiny_patch8"]),
        (["--model.mask_ratio", "1.0"], ["mask_ratio", "1.0"]),
        (["--model.mask_ratio", "-0.1"], ["mask_ratio", "-0.1"]),
        (["--model.mask_ratio", "0.99"], ["mask_ratio 0.99", "32 tokens"]),
        (["--model.decoder_heads", "3"], ["16", "3 heads"]),
        (["--data.image_width", "60"], ["patch size 8", "60", "56"]),
        (["--data.bands.names", "[B02,B99]"], ["B99", "B02"]),
        (["--data.bands.sensor", "sentinel9"], ["sentinel9", "sentinel2_l1c"]),
        (["--data.bands.mean", "[1,2]", "--data.bands.std", "[1,2]"], ["bands.mean", "2 values", "13"]),
        (["--data.batch_size", "0"], ["batch_size", "0"]),
        (["--trainer.accumulate_grad_batches", "0"], ["accumulate_grad_batches", "0"]),
        (["--trainer.devices", "999"], ["devices 999", "fewer"]),
        (["--seed_everything", "-5"], ["seed_everything", "-5"]),
        (["--model.attention", "xformers"], ["model.attention 'xformers'", "auto"]),
        (["--data", "SceneFolder"], ["missing: root", "--data.root"]),
        (["--trainer.devices", "0"], ["devices"]),
        (["--trainer.accelerator", "cuda", "--trainer.devices", "1"], ["accelerator"]),
        (["--ckpt_path", "missing.ckpt"], ["missing.ckpt", "does not exist"]),
        (["--data.class_path", "SceneFolder", "--data.root", "nowhere"], ["nowhere", "does not exist"]),
        (["--data.class_path", "SceneFolder", "--data.root", "."], ["data.root"]),
        (["--knn.k", "0"], ["k", "0"]),
        (["--knn.scales", "[12.5]"], ["knn.scales: 12.5", "such as 0.125"]),
    ],
)
def test_wrong_arguments(run, args, words):
    if {"cuda", "xformers"} & set(args) and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused(run(*args), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modell: 3", ["modell", "model"]),
        ("model: {class_path: mae, init_args: {mask_rtio: 0.3}}", ["mask_rtio", "mask_ratio"]),
        ("model: {class_path: nothing.here.Method}", ["nothing.here.Method"]),
        ("model: [1\nb: !!x", ["no valid YAML", "line"]),
    ],
)
def test_wrong_yaml(run, tmp_path, text, words):
    other = tmp_path / "other.yaml"
    other.write_text(text)
    refused(run("--config", str(other)), *words)


def test_missing_configuration(run):
    refused(run("--config", "no_such_file.yaml"), "no_such_file.yaml")


def test_nothing_configured(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["xscale"])
    assert cli.main(["fit"]) == 2
    assert "missing: data, model" in capsys.readouterr().err


def test_output_that_cannot_be_written(run, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    refused(run("--output", str(file / "runs")), "--output", "cannot be written")


def test_scene_smaller_than_a_patch(run, tmp_path):
    scene(tmp_path / "scenes", size=12)
    refused(run(*SCENES, "--data.root", str(tmp_path / "scenes")), "12", "16")


def test_band_that_the_files_lack(run, tmp_path):
    scene(tmp_path / "scenes", bands=2)
    refused(run(*SCENES, "--data.root", str(tmp_path / "scenes")), "B02")


@pytest.mark.parametrize("damage", ["zero bytes", "truncated", "text"])
def test_damaged_scene_is_named(run, tmp_path, damage):
    path = scene(tmp_path / "scenes", name="good.tif")
    bad = path.with_name("bad.tif")
    content = {"zero bytes": b"", "truncated": path.read_bytes()[:300], "text": b"this is no image"}[damage]
    bad.write_bytes(content)
    refused(run(*SCENES, "--data.root", str(tmp_path / "scenes"), "--data.on_error", "stop"), "bad.tif")


def test_statistics_that_cannot_fit_the_data(run, tmp_path):
    """0-255 statistics on 16-bit data: only the first batch can tell; the run folder made by then goes again."""
    scene(tmp_path / "scenes", size=128)
    statistics = ("--data.bands.mean", "[100,100,100]", "--data.bands.std", "[50,50,50]")
    code, err, output = run(*SCENES, "--data.root", str(tmp_path / "scenes"), *statistics)
    assert code == 2 and "Traceback" not in err
    message = err[err.index("xscale: error: ") :].strip()
    assert "do not fit the data" in message and "data.bands.mean" in message and len(message.splitlines()) == 2
    assert list(output.rglob("*")) == []


def test_checkpoint_of_another_architecture(run, tmp_path):
    code, err, output = run()
    assert code == 0, err
    (checkpoint,) = output.rglob("last.ckpt")
    before = sorted(output.rglob("*"))
    for args, word in (
        (["--model.backbone.depth", "2"], "another architecture"),
        (["--data.bands.names", "[B02,B03]"], "other bands"),
        (["--model.backbone.position", "gsd"], "position"),
        (["--model.decoder_heads", "4"], "decoder_heads is 2 there and 4 here"),
        (["--data.bands.mean", str([1.0] * 13), "--data.bands.std", str([1.0] * 13)], "mean"),
    ):
        code, err, _ = run("--ckpt_path", str(checkpoint), *args)
        assert code == 2 and word in err and "Traceback" not in err
    assert sorted(output.rglob("*")) == before, "a refused run left something behind"
    code, err, _ = run("--ckpt_path", str(checkpoint), "--trainer.max_steps", "2")
    assert code == 0, err


def test_runs_started_together_get_folders_of_their_own(tmp_path):
    names = [claim(tmp_path / "mae", "now") for _ in range(3)]
    assert names == ["now", "now_2", "now_3"]
    assert sorted(p.name for p in (tmp_path / "mae").iterdir()) == sorted(names)


def test_unknown_verb(capsys):
    assert cli.main(["fti"]) == 2
    assert "did you mean 'fit'" in capsys.readouterr().err


def test_debug_brings_the_traceback(run):
    with pytest.raises(ValueError, match="mask_ratio must be"):
        run("--model.mask_ratio", "2", "--debug")


def test_user_error_is_found_in_a_ring_of_exceptions():
    inner, outer = UserError("the cause"), ValueError("wrapped")
    outer.__cause__, inner.__context__ = inner, outer
    assert find_user_error(outer) is inner
    assert describe(outer) == "the cause"


def test_worker_traceback_is_cut_off():
    text = (
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1\nxscale_lightning.errors.UserError: file a.tif is damaged: remove it\n'
    )
    assert describe(UserError(text)) == "file a.tif is damaged: remove it"


def test_a_configuration_that_is_no_text_is_refused(tmp_path, capsys):
    (tmp_path / "scene.tif").write_bytes(b"II*\0\x83\xff")
    for path in (tmp_path / "scene.tif", tmp_path):
        assert cli.main(["predict", "--config", str(path)]) == 2
        assert f"--config '{path}'" in capsys.readouterr().err
