"""`trainer.gradient_clip_val` with our fused optimizer, in every precision a run can have."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.synthetic import SyntheticData
from xscale_lightning.methods.mae import MAE
from xscale_lightning.models.registry import BackboneConfig


class Norms(Callback):
    def __init__(self):
        self.before, self.after = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.before.append(norm(module))

    def on_before_zero_grad(self, trainer, module, optimizer):
        if any(p.grad is not None for p in module.parameters()):
            self.after.append(norm(module))


def norm(module):
    return torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm().item()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped(precision, algorithm):
    data = SyntheticData(BandSelection(names=["B02", "B03"]), image_height=16, image_width=16, length=8, batch_size=4)
    module = MAE(
        bands=data.bands,
        backbone=BackboneConfig("vit_tiny_patch8", depth=1, dim=16, num_heads=2),
        decoder_dim=16,
        decoder_depth=1,
        decoder_heads=2,
    )
    norms = Norms()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    Trainer(
        max_steps=2,
        accelerator="cpu",
        limit_val_batches=0,
        precision=precision,
        gradient_clip_val=1e-3,
        gradient_clip_algorithm=algorithm,
        enable_model_summary=False,
        callbacks=norms,
        **quiet,
    ).fit(module, datamodule=data)
    assert len(norms.before) == 2 and min(norms.before) > 0.1
    limit = 1e-3 if algorithm == "norm" else 1e-3 * sum(p.numel() for p in module.parameters()) ** 0.5
    assert norms.after and max(norms.after) <= limit * 1.001 < min(norms.before)
