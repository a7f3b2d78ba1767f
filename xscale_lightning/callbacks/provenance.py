"""What a result stands on: files of weights, versions, device, seed."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

import xscale_lightning
from xscale_lightning.errors import UserError
from xscale_lightning.pretrained import WEIGHTS, locate

PACKAGES = ("torch", "lightning", "torchgeo", "timm", "torchmetrics", "xformers")
DIGITS = 16  # of the hash: enough to tell files apart, short enough to read


def provenance(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """The checkpoint and the weights begun with (None where there are none), the data and the seed."""
    start = getattr(pl_module, "init_from", None) or pl_module.hparams.get("init_from")
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {
        "checkpoint": weights_record(trainer.ckpt_path),
        "init_from": None if trainer.ckpt_path else weights_record(start),
        "data": getattr(getattr(trainer, "datamodule", None), "name", None),
        "seed": int(seed) if seed else None,
    }


def weights_record(path: str | os.PathLike[str] | None) -> dict[str, str | None] | None:
    """Path and short sha256 of a file of weights, or of that which a run's or an export's folder stands for.

    The hash is None for what is no file, such as the name of a model of timm's.
    """
    if not path:
        return None
    try:
        file = locate(Path(path))
    except UserError:
        return {"path": str(path), "sha256": None}
    file = file / WEIGHTS if file.is_dir() else file
    return {"path": str(path), "sha256": short_hash(file) if file.is_file() else None}


def short_hash(path: Path) -> str:
    """The first digits of a file's sha256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def versions() -> dict[str, str]:
    """Versions of Python, this package and what it stands on, as far as installed."""
    found = {"python": platform.python_version(), "xscale_lightning": xscale_lightning.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_record(trainer: Trainer, device: torch.device) -> dict[str, Any]:
    """What the run ran on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"type": device.type, "name": name, "processes": trainer.world_size, "precision": str(trainer.precision)}
