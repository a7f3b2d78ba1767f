"""Every shipped YAML file: complete ones train two steps, overlays are laid over them, data files are composed."""

import hashlib
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
# Those of `xscale sweep`, of `xscale bench` and of tasks have tests of their own.
PATHS = [path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("ablations", "bench", "finetune")]
FILES = {path.relative_to(CONFIGS).as_posix(): yaml.safe_load(path.read_text()) for path in PATHS}
DATA = sorted(name for name in FILES if name.startswith("data/"))
TRAINER = sorted(name for name in FILES if name.startswith("trainer/"))
COMPLETE = sorted(
    name for name, content in FILES.items() if content.get("model", {}).get("class_path") and "data" in content
)
S2MAE_OVERLAYS = ("s2mae_quick.yaml", "s2mae_stages.yaml", "s2mae_hyperspectral.yaml")
OWN_QUICK = {
    "latent_mim_quick.yaml": ("latent_mim.yaml", "sa_latent_mim.yaml"),
    "ijepa_quick.yaml": ("ijepa.yaml", "sa_ijepa.yaml"),
}
ADDITIONS = ("dense_probe.yaml", "evaluation.yaml", "fsdp.yaml")  # the last: its parts in tests/distributed
OVERLAYS = sorted(set(FILES) - set(DATA) - set(TRAINER) - set(COMPLETE) - {*S2MAE_OVERLAYS, *OWN_QUICK, *ADDITIONS})

