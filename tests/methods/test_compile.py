"""`compile_blocks`: the same training within rounding, evaluations as they were, and no compiler is told at once."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch._dynamo.utils import counters

from xscale_lightning.data.bands import generic
from xscale_lightning.data.sample import SampleScene
from xscale_lightning.errors import UserError
from xscale_lightning.methods.mae import MAE
from xscale_lightning.methods.measure import count_flops
from xscale_lightning.models.blocks import Block, set_checkpointing, set_compiled
from xscale_lightning.models.registry import BackboneConfig


class Losses(Callback):
    """Losses of all steps, and how many functions were compiled by then."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.compiled: list[int] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())
        self.compiled.append(counters["frames"]["ok"])


def train(on: bool) -> tuple[MAE, Losses]:
    torch.manual_seed(0)
    data = SampleScene(image_size=32, batch_size=4, samples_per_epoch=16)
    backbone = BackboneConfig("vit_tiny_patch8", depth=2, dim=16, num_heads=2)
    small = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    module, log = MAE(bands=data.bands, backbone=backbone, compile_blocks=on, **small), Losses()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=1, limit_val_batches=1, callbacks=[log], **quiet)
    trainer.fit(module, datamodule=data)
    return module, log


@pytest.fixture
def no_code_generation(monkeypatch):
    """The same graphs, run as they are: a second in place of a minute."""
    monkeypatch.setattr(Block, "compile", lambda self: nn.Module.compile(self, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_same_gradients(no_code_generation, checkpointing):
    torch.manual_seed(0)
    block, x = Block(16, 2).double(), torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    set_checkpointing(block, checkpointing)
    found = []
    for on in (False, True):
        set_compiled(block, on)
        found.append(torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()]))
    assert counters["frames"]["ok"] > 0
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-11, atol=1e-12)
    set_compiled(block, False)
    assert block._compiled_call_impl is None


def test_training_is_the_same_and_evaluations_are_not_compiled(no_code_generation, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    _, eager = train(on=False)
    assert eager.compiled[-1] == 0
    module, log = train(on=True)
    torch.testing.assert_close(torch.tensor(log.losses), torch.tensor(eager.losses), rtol=1e-5, atol=1e-6)
    assert 0 < log.compiled[0] == log.compiled[-1], "compiled in the first step and never again"
    images = torch.randn(3, len(module.bands), 64, 64)
    module.features({"image": images, "gsd": torch.full((3,), 10.0)})
    assert count_flops(module, {"image": images[:2], "gsd": torch.full((2,), 10.0)}) > 0
    assert counters["frames"]["ok"] == log.compiled[-1]
    assert not any("orig_mod" in name for name in module.state_dict()), "names in checkpoints stay as they are"


def test_no_compiler_is_told_before_the_run(monkeypatch):
    module = MAE(bands=generic(3), compile_blocks=True)
    monkeypatch.setenv("CXX", "there-is-none")
    with pytest.raises(UserError, match=r"model\.compile_blocks.*there-is-none"):
        module.check_machine(torch.device("cpu"))
