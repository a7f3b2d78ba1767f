"""What the benchmarks share: clocks, rates, memory, and the record of a run. Needs torch only."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

import torch

RESULTS = Path(__file__).with_name("results")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    return _write(result_path(name, folder), {**environment(device), **content})


def merge_result(name: str, keys: tuple[str, ...], content: dict, folder: str | None) -> Path:
    """Put `content` at `keys` of `<folder>/<name>.json` and leave every other entry as it is; whole or not at all.

    Dictionaries that are there already are kept where `content` says nothing of them, down to the variants.
    """
    path = result_path(name, folder)
    whole = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    place = whole
    for key in keys:
        place = place.setdefault(key, {})
    _update(place, content)
    return _write(path, whole)


def _update(old: dict, new: dict) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            _update(old[key], value)
        else:
            old[key] = value


def result_path(name: str, folder: str | None) -> Path:
    """Where a result is written: `benchmarks/results` unless a folder is given."""
    return (Path(folder) if folder else RESULTS) / f"{name}.json"


def _write(path: Path, content: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
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
