"""One look at a GPU: does everything agree there, how fast is it, and how large a batch does it take?

    python benchmarks/gpu.py                    at most nine minutes on one GPU
    python benchmarks/gpu.py --minutes 4 --parts attention,methods,against_reference

The parts, in this order; each gets its share of the time that is left, and results/gpu.json is written after each:

1. attention           xFormers, SDPA, its flash kernel and math against float64, with gradients, packed and not
2. methods             every method trains in bfloat16; its loss stays finite and falls
3. against_reference   every method at ViT-B beside the eager reference, under autocast and in float32: time and memory
4. sweep               every method at ViT-B and ViT-L, bfloat16, the batch doubled to memory's edge; MFU
5. options             AdamW not fused, activation checkpointing, torch.compile, each beside the default
6. attention_speed     milliseconds by kernel and length, packed, padded and plain
7. nccl                start-up

Where there is no GPU only the first two run, on the CPU, and the result says so. Needs torch, timm and lightning.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import gpu_checks
import gpu_speed
import torch

from xscale_lightning.models.attention import choose_backend, xformers_status

Part = Callable[[float], dict[str, Any]]
# Shares of the time.
WEIGHTS = {
    "attention": 0.3,
    "methods": 1.0,
    "against_reference": 3.0,
    "sweep": 5.0,
    "options": 3.0,
    "attention_speed": 1.0,
    "nccl": 0.3,
}
CHECKS = ("attention", "methods")
LEAST = 2.0  # seconds, below which a part does not begin


class Budget:
    """Divides the time that is left over the parts that have not begun, by their weights."""

    def __init__(
        self, seconds: float, weights: dict[str, float], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.waiting, self.clock = dict(weights), clock
        self.end = clock() + seconds

    def share(self, name: str) -> float:
        """Seconds for this part, which begins now."""
        total = sum(self.waiting.values())
        return max(0.0, self.end - self.clock()) * self.waiting.pop(name) / total


def run_parts(parts: dict[str, Part], budget: Budget, device: torch.device, folder: str | None) -> dict[str, dict]:
    """Run the parts in turn and write after each; one that fails or finds no time is recorded, then comes the next."""
    record: dict[str, dict] = {}
    for name, part in parts.items():
        seconds, started = budget.share(name), time.perf_counter()
        if seconds < LEAST and name not in CHECKS:
            record[name] = {"skipped": f"{seconds:.1f} s were left for it"}
        else:
            try:
                record[name] = part(seconds)
            except Exception as error:  # what a machine cannot do is a finding; the others shall be known all the same
                record[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        record[name]["seconds"] = round(time.perf_counter() - started, 1)
        show(name, record[name])
        common.write_result("gpu", device, {**statement(device), "parts": record}, folder)
    return record


def statement(device: torch.device) -> dict[str, str]:
    """On what this was measured, in words."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "statement": "Measured on this GPU."}
    said = "No GPU was available: the checks ran on the CPU, and nothing was timed."
    return {"device": "CPU", "statement": said}


def show(name: str, found: dict[str, Any]) -> None:
    """Print a part's table, or why there is none."""
    print(f"\n[{name}, {found['seconds']} s]")
    for key in ("failed", "skipped", "left_out"):
        if key in found:
            print(f"{key}: {found[key]}")
    if found.get("rows"):
        print(common.table(found.get("header") or [""] * len(found["rows"][0]), found["rows"]), flush=True)


def _checked(rows: list[list[str]]) -> dict[str, Any]:
    return {"header": ["check", "distance or loss", "verdict"], "rows": rows}


def main(argv: list[str] | None = None) -> int:
    """Run the checks and, on a GPU, the measurements; the exit code is 1 when a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="time to spend, for all parts")
    parser.add_argument("--parts", default=",".join(WEIGHTS), help="names with commas; all unless given")
    parser.add_argument("--steps", type=int, default=30, help="training steps per method of the check")
    parser.add_argument("--output", help="folder for gpu.json; benchmarks/results unless given")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"device: {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU, ' + common.cpu_name()}")
    print(f"torch {torch.__version__}, xFormers: {xformers_status()[1]}")
    print(f"attention chosen in bfloat16: {choose_backend(device, torch.bfloat16)[0]}")
    parts: dict[str, Part] = {
        "attention": lambda _: _checked(gpu_checks.check_attention(device)),
        "methods": lambda _: _checked(gpu_checks.check_methods(device, args.steps)),
        "against_reference": partial(gpu_speed.against_reference, device),
        "sweep": partial(gpu_speed.sweep, device),
        "options": partial(gpu_speed.options, device),
        "attention_speed": partial(gpu_speed.attention, device),
        "nccl": partial(gpu_speed.nccl, device),
    }
    wanted = args.parts.split(",")
    if unknown := sorted(set(wanted) - set(parts)):
        parser.error(f"--parts {unknown[0]}: there are {', '.join(parts)}")
    if device.type == "cpu":
        wanted = [name for name in wanted if name in CHECKS]
    chosen = {name: parts[name] for name in parts if name in wanted}
    budget = Budget(60 * args.minutes, {name: WEIGHTS[name] for name in chosen})
    record = run_parts(chosen, budget, device, args.output)
    if device.type == "cpu":
        print(f"\n{statement(device)['statement']}")
    print("written:", common.result_path("gpu", args.output))
    checks = [row for name in CHECKS for row in record.get(name, {}).get("rows", [])]
    failed = sum(row[2] != "ok" for row in checks) + sum("failed" in part for part in record.values())
    print("all checks passed" if not failed else f"{failed} checks or parts FAILED")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
