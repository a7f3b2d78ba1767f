# %% [markdown]
# # An exported encoder in a TorchGeo task
#
# Pretrain, export the encoder as a folder, and let TorchGeo's own `SemanticSegmentationTask` train it: its losses, its
# metrics, its learning-rate schedule. A subclass that overrides `configure_models` is all there is to it.

# %%
import os

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchgeo.trainers import SemanticSegmentationTask

from xscale_lightning import load_backbone
from xscale_lightning.cli import main as xscale
from xscale_lightning.data.sample import SampleScene
from xscale_lightning.data.views import Views
from xscale_lightning.methods.mae import MAE
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.optim import OptimizerConfig

QUICK = "TUTORIAL_QUICK" in os.environ  # a few steps and patches, for the test
STEPS, SEEDS, BATCH, STRIDE = (2, 1, 8, 96) if QUICK else (600, 3, 64, 32)
EPOCHS, LABELLED = (1, 8) if QUICK else (12, 32)  # of TorchGeo's task; with many labels, pretraining matters less
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}

# %% [markdown]
# ## Pretrain and export
#
# `xscale export CHECKPOINT FOLDER` writes weights, configuration, band record and a model card. With no step at all it
# gives the same encoder untrained: what pretraining has to beat.

# %%
data = SampleScene(image_size=64, batch_size=BATCH, eval_stride=STRIDE)


def pretrain(steps: int, folder: str) -> None:
    """Train an MAE for `steps` steps and export its encoder."""
    seed_everything(0)
    method = MAE(
        bands=data.bands,
        backbone=BackboneConfig(name="vit_tiny_patch8", depth=4),
        **{"decoder_dim": 128, "decoder_depth": 3, "decoder_heads": 4},
        views=Views(scale=(1.0, 1.0), ratio=(1.0, 1.0)),
        optimizer=OptimizerConfig(lr=1.2e-2, warmup_epochs=1),
    )
    trainer = Trainer(max_steps=steps, max_epochs=-1, limit_val_batches=0, precision="bf16-mixed", **quiet)
    trainer.fit(method, datamodule=data)
    trainer.save_checkpoint(f"{folder}.ckpt")
    assert xscale(["export", f"{folder}.ckpt", folder, "--overwrite"]) == 0


pretrain(STEPS, "pretrained")
pretrain(0, "untrained")

# %% [markdown]
# ## The task
#
# `load_backbone` takes raw images and normalises them by its own band record, so TorchGeo must not: with one of
# TorchGeo's data modules set its `mean` to 0 and its `std` to 1. A small head turns the feature map `[B, D, H / 8, W /
# 8]` into logits per pixel.


# %%
class Segmenter(nn.Module):
    """An encoder and a convolutional head."""

    def __init__(self, folder: str, num_classes: int) -> None:
        super().__init__()
        self.encoder = load_backbone(folder).train()
        width = self.encoder.encoder.num_features
        self.head = nn.Sequential(nn.Conv2d(width, 64, 3, padding=1), nn.GELU(), nn.Conv2d(64, num_classes, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, K, H, W]` of raw images `[B, C, H, W]`."""
        logits = self.head(self.encoder(images, gsd=10.0).feature_map())
        return nn.functional.interpolate(logits, images.shape[-2:], mode="bilinear")


class Task(SemanticSegmentationTask):
    """TorchGeo's task, with `backbone` the folder of an export."""

    def configure_models(self) -> None:
        """Build our model in the place of one of TorchGeo's."""
        self.model = Segmenter(self.hparams["backbone"], self.hparams["num_classes"])


# %% [markdown]
# ## Train it on 32 labelled patches
#
# Masks are [index classes](../data.md#the-embedded-scene) of every pixel. `val_MulticlassJaccardIndex` is TorchGeo's:
# the IoU over all pixels together (micro). It is measured before the first step and after the last.

# %%
data.setup("fit")
labelled = data.probe_dataloader("train")  # a fixed grid of patches, with masks
validation = data.probe_dataloader("val")
score = "val_MulticlassJaccardIndex"
final: dict[str, list[float]] = {"pretrained": [], "untrained": []}
for seed in range(SEEDS):
    chosen = torch.randperm(len(labelled.dataset), generator=torch.Generator().manual_seed(seed))[:LABELLED].tolist()
    for folder, values in final.items():
        seed_everything(seed)
        subset = Subset(labelled.dataset, chosen)
        train = DataLoader(subset, batch_size=8, shuffle=True, collate_fn=labelled.collate_fn)
        task = Task(backbone=folder, in_channels=13, num_classes=data.num_mask_classes, lr=1e-3)
        trainer = Trainer(max_epochs=EPOCHS, num_sanity_val_steps=0, log_every_n_steps=1, **quiet)
        before = trainer.validate(task, validation, verbose=False)[0][score]
        trainer.fit(task, train, validation)
        values.append(trainer.validate(task, validation, verbose=False)[0][score])
        print(f"seed {seed}, {folder}: {score} {values[-1]:.3f} (step 0: {before:.3f})")

means = {folder: sum(values) / len(values) for folder, values in final.items()}
print(f"mean over seeds: pretrained {means['pretrained']:.3f}, untrained {means['untrained']:.3f}")

# %% [markdown]
# ## What came out
#
# ```text
# seed 0, pretrained: val_MulticlassJaccardIndex 0.600 (step 0: 0.181)
# seed 0, untrained: val_MulticlassJaccardIndex 0.622 (step 0: 0.066)
# seed 1, pretrained: val_MulticlassJaccardIndex 0.603 (step 0: 0.083)
# seed 1, untrained: val_MulticlassJaccardIndex 0.601 (step 0: 0.111)
# seed 2, pretrained: val_MulticlassJaccardIndex 0.627 (step 0: 0.096)
# seed 2, untrained: val_MulticlassJaccardIndex 0.618 (step 0: 0.158)
# mean over seeds: pretrained 0.610, untrained 0.613
# ```
#
# The task learns: from 0.07 to 0.18 before its first step to 0.60 and more. **The pretraining did not help**: both
# means lie within what the seeds differ by. That is no surprise: 600 steps on one small scene, and classes that are
# thresholds of four bands, which an untrained encoder passes through. The same steps with an encoder pretrained on
# much imagery, and labels that need context, are what this is for.
#
# Our own [fine-tuning](../finetune.md) has what this leaves out: layer-wise learning rates, UPerNet, intervals, a test
# split that is asked once.
