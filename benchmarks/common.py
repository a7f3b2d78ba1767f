"""What the benchmarks share: the plain reference, the method under test, clocks, counts, and the record of a run.

Needs torch, timm and lightning only: no imagery is read.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from xscale_lightning.data.bands import generic
from xscale_lightning.data.views import Views
from xscale_lightning.methods.base import SSLModule
from xscale_lightning.methods.mae import MAE
from xscale_lightning.models.attention import Backend, set_backend
from xscale_lightning.models.pos_embed import sincos_2d
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.optim import OptimizerConfig, build_adamw, parameter_groups

RESULTS = Path(__file__).with_name("results")
NO_VIEWS = Views(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False, rot90=False)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """One model size with its batch; `backbone` is a registered name."""

    backbone: str
    dim: int
    depth: int
    heads: int
    patch: int
    image: int
    bands: int
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int
    batch: int
    mask_ratio: float = 0.75

    @property
    def tokens(self) -> int:
        """Patches of one image."""
        return (self.image // self.patch) ** 2


SIZES = {
    # configs/quickstart.yaml, and the paper's ViT-B/16 as configs/mae.yaml has it
    "quickstart": Size("vit_tiny_patch8", 192, 6, 3, 8, 64, 13, 128, 2, 4, batch=128),
    "vit_base": Size("vit_base_patch16", 768, 12, 12, 16, 224, 3, 512, 8, 16, batch=8),
    "vit_large": Size("vit_large_patch16", 1024, 24, 16, 16, 224, 3, 512, 8, 16, batch=64),
    "smallest": Size("vit_tiny_patch8", 192, 1, 3, 8, 16, 2, 32, 1, 2, batch=2),  # for the benchmarks' own test
}


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, N, d]
        weights = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    """Pre-norm block, everything written out."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class ReferenceMAE(nn.Module):
    """MAE as the paper describes it: every patch embedded, then shuffled; every patch predicted, then masked.

    Explicit softmax attention, no autocast, nothing fused. Its parameters have the names of ours, so that a test can
    show that both compute the same loss.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        values = size.patch**2 * size.bands
        encoder, decoder = nn.Module(), nn.Module()
        encoder.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(size.bands, size.dim, size.patch, size.patch)})
        encoder.cls_token = nn.Parameter(torch.randn(1, 1, size.dim) * 0.02)
        encoder.blocks = nn.ModuleList(Block(size.dim, size.heads) for _ in range(size.depth))
        encoder.norm = nn.LayerNorm(size.dim, eps=1e-6)
        decoder.embed = nn.Linear(size.dim, size.decoder_dim)
        decoder.mask_token = nn.Parameter(torch.randn(1, 1, size.decoder_dim) * 0.02)
        decoder.blocks = nn.ModuleList(Block(size.decoder_dim, size.decoder_heads) for _ in range(size.decoder_depth))
        decoder.norm = nn.LayerNorm(size.decoder_dim, eps=1e-6)
        decoder.pred = nn.Linear(size.decoder_dim, values)
        self.backbone, self.decoder = encoder, decoder
        side = torch.arange(size.image // size.patch, dtype=torch.float64)
        for name, dim in (("positions", size.dim), ("decoder_positions", size.decoder_dim)):
            self.register_buffer(name, sincos_2d(dim, side, side).float().unsqueeze(0), persistent=False)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Loss of `images [B, C, H, W]`; the patches with the lowest `noise [B, L]` stay visible."""
        return self.view(images, noise)[2]

    def view(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encoder tokens `[B, 1 + K, D]`, decoder tokens `[B, 1 + L, d]` and the loss."""
        encoder, decoder, size = self.backbone, self.decoder, self.size
        keep = int(size.tokens * (1 - size.mask_ratio))
        order = noise.argsort(dim=1)
        back = order.argsort(dim=1)
        x = encoder.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.positions  # [B, L, D]
        x = x.gather(1, order[:, :keep, None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([encoder.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in encoder.blocks:
            x = block(x)
        encoded = encoder.norm(x)
        x = decoder.embed(encoded)
        full = torch.cat([x[:, 1:], decoder.mask_token.expand(len(x), size.tokens - keep, -1)], dim=1)
        full = full.gather(1, back.unsqueeze(-1).expand_as(full)) + self.decoder_positions
        x = torch.cat([x[:, :1], full], dim=1)
        for block in decoder.blocks:
            x = block(x)
        decoded = decoder.norm(x)
        prediction = decoder.pred(decoded)[:, 1:]  # [B, L, p * p * C]
        side, p = size.image // size.patch, size.patch
        target = images.reshape(len(images), size.bands, side, p, side, p).permute(0, 2, 4, 3, 5, 1)
        target = target.reshape(prediction.shape)
        mask = (back >= keep).float()
        return encoded, decoded, ((prediction - target).square().mean(-1) * mask).sum() / mask.sum()


def synthetic_images(size: Size, device: torch.device, batch: int | None = None) -> Tensor:
    """Normal noise `[B, C, H, W]`: the arithmetic does not depend on what the images show."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch or size.batch, size.bands, size.image, size.image)
    return torch.randn(shape, generator=generator).to(device)


class Reference:
    """The full training step of the plain reference: eager float32 and an ordinary AdamW."""

    name = "reference"

    def __init__(self, size: Size, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = ReferenceMAE(size).to(device).train()
        self.images = synthetic_images(size, device)
        config = OptimizerConfig()
        groups = [{k: v for k, v in group.items() if k == "params"} for group in parameter_groups(self.model)]
        self.optimizer = torch.optim.AdamW(
            groups, config.lr, (config.beta1, config.beta2), config.eps, config.weight_decay
        )

    def forward(self) -> Tensor:
        """Loss of one batch."""
        noise = torch.rand(len(self.images), self.model.size.tokens, device=self.images.device)
        return self.model(self.images, noise)

    def step(self) -> Tensor:
        """Forward, backward, optimizer; returns the loss."""
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class Ours:
    """The full training step of a method of this package, as the Trainer runs it, without the Trainer."""

    name = "ours"

    def __init__(
        self,
        size: Size,
        device: torch.device,
        dtype: torch.dtype,
        attention: Backend = "auto",
        compiled: bool = False,
        module: SSLModule | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.module = (module or build_mae(size)).to(device).train()
        set_backend(self.module, attention)
        if compiled:
            for part in self.module.modules():
                if isinstance(part, nn.ModuleList):
                    for block in part:
                        block.compile()
        self.device, self.dtype = device, dtype
        self.batch = {"image": synthetic_images(size, device), "gsd": torch.full((size.batch,), 10.0, device=device)}
        if ratio := getattr(self.module, "ratio", None):  # an add-on that learns from pairs
            self.batch["image_hr"] = F.interpolate(self.batch["image"], scale_factor=ratio, mode="bilinear")
            self.batch["gsd_hr"] = self.batch["gsd"] / ratio
        self.optimizer = build_adamw(parameter_groups(self.module), OptimizerConfig())

    def forward(self) -> Tensor:
        """Loss of one batch."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            return self.module.step(self.module.prepare(self.batch)).loss

    def step(self) -> Tensor:
        """Forward, backward, optimizer; returns the loss."""
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def build_mae(size: Size) -> MAE:
    """Our MAE of the given size."""
    return MAE(
        bands=generic(size.bands),
        backbone=BackboneConfig(size.backbone, depth=size.depth),
        views=NO_VIEWS,
        mask_ratio=size.mask_ratio,
        decoder_dim=size.decoder_dim,
        decoder_depth=size.decoder_depth,
        decoder_heads=size.decoder_heads,
    )


def count_flops(variant: Reference | Ours) -> int:
    """Floating-point operations of one forward and backward pass: matrix products and attention."""
    if isinstance(variant, Ours):
        set_backend(variant.module, "math")  # its matrix products are all counted
    with FlopCounterMode(display=False) as counter:
        variant.forward().backward()
    variant.optimizer.zero_grad()
    if isinstance(variant, Ours):
        set_backend(variant.module, "auto")
    return counter.get_total_flops()


def clock(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, queued CUDA work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def interleave(
    functions: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    warmup: int = 2,
    least: int = 5,
    most: int = 200,
) -> dict[str, list[float]]:
    """Times of A B A B ...: whatever else the machine does meets all of them alike.

    Args:
        functions: what to time, by name.
        device: where they run.
        seconds: time to spend, warm-up not included.
        warmup: untimed rounds.
        least: rounds at least.
        most: rounds at most.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    for done in range(most):
        if done >= least and time.perf_counter() > end:
            break
        for name, function in functions.items():
            times[name].append(clock(function, device))
    return times


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the pairs of slow / fast."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def peak_mb(variant: "Reference | Ours", device: torch.device) -> float | None:
    """Memory of one step above what is there before it, on CUDA; None elsewhere."""
    if device.type != "cuda":
        return None
    variant.step()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    variant.step()
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def compare(
    variants: "dict[str, Ours | Reference]", reference: str, batch: int, device: torch.device, seconds: float
) -> dict[str, dict]:
    """Images per second, ratio to the variant `reference` and memory of every variant; all of them interleaved."""
    memory = {name: peak_mb(variant, device) for name, variant in variants.items()}
    times = interleave({name: variant.step for name, variant in variants.items()}, device, seconds)
    return {
        name: {
            "images_per_s": batch / statistics.median(values),
            "ratio": median_ratio(times[reference], values),
            "step_memory_mb": memory[name],
        }
        for name, values in times.items()
    }


def compare_rows(name: str, found: dict[str, dict]) -> list[list[str]]:
    """Rows (variant, images per second, ratio, memory) of what `compare` found."""
    rows = []
    for variant, figures in found.items():
        memory = figures["step_memory_mb"]
        shown = "" if memory is None else f"{memory:.0f}"
        rows.append([f"{name} {variant}", f"{figures['images_per_s']:.1f}", f"{figures['ratio']:.2f}", shown])
    return rows


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a square matrix product, the best of several sizes and runs."""
    best = 0.0
    for side in (4096, 8192) if device.type == "cuda" else (768, 1536):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        best = max(best, *(2 * side**3 / clock(partial(torch.mm, a, b), device) for _ in range(20)))
    return best


def peak_memory(script: str, arguments: list[str]) -> int:
    """Largest resident memory in bytes of a fresh process that runs `script` with `arguments`."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def own_peak_memory() -> int:
    """Largest resident memory of this process in bytes.

    On Linux getrusage's figure begins with what the parent had before it started this program; /proc does not.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def cpu_name() -> str:
    """The processor as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, object]:
    """Machine, versions and date: what decides the numbers."""
    found = {"python": platform.python_version()}
    for package in ("torch", "timm", "lightning", "xformers", "xscale-lightning"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    record: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "versions": found,
        "load_average": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
        record["cuda"] = torch.version.cuda
    return record


def write_result(name: str, device: torch.device, content: dict[str, object], folder: str | None) -> Path:
    """Write `<folder>/<name>.json` with machine, versions and date, whole or not at all. Returns the path."""
    path = Path(folder) / f"{name}.json" if folder else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps({**environment(device), **content}, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def table(header: list[str], rows: list[list[str]]) -> str:
    """Columns under each other, numbers to the right."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
