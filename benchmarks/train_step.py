"""Time the whole MAE training step against a plain eager float32 reference, interleaved in one run.

    python benchmarks/train_step.py                         both sizes, under four minutes on two CPU cores
    python benchmarks/train_step.py --size vit_base --batch 64 --seconds 120

Same model size, batch and data; forward, backward and optimizer. Ratios are medians over pairs of neighbouring steps.
"""

import argparse
import dataclasses
import os
import statistics

import common
import torch

STEPS_FOR_MEMORY = 3


def measure(size: common.Size, device: torch.device, dtype: torch.dtype, seconds: float, compiled: bool) -> dict:
    """Time both variants; rates in images/s and floating-point operations per second."""
    variants = [common.Ours(size, device, dtype, compiled=compiled), common.Reference(size, device)]
    flops = {variant.name: common.count_flops(variant) for variant in variants}
    kinds = {"ours": dtype, "reference": torch.float32}
    peaks = {name: common.matmul_rate(kind, device) for name, kind in kinds.items()}
    times = common.interleave({variant.name: variant.step for variant in variants}, device, seconds)
    peaks = {name: max(peaks[name], common.matmul_rate(kind, device)) for name, kind in kinds.items()}
    result: dict = {"pairs": len(times["ours"]), "ratio": common.median_ratio(times["reference"], times["ours"])}
    for name, values in times.items():
        median = statistics.median(values)
        result[name] = {
            "dtype": str(dtype if name == "ours" else torch.float32).removeprefix("torch."),
            "seconds_per_step": median,
            "images_per_s": size.batch / median,
            "tflops": flops[name] / median / 1e12,
            "matmul_tflops": peaks[name] / 1e12,
            "share_of_matmul": flops[name] / median / peaks[name],
            "gflop_per_image": flops[name] / size.batch / 1e9,
        }
    return result


def run_alone(variant: str, size: common.Size, device: torch.device, dtype: torch.dtype) -> None:
    """Some steps of one variant and nothing else; prints the peak memory of this process."""
    built = common.Ours(size, device, dtype) if variant == "ours" else common.Reference(size, device)
    for _ in range(STEPS_FOR_MEMORY):
        built.step()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else common.own_peak_memory()
    print(peak)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*common.SIZES, "default"], default="default", help="quickstart and vit_base")
    parser.add_argument("--batch", type=int, help="images per step; the size's own unless given")
    parser.add_argument(
        "--dtype", choices=list(common.DTYPES), default="bfloat16", help="of ours; the reference is float32"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--seconds", type=float, default=25.0, help="time to spend on the pairs of each size")
    parser.add_argument("--compile", action="store_true", help="torch.compile our blocks")
    parser.add_argument(
        "--no-memory", action="store_true", help="leave out the peak memory, which needs fresh processes"
    )
    parser.add_argument("--output", help="folder for train_step.json; benchmarks/results unless given")
    parser.add_argument("--alone", choices=["ours", "reference"], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    args = parse(argv)
    device, dtype = torch.device(args.device), common.DTYPES[args.dtype]
    if args.threads:
        torch.set_num_threads(args.threads)
    names = ["quickstart", "vit_base"] if args.size == "default" else [args.size]
    sizes = {name: common.SIZES[name] for name in names}
    if args.batch:
        sizes = {name: dataclasses.replace(size, batch=args.batch) for name, size in sizes.items()}
    if args.alone:
        run_alone(args.alone, sizes[names[0]], device, dtype)
        return
    rows, results = [], {}
    for name, size in sizes.items():
        print(f"{name}: {size.backbone}, {size.image} px, {size.bands} bands, batch {size.batch} ...", flush=True)
        result = measure(size, device, dtype, args.seconds, args.compile)
        for variant in ("ours", "reference"):
            shown = result[variant]
            if not args.no_memory:
                options = ["--alone", variant, "--size", name, "--batch", str(size.batch), "--dtype", args.dtype]
                options += ["--device", args.device, *(["--threads", str(args.threads)] if args.threads else [])]
                shown["peak_memory_mb"] = round(common.peak_memory(os.path.abspath(__file__), options) / 1e6)
            rows.append(
                [
                    f"{name} {variant} ({shown['dtype']})",
                    f"{shown['images_per_s']:.1f}",
                    f"{result['ratio']:.2f}" if variant == "ours" else "1",
                    f"{shown['tflops']:.3f}",
                    f"{shown['share_of_matmul']:.0%}",
                    str(shown.get("peak_memory_mb", "")),
                ]
            )
        results[name] = {"size": dataclasses.asdict(size), **result}
    print(common.table(["training step", "images/s", "ratio", "TFLOP/s", "of matmul", "peak MB"], rows))
    print("ratio: median over pairs of reference time / our time; of matmul: of a matrix product's rate in that type")
    print("written:", common.write_result("train_step", device, {"sizes": results}, args.output))


if __name__ == "__main__":
    main()
