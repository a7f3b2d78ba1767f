"""Small runs that can be ended in the middle."""

import copy
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer

from xscale_lightning import cli
from xscale_lightning.callbacks.run_checkpoint import RunCheckpoint
from xscale_lightning.callbacks.trace import Trace, read_rows
from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.sample import SampleScene
from xscale_lightning.data.synthetic import SyntheticData
from xscale_lightning.methods.ijepa import IJEPA
from xscale_lightning.methods.mae import MAE
from xscale_lightning.models.jepa_predictor import PredictorConfig
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.optim import OptimizerConfig

RGB = BandSelection("sentinel2_rgb")
SMALL = BackboneConfig("vit_tiny_patch8", depth=1, dim=16, num_heads=2)


class Killed(BaseException):
    """Stands for the end of the process: nobody but the test catches it."""


class KillAt(Callback):
    """Ends a run before one of its batches."""

    def __init__(self, batch: int | None) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise Killed


class Hooks(Callback):
    """In which order epochs began and ended and validations took place."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append(("epoch", trainer.current_epoch))

    def on_validation_end(self, trainer, pl_module):
        self.seen.append(("validation", trainer.current_epoch, trainer.global_step))

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(("end", trainer.current_epoch, trainer.global_step))


def method(name: str = "mae") -> Any:
    torch.manual_seed(0)
    shared = {"bands": RGB.resolve(), "backbone": SMALL, "optimizer": OptimizerConfig(lr=0.1)}
    if name == "ijepa":
        shared["backbone"] = replace(SMALL, patch_size=4, class_token=False)
        return IJEPA(**shared, predictor=PredictorConfig(16, 1, 2))
    return MAE(**shared, decoder_dim=16, decoder_depth=1, decoder_heads=2)


def data(kind: Any, workers: int = 0) -> Any:
    if not isinstance(kind, str):
        return kind
    if kind == "scene":
        return SampleScene(RGB, image_size=16, samples_per_epoch=28, batch_size=4, num_workers=workers)
    return SyntheticData(RGB, 16, 16, length=28, batch_size=4, num_workers=workers)


def _train(folder: Path, name: str, kill: int | None = None, ckpt_path: Any = None, **options: Any) -> list[tuple]:
    """Train 7 batches an epoch into `folder/name`; returns what the hooks saw."""
    kind, workers = options.pop("kind", "synthetic"), options.pop("workers", 0)
    model, saving = method(options.pop("method", "mae")), options.pop("saving", {"minutes": 1e-9})
    hooks, more = Hooks(), options.pop("callbacks", [])
    writer = RunCheckpoint(**{"save_last": True, "save_top_k": 0, "dirpath": folder / name / "checkpoints", **saving})
    trainer = Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": 3, "limit_val_batches": 2, **options},
        callbacks=[*more, hooks, KillAt(kill), writer, Trace(str(folder / f"{name}.txt"))],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    try:
        trainer.fit(model, datamodule=data(kind, workers), ckpt_path=ckpt_path, weights_only=True)
    except Killed:
        assert kill is not None
    else:
        assert kill is None, "the run ended before it could be killed"
    return hooks.seen


@pytest.fixture
def train():
    """See `_train`."""
    return _train


@pytest.fixture
def seed(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")


CONFIG = {
    "seed_everything": 3,
    "model": {
        "class_path": "mae",
        "init_args": {
            **{"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "optimizer": {"lr": 0.1}},
            "backbone": {"name": "vit_tiny_patch8", "depth": 1, "dim": 16, "num_heads": 2},
        },
    },
    "data": {
        "class_path": "SyntheticData",
        "init_args": {
            **{"image_height": 16, "image_width": 16, "length": 20, "batch_size": 4, "num_workers": 0},
            "bands": {"names": ["B02", "B03"]},
        },
    },
    "trainer": {
        **{"max_epochs": 2, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "log_every_n_steps": 1}
    },
    "checkpoint": {"minutes": 1e-9},
    "knn": {"max_train": 8, "max_test": 2, "every_n_epochs": 0},
    "geometry": {"max_samples": 2, "every_n_epochs": 0},
    "pictures": {"num_images": 1, "num_score_images": 1, "every_n_epochs": 0},
}


class Command:
    """`xscale fit` in this process: 10 batches, a checkpoint after each."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch, self.output, self.config = folder, patch, folder / "runs", copy.deepcopy(CONFIG)

    def fit(self, *args: str, name: str = "trace", config: Path | None = None, **changes: Any) -> int:
        if config is None:
            config = self.folder / "small.yaml"
            config.write_text(yaml.safe_dump({**CONFIG, **changes}))
        trace = str(self.folder / f"{name}.txt")
        return cli.main(
            ["fit", "--config", str(config), "--output", str(self.output), "--trace.file", trace, *args, "--debug"]
        )

    def killed_at(self, batch: int, *args: str, **options: Any) -> None:
        begin = KillAt(batch).on_train_batch_start
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trace, "on_train_batch_start", lambda self, *given: begin(*given), raising=False)
            with pytest.raises(Killed):
                self.fit(*args, **options)

    def rows(self, name: str = "trace") -> list[tuple[str, ...]]:
        return read_rows(self.folder / f"{name}.txt")

    def runs(self) -> list[Path]:
        return sorted(self.output.glob("mae/*"))


@pytest.fixture
def command(tmp_path, monkeypatch) -> Command:
    monkeypatch.setattr(sys, "argv", ["xscale"])
    for name, value in (("PL_GLOBAL_SEED", "0"), ("PL_SEED_WORKERS", "0"), ("MPLBACKEND", "Agg")):
        monkeypatch.setenv(name, os.environ.get(name, value))
    return Command(tmp_path, monkeypatch)
