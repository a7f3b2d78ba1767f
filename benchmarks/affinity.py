"""Time and memory of the spatial affinity against its host alone, interleaved in one run.

    python benchmarks/affinity.py                        both hosts, two minutes on two CPU cores
    python benchmarks/affinity.py --size vit_small --seconds 60        the published size, for a GPU
    python benchmarks/affinity.py --no-memory --seconds 10

Three variants of each host: alone on MR; with the affinity and the host's own EMA as its teacher (`teacher: host`);
and with an EMA of its own, as the published code has it (`teacher: own`). Every step is forward, backward, AdamW and
the moves of all EMAs. The ratio is the median over pairs of neighbouring steps. Memory is that of a step on CUDA, the
largest resident memory of a fresh process elsewhere.
"""

import argparse
import dataclasses
import statistics

import common
import torch
from torch import Tensor
from torch.nn import functional

from xscale_lightning.data.bands import generic
from xscale_lightning.methods.spatial_affinity import SpatialAffinity
from xscale_lightning.models.registry import BackboneConfig

SMALL = dataclasses.replace(common.SIZES["vit_base"], backbone="vit_small_patch16", dim=384, heads=6, bands=4)
SIZES = {
    "quickstart": dataclasses.replace(common.SIZES["quickstart"], depth=4, decoder_depth=3, bands=4, batch=32),
    "vit_small": dataclasses.replace(SMALL, decoder_depth=12, decoder_dim=384, decoder_heads=6, batch=64),
    "smallest": dataclasses.replace(common.SIZES["smallest"], image=48),
}
VARIANTS = ("alone", "teacher host", "teacher own")
HOSTS = ("ijepa", "latent_mim")
RATIO = 2


def host_args(host: str, size: common.Size) -> dict[str, object]:
    """The parts of the host beside the encoder, of the given size; LatentMIM has the published depth and head."""
    if host == "ijepa":
        return {"predictor": {"dim": size.decoder_dim, "depth": size.decoder_depth, "num_heads": size.decoder_heads}}
    wide = size.dim >= 384
    heads = {"head_dim": 4096, "decoder_dim": 512, "decoder_heads": 16}
    small = {"head_dim": 2 * size.dim, "decoder_dim": size.decoder_dim, "decoder_heads": size.decoder_heads}
    return {**(heads if wide else small), "decoder_depth": 3 if wide else size.decoder_depth}


def build(host: str, variant: str, size: common.Size) -> SpatialAffinity:
    """One variant of one host."""
    position = "stretched" if host == "latent_mim" else "sincos"
    return SpatialAffinity(
        host,
        host_args(host, size),
        ratio=RATIO,
        source="mr" if variant == "alone" else "pair",
        teacher="own" if variant == "teacher own" else "host",
        bands=generic(size.bands),
        backbone=BackboneConfig(size.backbone, depth=size.depth, position=position, class_token=host == "latent_mim"),
        views=common.NO_VIEWS,
    )


class Step(common.Ours):
    """A training step on pairs, with the moves of the EMAs."""

    def __init__(self, host: str, variant: str, size: common.Size, device: torch.device, dtype: torch.dtype) -> None:
        side = size.image
        if host == "latent_mim":  # cells of patch and gap: as many patches as without
            side = size.image // size.patch * round(1.25 * size.patch)
        size = dataclasses.replace(size, image=side)
        super().__init__(size, device, dtype, module=build(host, variant, size))
        image = self.batch["image"]
        finer = functional.interpolate(image, scale_factor=RATIO, mode="nearest")
        self.batch |= {"image_hr": finer, "gsd_hr": self.batch["gsd"] / RATIO}

    def step(self) -> Tensor:
        """Forward, backward, optimizer, targets; returns the loss."""
        loss = super().step()
        self.module._move_targets(None)
        return loss


def measure(
    host: str, size: common.Size, device: torch.device, dtype: torch.dtype, seconds: float
) -> dict[str, dict[str, object]]:
    """Milliseconds, ratio to the host alone and CUDA memory of every variant; all of them interleaved."""
    steps = {name: Step(host, name, size, device, dtype) for name in VARIANTS}
    memory = {name: common.peak_mb(step, device) for name, step in steps.items()}
    times = common.interleave({name: step.step for name, step in steps.items()}, device, seconds)
    return {
        name: {
            "step_ms": 1000 * statistics.median(values),
            "time_ratio": common.median_ratio(values, times["alone"]),
            "rounds": len(values),
            "step_memory_mb": memory[name],
        }
        for name, values in times.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="quickstart")
    parser.add_argument("--batch", type=int, help="images per step; the size's own unless given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(common.DTYPES), default="bfloat16", help="of the autocast")
    parser.add_argument("--seconds", type=float, default=30.0, help="time to spend on each host")
    parser.add_argument("--no-memory", action="store_true", help="no fresh processes for the memory on a CPU")
    parser.add_argument("--output", help="folder for affinity.json; benchmarks/results unless given")
    parser.add_argument("--peak", nargs=2, metavar=("HOST", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device, dtype = torch.device(args.device), common.DTYPES[args.dtype]
    size = dataclasses.replace(SIZES[args.size], batch=args.batch) if args.batch else SIZES[args.size]
    if args.peak:  # the fresh process
        host, variant = args.peak
        step = Step(host, variant, size, device, dtype)
        step.step()
        step.step()
        print(common.own_peak_memory())
        return
    rows, results = [], {}
    for host in HOSTS:
        print(f"{host}: {size.backbone}, {size.image} px, {size.bands} bands, batch {size.batch} ...", flush=True)
        found = measure(host, size, device, dtype, args.seconds)
        for name, figures in found.items():
            if device.type == "cpu" and not args.no_memory:
                same = ["--size", args.size, "--device", "cpu", "--dtype", args.dtype, "--batch", str(size.batch)]
                figures["process_memory_mb"] = common.peak_memory(__file__, [*same, "--peak", host, name]) / 1e6
            memory = figures.get("process_memory_mb") or figures["step_memory_mb"]
            shown = "" if memory is None else f"{memory:.0f}"
            rows.append([f"{host} {name}", f"{figures['step_ms']:.1f}", f"{figures['time_ratio']:.2f}", shown])
        results[host] = found
    print(common.table(["training step", "ms", "x host alone", "MB"], rows))
    content = {"size": dataclasses.asdict(size), "dtype": args.dtype, "hosts": results}
    print("written:", common.write_result("affinity", device, content, args.output))


if __name__ == "__main__":
    main()
