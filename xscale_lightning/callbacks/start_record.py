"""What a run writes into its folder before the first step: configuration, command line, environment."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from xscale_lightning.callbacks.probe import run_folder
from xscale_lightning.callbacks.provenance import device_record, versions
from xscale_lightning.files import write_bytes, write_json

COMMAND, ENVIRONMENT = "command.txt", "environment.json"
# What decides numbers or speed and stands nowhere in the configuration. Never the whole environment: it holds secrets.
VARIABLES = (
    *(
        "CUDA_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
        "PYTORCH_CUDA_ALLOC_CONF",
        "NCCL_DEBUG",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    ),
    *("SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS", "WORLD_SIZE"),
)
SECONDS = 5.0  # that git may take


class StartRecord(SaveConfigCallback):
    """Writes `config.yaml`, and beside it `command.txt` and `environment.json`; without a run folder the latter not.

    A run that goes on in its folder adds its command to the first one; the environment is that of the newest start.
    """

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write both; on the first process only, once."""
        folder = run_folder(trainer)
        if folder is None:
            return
        before = (folder / COMMAND).read_bytes() if (folder / COMMAND).is_file() else b""
        write_bytes(folder / COMMAND, before + command_line().encode())
        write_json(environment(trainer, pl_module), folder / ENVIRONMENT)


def command_line() -> str:
    """The command of this process, as one types it into a shell."""
    return shlex.join(["xscale", *sys.argv[1:]]) + "\n"


def environment(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """When, where and with what the run began: versions, device, threads, code."""
    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "working_directory": str(Path.cwd()),
        "versions": versions(),
        "platform": platform.platform(),
        "device": device_record(trainer, trainer.strategy.root_device),
        "nodes": trainer.num_nodes,
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "git": git_state(Path.cwd()),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the work tree that a folder is in and whether tracked files differ from it; None outside of one."""
    commit, changes = (_git(folder, *words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno")))
    return None if commit is None else {"commit": commit.strip(), "modified": bool(changes and changes.strip())}


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
