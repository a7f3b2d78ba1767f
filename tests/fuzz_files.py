"""Small files for every data module, and arguments with which each method, task and data module works: for the fuzz."""

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from PIL import Image
from rasterio.transform import from_origin

TINY = {"name": "vit_tiny_patch8", "depth": 1, "dim": 16, "num_heads": 2}
SMALL = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
CUBES = {**TINY, "name": "spectral_vit_tiny_cube3_patch8", "pad": "edge", "image_size": 32}
METHODS: dict[str, dict[str, Any]] = {
    "mae": {"backbone": TINY, **SMALL},
    "cross_scale_mae": {"backbone": TINY, "predictor_dim": 16, **SMALL},
    "s2mae": {"backbone": CUBES, "mask_ratio": 0.75, **SMALL},
    "ijepa": {"backbone": {**TINY, "class_token": False}, "predictor": {"dim": 48, "depth": 1}},
    "latent_mim": {"backbone": {**TINY, "position": "stretched"}, "head_dim": 16, "mask_ratio": 0.5, **SMALL},
    "spatial_affinity": {
        "backbone": TINY, "host": "mae", "host_args": SMALL, "teacher": "own", "source": "interpolated"
    },
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "xscale_lightning.tasks.classification.Classification": {"backbone": TINY},
    "xscale_lightning.tasks.classification.MultiLabelClassification": {"backbone": TINY},
    "xscale_lightning.tasks.segmentation.Segmentation": {"backbone": TINY, "decoder_dim": 32},
    "xscale_lightning.tasks.change.ChangeDetection": {"backbone": TINY, "decoder_dim": 32},
}
# Data with the labels that a task needs; methods take any data.
LABELLED = {
    "Classification": ("SyntheticData", "ImageFolderData", "TorchGeoData", "PackedData"),
    "MultiLabelClassification": ("TorchGeoData:labels",),
    "Segmentation": ("MaskFolder",),
    "ChangeDetection": ("ChangeFolder", "xscale_lightning.data.oscd.OSCDData"),
}
SMALL_PATCHES = {"TreeSatPairs": 2}  # its coarse images have at most 6 x 6 pixels
RGB = {"sensor": "generic", "names": ["R", "G", "B"], "mean": [1700.0] * 3, "std": [700.0] * 3}
EUROSAT = "ds/images/remote_sensing/otherDatasets/sentinel_2/tif"  # where TorchGeo looks for its images
UCMERCED = "xscale_lightning.data.ucmerced.UCMercedMultiLabel"
OSCD = "Onera Satellite Change Detection dataset - "
SCENES = {"bands": RGB, "file_bands": ["R", "G", "B"], "image_size": 32, "samples_per_epoch": 8}


