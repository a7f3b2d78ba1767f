"""What `gpu.py` times on a CUDA device; each part keeps to the seconds it is given and returns tables."""

import dataclasses
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import common
import torch
from gpu_checks import attention_kinds
from lightning.fabric.utilities.throughput import get_available_flops
from ours import Ours, Step, count_flops, synthetic_batch
from references import ReferenceStep, build_reference
from sizes import METHODS, SIZES, Size

from xscale_lightning.models.blocks import set_checkpointing

BF16 = torch.bfloat16
LENGTHS = (17, 50, 197, 577, 1025)
TOKENS = 16384  # per call of attention
BATCHES = (16, 32, 64, 128, 256, 512, 1024, 2048)
BATCH = 64  # beside the reference, and for the options


class Clock:
    """Says whether there is time for more."""

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.perf_counter()


def free(device: torch.device) -> None:
    """Give back what the last measurement held."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def timed(step: Step, device: torch.device, most: float = 2.0) -> float:
    """Median seconds of a step: two warm ones, then at least three."""
    times = common.interleave({"step": step.step}, device, most, warmup=2, least=3, most=30)["step"]
    return statistics.median(times)


def peak_gb(step: Step, device: torch.device) -> float:
    """Gigabytes that the allocator holds at the peak of a step, weights and optimizer included."""
    step.step()
    torch.cuda.reset_peak_memory_stats(device)
    step.step()
    return torch.cuda.max_memory_allocated(device) / 1e9


def attention(device: torch.device, seconds: float) -> dict[str, Any]:
    """Milliseconds forward and backward of `TOKENS` tokens, 12 heads of 64, in bfloat16."""
    clock, rows = Clock(seconds), []
    for packed in (False, True):
        for length in LENGTHS:
            if clock.left < 1:
                return {"header": _ATTENTION, "rows": rows, "cut_short": True}
            count = max(1, TOKENS // length)
            half = (max(1, length // 2),) * (count // 2)  # shortest first, as the methods pack them
            seqlens = (*half, *((length,) * (count // 2))) if packed and count > 1 else None
            shape = (1, sum(seqlens), 12, 64) if seqlens else (count, length, 12, 64)
            inputs = [torch.randn(shape, device=device, dtype=BF16).requires_grad_() for _ in range(3)]
            for name, kind in attention_kinds(device, BF16, seqlens is not None).items():
                call = kind if seqlens is None else partial(kind, seqlens=seqlens)
                try:
                    both = common.interleave(
                        {"f": partial(call, *inputs), "fb": partial(_backward, call, inputs)}, device, 0.3
                    )
                except RuntimeError as error:
                    rows.append(
                        [name, "packed" if packed else "plain", str(length), "", str(error).splitlines()[0][:60]]
                    )
                    continue
                f, fb = (f"{1e3 * statistics.median(both[key]):.3f}" for key in ("f", "fb"))
                rows.append([name, "packed" if packed else "plain", str(length), f, fb])
    return {"header": _ATTENTION, "rows": rows}


_ATTENTION = ["attention", "", "tokens", "forward ms", "forward + backward ms"]


def _backward(call: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> None:
    torch.autograd.grad(call(*inputs).sum(), inputs)


def sweep(device: torch.device, seconds: float) -> dict[str, Any]:
    """Every method at ViT-B and ViT-L in bfloat16, the batch doubled until memory ends.

    `best` holds the fastest batch of each: its share of a measured matrix product's rate, and of the vendor's peak
    (`mfu`), where that is known.
    """
    clock, rows, best, left_out = Clock(seconds), [], {}, []
    rate, peak = common.matmul_rate(BF16, device) / 1e12, (get_available_flops(device, BF16) or 0) / 1e12
    todo = [(name, method) for method in METHODS for name in ("vit_large", "vit_base")]
    for index, (name, method) in enumerate(todo):
        if clock.left < 2:
            left_out.append(f"{method} {name}")
            continue
        found = batches(SIZES[name][method], name, device, clock.left / (len(todo) - index), rate)
        rows += found
        fastest = max((float(row[4]), float(row[3]), int(row[2])) for row in found if row[3]) if found[0][3] else None
        if fastest is not None:
            figures = dict(zip(("tflops", "images_per_s", "batch"), fastest, strict=True))
            figures |= {"share_of_matmul": fastest[0] / rate} | ({"mfu": fastest[0] / peak} if peak else {})
            best[f"{method} {name}"] = figures
    head = {"matmul_tflops": rate, "peak_tflops": peak, "best": best, "left_out": left_out}
    return {**head, "header": _SWEEP, "rows": rows}


_SWEEP = ["method", "size", "batch", "images/s", "TFLOP/s", "of matmul", "GB"]


def batches(size: Size, name: str, device: torch.device, seconds: float, rate: float) -> list[list[str]]:
    """Rows of one method: batch 16, 32, ... to memory's edge or the end of the time; `rate` in TFLOP/s."""
    clock, rows = Clock(seconds), []
    total = torch.cuda.get_device_properties(device).total_memory / 1e9
    step = Ours(dataclasses.replace(size, batch=BATCHES[0]), device, BF16, augment=False)  # built once: seconds
    flops_per_image = count_flops(step) / BATCHES[0]
    few = step.batch
    for batch in BATCHES:
        title = [size.method, name, str(batch)]
        if rows and (clock.left < 0 or 1.9 * float(rows[-1][6]) > total):  # it would not fit, or there is no time
            break
        try:
            step.batch = {key: v.repeat(batch // BATCHES[0], *(1,) * (v.ndim - 1)) for key, v in few.items()}
            memory = peak_gb(step, device)
            speed = batch / timed(step, device, most=0.5)
        except torch.cuda.OutOfMemoryError:
            rows.append([*title, "", "", "", "out of memory"])
            break
        finally:
            step.batch = few
            step.optimizer.zero_grad()
            free(device)
        tflops = speed * flops_per_image / 1e12
        rows.append([*title, f"{speed:.1f}", f"{tflops:.2f}", f"{tflops / rate:.1%}", f"{memory:.2f}"])
    del step, few
    free(device)
    return rows


def against_reference(device: torch.device, seconds: float) -> dict[str, Any]:
    """Ours in bfloat16 beside the eager reference under autocast and in float32: time, memory, ratio."""
    clock, rows = Clock(seconds), []
    for index, method in enumerate(METHODS):
        share = clock.left / (len(METHODS) - index)
        if share < 2:
            break
        size = dataclasses.replace(SIZES["vit_base"][method], batch=BATCH)
        built = {
            "reference float32": partial(_reference, size, device, torch.float32),
            "reference autocast": partial(_reference, size, device, BF16),
            "ours bfloat16": lambda size=size: Ours(size, device, BF16, augment=False),
        }
        memory = {}
        for name, build in built.items():
            memory[name] = peak_gb(build(), device)
            free(device)
        steps = {name: build() for name, build in built.items()}
        times = common.interleave({n: s.step for n, s in steps.items()}, device, share / 2, least=3)
        steps.clear()
        free(device)
        for name in built:
            speed = BATCH / statistics.median(times[name])
            ratio = common.median_ratio(times["reference autocast"], times[name])
            less = 1 - memory[name] / memory["reference autocast"]
            rows.append([method, name, f"{speed:.0f}", f"{ratio:.2f}", f"{memory[name]:.2f}", f"{less:.0%}"])
    return {"header": ["method", f"batch {BATCH}, ViT-B", "images/s", "x autocast", "GB", "less"], "rows": rows}


def _reference(size: Size, device: torch.device, dtype: torch.dtype) -> ReferenceStep:
    torch.manual_seed(0)
    return ReferenceStep(build_reference(size), synthetic_batch(size), device, dtype, augment=False)


def options(device: torch.device, seconds: float) -> dict[str, Any]:
    """MAE and S2MAE at ViT-L: blocks compiled, AdamW not fused, activations recomputed; each beside the default."""
    clock, rows = Clock(seconds), []
    for method in ("mae", "s2mae"):
        size = dataclasses.replace(SIZES["vit_large"][method], batch=BATCH)
        for name, build in _options(size, device):
            if clock.left < 5:
                return {"header": _OPTIONS, "rows": rows, "cut_short": True}
            started = time.perf_counter()
            plain, other = Ours(size, device, BF16, augment=False), build()
            other.step()
            first = time.perf_counter() - started
            times = common.interleave(
                {"plain": plain.step, "other": other.step}, device, min(4.0, clock.left / 2), least=3
            )
            del plain
            free(device)
            ratio = common.median_ratio(times["plain"], times["other"])
            rows.append([method, name, f"{ratio:.2f}", f"{peak_gb(other, device):.2f}", f"{first:.1f}"])
            del other
            free(device)
    return {"header": _OPTIONS, "rows": rows}


_OPTIONS = ["method", "option", "x default", "GB", "s to first step"]


def _options(size: Size, device: torch.device) -> Iterator[tuple[str, Callable[[], Ours]]]:
    yield "default", lambda: Ours(size, device, BF16, augment=False)
    yield "augmentation on the device", lambda: Ours(size, device, BF16)
    yield "AdamW not fused", lambda: Ours(size, device, BF16, augment=False, fused=False)
    yield "activations recomputed", lambda: recomputing(Ours(size, device, BF16, augment=False))
    yield "blocks compiled", lambda: Ours(size, device, BF16, compiled=True, augment=False)


def recomputing(step: Ours) -> Ours:
    """The step with activation checkpointing."""
    set_checkpointing(step.module, True)
    return step


def nccl(device: torch.device, seconds: float) -> dict[str, Any]:
    """Seconds to start a process group of one and to reduce 100 MB in it."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        store = dist.FileStore(os.path.join(folder, "store"), 1)
        dist.init_process_group("nccl", store=store, rank=0, world_size=1)
        values = torch.ones(25_000_000, device=device)
        dist.all_reduce(values)
        torch.cuda.synchronize()
        first = time.perf_counter() - started
        again = statistics.median(common.clock(partial(dist.all_reduce, values), device) for _ in range(10))
        dist.destroy_process_group()
    rows = [["start and first reduction, s", f"{first:.2f}"], ["reduction of 100 MB, ms", f"{1e3 * again:.2f}"]]
    return {"header": ["NCCL, one process", ""], "rows": rows}
