"""The trainings that `kill.py` kills: small ones of every kind that keeps something of its own over a kill."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMALL = {
    "model": {
        "optional_args": {
            "decoder_dim": 32,
            "decoder_depth": 1,
            "decoder_heads": 2,
            "head_dim": 64,
            "predictor": {"dim": 24, "depth": 1, "num_heads": 3},
        },
        "init_args": {"backbone": {"dim": 48, "depth": 2, "num_heads": 3, "image_size": 32}},
    },
    "data": {"init_args": {"image_size": 32, "batch_size": 8, "samples_per_epoch": 104}},  # 13 batches
    "trainer": {"max_epochs": 3, "precision": "32-true", "accelerator": "cpu", "log_every_n_steps": 1},
    "checkpoint": {"minutes": 0.001},
    "knn": {"every_n_epochs": 0, "max_train": 64, "max_test": 32},
    "geometry": {"every_n_epochs": 0, "max_samples": 32},
    "pictures": {"every_n_epochs": 0, "num_images": 1, "num_score_images": 8},
    "affinity": {"every_n_epochs": 0},
}
STAGES = [
    {"name": "one", "config": {"trainer": {"max_epochs": 2}}},
    {"name": "two", "optimizer": "carry", "config": {"data": {"init_args": {"batch_size": 16}}}},
]
LARGER = {"image_size": 64, "num_workers": 2}  # some masks leave nothing of 16 tokens
SCENE_BANDS = {"sensor": "generic", "count": 4, "mean": [1500.0] * 4, "std": [500.0] * 4}
# Name -> (configuration of the method, what is laid over `SMALL`).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mae": (
        "mae",
        {"knn": {"every_n_epochs": 1}, "geometry": {"every_n_epochs": 1}, "pictures": {"every_n_epochs": 2}},
    ),
    "mae_workers_accumulate": (
        "mae",
        {
            "data": {"init_args": {"num_workers": 2}},
            "trainer": {"accumulate_grad_batches": 3, "val_check_interval": 5},
            "checkpoint": {"every_n_train_steps": 2},
        },
    ),
    "mae_scenes": (
        "mae",
        {
            "data": {
                "class_path": "SceneFolder",
                "init_args": {"root": "scenes", "num_workers": 2, "bands": SCENE_BANDS},
            },
            "trainer": {"val_check_interval": 6},
        },
    ),
    "cross_scale_mae": ("cross_scale_mae", {"data": {"init_args": {"num_workers": 1}}}),
    "latent_mim": (
        "latent_mim",
        {"model": {"init_args": {"backbone": {"image_size": 64}}}, "data": {"init_args": LARGER}},
    ),
    "ijepa": ("ijepa", {"trainer": {"accumulate_grad_batches": 2}}),
    "sa_ijepa_pairs": (
        "sa_ijepa",
        {
            "model": {"init_args": {"backbone": {"image_size": 64}}},
            "data": {"init_args": {**LARGER, "pair_ratio": 2, "samples_per_epoch": 80}},
        },
    ),
    "s2mae": ("s2mae", {"trainer": {"val_check_interval": 4}}),
    "s2mae_stages": ("s2mae", {"stages": STAGES}),
}


def write_scenes(folder: Path) -> None:
    """Two GeoTIFFs of 4 bands of 16 bits, 160 pixels wide: smooth surfaces with noise, the same every time."""
    import rasterio
    from rasterio.transform import from_origin

    folder.mkdir(parents=True)
    draw, side = np.random.default_rng(0), 160
    rows, columns = np.mgrid[:side, :side] / side
    for number in range(2):
        waves = [np.sin((band + 2) * 6 * rows + number) + np.cos((band + 3) * 5 * columns) for band in range(4)]
        pixels = 1500 + 500 * np.stack(waves) + draw.normal(0, 60, (4, side, side))
        profile = {"driver": "GTiff", "height": side, "width": side, "count": 4, "dtype": "uint16", "crs": "EPSG:32633"}
        place = from_origin(500_000 + 10_000 * number, 5_000_000, 10, 10)
        with rasterio.open(folder / f"scene_{number}.tif", "w", transform=place, **profile) as file:
            file.write(pixels.clip(1).astype(np.uint16))


def arguments(name: str, folder: Path) -> list[str]:
    """Command line of a case, with its files in `folder`."""
    method, extra = CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    if extra.get("data", {}).get("class_path") == "SceneFolder":
        write_scenes(folder / "scenes")
        data = {**extra["data"], "init_args": {**extra["data"]["init_args"], "root": str(folder / "scenes")}}
        extra = {**extra, "data": data}
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    (folder / "case.yaml").write_text(yaml.safe_dump(extra), encoding="utf-8")
    files = [CONFIGS / f"{method}.yaml", CONFIGS / "quickstart.yaml", folder / "small.yaml", folder / "case.yaml"]
    return ["fit", *(word for file in files for word in ("--config", str(file)))]
