"""Skipped updates are counted in `results.json`, and told at the end of the run."""

import json
import math

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from xscale_lightning.callbacks.guard import FiniteGuard
from xscale_lightning.callbacks.summary import RunSummary
from xscale_lightning.data.synthetic import SyntheticData
from xscale_lightning.methods.mae import MAE
from xscale_lightning.models.registry import BackboneConfig


class Sometimes(MAE):
    """Its loss is no number in the batches of `bad`."""

    bad: tuple[int, ...] = ()

    def step(self, batch):
        output = super().step(batch)
        if self.trainer.fit_loop.epoch_loop.total_batch_idx in self.bad:
            output.loss = output.loss * math.nan
        return output


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("bad", "line"), [((), ""), ((1,), "1 update was"), ((1, 3), "2 updates were")])
def test_results_count_skipped_updates(tmp_path, capsys, bad, line):
    data = SyntheticData(length=16, batch_size=4, image_height=16, image_width=16)
    backbone = BackboneConfig("vit_tiny_patch8", depth=1, dim=16, num_heads=2)
    module = Sometimes(bands=data.bands, backbone=backbone, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    module.bad = bad
    trainer = Trainer(
        max_steps=4, accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, num_sanity_val_steps=0, enable_checkpointing=False,
        logger=TensorBoardLogger(tmp_path, name="", version=""), callbacks=[FiniteGuard(), RunSummary()],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    results = json.loads(next(tmp_path.rglob("results.json")).read_text())
    assert results["skipped_updates"] == len(bad)
    out = capsys.readouterr().out
    assert ("not finite and left out" in out) == bool(bad) and line in out
