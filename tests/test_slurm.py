"""The SLURM example: a job of two processes, started by a stand-in for `srun`, trains two steps on the CPU."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "configs" / "slurm" / "pretrain.sbatch"

# Starts the command as two tasks of one machine, as srun would; forked, so that one import serves both.
SRUN = """#!{python}
import os, sys
assert sys.argv[1] == "--kill-on-bad-exit=1" and sys.argv[2] == "xscale", sys.argv
import xscale_lightning.commands.stages
from xscale_lightning import cli
os.environ.update(SLURM_NTASKS="2", SLURM_LOCALID="0", SLURM_PROCID="0", SLURM_NODEID="0")
child = os.fork()
if not child:
    os.environ.update(SLURM_LOCALID="1", SLURM_PROCID="1")
code = 1
try:
    code = cli.main([*sys.argv[3:], "--debug"])
finally:
    if not child:
        os._exit(code)
sys.exit(code or os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

CONFIG = """
seed_everything: 0
model:
  class_path: mae
  init_args: {decoder_dim: 16, decoder_depth: 1, decoder_heads: 2, backbone: {name: vit_tiny_patch8, depth: 1}}
data:
  class_path: SampleScene
  init_args: {image_size: 32, batch_size: 4, samples_per_epoch: 64, num_workers: 0}
trainer: {max_steps: 2, accelerator: cpu, strategy: ddp, limit_val_batches: 1, enable_progress_bar: false}
knn: {max_train: 8, max_test: 4}
geometry: {max_samples: 4}
pictures: {num_images: 1, num_score_images: 1, num_ratio_images: 1}
"""


def test_the_script_is_valid_and_asks_for_a_warning():
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    assert subprocess.run([bash, "-n", str(SCRIPT)]).returncode == 0
    asked = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--signal=USR1@120", "--open-mode=append"} <= set(asked)
    assert "--ckpt_path last" in SCRIPT.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork") or shutil.which("bash") is None, reason="needs bash and fork")
def test_a_job_trains(tmp_path):
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN.format(python=sys.executable))
    srun.chmod(0o755)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    steering = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PL_GLOBAL_SEED")
    environment = {
        **{name: value for name, value in os.environ.items() if name not in steering},
        "PATH": f"{srun.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "pretrain", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "2"},
        **{"SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NODELIST": "127.0.0.1", "MASTER_PORT": str(port)},
        **{"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
    }
    command = ["bash", str(SCRIPT), "--config", "tiny.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "job 4711, try 0, 1 machines x 2 processes" in done.stdout
    assert "8 samples per step" in done.stdout + done.stderr, "the two processes did not train together"
    assert "2 steps" in done.stdout + done.stderr
    (folder,) = (tmp_path / "runs" / "pretrain-4711" / "mae").iterdir()  # not one of every process
    assert {"config.yaml", "results.json", "checkpoints", "pictures"} <= {path.name for path in folder.iterdir()}
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
