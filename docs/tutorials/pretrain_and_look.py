# %% [markdown]
# # Pretrain and look
#
# A small masked autoencoder on the imagery inside the package, from Python. Before the first step everything is
# measured once; at the end stand a table, one sentence, and pictures. Nothing is downloaded.

# %%
import os

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from xscale_lightning import load_backbone
from xscale_lightning.callbacks import (
    FeatureGeometry,
    OnlineKNN,
    ReconstructionPictures,
    RunSummary,
    TensorBoardReport,
    Throughput,
)
from xscale_lightning.data.sample import SampleScene
from xscale_lightning.data.views import Views
from xscale_lightning.evaluation import composite, picture_grid, save_png, stretch_limits
from xscale_lightning.methods.mae import MAE
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.optim import OptimizerConfig

QUICK = "TUTORIAL_QUICK" in os.environ  # a few steps and patches, for the test
STEPS, BATCH, STRIDE, SCORED = (2, 8, 128, 8) if QUICK else (256, 64, 32, 64)
seed_everything(0)

# %% [markdown]
# ## Data, method, trainer
#
# `SampleScene` cuts random patches of 64 pixels out of a Sentinel-2 scene of 13 bands. A batch is a dict with `image`
# `[B, 13, 64, 64]` in raw units and `gsd` `[B]` in metres per pixel. The method takes the *band record* of the data,
# and with it mean and deviation: images are normalised inside the method, once.

# %%
data = SampleScene(image_size=64, batch_size=BATCH, eval_stride=STRIDE)
method = MAE(
    bands=data.bands,
    backbone=BackboneConfig(name="vit_tiny_patch8", depth=4),
    decoder_dim=128,
    decoder_depth=3,
    decoder_heads=4,
    views=Views(scale=(1.0, 1.0), ratio=(1.0, 1.0)),  # patches come from random places: flips and turns are enough
    optimizer=OptimizerConfig(lr=1.2e-2, warmup_epochs=1),  # per 256 samples, so 3e-3 here
)
pictures = ReconstructionPictures(num_score_images=SCORED, every_n_epochs=2)
trainer = Trainer(
    max_steps=STEPS,
    max_epochs=-1,
    precision="bf16-mixed",
    logger=TensorBoardLogger("runs", name="tutorial", version="mae", default_hp_metric=False),
    callbacks=[OnlineKNN(), FeatureGeometry(), pictures, Throughput(), RunSummary(), TensorBoardReport()],
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(method, datamodule=data)

# %% [markdown]
# ```text
# metric                         step 0    last  at step  best base line
# knn/sample/top1                 0.700   0.713      256
# geometry/rank                    15.6   3.113      256
# geometry/uniformity            -1.477  -0.112      256
# geometry/cosine                 0.340   0.970      256
# reconstruction/psnr_at_50       9.624    13.8      256  bilinear inpainting 16.4
# reconstruction/psnr_at_75       9.401    13.1      256  bilinear inpainting 14.1
# reconstruction/psnr_at_90       9.482    12.6      256  bilinear inpainting 13.1
# reconstruction/psnr_at_95       9.448    12.5      256  bilinear inpainting 12.4
# reconstruction/psnr              10.6    16.1      256  bilinear inpainting 18.2
# reconstruction/spectral_angle    22.8   7.394      256
#
# It has not learned, as far as these figures show: kNN top-1 on sample 0.713 is within the noise (± 0.101) of its
# step-0 value 0.700; masked PSNR 16.1 dB does not beat bilinear inpainting 18.2 dB (step 0: 10.6).
# ```
#
# **It has not learned** anything that a smooth surface does not know: it fills gaps 5.5 dB better than at step 0 and
# 2 dB worse than bilinear inpainting, which needs no training. kNN is a share of 80 patches, so 0.713 beside 0.700 says
# nothing. Rank 3 and a mean cosine of 0.97 say that all images have become alike to the encoder. 256 steps took 109 s
# of one core; the [demo](../quickstart.md), the same with 1408, gets to 18.3 dB.
#
# ## Look at what it puts back
#
# `runs/tutorial/mae/pictures` has the same held-out patches at step 0 and later. All rows share one contrast stretch,
# so a prediction that is too dark looks too dark. `tensorboard --logdir runs` shows them with a slider, and all curves
# ([what to look at](../tensorboard.md)).
#
# ![Three held-out patches: original, masked, reconstruction, with the visible pixels](../images/tutorial_mae.png)
#
# At step 0 the third column is noise. Now it has about one colour per patch, that of the patches around: no edge, no
# road. The figures say the same.
#
# ## Look at what the encoder makes of a larger image
#
# The checkpoint holds the encoder with its bands and its normalisation. It takes any image size: here 256 pixels, 32 x
# 32 patches. The three strongest directions of the patch features are shown as red, green and blue, beside those of
# the same encoder before its first step.

# %%
checkpoint = "runs/tutorial/mae/checkpoints/last.ckpt"
trainer.save_checkpoint(checkpoint)
seed_everything(0)
untrained = MAE(bands=data.bands, backbone=BackboneConfig(name="vit_tiny_patch8", depth=4))

large = SampleScene(image_size=256, fractions=(0.4, 0.3, 0.3), eval_stride=128)
large.setup("fit")
batch = {name: values[:2] for name, values in next(iter(large.probe_dataloader("val"))).items()}


def in_colours(features: torch.Tensor) -> torch.Tensor:
    """Three principal components of feature maps `[B, D, h, w]` as pictures `[B, 3, 256, 256]`."""
    tokens = features.permute(0, 2, 3, 1).flatten(0, 2)
    tokens = tokens - tokens.mean(0)
    parts = tokens @ torch.pca_lowrank(tokens, q=3, center=False)[2]
    maps = parts.unflatten(0, (len(features), *features.shape[-2:])).permute(0, 3, 1, 2)
    return composite(torch.nn.functional.interpolate(maps, 256), (0, 1, 2), stretch_limits(maps))


trained = load_backbone(checkpoint).patch_features(batch["image"], batch["gsd"])
columns = [composite(batch["image"], data.bands.rgb), in_colours(untrained.patch_features(batch)), in_colours(trained)]
titles = ("image", "features at step 0", f"features at step {STEPS}")
save_png(picture_grid(columns, titles), "runs/tutorial/features.png")

# %% [markdown]
# ![Two scenes of 256 pixels beside three principal components of the patch features](../images/tutorial_features.png)
#
# Fields, woods and the village stand out at step 0 already: random weights turn colours into other colours, and these
# classes have different colours. After 256 steps it is not clearer. This is why no picture and no figure here comes
# without its step 0.
