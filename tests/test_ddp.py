"""Two processes on CPU (gloo): the gradients of one process with the same global batch; a run by command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# Runs in a process of its own, which forks the two of the distributed run before torch has started any thread.
GRADIENTS = """
import sys
import torch
from lightning.pytorch import Callback, Trainer, LightningDataModule
from torch.utils.data import DataLoader, Subset
from xscale_lightning.data.bands import generic
from xscale_lightning.data.datamodule import Collate
from xscale_lightning.data.synthetic import SyntheticDataset
from xscale_lightning.data.scale_view import ScaleView
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
        CrossScaleMAE, VIT, {**DECODER, "gather_negatives": True, "scale_view": ScaleView((1, 1), (1, 1))}
    ),
    "s2mae": (S2MAE, SPECTRAL, DECODER),
    "ijepa": (IJEPA, {**VIT, "class_token": False}, {"predictor": PredictorConfig(48, 1)}),
    "latent_mim": (LatentMIM, {**VIT, "position": "stretched"}, {**DECODER, "head_dim": 32}),
    "spatial_affinity": (
        SpatialAffinity, {**VIT, "class_token": False}, {"host": "ijepa", "host_args": JEPA, "source": "interpolated"}
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
        max_steps=1, accelerator="cpu", use_distributed_sampler=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Save(path)], **options
    ).fit(module, datamodule=Data())

if __name__ == "__main__":
    for name in METHODS:
        train(name, f"{sys.argv[1]}/{name}_two.pt", devices=2, strategy="ddp_fork")
    for name in METHODS:
        train(name, f"{sys.argv[1]}/{name}_one.pt", devices=1)
"""


def environment() -> dict[str, str]:
    """This process's environment without anything that would steer a distributed run: Lightning picks a free port."""
    steering = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "PL_GLOBAL_SEED")
    kept = {name: value for name, value in os.environ.items() if name not in steering}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MPLBACKEND": "Agg"}


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def processes_that_name(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if text in command and int(entry.name) != os.getpid():
            found.append(command)
    return found


@pytest.fixture(scope="module")
def gradients(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    (folder / "train.py").write_text(GRADIENTS)
    run("train.py", str(folder), cwd=folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the two processes are forked")
@pytest.mark.parametrize("method", ["mae", "cross_scale_mae", "s2mae", "ijepa", "latent_mim", "spatial_affinity"])
def test_two_processes_have_the_gradients_of_one(method, gradients):
    two, one = (torch.load(gradients / f"{method}_{name}.pt", weights_only=True) for name in ("two", "one"))
    assert (two["world"], one["world"]) == (2, 1)
    assert two["lr"] == one["lr"] == pytest.approx(1.5e-4 * 8 / 256)
    assert two["gradients"].keys() == one["gradients"].keys() and len(one["gradients"]) > 30
    for name, gradient in one["gradients"].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(
            two["gradients"][name], gradient, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )


CONFIG = """
seed_everything: 0
model:
  class_path: mae
  init_args:
    decoder_dim: 16
    decoder_depth: 1
    decoder_heads: 2
    backbone: {name: vit_tiny_patch8, depth: 1}
    views: {size: null, scale: [1.0, 1.0], ratio: [1.0, 1.0]}
data:
  class_path: SampleScene
  init_args: {image_size: 32, batch_size: 4, samples_per_epoch: 64, num_workers: 0}
trainer: {max_steps: 2, accelerator: cpu, devices: 2, strategy: ddp, limit_val_batches: 1}
knn: {max_train: 8, max_test: 4}
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="processes are looked up in /proc")
def test_a_run_of_two_processes_from_the_command_line(tmp_path):
    (tmp_path / "ddp.yaml").write_text(CONFIG)
    output = tmp_path / "runs"
    text = run("-m", "xscale_lightning.cli", "fit", "--config", "ddp.yaml", "--output", str(output), cwd=tmp_path)
    assert "8 samples per step" in text and "2 steps" in text
    folders = list((output / "mae").iterdir())
    assert len(folders) == 1, "every process made a run folder of its own"
    assert {"config.yaml", "results.json", "checkpoints", "pictures"} <= {path.name for path in folders[0].iterdir()}
    checkpoint = torch.load(folders[0] / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert not processes_that_name(str(output))
