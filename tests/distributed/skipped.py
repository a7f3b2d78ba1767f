"""Three steps of two processes, of which one has a loss that is not finite in the second: `skipped.py FOLDER`."""

import sys

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from xscale_lightning.callbacks.guard import FiniteGuard
from xscale_lightning.data.synthetic import SyntheticData
from xscale_lightning.methods.latent_mim import LatentMIM
from xscale_lightning.models.registry import BackboneConfig

torch.set_num_threads(1)
folder = sys.argv[1]


class OnlyOne(LatentMIM):
    def step(self, batch):
        output = super().step(batch)
        if self.global_rank == 1 and self.trainer.fit_loop.epoch_loop.total_batch_idx == 1:
            output.loss = output.loss + float("nan")
        return output


class Note(Callback):
    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, module, *args):
        self.states.append({k: v.clone() for k, v in module.state_dict().items()})

    def on_train_end(self, trainer, module):
        guard = next(c for c in trainer.callbacks if isinstance(c, FiniteGuard))
        record = {"states": self.states, "skipped": guard.skipped, "updates": guard.updates}
        torch.save(record, f"{folder}/{trainer.global_rank}.pt")


backbone = BackboneConfig("vit_tiny_patch8", depth=1, dim=16, num_heads=2, position="stretched")
data = SyntheticData(length=64, batch_size=4, num_workers=0, image_height=32, image_width=32)
torch.manual_seed(0)
module = OnlyOne(
    bands=data.bands, backbone=backbone, decoder_dim=16, decoder_depth=1, decoder_heads=2, head_dim=16, mask_ratio=0.5
)
Trainer(
    max_steps=3,
    accelerator="cpu",
    devices=2,
    strategy="ddp_fork",
    logger=CSVLogger(folder, "run", "0"),
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    limit_val_batches=0,
    callbacks=[FiniteGuard(), Note()],
).fit(module, datamodule=data)
