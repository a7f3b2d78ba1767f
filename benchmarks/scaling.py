"""How the cost of a step grows with image size, bands and batch: `python benchmarks/train_step.py --scaling`.

Time and memory per image of MAE and S2MAE at ViT-S's width with 4 blocks: ours in bfloat16, ours in float32 and the
reference in float32. One axis is changed at a time; the other two stay at 96 pixels, 12 bands and a batch of 8. Patches
are of 8 pixels in both methods. Times are interleaved within a point; memory is that of a fresh process per point. A
point that would take more memory than the machine has is left out and said.

Every axis of every method is an entry of its own in results/scaling.json, and `python benchmarks/scaling.py` draws
docs/images/scaling.png from what is there.
"""

import dataclasses
import statistics
import sys
from pathlib import Path

import common
import torch
from ours import resized, variants
from sizes import SIZES, Size

IMAGE = Path(__file__).resolve().parents[1] / "docs" / "images" / "scaling.png"
AXES: dict[str, tuple[int, ...]] = {
    "image": (64, 96, 128, 192, 256),
    "bands": (3, 12, 24, 51),
    "batch": (1, 2, 4, 8, 16, 32),
}
LABELS = {"image": "image size, pixels", "bands": "bands", "batch": "batch, images"}
SCALED = ("mae", "s2mae")
START = {"image": 96, "bands": 12, "batch": 8}
SHAPE = {"dim": 384, "depth": 4, "heads": 6, "patch": 8, "decoder_dim": 192, "decoder_depth": 2, "decoder_heads": 6}
SHOWN = ("reference float32", "ours float32", "ours bfloat16")
LIMIT = 6e9  # bytes of the reference's attention matrices that a point may need


def point(method: str, axis: str, value: int) -> Size:
    """The size at one point of an axis."""
    size = dataclasses.replace(SIZES["vit_base"][method], **SHAPE)
    return resized(size, **{**START, axis: value})


def attention_bytes(size: Size) -> float:
    """What the reference keeps of its decoder's attention matrices for the backward pass: scores and weights."""
    return 2 * 4.0 * size.batch * size.decoder_heads * size.tokens**2 * size.decoder_depth


def run(
    methods: list[str], axes: list[str], device: torch.device, seconds: float, only: str | None, folder: str | None
) -> None:
    """Measure the axes of the methods that are scaled; one entry is written after each."""
    for method in [name for name in SCALED if name in methods]:
        for axis in axes:
            points = [value for value in AXES[axis] if attention_bytes(point(method, axis, value)) < LIMIT]
            share = seconds / len(points)
            found: dict = {str(value): {name: {} for name in SHOWN} for value in points}
            for value in points:
                if only != "memory":
                    _merge(found[str(value)], times(point(method, axis, value), device, share))
                if only != "time":
                    for name in SHOWN:
                        found[str(value)][name]["memory_mb"] = fresh_memory(method, axis, value, name, device)
            left_out = [value for value in AXES[axis] if value not in points]
            content = {**common.environment(device), "shape": SHAPE, "start": START, "points": found}
            content["left_out_for_memory"] = left_out
            path = common.merge_result("scaling", (method, axis), content, folder)
            for value in points:
                cells = (f"{name}: {_shown(found[str(value)][name])}" for name in SHOWN)
                print(f"{method} {axis} {value}  " + "; ".join(cells), flush=True)
            print("written:", path, f"(left out: {left_out})" if left_out else "")


def _merge(old: dict, new: dict) -> None:
    for name, values in new.items():
        old[name].update(values)


def _shown(figures: dict) -> str:
    words = [f"{figures['ms_per_image']:.1f} ms/image"] if "ms_per_image" in figures else []
    return ", ".join([*words, *([f"{figures['memory_mb']} MB"] if "memory_mb" in figures else [])])


def times(size: Size, device: torch.device, seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds per image of the variants, interleaved; without augmentation."""
    built = variants(size, device, augment=False)
    steps = {name: built[name]() for name in SHOWN}
    functions = {name: step.step for name, step in steps.items()}
    found = common.interleave(functions, device, seconds, warmup=1, least=3)
    return {name: {"ms_per_image": 1e3 * statistics.median(v) / size.batch} for name, v in found.items()}


def fresh_memory(method: str, axis: str, value: int, name: str, device: torch.device) -> int:
    """Peak megabytes of a fresh process that takes two steps at one point."""
    return round(common.peak_memory(__file__, [method, axis, str(value), name, device.type]) / 1e6)


def draw(record: dict, path: Path = IMAGE) -> None:
    """Time and memory per image, a row each where measured; a colour per variant, a line style per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = (("ms_per_image", "ms per image"), ("memory_mb", "peak memory of the process, MB"))
    colours = dict(zip(SHOWN, ("#888888", "#4477aa", "#cc6633"), strict=True))
    rows = [row for row in rows if _measured(record, row[0])]
    figure, axes = pyplot.subplots(len(rows), len(AXES), figsize=(12, 0.6 + 2.8 * len(rows)), squeeze=False)
    for row, (key, label) in enumerate(rows):
        for column, axis in enumerate(AXES):
            panel = axes[row][column]
            for method, style in zip(SCALED, ("-", "--"), strict=True):
                points = record.get(method, {}).get(axis, {}).get("points", {})
                for name, colour in colours.items():
                    xy = [(int(v), found[name][key]) for v, found in points.items() if key in found[name]]
                    if xy:
                        panel.plot(
                            *zip(*xy, strict=True), style, color=colour, marker="o", ms=3.5, label=f"{method}, {name}"
                        )
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(AXES[axis], [str(v) for v in AXES[axis]])
            panel.set_xticks([], minor=True)
            panel.set_xlabel(LABELS[axis])
            panel.set_ylabel(label if column == 0 else "")
            panel.grid(alpha=0.25)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.16 / len(rows), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _measured(record: dict, key: str) -> bool:
    """Whether any point has this figure: time and memory can be measured apart."""
    axes = [axis for method in record.values() for axis in method.values()]
    return any(key in figures for axis in axes for point in axis["points"].values() for figures in point.values())


def main(argv: list[str]) -> None:
    """Without arguments: draw the figure. With a point: take two steps there and print the peak memory."""
    if not argv:
        import json

        draw(json.loads(common.result_path("scaling", None).read_text(encoding="utf-8")))
        print("drawn:", IMAGE)
        return
    method, axis, value, name, device = argv
    step = variants(point(method, axis, int(value)), torch.device(device), augment=False)[name]()
    step.step()
    step.step()
    print(torch.cuda.max_memory_allocated() if device == "cuda" else common.own_peak_memory())


if __name__ == "__main__":
    main(sys.argv[1:])
