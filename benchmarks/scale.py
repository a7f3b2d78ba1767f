"""Time and memory of the full published recipes on 1, 8 and 64 H100s, from counted operations and stated assumptions.

`python benchmarks/scale.py --count` builds every recipe of `configs/` (its depth extrapolated from 1 and 2 blocks: both
operations and memory are linear in it), counts operations, parameters and saved activations on the CPU, and writes
`results/scale.json`. Without `--count` the tables are made of that file, printed, and written between the markers of
`docs/scale.md`. Speed is taken from `results/gpu.json` where that was measured; else it is assumed, and the page says
so.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- scale:begin (benchmarks/scale.py writes this) -->", "<!-- scale:end -->"

PEAK = 989e12  # H100 SXM, dense bfloat16, operations per second: NVIDIA's data sheet
ASSUMED = (0.30, 0.45)  # share of the peak that training reaches
EFFICIENCY = {1: 1.0, 8: 0.95, 64: 0.90}  # of n devices, against n times one
MEMORY = 80e9  # bytes of one H100
RESERVE = 0.10  # of the memory: allocator, kernels, communication


@dataclass(frozen=True)
class Recipe:
    """One published training: a configuration of ours, its encoder, data and length."""

    config: str
    encoder: dict[str, Any]
    depth: int
    data: str
    images: int
    epochs: int
    batch: int
    """Of all devices together."""
    bands: int = 3
    extra: dict[str, Any] = field(default_factory=dict)


RECIPES = {
    "MAE, ViT-L/16": Recipe("mae", {"name": "vit_large_patch16"}, 24, "ImageNet-1k", 1_281_167, 1600, 4096),
    "Cross-Scale MAE, ViT-B/16": Recipe("cross_scale_mae", {}, 12, "fMoW-RGB", 363_571, 400, 512),
    "Cross-Scale MAE, ViT-L/16": Recipe(
        "cross_scale_mae", {"name": "vit_large_patch16"}, 24, "fMoW-RGB", 363_571, 400, 512
    ),
    "S2MAE stage 1, ViT-B/8": Recipe("s2mae", {}, 12, "fMoW-Sentinel", 712_874, 200, 4096, 12),
    "S2MAE stage 1, ViT-H/8": Recipe(
        "s2mae", {"name": "spectral_vit_huge_cube3_patch8"}, 32, "fMoW-Sentinel", 712_874, 200, 4096, 12
    ),
    "S2MAE stage 2, ViT-B/8": Recipe(
        "s2mae", {"image_size": 128}, 12, "BigEarthNet", 354_196, 200, 4096, 12, {"views": {"size": 128}}
    ),
    "I-JEPA, ViT-H/14": Recipe(
        "ijepa", {"name": "vit_huge_patch14"}, 32, "ImageNet-1k", 1_281_167, 300, 2048, 3,
        {"predictor": {"dim": 384, "depth": 12}},
    ),
    "LatentMIM, ViT-B/16": Recipe("latent_mim", {}, 12, "ImageNet-1k", 1_281_167, 800, 1024),
    "SA with I-JEPA, ViT-S/16": Recipe("sa_ijepa", {}, 12, "SEN2VENµS", 132_955, 300, 64),
    "SA with LatentMIM, ViT-S/16": Recipe("sa_latent_mim", {}, 12, "SEN2VENµS", 132_955, 300, 512),
}  # fmt: skip


def count(recipe: Recipe) -> dict[str, float]:
    """Operations and saved activations (bytes) of one image, parameters, trained ones, and those of targets."""
    one, two = (_count_depth(recipe, depth) for depth in (1, 2))
    return {key: round(one[key] + (recipe.depth - 1) * (two[key] - one[key])) for key in one}


def build(recipe: Recipe, depth: int) -> Any:
    """The method of a recipe with an encoder of `depth` blocks."""
    import yaml

    from xscale_lightning.checkpoints import build_method
    from xscale_lightning.data.bands import SENSORS, generic
    from xscale_lightning.methods.discovery import load_method_class

    model = yaml.safe_load((ROOT / "configs" / f"{recipe.config}.yaml").read_text())["model"]
    arguments = {**model["init_args"], **recipe.extra}
    for key in ("views",):
        arguments[key] = {**model["init_args"][key], **recipe.extra.get(key, {})}
    arguments["backbone"] = {**model["init_args"]["backbone"], **recipe.encoder, "depth": depth}
    bands = SENSORS["sentinel2_l1c_12"] if recipe.bands == 12 else generic(recipe.bands)
    return build_method(load_method_class(model["class_path"]), {**arguments, "bands": bands})


def _count_depth(recipe: Recipe, depth: int) -> dict[str, float]:
    import torch

    from xscale_lightning.ema import EMA
    from xscale_lightning.methods.measure import count_flops
    from xscale_lightning.models.attention import set_backend

    torch.manual_seed(0)
    module = build(recipe, depth).train()
    prepared = _prepared(module, 4)
    torch.manual_seed(0)  # the same masks at both depths
    flops = count_flops(module, prepared) / 4
    set_backend(module, "sdpa")  # keeps no matrix of attention, as the kernels of a GPU do
    # The difference of two batches: what is kept once, such as bfloat16 copies of weights, is no activation.
    activations = (_saved_bytes(module, 8) - _saved_bytes(module, 2)) / 6
    targets = sum(p.numel() for child in module.modules() if isinstance(child, EMA) for p in child.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return {"flops": flops, "activations": activations, "trained": trained, "targets": targets}


def _prepared(module: Any, batch: int) -> dict[str, Any]:
    """Noise of the size the views deliver; views themselves are no part of the count."""
    import torch

    size = module.views.size
    raw = {"image": torch.randn(batch, len(module.bands), size, size), "gsd": torch.full((batch,), 10.0)}
    if getattr(module, "source", None) == "pair":
        raw["image_hr"], raw["gsd_hr"] = torch.randn(batch, len(module.bands), 2 * size, 2 * size), raw["gsd"] / 2
    return module.prepare(raw)


def _saved_bytes(module: Any, batch: int) -> int:
    """Bytes that autograd keeps from the forward to the backward pass under bfloat16 autocast."""
    import torch

    own = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
    kept = {}  # holds the storages, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    prepared = _prepared(module, batch)
    torch.manual_seed(0)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        loss = module.step(prepared).loss
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


def state_bytes(counts: Mapping[str, float]) -> float:
    """Bytes that do not grow with the batch: per trained parameter float32 weight, gradient, two moments and a bfloat16
    copy (4 + 4 + 8 + 2), per target parameter a float32 weight and a bfloat16 copy (4 + 2)."""
    return 18 * counts["trained"] + 6 * counts["targets"]


def measured_shares(path: Path) -> tuple[float, float] | None:
    """Lowest and highest share of the peak that `gpu.json` has of our training steps; None if there is none."""
    if not path.is_file():
        return None
    shares = sorted(_shares(json.loads(path.read_text())))
    return (shares[0], shares[-1]) if shares else None


def _shares(content: Any) -> list[float]:
    if isinstance(content, list):
        return [share for part in content for share in _shares(part)]
    if not isinstance(content, dict):
        return []
    own = [content["mfu"]] if isinstance(content.get("mfu"), float) else []
    return own + [share for part in content.values() for share in _shares(part)]


def duration(hours: float) -> str:
    """Minutes below an hour, days from two days on."""
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours / 24:.1f} d" if hours >= 48 else f"{hours:.1f} h"


def tables(counts: Mapping[str, Mapping[str, float]], shares: tuple[float, float] | None) -> str:
    """Both tables as Markdown, under a line that says where the speed is from."""
    low, high = shares or ASSUMED
    origin = "measured (`benchmarks/results/gpu.json`)" if shares else "**assumed, not measured**"
    lines = [
        f"Share of the peak reached: {low:.0%} to {high:.0%}, {origin}.",
        "",
        "| recipe | data, epochs | images seen | TFLOP per image | total, EFLOP | 1 H100 | 8 H100s | 64 H100s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, recipe in RECIPES.items():
        flops, seen = counts[name]["flops"], recipe.images * recipe.epochs
        times = []
        for devices, efficiency in EFFICIENCY.items():
            hours = [flops * seen / (PEAK * share * efficiency * devices) / 3600 for share in (high, low)]
            times.append(" to ".join(duration(value) for value in hours))
        lines.append(
            f"| {name} | {recipe.data}, {recipe.epochs} | {seen / 1e6:.0f} M | {flops / 1e12:.3f} | "
            f"{flops * seen / 1e18:.0f} | {' | '.join(times)} |"
        )
    lines += [
        "",
        "| recipe | trained parameters | target (EMA) | state per device | the same, sharded over 8 | activations per "
        "image | images per device | batch of the recipe |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, recipe in RECIPES.items():
        found = counts[name]
        state = state_bytes(found)
        fits = int((MEMORY * (1 - RESERVE) - state) / found["activations"])
        lines.append(
            f"| {name} | {found['trained'] / 1e6:.0f} M | {found['targets'] / 1e6:.0f} M | {state / 1e9:.1f} GB | "
            f"{state / 8e9:.1f} GB | {found['activations'] / 1e6:.0f} MB | {fits} | {recipe.batch} |"
        )
    return "\n".join(lines)


def written(page: str, content: str) -> str:
    """The page with `content` between its markers."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n\n{content}\n\n{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None) -> int:
    """Count if asked, print the tables, and write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--count", nargs="?", const="", metavar="TEXT", help="count the recipes with TEXT in their name (all) anew"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page says otherwise")
    args = parser.parse_args(argv)
    counts_file = RESULTS / "scale.json"
    if args.count is not None:
        counts = json.loads(counts_file.read_text()) if counts_file.is_file() else {}
        for name in (name for name in RECIPES if args.count in name):
            counts[name] = count(RECIPES[name])
            print(name, counts[name], flush=True)
            ordered = {name: counts[name] for name in RECIPES if name in counts}
            counts_file.write_text(json.dumps(ordered, indent=2) + "\n")
    content = tables(json.loads(counts_file.read_text()), measured_shares(RESULTS / "gpu.json"))
    print(content)
    page = PAGE.read_text(encoding="utf-8")
    if args.check:
        return int(written(page, content) != page)
    PAGE.write_text(written(page, content), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
