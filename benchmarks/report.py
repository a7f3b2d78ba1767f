"""Put the committed results into docs/speed.md, between its markers: `python benchmarks/report.py`."""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parent / "docs" / "speed.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SIZES = {"vit_base": "ViT-B", "base4": "ViT-B's width, 4 blocks, half a decoder", "quickstart": "quickstart"}
SHARE = 0.45  # aim: share of a matrix product's rate in bfloat16, over the whole step
TIMES = 2.5  # aim on a GPU
FASTER = {"cross_scale_mae": 4.0, "s2mae": 5.0}  # aims: bfloat16 over the published code


def machine(record: dict) -> str:
    """Where and when a result was measured, in one line."""
    where = record.get("gpu") or f"{record['cpu']}, {record['torch_threads']} threads"
    load = f", load average {record['load_average'][0]} at the end" if record.get("load_average") else ""
    return f"{where}, torch {record['versions']['torch']}, {record['date'][:10]}{load}"


def _cell(row: dict, key: str, style: str) -> str:
    return format(row[key], style) if key in row else ""


def train_step(record: dict) -> list[str]:
    """Tables of the training step, one per set of sizes, and which aims are reached."""
    lines, slow, below, reached, faster = [], [], [], [], []
    for name, entries in record["sizes"].items():
        first = next(iter(entries.values()))
        memory = any("peak_memory_mb" in row for entry in entries.values() for row in entry["variants"].values())
        lines += [
            f"**Training step**, {SIZES.get(name, name)} (`--size {name}`; {machine(first)}):",
            "",
            f"| | | images/s | x reference | TFLOP/s | of a matrix product's rate |{' peak memory, MB |' * memory}",
            f"| --- | --- | ---: | ---: | ---: | ---: |{' ---: |' * memory}",
        ]
        for method, entry in entries.items():
            for variant, row in entry["variants"].items():
                figures = (("images_per_s", ".2f"), ("ratio", ".2f"), ("tflops", ".3f"), ("share_of_matmul", ".0%"))
                cells = [_cell(row, key, style) for key, style in figures]
                cells += [str(row.get("peak_memory_mb", ""))] * memory
                lines.append(f"| `{method}` | {variant} | {' | '.join(cells)} |")
            plain = entry["variants"].get("ours float32", {}).get("ratio", 1.0)
            share = entry["variants"].get("ours bfloat16", {}).get("share_of_matmul", 0.0)
            if method in FASTER and (ratio := entry["variants"].get("ours bfloat16", {}).get("ratio")):
                verdict = "reached" if ratio >= FASTER[method] else "not reached"
                faster.append(f"{method} ({name}) {ratio:.2f} of {FASTER[method]:g}, {verdict}")
            if plain < 1:
                slow.append(f"{method} ({name}, {plain:.2f})")
            (reached if share >= SHARE else below).append(f"{method} ({name}, {share:.0%})")
        sizes = (
            f"{method} {entry['size']['image']} px x {entry['size']['bands']} bands, batch {entry['size']['batch']}, "
            f"{entry.get('pairs', 0)} rounds, loader's part {1e3 * entry.get('augment_s', 0):.0f} ms"
            for method, entry in entries.items()
        )
        lines += ["", f"Images: {'; '.join(sizes)}.", ""]
    lines += [
        f"Slower than the reference in float32: {', '.join(slow) or 'none'}. {SHARE:.0%} of the rate of a bfloat16 "
        f"matrix product over the whole step: reached by {', '.join(reached) or 'none'}; not by "
        f"{', '.join(below) or 'none'}.",
        "",
        "Speed in bfloat16 over the published code, for which the reference stands: "
        f"{'; '.join(faster) or 'not measured'}.",
        "",
    ]
    return lines


