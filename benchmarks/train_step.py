"""Time every method's full training step against a plain eager float32 reference, interleaved in one run.

    python benchmarks/train_step.py                         every method at ViT-B's width and 4 blocks, minutes
                                                            on two CPU cores
    python benchmarks/train_step.py --size vit_base --methods mae --seconds 45
    python benchmarks/train_step.py --scaling               cost against image size, bands and batch; see scaling.py

A step is augmentation, forward, backward, optimizer and targets (EMA). The reference (references/) has the arithmetic
of the papers' published code: explicit softmax attention, one pass per view, two teachers, and per-sample augmentation
on the host. On a CPU that augmentation is part of the timed step, because loader processes would take the same cores;
`augment_s` says how long it takes. On a GPU neither side augments. Same size, batch, data and masks; what we add
beyond the papers stands in rows of its own. Ratios are medians over pairs of neighbouring steps. Memory is the largest
resident memory of a fresh process by the operating system's account (VmHWM), on CUDA that of the allocator.

Every method is one entry of results/train_step.json, with machine, versions and date of its own: a later run of some
methods leaves the others as they are.
"""

import argparse
import dataclasses
import statistics

import common
import scaling
import torch
from ours import Step, count_flops, resized, variants
from references import ReferenceStep
from sizes import METHODS, SIZES, Size

from xscale_lightning.allocator import keep_freed_memory

STEPS_FOR_MEMORY = 2


def measure(size: Size, device: torch.device, dtype: torch.dtype, seconds: float, compiled: bool = False) -> dict:
    """Times, rates and ratios of all variants of one method."""
    augment = device.type == "cpu"
    steps = {name: build() for name, build in variants(size, device, dtype, augment, compiled).items()}
    flops = {name: count_flops(step) for name, step in steps.items()}
    rates = _rates(steps, device)
    times = common.interleave({name: step.step for name, step in steps.items()}, device, seconds, warmup=1)
    rates = {kind: max(rate, rates[kind]) for kind, rate in _rates(steps, device).items()}
    reference = times["reference float32"]
    loader = steps["reference float32"]
    found: dict = {"size": dataclasses.asdict(size), "pairs": len(reference), "augment_s": _augment_time(loader)}
    found["variants"] = {
        name: {
            "seconds_per_step": statistics.median(values),
            "images_per_s": size.batch / statistics.median(values),
            "ratio": common.median_ratio(reference, values),
            "tflops": flops[name] / statistics.median(values) / 1e12,
            "matmul_tflops": rates[steps[name].dtype] / 1e12,
            "share_of_matmul": flops[name] / statistics.median(values) / rates[steps[name].dtype],
            "gflop_per_image": flops[name] / size.batch / 1e9,
        }
        for name, values in times.items()
    }
    return found


def _rates(steps: dict[str, Step], device: torch.device) -> dict[torch.dtype, float]:
    return {kind: common.matmul_rate(kind, device) for kind in sorted({s.dtype for s in steps.values()}, key=str)}


def _augment_time(step: Step) -> float:
    """Median seconds of the loader's part of a step."""
    assert isinstance(step, ReferenceStep)
    return statistics.median(common.clock(lambda: step.model.load(step.raw), torch.device("cpu")) for _ in range(3))


def run_alone(name: str, size: Size, device: torch.device, dtype: torch.dtype) -> None:
    """Some steps of one variant and nothing else; prints the peak memory of this process."""
    step = variants(size, device, dtype, augment=device.type == "cpu")[name]()
    for _ in range(STEPS_FOR_MEMORY):
        step.step()
    print(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else common.own_peak_memory())


def rows(title: str, found: dict) -> list[list[str]]:
    """Rows of the table for one method; what was not measured is left blank."""
    lines = []
    for name, row in found["variants"].items():
        shown = {"images_per_s": ".2f", "ratio": ".2f", "tflops": ".3f", "share_of_matmul": ".0%"}
        cells = [format(row[key], style) if key in row else "" for key, style in shown.items()]
        lines.append([f"{title} {name}", *cells, str(row.get("peak_memory_mb", ""))])
    return lines


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="names with commas; all unless given")
    parser.add_argument("--size", choices=list(SIZES), default="base4")
    parser.add_argument("--image-size", type=int, help="pixels; the method's own unless given")
    parser.add_argument("--bands", type=int)
    parser.add_argument("--batch", type=int, help="images per step")
    parser.add_argument(
        "--dtype",
        choices=list(common.DTYPES),
        default="bfloat16",
        help="of ours beside float32; the reference has none",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--seconds", type=float, default=15.0, help="time to spend on the pairs of each method")
    parser.add_argument("--only", choices=["time", "memory"], help="memory needs a fresh process per variant")
    parser.add_argument("--compiled", action="store_true", help="a row with compile_blocks, too: a minute per method")
    parser.add_argument("--scaling", action="store_true", help="cost against image size, bands and batch instead")
    parser.add_argument("--axes", default=",".join(scaling.AXES), help="with --scaling: which of them")
    parser.add_argument("--output", help="folder for the JSON; benchmarks/results unless given")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.methods = args.methods.split(",")
    if unknown := sorted(set(args.methods) - set(METHODS)):
        parser.error(f"--methods {unknown[0]}: there are {', '.join(METHODS)}")
    return args


def peak_memory(size: Size, name: str, args: argparse.Namespace) -> int:
    """Megabytes at the peak of a fresh process with one variant."""
    options = ["--alone", name, "--methods", size.method, "--size", args.size, "--dtype", args.dtype]
    options += ["--device", args.device, *(["--threads", str(args.threads)] if args.threads else [])]
    for flag, value in (("--image-size", args.image_size), ("--bands", args.bands), ("--batch", args.batch)):
        options += [flag, str(value)] if value else []
    return round(common.peak_memory(__file__, options) / 1e6)


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, write JSON after every method."""
    args = parse(argv)
    device, dtype = torch.device(args.device), common.DTYPES[args.dtype]
    if args.threads:
        torch.set_num_threads(args.threads)
    if device.type == "cpu":  # as in `fit`; the reference in the same process has it, too
        keep_freed_memory()
    if args.scaling:
        scaling.run(args.methods, args.axes.split(","), device, args.seconds, args.only, args.output)
        return
    lines, path = [], None
    for method in args.methods:
        size = resized(SIZES[args.size][method], args.image_size, args.bands, args.batch)
        if args.alone:
            run_alone(args.alone, size, device, dtype)
            return
        print(f"{method}: width {size.dim}, {size.image} px, {size.bands} bands, batch {size.batch} ...", flush=True)
        found: dict = {"variants": {}}
        if args.only != "memory":
            found = {**common.environment(device), **measure(size, device, dtype, args.seconds, args.compiled)}
        if args.only != "time":
            for name in list(variants(size, device, dtype))[:3]:  # the options' rows go without
                found["variants"].setdefault(name, {})["peak_memory_mb"] = peak_memory(size, name, args)
        path = common.merge_result("train_step", ("sizes", args.size, method), found, args.output)
        lines += rows(method, found)
    print(common.table(["training step", "images/s", "ratio", "TFLOP/s", "of matmul", "peak MB"], lines))
    print("ratio: median over pairs of reference time / our time; of matmul: of a matrix product's rate in that type")
    print("written:", path)


if __name__ == "__main__":
    main()
