"""`xscale reconstruct`: figure and numbers of any GeoTIFF, and errors of one or two lines that leave nothing behind."""

import json
import os

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin

from xscale_lightning import cli
from xscale_lightning.checkpoints import metadata
from xscale_lightning.data.bands import SENSORS
from xscale_lightning.data.views import Views
from xscale_lightning.methods.mae import MAE
from xscale_lightning.methods.s2mae import S2MAE
from xscale_lightning.models.registry import BackboneConfig

NAMES = ("B04", "B03", "B02", "B08")
BANDS = SENSORS["sentinel2_l1c"].select(NAMES)


def save(path, method, **extra):
    torch.save({"state_dict": method.state_dict(), "xscale": metadata(method), **extra}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """MAE of four bands, trained (as it says) on 16 pixels."""
    torch.manual_seed(0)
    backbone = BackboneConfig("vit_tiny_patch8", depth=1, patch_size=4)
    method = MAE(bands=BANDS, backbone=backbone, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    path = tmp_path_factory.mktemp("model") / "last.ckpt"
    return save(path, method, callbacks={"ReconstructionPictures": {"image_size": [16, 16]}})


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the verb in an empty folder; returns (exit code, printed, error text)."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def call(*args):
        code = cli.main(["reconstruct", *map(str, args)])
        return code, *capsys.readouterr()

    return call


def values(bands=4, height=40, width=48):
    noise = np.random.default_rng(0).normal(size=(bands, height, width)).cumsum(1).cumsum(2)
    return np.clip(1400 + 20 * noise, 1, 9000)


def numbers(name):
    with open(f"{name}.json", encoding="utf-8") as file:
        return json.load(file)


def write(path, pixels, names=NAMES, res=10.0, dtype="uint16", **options):
    path.parent.mkdir(exist_ok=True)
    shape = {"count": pixels.shape[0], "height": pixels.shape[1], "width": pixels.shape[2]}
    place = from_origin(4e5, 4e6, res, res)
    with rasterio.open(path, "w", "GTiff", **shape, crs="EPSG:32618", transform=place, dtype=dtype, **options) as file:
        file.write(pixels.astype(dtype))
        for i, name in enumerate(names or ()):
            file.set_band_description(i + 1, name)
    return path


def test_figure_numbers_and_geotiff(run, checkpoint, tmp_path):
    pixels = values()
    # Another order than the model's, and other spelling.
    image = write(tmp_path / "image.tif", pixels[[3, 2, 1, 0]], ("b8", "B2", "B03", "b04"))
    code, out, err = run(checkpoint, image, "--tif", "put_back.tif", "--tif-ratio", 0.5, "--paste-visible")
    assert code == 0, err
    assert sorted(os.listdir()) == ["image_reconstruction.json", "image_reconstruction.png", "put_back.tif"]
    assert np.asarray(Image.open("image_reconstruction.png")).shape[1] > 900
    found = numbers("image_reconstruction")
    window = found["window"]
    assert (window["row"], window["col"], window["height"], window["width"]) == (12, 16, 16, 16)
    assert [part["mask_ratio"] for part in found["ratios"]] == [0.5, 0.75, 0.9] and "0.95" in found["left_out"]
    half = found["ratios"][0]
    assert half["hidden"] == 0.5 and list(half["bands"]) == list(NAMES)
    for who in ("reconstruction", "mean spectrum", "bilinear inpainting"):
        assert np.isfinite([half[who]["psnr"], half[who]["spectral_angle"], half["bands"]["B08"][who]["rmse"]]).all()
    assert f"{half['reconstruction']['psnr']:.2f}" in out and "95 % left out" in out
    with rasterio.open("put_back.tif") as file:
        assert file.descriptions == NAMES and file.crs.to_epsg() == 32618
        assert file.transform == from_origin(4e5 + 160, 4e6 - 120, 10, 10)
        back = file.read()
    wanted = pixels.astype("uint16")[:, 12:28, 16:32]
    assert 0.5 <= (back == wanted).mean() < 0.52  # the visible half is the original's, in its place and its unit


def test_window_size_and_seed_as_asked_for(run, checkpoint, tmp_path):
    image = write(tmp_path / "image.tif", values())
    common = ("--ratios", 0.5, "--size", 24, "--row", 3, "--col", 24)
    first = run(checkpoint, image, *common, "--out", "a.png")
    again = run(checkpoint, image, *common, "--out", "b.png")
    other = run(checkpoint, image, *common, "--out", "c.png", "--seed", 1)
    assert first[0] == again[0] == other[0] == 0, first[2]
    a, b, c = (numbers(f"{name}") for name in "abc")
    assert a["window"]["row"] == 3 and a["window"]["col"] == 24 and a["window"]["height"] == 24
    assert a["ratios"] == b["ratios"] != c["ratios"]
    with Image.open("a.png") as one, Image.open("b.png") as two:
        assert np.array_equal(np.asarray(one), np.asarray(two))


def test_files_without_names_are_taken_in_the_models_order_and_that_is_said(run, checkpoint, tmp_path):
    bare = write(tmp_path / "bare.tif", values(), names=None)
    code, out, err = run(checkpoint, bare, "--ratios", 0.5)
    assert code == 0 and "model's order, B04, B03, B02, B08" in out and "--file-bands" in out
    turned = write(tmp_path / "turned.tif", values()[[1, 0, 3, 2]], names=None)
    code, out, err = run(checkpoint, turned, "--ratios", 0.5, "--file-bands", "B03,B04,B08,B02")
    assert code == 0 and "order" not in out, err
    one, two = (numbers(f"{name}_reconstruction") for name in ("bare", "turned"))
    assert one["ratios"] == two["ratios"]


def test_a_folder_with_one_file_per_band_of_other_resolutions(run, checkpoint, tmp_path):
    pixels = values()
    for i, name in enumerate(NAMES):
        coarse = name == "B08"
        band = pixels[i].reshape(20, 2, 24, 2).mean((1, 3)) if coarse else pixels[i]
        write(tmp_path / "scene" / f"tile_{name}.tif", band[None], names=None, res=20 if coarse else 10)
    code, _, err = run(checkpoint, tmp_path / "scene", "--ratios", 0.5)
    assert code == 0, err
    assert numbers("scene_reconstruction")["window"]["gsd"] == 10


def test_masks_per_band_of_a_method_that_scales_every_image(run, tmp_path):
    torch.manual_seed(0)
    backbone = BackboneConfig("spectral_vit_tiny_cube3_patch8", depth=1, cube_depth=2, class_token=False)
    method = S2MAE(
        bands=BANDS, backbone=backbone, decoder_dim=48, decoder_depth=1, decoder_heads=2, views=Views(size=32)
    )
    path = save(tmp_path / "s2mae.ckpt", method)
    # Reflectance in 0..1, which does not belong to the record: every image is scaled by itself, so it does not matter.
    image = write(tmp_path / "image.tif", values() / 10_000, dtype="float32")
    code, _, err = run(path, image, "--ratios", 0.5, 0.9)
    assert code == 0, err
    found = numbers("image_reconstruction")
    assert found["window"]["height"] == 32 and found["left_out"] == {}
    assert [part["hidden"] for part in found["ratios"]] == [0.5, pytest.approx(29 / 32)]


def refused(result, *words):
    code, _, err = result
    message = err.strip()
    assert code == 2 and message.startswith("xscale: error: ") and "Traceback" not in err
    assert len(message.splitlines()) <= 2, message
    for word in words:
        assert word in message, message
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--size", 18], ["patch size 4", "18", "16"]),
        (["--size", 44], ["--size", "44", "40 x 48"]),
        (["--size", 0], ["--size 0"]),
        (["--row", 25], ["--row 25", "0 to 24"]),
        (["--col", -1], ["--col -1"]),
        (["--ratios", 1.0], ["--ratios", "1"]),
        (["--ratios", 0.97], ["0.97", "none of the 16 tokens"]),
        (["--ratios", "much"], ["much"]),
        (["--tif", "x.tif", "--tif-ratio", 0.3], ["--tif-ratio 0.3"]),
        (["--out", "figure.jpg"], ["figure.jpg", ".png"]),
        (["--out", "nowhere/figure.png"], ["nowhere", "does not exist"]),
        (["--tif", "x.png"], ["x.png", ".tif"]),
        (["--file-bands", "B04,B03"], ["--file-bands", "2 names", "4 band"]),
        (["--file-bands", "B04,B03,B02,B05"], ["B08", "B05"]),
        (["--gsd", 0], ["--gsd 0"]),
        (["--nodata", 5], ["% of the window's pixels", "--row"]),
        (["--sise", 16], ["--sise"]),
    ],
)
def test_wrong_arguments(run, checkpoint, tmp_path, args, words):
    pixels = values()
    pixels[0, 15:17] = 5
    refused(run(checkpoint, write(tmp_path / "image.tif", pixels), *args), *words)


