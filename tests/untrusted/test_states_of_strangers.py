"""Checkpoints whose parts are of the right types and make no sense: a run does not go on with them, and says so."""

import copy
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from xscale_lightning.callbacks.saving import use_checkpoint_files
from xscale_lightning.callbacks.summary import RunSummary
from xscale_lightning.commands.restoring import tell_of_damage
from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.synthetic import SyntheticData
from xscale_lightning.errors import UserError
from xscale_lightning.methods.mae import MAE
from xscale_lightning.models.registry import BackboneConfig

RGB = BandSelection("sentinel2_rgb")


def fit(epochs: int, checkpoint: Path | None = None) -> Trainer:
    backbone = BackboneConfig("vit_tiny_patch8", depth=1, dim=16, num_heads=2)
    module = MAE(bands=RGB.resolve(), backbone=backbone, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, callbacks=[RunSummary()], limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    use_checkpoint_files(trainer)
    tell_of_damage(trainer, str(checkpoint) if checkpoint else None)
    data = SyntheticData(RGB, 16, 16, length=8, batch_size=4, num_workers=0)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return trainer


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    fit(1).save_checkpoint(path)
    return path


def group(**options):
    return lambda content: content["optimizer_states"][0]["param_groups"][0].update(options)


def moments(value):
    return lambda content: content["optimizer_states"][0]["state"][0].update(exp_avg=value)


CHANGES = {
    "no loops": lambda content: content.update(loops={}),
    "other loops": lambda content: content.update(loops={"fit_loop": {"state_dict": {}, "epoch_progress": 5}}),
    "no optimizer": lambda content: content.update(optimizer_states=[{"state": 5, "param_groups": 7}]),
    "moments of other shapes": lambda content: content["optimizer_states"][0]["state"][0].update(
        exp_avg=torch.zeros(3)
    ),
    "moments that are texts": moments("x"),
    "a learning rate in words": group(lr="fast"),
    "a rate that is no number": group(weight_decay=float("nan")),
    "three betas": group(betas=(0.9, 0.9, 0.9)),
    "callbacks that are numbers": lambda content: content.update(callbacks=dict.fromkeys(content["callbacks"], 5)),
    "data that is a list": lambda content: content.update(SyntheticData=[1]),
    "a version that steers the terminal": lambda content: content.update({"pytorch-lightning_version": "\x1b[2J9.0"}),
    "a version of long ago": lambda content: content.update({"pytorch-lightning_version": "0.1.0"}),
    "more steps than there can be": lambda content: content.update(global_step=10**30),
    "more epochs than there can be": lambda content: content.update(epoch=2**62),
    "a hundred thousand bands": lambda content: content["xscale"]["bands"].update(
        bands=content["xscale"]["bands"]["bands"] * 40_000
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_run_does_not_go_on_with_them(good, tmp_path, kind):
    content = copy.deepcopy(torch.load(good, weights_only=True))
    CHANGES[kind](content)
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(UserError) as caught:
        fit(2, tmp_path / "x.ckpt")
        from xscale_lightning.checkpoints import read_metadata

        read_metadata(tmp_path / "x.ckpt")
    text = str(caught.value)
    assert "damaged" in text and len(text.splitlines()) == 1 and text.isprintable() and len(text) < 500


def test_a_good_one_goes_on(good):
    assert fit(2, good).global_step == 4