def attention(record: dict) -> list[str]:
    """Table of the attention backends."""
    backends = list(record["rows"][0]["milliseconds"])
    lines = [
        f"**Attention**, milliseconds forward and backward of {record['tokens']} tokens, {record['heads']} heads of "
        f"{record['head_dim']} ({machine(record)}):",
        "",
        f"| | tokens per sequence | {' | '.join(backends)} | chosen |",
        f"| --- | ---: | {' | '.join('---:' for _ in backends)} | --- |",
    ]
    for row in record["rows"]:
        times = " | ".join(f"{row['milliseconds'][name]:.1f}" for name in backends)
        kind = f"{row['dtype']}, {'packed' if row['packed'] else 'plain'}"
        lines.append(f"| {kind} | {row['length']} | {times} | `{row['auto']}` |")
    return [*lines, ""]


def scaling(record: dict) -> list[str]:
    """The figure of the cost, and where it was measured."""
    # the axes were measured at different times: the busiest machine is named
    first = max((entry for axes in record.values() for entry in axes.values()), key=lambda e: e["load_average"][0])
    shape, start = first["shape"], first["start"]
    left_out = [
        f"{method} at {axis} {', '.join(map(str, found['left_out_for_memory']))}"
        for method, axes in record.items()
        for axis, found in axes.items()
        if found["left_out_for_memory"]
    ]
    return [
        "**Cost as images, bands and batch grow**",
        "",
        "![Cost against image size, bands and batch](images/scaling.png)",
        "",
        f"Width {shape['dim']}, {shape['depth']} blocks, patches of {shape['patch']} pixels; what is not on the axis "
        f"stays at {start['image']} pixels, {start['bands']} bands, batch {start['batch']}. No augmentation. MAE's "
        f"tokens grow with the area alone, S2MAE's with area times bands ({machine(first)}).",
        "",
        f"Left out, as the reference's attention matrices take too much memory: {'; '.join(left_out) or 'nothing'}.",
        "",
    ]


def precision(record: dict) -> list[str]:
    """The two curves per method."""
    apart = "; ".join(
        f"`{name}`: training loss of the last tenth {entry['apart']['train_loss_end']:+.2%}, validation loss "
        f"{entry['apart']['val_loss']:+.2%}, {entry['steps']} steps of {entry['shape']['batch']} images"
        for name, entry in record.items()
        if "apart" in entry
    )
    return [
        "**bfloat16 beside float32**, the quickstart's model on the embedded imagery, same seeds:",
        "",
        "![Training losses in bfloat16 and float32](images/precision.png)",
        "",
        f"bfloat16 relative to float32: {apart}.",
        "",
    ]


def gpu(record: dict) -> list[str]:
    """What the look at a GPU found, or that there was none."""
    where = f"{record['device']}, torch {record['versions']['torch']}, {record['date'][:10]}"
    lines = [f"**GPU** ({where}): {record['statement']}", ""]
    for name, part in record["parts"].items():
        if reason := part.get("failed") or part.get("skipped"):
            lines += [f"`{name}`: {reason}", ""]
        elif name in ("attention", "methods"):
            good = sum(row[2] == "ok" for row in part["rows"])
            lines += [f"`{name}`: {good} of {len(part['rows'])} checks passed.", ""]
        else:
            lines += [f"| {' | '.join(part['header'])} |", f"|{' --- |' * len(part['header'])}"]
            lines += [f"| {' | '.join(row)} |" for row in part["rows"]] + [""]
    if record["device"] == "CPU":
        aims = f"MFU of {SHARE:.0%} at ViT-L, {TIMES} times the reference under autocast, 30 % less memory"
        lines += [f"So the aims for a GPU ({aims}) are untested.", ""]
    return lines


TABLES = {"train_step": train_step, "scaling": scaling, "precision": precision, "gpu": gpu, "attention": attention}


def main() -> None:
    """Write the tables of whatever results there are."""
    lines = ["## Measured", ""]
    for name, write in TABLES.items():
        path = FOLDER / "results" / f"{name}.json"
        if path.is_file():
            lines += write(json.loads(path.read_text(encoding="utf-8")))
    text = PAGE.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    body = "\n".join(lines) if len(lines) > 2 else ""
    PAGE.write_text(f"{before}{BEGIN}\n\n{body}\n{after}" if body else f"{before}{BEGIN}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
