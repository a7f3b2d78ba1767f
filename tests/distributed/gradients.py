"""Gradients of every method from two processes, and from one with the same global batch: `gradients.py FOLDER`."""

import sys

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader, Subset

from xscale_lightning.data.bands import generic
from xscale_lightning.data.datamodule import Collate
from xscale_lightning.data.scale_view import ScaleView
from xscale_lightning.data.synthetic import SyntheticDataset
from xscale_lightning.methods.cross_scale_mae import CrossScaleMAE
from xscale_lightning.methods.ijepa import IJEPA
from xscale_lightning.methods.latent_mim import LatentMIM
from xscale_lightning.methods.mae import MAE
from xscale_lightning.methods.s2mae import S2MAE
from xscale_lightning.methods.spatial_affinity import SpatialAffinity
from xscale_lightning.models.jepa_predictor import PredictorConfig
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.testing import NO_VIEWS, _PerSampleNoise

torch.set_num_threads(1)
BATCH = 8

VIT, DECODER = {"name": "vit_tiny_patch8", "depth": 2}, {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4}
SPECTRAL = {"name": "spectral_vit_tiny_cube3_patch8", "depth": 2, "pad": "edge", "image_size": 32}
JEPA = {"predictor": {"dim": 48, "depth": 1}}
METHODS = {
    "mae": (MAE, VIT, DECODER),
    # The whole image as second view: its box is the same in both runs, its mask is not the first view's.
    "cross_scale_mae": (
        CrossScaleMAE,
        VIT,
        {**DECODER, "gather_negatives": True, "scale_view": ScaleView((1, 1), (1, 1))},
    ),
    "s2mae": (S2MAE, SPECTRAL, DECODER),
    "ijepa": (IJEPA, {**VIT, "class_token": False}, {"predictor": PredictorConfig(48, 1)}),
    "latent_mim": (LatentMIM, {**VIT, "position": "stretched"}, {**DECODER, "head_dim": 32}),
    "spatial_affinity": (
        SpatialAffinity,
        {**VIT, "class_token": False},
        {"host": "ijepa", "host_args": JEPA, "source": "interpolated"},
    ),
}


def same_masks(method):
    class SameMasks(method):
        # A sample's mask depends on the sample alone, so that both runs see the same ones.
        def step(self, batch):
            with _PerSampleNoise(self.global_rank * BATCH // self.trainer.world_size):
                return super().step(batch)

    return SameMasks


class Data(LightningDataModule):
    def train_dataloader(self):
        share = BATCH // self.trainer.world_size
        first = self.trainer.global_rank * share
        data = SyntheticDataset(torch.zeros(3), torch.ones(3), (32, 48), BATCH, 4, 0)
        return DataLoader(Subset(data, range(first, first + share)), batch_size=share, collate_fn=Collate(10.0))


class Save(Callback):
    def __init__(self, path):
        self.path = path

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.is_global_zero:
            gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}
            torch.save({"gradients": gradients, "lr": module.plan.peak_lr, "world": trainer.world_size}, self.path)


def train(name, path, **options):
    torch.manual_seed(0)
    method, backbone, arguments = METHODS[name]
    module = same_masks(method)(
        bands=generic(3), backbone=BackboneConfig(**backbone), views=NO_VIEWS, **arguments
    ).double()
    Trainer(
        max_steps=1,
        accelerator="cpu",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Save(path)],
        **options,
    ).fit(module, datamodule=Data())


if __name__ == "__main__":
    for name in METHODS:
        train(name, f"{sys.argv[1]}/{name}_two.pt", devices=2, strategy="ddp_fork")
    for name in METHODS:
        train(name, f"{sys.argv[1]}/{name}_one.pt", devices=1)
