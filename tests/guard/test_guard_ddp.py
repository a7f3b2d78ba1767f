"""One of two processes has a loss that is not finite: both skip the update."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

# Runs in a process of its own, which forks the two of the distributed run before torch has started any thread.
RUN = """
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
    bands=data.bands, backbone=backbone, decoder_dim=16, decoder_depth=1, decoder_heads=2, head_dim=16,
    mask_ratio=0.5
)
Trainer(
    max_steps=3, accelerator="cpu", devices=2, strategy="ddp_fork", logger=CSVLogger(folder, "run", "0"),
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    callbacks=[FiniteGuard(), Note()],
).fit(module, datamodule=data)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the two processes are forked")
def test_both_processes_skip_what_one_cannot_do(tmp_path):
    (tmp_path / "run.py").write_text(RUN)
    steering = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "PL_GLOBAL_SEED")
    kept = {name: value for name, value in os.environ.items() if name not in steering}
    env = {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, "run.py", str(tmp_path)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=80
    )
    assert done.returncode == 0, done.stderr[-3000:]
    zero, one = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert zero["skipped"] == one["skipped"] == 1 and zero["updates"] == one["updates"] == 2
    for record in (zero, one):
        first, second, third = record["states"]
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert any(not torch.equal(second[name], third[name]) for name in first)
        assert all(tensor.isfinite().all() for tensor in third.values())
    assert all(torch.equal(zero["states"][-1][name], one["states"][-1][name]) for name in zero["states"][-1])
    told = [line for line in done.stderr.splitlines() if "Skipped the update" in line]
    assert len(told) == 1 and "process 1" in told[0]
    assert [path.name for path in (tmp_path / "run" / "0" / "guard").iterdir()] == ["step_0000001_process1.pt"]