def test_wrong_images(run, checkpoint, tmp_path):
    refused(run(checkpoint, tmp_path / "none.tif"), "none.tif", "does not exist")
    refused(run(checkpoint, write(tmp_path / "three.tif", values(3), NAMES[:3])), "B08", "--file-bands")
    refused(run(checkpoint, write(tmp_path / "bare.tif", values(3), None)), "3 band", "4", "--file-bands")
    refused(run(checkpoint, write(tmp_path / "tiny.tif", values(4, 3, 3))), "3 x 3", "patch of 4")
    scaled = write(tmp_path / "scaled.tif", values() / 10_000, dtype="float32")
    refused(run(checkpoint, scaled), "mean 0.", "reflectance x 10000")
    refused(run(checkpoint, write(tmp_path / "loud.tif", values() * 7)), "B02", "was trained on", "unit")
    holed = values()
    holed[2, 20, 20] = np.nan
    refused(run(checkpoint, write(tmp_path / "holed.tif", holed, dtype="float32")), "0.391 %", "no data")
    empty = tmp_path / "empty.tif"
    empty.write_bytes(b"")
    refused(run(checkpoint, empty), "empty")
    (tmp_path / "scenes").mkdir()
    refused(run(checkpoint, tmp_path / "scenes"), "IMAGE", "no raster")
    for name in "ab":
        write(tmp_path / "scenes" / f"{name}.tif", values())
    refused(run(checkpoint, tmp_path / "scenes"), "2 scenes", "a, b")


