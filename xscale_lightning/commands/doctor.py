"""`xscale doctor`: can this machine train? Versions, devices, attention, run folder, two steps on synthetic data.

With `--data` or `--config` it looks for damaged files instead, with `--replay` at a step that the finite guard skipped.
"""

import argparse
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from xscale_lightning import __version__

PACKAGES = ("torch", "lightning", "timm", "xformers", "torchgeo", "torchmetrics", "jsonargparse", "rasterio")


def versions() -> str:
    """Versions of what decides the numbers; what is missing is said."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} (not installed)")
    return f"xscale_lightning {__version__}, Python {platform.python_version()}, {', '.join(found)}"


def devices() -> str:
    """GPUs with their memory, else the CPU with its cores."""
    import torch

    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        cpu = platform.processor() or platform.machine()
        return f"no GPU; CPU {cpu}, {cores} cores, {torch.get_num_threads()} threads"
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{p.name} ({p.total_memory / 2**30:.0f} GiB)" for p in properties)


def attention() -> str:
    """The backend that `auto` takes, per type, and why."""
    import torch

    from xscale_lightning.models.attention import choose_backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = []
    for dtype in (torch.bfloat16, torch.float32):
        backend, why = choose_backend(device, dtype)
        lines.append(f"{str(dtype)[6:]}: {backend} ({why})")
    return "; ".join(lines)


def run_folder(output: str) -> Callable[[], str]:
    """Check that run folders can be made below `output`."""

    def check() -> str:
        from xscale_lightning.commands.train import check_writable

        check_writable(Path(output))
        return f"{Path(output).absolute()} can be written"

    return check


def two_steps() -> str:
    """Train MAE for two steps on synthetic data with the precision of the shipped recipes."""
    from lightning.pytorch import Trainer

    from xscale_lightning.commands.stages import quiet
    from xscale_lightning.data.synthetic import SyntheticData
    from xscale_lightning.methods.mae import MAE
    from xscale_lightning.models.registry import BackboneConfig

    data = SyntheticData(length=8, batch_size=4)
    backbone = BackboneConfig("vit_tiny_patch8", depth=2)
    model = MAE(bands=data.bands, backbone=backbone, decoder_dim=64, decoder_depth=1, decoder_heads=4)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_steps=2,
            limit_val_batches=0,
            precision="bf16-mixed",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(model, datamodule=data)
    loss = float(trainer.callback_metrics["train/loss"])
    return f"loss {loss:.3f} after 2 steps on {trainer.strategy.root_device}, {time.perf_counter() - started:.1f} s"


def main(argv: list[str]) -> int:
    """Run every check; the exit code is 1 when one fails."""
    parser = argparse.ArgumentParser(prog="xscale doctor", description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", default="runs", help="folder of run folders to check")
    parser.add_argument("--data", metavar="CLASS", help="look at every file of this data instead; --data.x as for fit")
    parser.add_argument("--config", action="append", default=[], help="configuration whose data section to look at")
    parser.add_argument("--report", help="one line per file: a name that ends in .json or .csv")
    parser.add_argument("--workers", type=int, default=4, help="files that are read at once")
    parser.add_argument("--ignore", help="kinds that do not count, with commas: size,crs,gsd ...")
    parser.add_argument("--replay", metavar="FILE", help="a batch that the finite guard has saved: its step once more")
    parser.add_argument("--ckpt_path", help="checkpoint with the weights for --replay")
    args, rest = parser.parse_known_args(argv[1:])
    if args.replay:
        from xscale_lightning.commands.doctor_replay import replay_file

        return replay_file(args.replay, args.ckpt_path)
    if args.data or args.config:
        from xscale_lightning.commands.doctor_data import check_data

        return check_data(args, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    checks: dict[str, Callable[[], str]] = {
        "versions": versions,
        "devices": devices,
        "attention": attention,
        "run folder": run_folder(args.output),
        "training": two_steps,
    }
    failed = 0
    for name, check in checks.items():
        try:
            print(f"ok      {name:<11} {check()}", flush=True)
        except Exception as error:  # a check that cannot run is the finding
            failed += 1
            print(f"FAILED  {name:<11} {str(error).splitlines()[0]}", flush=True)
    print("this machine can train" if not failed else f"{failed} of {len(checks)} checks failed")
    return int(bool(failed))