# The smallest of everything that does not change which code runs; a kNN of a few images, pictures of two.
QUICK = [
    *("--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.devices", "1"),
    *("--trainer.limit_val_batches", "1", "--knn.max_train", "8", "--knn.max_test", "4"),
    *("--geometry.max_samples", "4", "--pictures.num_images", "2", "--pictures.num_score_images", "2"),
    *("--pictures.num_ratio_images", "1"),
    *("--data.batch_size", "4", "--data.num_workers", "0"),
]
# Published recipes are too wide for a test: their decoder too, where a method has one.
NARROW = [*("--model.backbone.dim", "96", "--model.backbone.depth", "1"), *("--model.backbone.num_heads", "3")]
DECODER = ["--model.decoder_depth", "1", "--model.decoder_dim", "64", "--model.decoder_heads", "4"]
NARROW_DECODER = {
    "mae.yaml": DECODER,
    "cross_scale_mae.yaml": [*DECODER, "--model.predictor_dim", "32"],
    "s2mae.yaml": DECODER,
    "latent_mim.yaml": [*DECODER, "--model.head_dim", "32"],
    "ijepa.yaml": ["--model.predictor.depth", "1"],
    "sa_ijepa.yaml": ["--model.host_args.predictor", "{dim: 48, depth: 1, num_heads: 3}"],
    "sa_latent_mim.yaml": [
        *("--model.host_args.decoder_depth", "1", "--model.host_args.decoder_dim", "64"),
        *("--model.host_args.head_dim", "32"),
    ],
}
NARROWED = ("decoder_depth", "decoder_dim", "decoder_heads", "predictor_dim", "head_dim")


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """The command line sets these for its process; the next test gets them back."""
    monkeypatch.setattr(sys, "argv", ["xscale"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.setenv("MPLBACKEND", "Agg")


def at_once(*arguments: str) -> list[str]:
    """The options of model and data as one configuration: as options, every one has all of them looked at again."""
    words, together = list[str](), dict[str, Any]()
    for option, value in zip(arguments[::2], arguments[1::2], strict=True):
        name, *keys = option.removeprefix("--").split(".")
        if name not in ("model", "data") or not keys or keys[0] == "host_args":  # a dict would lose its other keys
            words += [option, value]
            continue
        place = together.setdefault(name, {"init_args": {}})["init_args"]
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = yaml.safe_load(value)
    return [*words, *(["--config", json.dumps(together)] if together else [])]


def fit(output: Path, *arguments: str) -> dict:
    """Train two steps in this process; returns what the checkpoint says."""
    assert cli.main(["fit", *at_once(*arguments), "--output", str(output), "--debug"]) == 0
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
    assert TRAINER == ["trainer/cpu.yaml", "trainer/ddp.yaml", "trainer/gpu.yaml"]
    for name in TRAINER:
        assert set(FILES[name]) == {"trainer"}, f"{name} sets more than the trainer"


@pytest.mark.parametrize("name", TRAINER)
def test_trainer_files_go_over_method_data_and_size(name, capsys):
    """Method, size, data, trainer, in this order, and an option over all of them."""
    words = [*config("mae.yaml"), *config("quickstart.yaml"), *config("data/eurosat.yaml"), "-c", str(CONFIGS / name)]
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", *words, "--data.root", "x", "--trainer.max_epochs", "7", "--print_config"])
    assert not stop.value.code
    shown = yaml.safe_load(capsys.readouterr().out)
    assert {key: shown["trainer"][key] for key in FILES[name]["trainer"]} == FILES[name]["trainer"]
    assert shown["trainer"]["max_epochs"] == 7 and shown["model"]["init_args"]["backbone"]["depth"] == 4
    assert shown["data"]["class_path"].endswith("TorchGeoData") and shown["data"]["init_args"]["root"] == "x"
    assert shown["model"]["init_args"]["mask_ratio"] == FILES["mae.yaml"]["model"]["init_args"]["mask_ratio"]


@pytest.mark.slow
def test_the_cpu_trainer_trains(tmp_path):
    recipe = [*config("mae.yaml"), *config("quickstart.yaml"), *config("trainer/cpu.yaml")]
    fit(tmp_path, *recipe, *QUICK, "--data.samples_per_epoch", "16", "--knn.every_n_epochs", "0")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPLETE)
def test_complete_files_train(name, tmp_path):
    saved = fit(
        tmp_path, *config(name), *QUICK, *NARROW, *NARROW_DECODER.get(name, []), "--data.samples_per_epoch", "16"
    )
    given = FILES[name]["model"]["init_args"]
    for key, value in given.items():
        if not isinstance(value, dict) and key not in NARROWED:
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


@pytest.mark.slow
def test_s2mae_has_a_quick_variant(tmp_path):
    saved = fit(tmp_path, *config("s2mae.yaml"), *config("s2mae_quick.yaml"), *QUICK, "--data.samples_per_epoch", "16")
    given = FILES["s2mae_quick.yaml"]["model"]["init_args"]
    assert saved["init_args"]["predict_ratio"] == given["predict_ratio"]
    assert saved["init_args"]["backbone"]["dim"] == given["backbone"]["dim"]
    assert [band["name"] for band in saved["bands"]["bands"]] == list(SENSORS["sentinel2_l1c_12"].names)


@pytest.mark.slow
@pytest.mark.parametrize(("overlay", "name"), [(quick, name) for quick, names in OWN_QUICK.items() for name in names])
def test_methods_with_a_quick_variant_of_their_own(overlay, name, tmp_path):
    saved = fit(tmp_path, *config(name), *config(overlay), *QUICK, "--data.samples_per_epoch", "16")
    arguments = saved["init_args"]
    wanted = FILES[overlay]["model"]["init_args"]["backbone"]
    assert {key: arguments["backbone"][key] for key in wanted} == wanted
    own = arguments.get("host_args", arguments)
    for key, value in FILES[overlay]["model"]["optional_args"].items():
        given = own[key]
        assert (value.items() <= given.items()) if isinstance(value, dict) else given == value, key


@pytest.mark.slow
def test_s2mae_trains_in_its_two_stages(tmp_path, fmow_sentinel, bigearthnet):
    recipe = [*config("s2mae.yaml"), *config("s2mae_stages.yaml")]
    roots = ["--stages.fmow.data.root", str(fmow_sentinel), "--stages.bigearthnet.data.root", str(bigearthnet)]
    narrow = [*NARROW, *NARROW_DECODER["s2mae.yaml"]]
    assert cli.main(["fit", *recipe, *roots, *QUICK, *narrow, "--output", str(tmp_path), "--debug"]) == 0
    first, second = (
        torch.load(next(tmp_path.glob(f"*/*/stage_{name}/checkpoints/last.ckpt")), weights_only=True)
        for name in ("1_fmow", "2_bigearthnet")
    )
    assert second["xscale"]["stage"] == {"number": 2, "of": 2, "name": "bigearthnet"}
    table = "backbone.positions.spatial.table"
    assert first["state_dict"][table].shape[1] == 12**2 and second["state_dict"][table].shape[1] == 16**2
    rates = [checkpoint["xscale"]["init_args"]["optimizer"]["lr"] for checkpoint in (first, second)]
    assert rates == [2e-4, 1e-4]
    assert [len(checkpoint["xscale"]["bands"]["bands"]) for checkpoint in (first, second)] == [12, 12]


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


def raster(path: Path, values: np.ndarray, gsd: float, names: Sequence[str] = ()) -> None:
    """Write `[C, H, W]`, without band names unless they are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "count": len(values), "height": values.shape[1], "width": values.shape[2]}
    transform = from_origin(500_000, 5_000_000, gsd, gsd)
    with rasterio.open(path, "w", dtype=values.dtype, crs="EPSG:32633", transform=transform, **profile) as file:
        file.write(values)
        file.descriptions = tuple(names) or (None,) * len(values)


def draw(means: list[float], stds: list[float], size: tuple[int, int], number: int) -> np.ndarray:
    noise = np.random.default_rng(number).standard_normal((len(means), *size))
    values = np.array(means)[:, None, None] + np.array(stds)[:, None, None] * noise
    return values.clip(1, 30000).astype(np.int16)


@pytest.fixture(scope="module")
def enmap(tmp_path_factory) -> Path:
    """Tiles of 224 bands in the units of the preset; six bands hold the value for no data, which no file declares."""
    root, bands = tmp_path_factory.mktemp("enmap"), SENSORS["enmap"]
    for i in range(5):
        values = draw(bands.means, bands.stds, (32, 32), i)
        values[129:135] = -32768
        raster(root / "images" / f"tile_{i}_0.tif", values, 30.0)
        raster(root / "labels" / f"tile_{i}_0.tif", np.zeros((1, 32, 32), np.int16), 30.0)
    return root


@pytest.fixture(scope="module")
def idtrees(tmp_path_factory) -> Path:
    root, bands = tmp_path_factory.mktemp("idtrees"), FILES["data/idtrees_hsi.yaml"]["data"]["init_args"]["bands"]
    for i in range(5):
        folder = root / "train" / "RemoteSensing"
        raster(folder / "HSI" / f"MLBS_{i}.tif", draw(bands["mean"], bands["std"], (20, 20), i), 1.0)
        raster(folder / "RGB" / f"MLBS_{i}.tif", draw([90.0] * 3, [30.0] * 3, (200, 200), i), 0.1)
    return root


@pytest.fixture(scope="module")
def fmow_sentinel(tmp_path_factory) -> Path:
    """Two classes of images of every size, 13 bands in the published order."""
    root, arguments = tmp_path_factory.mktemp("fmow"), FILES["data/fmow_sentinel.yaml"]["data"]["init_args"]
    place = [arguments["bands"]["names"].index(name) if name != "B10" else None for name in arguments["channels"]]
    mean, std = ([arguments["bands"][key][i] if i is not None else 20.0 for i in place] for key in ("mean", "std"))
    number = 0
    for split in ("train", "val", "test_gt"):
        for label in ("airport", "zoo"):
            for location in range(3):
                number += 1
                values = draw(mean, std, (20 + 7 * number, 90), number)
                raster(root / split / label / f"{label}_{location}" / f"{label}_{location}_0.tif", values, 10.0)
    return root


@pytest.fixture(scope="module")
def bigearthnet(tmp_path_factory) -> Path:
    """BigEarthNet v1's layout, six patches a split, every band at its own resolution."""
    root, bands = tmp_path_factory.mktemp("ben"), FILES["data/bigearthnet.yaml"]["data"]["init_args"]["bands"]
    size = {"B01": 20, "B09": 20} | dict.fromkeys(("B02", "B03", "B04", "B08"), 120)
    for number, split in enumerate(("train", "val", "test")):
        names = [f"S2A_MSIL2A_20170613T101031_{number}_{i}" for i in range(6)]
        for name in names:
            for band, mean, std in zip(bands["names"], bands["mean"], bands["std"], strict=True):
                side = size.get(band, 60)
                values = draw([mean], [std], (side, side), number)
                raster(root / "BigEarthNet-v1.0" / name / f"{name}_{band}.tif", values, 1200 / side)
            labels = json.dumps({"labels": ["Sea and ocean"]})
            (root / "BigEarthNet-v1.0" / name / f"{name}_labels_metadata.json").write_text(labels)
        rows = "".join(f"{name},{name.replace('S2A_MSIL2A', 'S1A_IW_GRDH_1SDV')}\n" for name in names)
        (root / f"bigearthnet-{split}.csv").write_text(rows)
    return root


@pytest.fixture(scope="module")
def sen1floods11(tmp_path_factory) -> Path:
    """One chip in the published layout, with the band names of its files and a mask of water to the left."""
    root, bands = tmp_path_factory.mktemp("floods"), SENSORS["sentinel2_l1c"]
    mask = np.zeros((1, 320, 320), np.int16)
    mask[:, :, :130], mask[:, :2] = 1, -1
    values = draw(bands.means, bands.stds, (320, 320), 0)
    raster(root / "S2Hand" / "Spain_1_S2Hand.tif", np.where(mask == 1, values // 3, values), 10.0, bands.names)
    raster(root / "LabelHand" / "Spain_1_LabelHand.tif", mask, 10.0)
    raster(root / "S1Hand" / "Spain_1_S1Hand.tif", values[:2].astype(np.float32), 10.0, ("VV", "VH"))
    return root


@pytest.fixture(scope="module")
def enmap_potsdam(tmp_path_factory) -> Path:
    """Tiles of 224 bands with masks of six classes, 0 where there is none."""
    root, bands = tmp_path_factory.mktemp("potsdam"), SENSORS["enmap"]
    for i in range(9):
        values = draw(bands.means, bands.stds, (32, 32), i)
        values[129:135] = -32768
        raster(root / "images" / f"tile_{i}.tif", values, 30.0)
        raster(root / "labels" / f"tile_{i}.tif", np.arange(1024, dtype=np.uint8).reshape(1, 32, 32) % 7, 30.0)
    return root


# Their images are smaller than, or no multiple of, the usual patch of 16 pixels.
PATCH = {"idtrees_hsi": ["--model.backbone.patch_size", "4"], "bigearthnet": ["--model.backbone.patch_size", "8"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "source", "bands"),
    [
        ("eurosat", "eurosat", 13),
        ("eurosat_rgb", "eurosat", 3),
        ("eurosat_jpg", "jpegs", 3),
        ("enmap", "enmap", 202),
        ("idtrees_hsi", "idtrees", 369),
        ("fmow_sentinel", "fmow_sentinel", 12),
        ("bigearthnet", "bigearthnet", 12),
        ("sen1floods11", "sen1floods11", 13),
        ("enmap_potsdam", "enmap_potsdam", 202),
    ],
)
def test_data_files_compose_with_a_method(name, source, bands, tmp_path, request):
    root = request.getfixturevalue(source)
    recipe = [*config("mae.yaml"), *config(f"data/{name}.yaml"), "--data.root", str(root)]
    narrow = [*NARROW, *NARROW_DECODER["mae.yaml"], *PATCH.get(name, []), "--model.views.size", "32"]
    saved = fit(tmp_path, *recipe, *QUICK, *narrow)
    given = FILES[f"data/{name}.yaml"]["data"]["init_args"]["bands"]
    assert [band["mean"] for band in saved["bands"]["bands"]] == (given.get("mean") or SENSORS[given["sensor"]].means)
    assert len(saved["bands"]["bands"]) == bands


@pytest.mark.slow
@pytest.mark.parametrize(("name", "spectral", "groups"), [("enmap", "wavelength", 68), ("idtrees_hsi", "sincos", 123)])
def test_s2mae_takes_hundreds_of_bands(name, spectral, groups, tmp_path, request):
    root = request.getfixturevalue(name.removesuffix("_hsi"))
    recipe = [*config("s2mae.yaml"), *config("s2mae_hyperspectral.yaml"), *config(f"data/{name}.yaml")]
    options = ["--data.root", str(root), "--model.backbone.spectral", spectral, "--data.batch_size", "2"]
    saved = fit(tmp_path, *recipe, *QUICK, *NARROW, *NARROW_DECODER["s2mae.yaml"], *options)
    backbone = saved["init_args"]["backbone"]
    assert backbone["spectral"] == spectral and -(-len(saved["bands"]["bands"]) // 3) == groups
    assert saved["init_args"]["predict_ratio"] == 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae.yaml", "ijepa.yaml"])
def test_dense_probe_goes_over_a_method(name, tmp_path, sen1floods11):
    recipe = [*config(name), *config("dense_probe.yaml"), "--dense.data.root", str(sen1floods11)]
    short = ["--dense.epochs", "3", "--dense.warmup_epochs", "1", "--dense.batch_size", "8", "--dense.num_images", "2"]
    short += ["--dense.data.num_workers", "0", "--dense.data.cache_mb", "8"]
    narrow = [*NARROW, *NARROW_DECODER[name], "--data.samples_per_epoch", "16"]
    words = at_once(*recipe, *QUICK, *narrow, *short)
    assert cli.main(["fit", *words, "--output", str(tmp_path), "--debug"]) == 0
    (folder,) = tmp_path.glob("*/*")
    record = json.loads((folder / "results.json").read_text())["metrics"]["dense/sen1floods11/miou"]
    assert record["last_step"] == 2 and record["split"] == "val" and 0 < record["step_0"] < 1
    assert len(list((folder / "pictures").glob("dense_sen1floods11_step_*.png"))) == 2
    written = ["--config", str(folder / "config.yaml"), "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    assert cli.main(["test", *written, "--output", str(tmp_path / "test"), "--debug"]) == 0
    (folder,) = (tmp_path / "test").glob("*/*")
    tested = json.loads((folder / "results.json").read_text())["metrics"]["dense/sen1floods11/miou"]
    assert tested["split"] == "test" and tested["step_0"] == record["step_0"] and tested["last_step"] == 2


@pytest.mark.slow
def test_evaluation_goes_over_a_run_and_over_its_weights_alone(tmp_path, eurosat, capsys):
    data = [*config("data/eurosat.yaml"), "--data.root", str(eurosat)]
    recipe = [*config("mae.yaml"), *data, *QUICK, *NARROW, *NARROW_DECODER["mae.yaml"], "--model.views.size", "64"]
    recipe += ["--model.optimizer.lr", "0.1", "--model.optimizer.warmup_epochs", "0"]  # two steps that leave a trace
    fit(tmp_path / "runs", *recipe)
    (folder,) = (tmp_path / "runs").glob("*/*")
    checkpoint = folder / "checkpoints" / "last.ckpt"
    # The same weights in a method that is built anew, on data whose record has other statistics.
    other = ["--data.bands.mean", str([1000.0] * 13), "--data.bands.std", str([500.0] * 13)]
    commands = {
        "run": ["--config", str(folder / "config.yaml"), "--ckpt_path", str(checkpoint)],
        "weights": [*recipe, *other, "--model.init_from", str(folder)],
        "nothing": recipe,
    }
    found = {}
    for name, command in commands.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            arguments = [*at_once(*command), *config("evaluation.yaml"), "--output", str(tmp_path / name), "--debug"]
            assert cli.main(["test", *arguments]) == 0
        assert any("the weights are untrained" in str(w.message) for w in caught) == (name == "nothing")
        (file,) = (tmp_path / name).glob("*/*/results.json")
        found[name] = json.loads(file.read_text())
    metrics = found["run"]["metrics"]
    for name in ("knn/eurosat/top1", "knn/eurosat/scale_25/macro_f1", "linear/eurosat/top1", "linear/eurosat/macro_f1"):
        assert metrics[name]["split"] == "test" and metrics[name]["protocol"]["samples"] == 8
        assert metrics[name]["interval"][0] <= metrics[name]["last"] <= metrics[name]["interval"][1]
        assert found["weights"]["metrics"][name]["last"] == metrics[name]["last"]
    assert metrics["knn/eurosat/top1"]["step_0"] is not None
    rank = [part["metrics"]["geometry/rank"]["last"] for part in found.values()]
    assert rank[0] == pytest.approx(rank[1], rel=1e-4) and rank[0] != pytest.approx(rank[2], rel=1e-4)
    digits = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:16]
    assert found["run"]["checkpoint"]["sha256"] == found["weights"]["init_from"]["sha256"] == digits
    assert found["run"]["init_from"] is found["weights"]["checkpoint"] is None


@pytest.mark.parametrize("name", DATA)
def test_data_files_without_their_data_name_the_folder(name, tmp_path, capsys):
    missing, output = tmp_path / "nowhere", tmp_path / "runs"
    recipe = [*config("mae.yaml"), *config(name), *at_once("--data.root", str(missing)), *QUICK[:6]]
    assert cli.main(["fit", *recipe, "--output", str(output)]) == 2
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("xscale: error")]
    assert len(shown) == 1 and str(missing) in shown[0] and "does not exist" in shown[0]
    assert not output.exists()
