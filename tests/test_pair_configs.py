"""Every shipped configuration of pairs reads files as its comment describes them; a shift of one HR pixel is seen."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml
from jsonargparse import ArgumentParser
from rasterio.transform import from_origin

import xscale_lightning.data.paired
import xscale_lightning.data.paired_geo
import xscale_lightning.data.treesat  # noqa: F401 (short names of classes)
from xscale_lightning.data.datamodule import XScaleDataModule

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "data"
PAIRED = ("PairedFolders", "PairedGeo", "TreeSatPairs")
NAMES = sorted(p.stem for p in CONFIGS.glob("*.yaml") if yaml.safe_load(p.read_text())["data"]["class_path"] in PAIRED)
LEFT, TOP = 500_000.0, 5_000_000.0


def raster(path: Path, bands: int, side: int, gsd: float, dtype="uint16", left=LEFT, top=TOP) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(side).integers(1, 250, (bands, side, side)).astype(dtype)
    place = {"transform": from_origin(left, top, gsd, gsd), "crs": "EPSG:32632"}
    with rasterio.open(path, "w", "GTiff", side, side, bands, dtype=dtype, **place) as file:
        file.write(values)


def idtrees(root: Path) -> None:
    for i in range(3):
        place = {"left": LEFT + 500 * i}
        raster(root / "train" / "RemoteSensing" / "HSI" / f"MLBS_{i}.tif", 369, 20, 1.0, "int16", **place)
        raster(root / "train" / "RemoteSensing" / "RGB" / f"MLBS_{i}.tif", 3, 200, 0.1, "uint8", **place)


def landsat(root: Path) -> None:
    scene = "LC08_L1TP_021039_20170322_20200904_02_T1"
    for band in range(1, 8):
        raster(root / scene / f"{scene}_B{band}.TIF", 1, 200, 30.0)
    raster(root / scene / f"{scene}_B8.TIF", 1, 402, 15.0, left=LEFT - 7.5, top=TOP + 7.5)


def sen2venus(root: Path) -> None:
    for i in range(3):
        name, place = f"FR-BIL_C_32TMR_2018-03-0{i + 1}", {"left": LEFT + 5000 * i}
        raster(root / "FR-BIL" / f"{name}_10m_b2b3b4b8.tif", 4, 128, 10.0, "int16", **place)
        raster(root / "FR-BIL" / f"{name}_05m_b2b3b4b8.tif", 4, 256, 5.0, "int16", **place)


def rapidai4eo(root: Path) -> None:
    for i in range(3):
        raster(root / "s2" / f"32UNC_place{i}.tif", 12, 60, 10.0, left=LEFT + 600 * i)
        raster(root / "planet" / f"32UNC_place{i}.tif", 4, 200, 3.0, left=LEFT + 600 * i)


def naip(root: Path) -> None:
    for band in ("B02", "B03", "B04", "B08"):
        raster(root / "s2" / "R10m" / f"T18SVG_20200601T154911_{band}_10m.tif", 1, 150, 10.0)
    for i in range(3):
        raster(root / "naip" / f"m_380750{i}_se_18_1_2020.tif", 4, 400, 1.0, "uint8", left=LEFT + 500 * i)


def treesat(root: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (root / "sentinel-ts").mkdir(parents=True)
    for i in range(3):
        raster(root / "aerial" / f"Abies_alba_1_{i}_WEFL_NLF.tif", 4, 304, 0.2, "uint8", left=LEFT + 500 * i)
        with h5py.File(root / "sentinel-ts" / f"Abies_alba_1_{i}_WEFL_NLF_2020.h5", "w") as file:
            file["sen-2-data"] = np.random.default_rng(i).uniform(1, 5000, (3, 10, 6, 6))
            file["sen-2-masks"] = np.zeros((3, 2, 6, 6))
            products = [f"S2A_MSIL2A_2020070{day}T102421" for day in (1, 2, 3)]
            file.create_dataset("sen-2-products", data=products, dtype=h5py.string_dtype())


# Files, sub-folders of MR and HR, and what a batch must hold: bands of MR and HR, side of MR, ratio.
EXPECTED = {
    "idtrees_pairs": (idtrees, "", "", (369, 3, 20, 10)),
    "idtrees_rgb_pairs": (idtrees, "", "", (3, 3, 16, 10)),
    "landsat_pan": (landsat, "", "", (7, 1, 64, 2)),
    "landsat_pan_torchgeo": (landsat, "", "", (7, 1, 64, 2)),
    "sen2venus": (sen2venus, "", "", (4, 4, 128, 2)),
    "rapidai4eo": (rapidai4eo, "s2", "planet", (4, 4, 60, Fraction(10, 3))),
    "naip_sentinel2": (naip, "s2", "naip", (4, 4, 32, 10)),
    "treesat_pairs": (treesat, "", None, (10, 4, 6, 50)),
}


def load(name: str, root: Path, root_hr: Path | None) -> XScaleDataModule:
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    folders = {"root": str(root)} if root_hr is None else {"root": str(root), "root_hr": str(root_hr)}
    content["data"]["init_args"] |= folders | {"batch_size": 2, "num_workers": 0, "samples_per_epoch": 4}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(XScaleDataModule, "data")
    return parser.instantiate(parser.parse_object(content)).data


@pytest.mark.parametrize("name", NAMES)
def test_pairs_are_read(name, tmp_path):
    write, mr, hr, (bands, bands_hr, side, ratio) = EXPECTED[name]
    write(tmp_path)
    data = load(name, tmp_path / mr, None if hr is None else tmp_path / hr)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape[1:] == (bands, side, side)
    assert batch["image_hr"].shape[1:] == (bands_hr, int(side * ratio), int(side * ratio))
    assert (batch["gsd"] / batch["gsd_hr"]).sub(float(ratio)).abs().max() < 1e-3
    assert data.missing_hr == 0 and len(data.bands) == bands and len(data.bands_hr) == bands_hr
    assert len(next(iter(data.val_dataloader()))["image"])