def test_wrong_checkpoints(run, tmp_path):
    image = write(tmp_path / "image.tif", values())
    refused(run(tmp_path / "none.ckpt", image), "none.ckpt", "does not exist")
    refused(run(), "CKPT")


def test_the_image_is_never_overwritten(run, checkpoint, tmp_path):
    image = write(tmp_path / "image.tif", values())
    before = image.read_bytes()
    refused(run(checkpoint, image, "--tif", image), "is the image itself")
    assert image.read_bytes() == before


def test_nothing_half_written(run, checkpoint, tmp_path, monkeypatch):
    image = write(tmp_path / "image.tif", values())
    monkeypatch.setattr(os, "fsync", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    refused(run(checkpoint, image), "No space left")


def test_statistics_borrowed_from_the_original_give_no_numbers(run, tmp_path):
    backbone = BackboneConfig("vit_tiny_patch8", depth=1)
    method = MAE(bands=BANDS, backbone=backbone, decoder_dim=16, decoder_depth=1, decoder_heads=2, norm_pix_loss=True)
    path = save(tmp_path / "norm.ckpt", method)
    code, out, err = run(path, write(tmp_path / "image.tif", values()), "--ratios", 0.5)
    assert code == 0, err
    assert "borrow" in out
    assert "reconstruction" not in numbers("image_reconstruction")["ratios"][0]