def make_files(root: Path) -> None:
    """A few small files for every data module."""
    rng = np.random.default_rng(0)

    def write(path: Path, pixels: np.ndarray, gsd: float = 10.0, left: float = 3e5) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"crs": "EPSG:32632", "transform": from_origin(left, 5e6, gsd, gsd), "dtype": pixels.dtype}
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
    several_labels(root / "ucmerced", rng)
    cities(root / "oscd", rng)
    for number in range(4):
        write(root / "treesat" / "aerial" / f"t{number}.tif", image(304, 4) // 12, 0.2, 3e5 + 1000 * number)
        series(root / "treesat" / "sentinel-ts", f"t{number}_2020", rng)


def several_labels(root: Path, rng: np.random.Generator) -> None:
    """UC Merced's layout: 32 x 32 pixels, three labels."""
    folder, lines = root / "UCMerced_LandUse" / "Images" / "beach", ["IMAGE\\LABEL\tsand\tsea\tcars"]
    folder.mkdir(parents=True)
    for number, split in enumerate(("train", "val", "test")):
        names = [f"beach{10 * number + i:02d}" for i in range(4)]
        for name in names:
            Image.fromarray(rng.integers(0, 255, (32, 32, 3)).astype("uint8")).save(folder / f"{name}.tif")
            lines.append(f"{name}\t" + "\t".join(str(value) for value in rng.integers(0, 2, 3)))
        (root / f"uc_merced-{split}.txt").write_text("\n".join(f"{name}.tif" for name in names))
    (root / "LandUse_Multilabeled.txt").write_text("\n".join(lines))


def cities(root: Path, rng: np.random.Generator) -> None:
    """OSCD's layout: five cities of 64 x 64 pixels."""
    for city, split in {"a": "Train", "b": "Train", "c": "Train", "d": "Train", "e": "Test"}.items():
        for date in (1, 2):
            folder = root / f"{OSCD}Images" / city / f"imgs_{date}_rect"
            folder.mkdir(parents=True)
            for band in (*(f"B{i:02d}" for i in range(1, 13)), "B8A"):
                Image.fromarray(rng.integers(500, 3000, (64, 64)).astype("int32")).save(folder / f"{band}.tif")
        (root / f"{OSCD}Images" / city / "dates.txt").write_text("date_1: 20160101\ndate_2: 20170101\n")
        folder = root / f"{OSCD}{split} Labels" / city / "cm"
        folder.mkdir(parents=True)
        Image.fromarray(rng.choice([0, 255], (64, 64)).astype("uint8")).save(folder / "cm.png")


def series(folder: Path, name: str, rng: np.random.Generator) -> None:
    """Two acquisitions of TreeSatAI-Time-Series; without h5py none, and its data module is refused."""
    try:
        import h5py
    except ImportError:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / f"{name}.h5", "w") as file:
        file["sen-2-data"] = rng.integers(500, 3000, (2, 10, 6, 6)).astype("float32")
        file["sen-2-masks"] = np.zeros((2, 2, 6, 6), "float32")
        days = [f"S2A_MSIL2A_{day}T102421_N0213_R065_T32UNC_20200102T115419" for day in ("20200602", "20200703")]
        file.create_dataset("sen-2-products", data=days, dtype=h5py.string_dtype())


def make_pack(root: Path) -> None:
    """A pack of the labelled folder; the command line makes it."""
    from xscale_lightning import cli

    given = [f"--data.root={root / 'labelled'}", "--data.channels=[R, G, B]", "--data.image_size=32", "--data.gsd=10"]
    given += ["--data.bands.sensor=generic", "--data.bands.names=[R, G, B]", "--data.num_workers=0"]
    given += ["--data.bands.mean=[1700.0, 1700.0, 1700.0]", "--data.bands.std=[700.0, 700.0, 700.0]"]
    if code := cli.main(["pack", str(root / "packed"), "--data", "ImageFolderData", *given, "--data.holdout=0.25"]):
        raise RuntimeError(f"xscale pack ended with code {code}")


def data_modules(root: Path) -> dict[str, dict[str, Any]]:
    """Arguments of every data module with which it works; "Name:what" is a second way to use one."""
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
        "TorchGeoData:labels": {
            "root": str(root / "ucmerced"), "dataset": {"class_path": UCMERCED}, "num_classes": 3, "gsd": 0.3,
            "bands": RGB, "image_size": 32,
        },
        "TreeSatPairs": {
            "root": str(root / "treesat"), "bands": {"sensor": "sentinel2_l2a", "names": ["B02", "B03"]},
            "image_size": 6, "samples_per_epoch": 8, "fractions": [0.5, 0.5, 0.0],
        },
        "xscale_lightning.data.oscd.OSCDData": {
            "root": str(root / "oscd"), "bands": {"names": ["B02", "B03"]}, "image_size": 32, "validation": 1,
        },
        "PackedData": {"root": str(root / "packed")},
        "ChangeFolder": {"root": str(root / "changes"), "bands": RGB, "image_size": 32, "label": "label.tif"},
    }  # fmt: skip
