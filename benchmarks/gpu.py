"""One look at a GPU: does everything agree there, and how fast is it?

    python benchmarks/gpu.py                    some minutes on one GPU; on a machine without one, the checks alone
    python benchmarks/gpu.py --size vit_large --batch 128

1. Attention: xFormers, SDPA and math against float64, forward and gradients, packed and not.
2. Every registered method trains in bfloat16 and its loss stays finite and falls.
3. Speed of the training step by attention backend and with torch.compile, against the plain float32 reference.

Needs torch, timm and lightning; no imagery is read.
"""

import argparse
import dataclasses
import inspect
import statistics
import sys
from collections.abc import Callable
from functools import partial

import common
import torch
from torch import Tensor

from xscale_lightning.callbacks.throughput import peak_tflops
from xscale_lightning.data.bands import generic
from xscale_lightning.methods.discovery import load_method_class, method_entries
from xscale_lightning.models.attention import attend, available_backends, choose_backend, xformers_status
from xscale_lightning.models.registry import BackboneConfig

# Largest allowed distance to float64, relative to the largest value, per type of the inputs.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
CASES = {"plain": None, "packed equal": (64, 64, 64), "packed unequal": (7, 64, 1, 120)}


def attention_reference(q: Tensor, k: Tensor, v: Tensor, seqlens: tuple[int, ...] | None = None) -> Tensor:
    """Softmax attention written out in the inputs' type, one sequence at a time."""
    lengths = seqlens or (q.shape[1],)
    rows = []
    for a, b, c in zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True):
        weights = torch.einsum("bnhd,bmhd->bhnm", a, b).div(q.shape[-1] ** 0.5).softmax(-1)
        rows.append(torch.einsum("bhnm,bmhd->bnhd", weights, c))
    return torch.cat(rows, 1)


def forward_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients of a weighted sum, in float64."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    out = function(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)
    gradients = torch.autograd.grad((out * weights).sum(), inputs)
    return [t.detach().double() for t in (out, *gradients)]


def check_attention(device: torch.device) -> list[list[str]]:
    """Rows (what, distance, verdict); every backend, type and packing."""
    rows = []
    for backend in available_backends(device):
        for dtype, tolerance in TOLERANCE.items():
            for case, seqlens in CASES.items():
                generator = torch.Generator().manual_seed(0)
                shape = (2, 96, 6, 64) if seqlens is None else (1, sum(seqlens), 6, 64)
                inputs = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]
                ours = forward_and_gradients(partial(attend, seqlens=seqlens, backend=backend), inputs)
                doubles = [t.double() for t in inputs]
                exact = forward_and_gradients(partial(attention_reference, seqlens=seqlens), doubles)
                pairs = zip(ours, exact, strict=True)
                worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
                verdict = "ok" if worst < tolerance else f"FAILED (limit {tolerance:g})"
                rows.append([f"attention {backend} {str(dtype)[6:]} {case}", f"{worst:.1e}", verdict])
    return rows


def check_methods(device: torch.device, steps: int) -> list[list[str]]:
    """Rows (method, first and last loss, verdict) of a short bfloat16 training on one batch."""
    rows = []
    size = dataclasses.replace(common.SIZES["quickstart"], batch=16, bands=12)
    for name in method_entries():
        torch.manual_seed(0)
        cls = load_method_class(name)
        default = inspect.signature(cls).parameters.get("backbone")
        backbone = default.default if default else BackboneConfig()
        backbone = dataclasses.replace(backbone, dim=192, depth=2, num_heads=3, patch_size=8, image_size=size.image)
        module = cls(bands=generic(size.bands), backbone=backbone, views=common.NO_VIEWS)
        variant = common.Ours(size, device, torch.bfloat16, module=module)
        losses = [variant.step() for _ in range(steps)]
        first, last = losses[0].item(), losses[-1].item()
        finite = bool(torch.stack(losses).isfinite().all())
        rows.append(
            [f"method {name} bfloat16", f"{first:.3f} -> {last:.3f}", "ok" if finite and last < first else "FAILED"]
        )
    return rows


