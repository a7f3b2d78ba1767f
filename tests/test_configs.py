"""Every shipped YAML file: complete ones train two steps, overlays are laid over them, data files are composed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml
from PIL import Image
from rasterio.transform import from_origin

from xscale_lightning import cli
from xscale_lightning.data.bands import SENSORS

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PATHS = [path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "ablations"]  # those are for `xscale sweep`
FILES = {path.relative_to(CONFIGS).as_posix(): yaml.safe_load(path.read_text()) for path in PATHS}
DATA = sorted(name for name in FILES if name.startswith("data/"))
COMPLETE = sorted(
    name for name, content in FILES.items() if content.get("model", {}).get("class_path") and "data" in content
)
OVERLAYS = sorted(set(FILES) - set(DATA) - set(COMPLETE))

# The smallest of everything that does not change which code runs; a kNN of a few images, pictures of two.
QUICK = [
    *("--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.devices", "1"),
    *("--trainer.limit_val_batches", "1", "--knn.max_train", "8", "--knn.max_test", "4"),
    *("--geometry.max_samples", "4", "--pictures.num_images", "2", "--pictures.num_score_images", "2"),
    *("--data.batch_size", "4", "--data.num_workers", "0"),
]
# Published recipes are too wide for a test: their decoder too, where a method has one.
NARROW = [*("--model.backbone.dim", "96", "--model.backbone.depth", "1"), *("--model.backbone.num_heads", "3")]
NARROW_DECODER = {
    "mae.yaml": ["--model.decoder_depth", "1"],
    "cross_scale_mae.yaml": ["--model.decoder_depth", "1", "--model.predictor_dim", "32"],
    "s2mae.yaml": ["--model.decoder_depth", "1"],
}


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """The command line sets these for its process; the next test gets them back."""
    monkeypatch.setattr(sys, "argv", ["xscale"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.setenv("MPLBACKEND", "Agg")


def fit(output: Path, *arguments: str) -> dict:
    """Train two steps in this process; returns what the checkpoint says."""
    assert cli.main(["fit", *arguments, "--output", str(output), "--debug"]) == 0
    (folder,) = output.glob("*/*")
    assert json.loads((folder / "results.json").read_text())
    assert (folder / "config.yaml").exists()
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(bool(value.isfinite().all()) for value in checkpoint["state_dict"].values())
    return checkpoint["xscale"]


def config(name: str) -> list[str]:
    return ["--config", str(CONFIGS / name)]


def test_every_file_has_its_kind():
    assert COMPLETE and DATA and OVERLAYS == ["quickstart.yaml"]
    for name in DATA:
        assert set(FILES[name]) == {"data"}, f"{name} sets more than the data"


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPLETE)
def test_complete_files_train(name, tmp_path):
    saved = fit(
        tmp_path, *config(name), *QUICK, *NARROW, *NARROW_DECODER.get(name, []), "--data.samples_per_epoch", "16"
    )
    given = FILES[name]["model"]["init_args"]
    for key, value in given.items():
        if not isinstance(value, dict) and key not in ("decoder_depth", "predictor_dim"):
            assert saved["init_args"][key] == value, key
    assert saved["init_args"]["optimizer"]["weight_decay"] == given["optimizer"]["weight_decay"]


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("name", COMPLETE)
def test_overlays_go_over_every_method(name, overlay, tmp_path):
    saved = fit(tmp_path, *config(name), *config(overlay), *QUICK, "--data.samples_per_epoch", "16")
    wanted = FILES[overlay]["model"]["init_args"]["backbone"]
    assert {key: saved["init_args"]["backbone"][key] for key in wanted} == wanted
    sensor = FILES[name]["data"]["init_args"].get("bands", {}).get("sensor", "sentinel2_l1c")
    assert len(saved["bands"]["bands"]) == len(SENSORS[sensor])


@pytest.fixture(scope="module")
def eurosat(tmp_path_factory) -> Path:
    """EuroSAT's layout with four images a class and split, drawn from the statistics of its configuration."""
    arguments = FILES["data/eurosat.yaml"]["data"]["init_args"]["bands"]
    order = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A"]
    place = [arguments["names"].index(name) for name in order]
    mean, std = (np.array(arguments[key])[place].reshape(13, 1, 1) for key in ("mean", "std"))
    root, draws = tmp_path_factory.mktemp("eurosat"), np.random.default_rng(0)
    folder = root / "ds" / "images" / "remote_sensing" / "otherDatasets" / "sentinel_2" / "tif"
    profile = {"driver": "GTiff", "count": 13, "height": 64, "width": 64, "dtype": "uint16", "crs": "EPSG:32633"}
    for number, split in enumerate(("train", "val", "test")):
        names = []
        for label in ("AnnualCrop", "Forest"):
            (folder / label).mkdir(parents=True, exist_ok=True)
            for i in range(4):
                name = f"{label}_{10 * number + i}"
                values = (mean + std * draws.standard_normal((13, 64, 64))).clip(1).astype(np.uint16)
                path, transform = folder / label / f"{name}.tif", from_origin(500_000, 5_000_000, 10, 10)
                with rasterio.open(path, "w", transform=transform, **profile) as file:
                    file.write(values)
                names.append(f"{name}.jpg")
        (root / f"eurosat-{split}.txt").write_text("\n".join(names))
    return root


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory) -> Path:
    root, draws = tmp_path_factory.mktemp("jpg") / "EuroSAT", np.random.default_rng(0)
    for label in ("AnnualCrop", "Forest"):
        (root / label).mkdir(parents=True)
        for i in range(20):
            values = (95 + 40 * draws.standard_normal((64, 64, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(values).save(root / label / f"{label}_{i}.jpg")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source", "bands"),
    [("eurosat", "eurosat", 13), ("eurosat_rgb", "eurosat", 3), ("eurosat_jpg", "jpegs", 3)],
)
def test_data_files_compose_with_a_method(name, source, bands, tmp_path, request):
    root = request.getfixturevalue(source)
    recipe = [*config("mae.yaml"), *config(f"data/{name}.yaml"), "--data.root", str(root)]
    saved = fit(tmp_path, *recipe, *QUICK, *NARROW, *NARROW_DECODER["mae.yaml"], "--model.views.size", "32")
    assert [band["mean"] for band in saved["bands"]["bands"]] == FILES[f"data/{name}.yaml"]["data"]["init_args"][
        "bands"
    ]["mean"]
    assert len(saved["bands"]["bands"]) == bands


@pytest.mark.parametrize("name", DATA)
def test_data_files_without_their_data_name_the_folder(name, tmp_path, capsys):
    missing, output = tmp_path / "nowhere", tmp_path / "runs"
    recipe = [*config("mae.yaml"), *config(name), "--data.root", str(missing), *QUICK, *NARROW]
    assert cli.main(["fit", *recipe, *NARROW_DECODER["mae.yaml"], "--output", str(output)]) == 2
    shown = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(shown) == 1 and str(missing) in shown[0] and "does not exist" in shown[0]
    assert not output.exists()
