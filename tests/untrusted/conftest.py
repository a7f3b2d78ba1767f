"""A sound checkpoint and its export, which the tests then spoil."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from xscale_lightning import exports
from xscale_lightning.data.bands import generic
from xscale_lightning.methods.mae import MAE
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.pretrained import load_backbone


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Path of the checkpoint; the export lies in `export` beside it."""
    torch.manual_seed(0)
    backbone = BackboneConfig("vit_tiny_patch8", depth=1, dim=16, num_heads=2)
    module = MAE(bands=generic(2), backbone=backbone, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    trainer.save_checkpoint(path)
    exports.write_export(load_backbone(path), path.parent / "export", lambda config: "card")
    return path