def measure_speed(device: torch.device, size: common.Size, seconds: float) -> tuple[list[list[str]], dict]:
    """Rows of the speed table, and the figures."""
    peak = peak_tflops(device, "bf16-mixed")
    reference = common.Reference(size, device)
    variants = {
        f"ours {backend}{' compiled' if compiled else ''}": common.Ours(
            size, device, torch.bfloat16, attention=backend, compiled=compiled
        )
        for backend in available_backends(device)
        for compiled in (False, True)
    }
    flops = {
        "ours": common.count_flops(common.Ours(size, device, torch.bfloat16)),
        "ref": common.count_flops(reference),
    }
    rate = common.matmul_rate(torch.bfloat16, device) / 1e12
    rows, figures = [], {"matmul_tflops_bfloat16": rate, "peak_tflops_bfloat16": peak}
    memory = {}
    for name, variant in {"reference float32": reference, **variants}.items():
        variant.step()  # optimizer state and compiled code exist before the peak is taken
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        variant.step()
        memory[name] = (torch.cuda.max_memory_allocated(device) - before) / 1e6
    for name, variant in {"reference float32": None, **variants}.items():
        pair = {"reference": reference.step} | ({"ours": variant.step} if variant else {})
        times = common.interleave(pair, device, seconds, warmup=3)
        key = "ours" if variant else "reference"
        median = statistics.median(times[key])
        tflops = flops["ours" if variant else "ref"] / median / 1e12
        ratio = common.median_ratio(times["reference"], times["ours"]) if variant else 1.0
        figures[name] = {
            "images_per_s": size.batch / median,
            "ratio": ratio,
            "tflops": tflops,
            "mfu": tflops / peak if peak and variant else None,
            "share_of_matmul": tflops / rate if variant else None,
            "activations_mb": memory[name],
        }
        rows.append(
            [
                name,
                f"{size.batch / median:.0f}",
                f"{ratio:.2f}",
                f"{tflops:.1f}",
                f"{tflops / peak:.0%}" if peak and variant else "",
                f"{tflops / rate:.0%}" if variant else "",
                f"{memory[name]:.0f}",
            ]
        )
    return rows, figures


def main(argv: list[str] | None = None) -> int:
    """Run the checks and, on a GPU, the measurements; the exit code is 1 when a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(common.SIZES), default="vit_base")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30, help="training steps per method")
    parser.add_argument("--seconds", type=float, default=10.0, help="time to spend on each row of the speed table")
    parser.add_argument("--output", help="folder for gpu.json; benchmarks/results unless given")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"device: {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU, ' + common.cpu_name()}")
    print(f"torch {torch.__version__}, xFormers: {xformers_status()[1]}")
    print(f"attention chosen for 197 tokens in bfloat16: {choose_backend(device, torch.bfloat16, 197)[0]}")
    checks = check_attention(device) + check_methods(device, args.steps)
    print(common.table(["check", "distance or loss", "verdict"], checks), flush=True)
    failed = sum(row[2] != "ok" for row in checks)
    content: dict[str, object] = {"checks": checks}
    if device.type == "cuda":
        size = dataclasses.replace(common.SIZES[args.size], batch=args.batch)
        rows, content["speed"] = measure_speed(device, size, args.seconds)
        content["size"] = dataclasses.asdict(size)
        print(
            common.table(["training step", "images/s", "ratio", "TFLOP/s", "MFU", "of matmul", "activations MB"], rows)
        )
        print("written:", common.write_result("gpu", device, content, args.output))
    else:
        print("No CUDA device: only the checks ran, on the CPU; nothing was timed and nothing written.")
    print("all checks passed" if not failed else f"{failed} of {len(checks)} checks FAILED")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
