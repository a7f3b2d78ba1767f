"""Small files for every data module, and arguments with which each method, task and data module works: for the fuzz."""

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.transform import from_origin

TINY = {"name": "vit_tiny_patch8", "depth": 1, "dim": 16, "num_heads": 2}
SMALL = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
CUBES = {**TINY, "name": "spectral_vit_tiny_cube3_patch8", "pad": "edge", "image_size": 32}
METHODS: dict[str, dict[str, Any]] = {
    "mae": {"backbone": TINY, **SMALL},
    "cross_scale_mae": {"backbone": TINY, "predictor_dim": 16, **SMALL},
    "s2mae": {"backbone": CUBES, **SMALL},
    "ijepa": {"backbone": {**TINY, "class_token": False}, "predictor": {"dim": 48, "depth": 1}},
    "latent_mim": {"backbone": {**TINY, "position": "stretched"}, "head_dim": 16, "mask_ratio": 0.5, **SMALL},
    "spatial_affinity": {
        "backbone": TINY, "host": "mae", "host_args": SMALL, "teacher": "own", "source": "interpolated"
    },
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "xscale_lightning.tasks.classification.Classification": {"backbone": TINY},
    "xscale_lightning.tasks.segmentation.Segmentation": {"backbone": TINY, "decoder_dim": 16},
    "xscale_lightning.tasks.change.ChangeDetection": {"backbone": TINY, "decoder_dim": 16},
}
# Data with the labels that a task needs; methods take any data.
LABELLED = {
    "Classification": ("SyntheticData", "ImageFolderData", "TorchGeoData", "PackedData"),
    "Segmentation": ("SampleScene", "MaskFolder"),
    "ChangeDetection": ("ChangeFolder",),
}
RGB = {"sensor": "generic", "names": ["R", "G", "B"], "mean": [1700.0] * 3, "std": [700.0] * 3}
EUROSAT = "ds/images/remote_sensing/otherDatasets/sentinel_2/tif"  # where TorchGeo looks for its images
SCENES = {"bands": RGB, "file_bands": ["R", "G", "B"], "image_size": 32, "samples_per_epoch": 8}


def make_files(root: Path) -> None:
    """A few small files for every data module."""
    rng = np.random.default_rng(0)

    def write(path: Path, pixels: np.ndarray, gsd: float = 10.0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"crs": "EPSG:32632", "transform": from_origin(3e5, 5e6, gsd, gsd), "dtype": pixels.dtype}
        count, height, width = pixels.shape
        with rasterio.open(path, "w", "GTiff", width, height, count, **options) as file:
            file.write(pixels)

    def image(side: int = 64, bands: int = 3) -> np.ndarray:
        return rng.integers(500, 3000, (bands, side, side)).astype("uint16")

    for number in range(4):
        write(root / "scenes" / f"s{number}.tif", image())
        write(root / "fine" / f"s{number}.tif", image(128), 5.0)
        write(root / "masks" / f"s{number}.tif", rng.integers(0, 2, (1, 64, 64)).astype("uint8"))
        write(root / "labelled" / ("a" if number % 2 else "b") / f"i{number}.tif", image(32))
        write(root / "labelled" / ("a" if number % 2 else "b") / f"j{number}.tif", image(32))
        for name in ("A.tif", "B.tif"):
            write(root / "changes" / f"p{number}" / name, image())
        write(root / "changes" / f"p{number}" / "label.tif", rng.integers(1, 3, (1, 64, 64)).astype("uint8"))
    for number, split in enumerate(("train", "val", "test")):
        names = [f"{kind}_{10 * number + i}" for kind in ("Forest", "River") for i in range(2)]
        for name in names:
            write(root / "eurosat" / EUROSAT / name.split("_")[0] / f"{name}.tif", image(32, 13))
        (root / "eurosat" / f"eurosat-{split}.txt").write_text("\n".join(f"{name}.jpg" for name in names))


def make_pack(root: Path) -> None:
    """A pack of the labelled folder; the command line makes it."""
    from xscale_lightning import cli

    given = [f"--data.root={root / 'labelled'}", "--data.channels=[R, G, B]", "--data.image_size=32", "--data.gsd=10"]
    given += ["--data.bands.sensor=generic", "--data.bands.names=[R, G, B]", "--data.num_workers=0"]
    given += ["--data.bands.mean=[1700.0, 1700.0, 1700.0]", "--data.bands.std=[700.0, 700.0, 700.0]"]
    if code := cli.main(["pack", str(root / "packed"), "--data", "ImageFolderData", *given, "--data.holdout=0.25"]):
        raise RuntimeError(f"xscale pack ended with code {code}")


def data_modules(root: Path) -> dict[str, dict[str, Any]]:
    """Arguments of every data module with which it works."""
    scenes = {"root": str(root / "scenes"), **SCENES}
    pairs = {"bands_hr": RGB, "root_hr": str(root / "fine")}
    geo = {"class_path": "torchgeo.datasets.RasterDataset", "init_args": {}}
    return {
        "SyntheticData": {"length": 8, "image_height": 32, "image_width": 32, "bands": {"names": ["B02", "B03"]}},
        "SampleScene": {"image_size": 32, "samples_per_epoch": 8},
        "SceneFolder": scenes,
        "MaskFolder": {**scenes, "root_masks": str(root / "masks"), "num_classes": 2},
        "PairedFolders": {**scenes, **pairs, "file_bands_hr": ["R", "G", "B"]},
        "PairedGeo": {
            "root": str(root / "scenes"), **pairs, "bands": RGB, "dataset": geo, "dataset_hr": geo,
            "channels": ["R", "G", "B"], "channels_hr": ["R", "G", "B"], "image_size": 32, "samples_per_epoch": 8,
        },
        "ImageFolderData": {
            "root": str(root / "labelled"), "bands": RGB, "channels": ["R", "G", "B"], "image_size": 32,
            "holdout": 0.25,
        },
        "TorchGeoData": {
            "root": str(root / "eurosat"), "dataset": {"class_path": "torchgeo.datasets.EuroSAT"}, "image_size": 32,
            "bands": {"names": ["B02", "B03", "B04"]}, "num_classes": 2,
        },
        "PackedData": {"root": str(root / "packed")},
        "ChangeFolder": {"root": str(root / "changes"), "bands": RGB, "image_size": 32, "label": "label.tif"},
    }  # fmt: skip
