"""Put the committed results into docs/speed.md, between its markers.

python benchmarks/report.py
"""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parent / "docs" / "speed.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def machine(record: dict) -> str:
    """Where and when a result was measured, in one line."""
    where = record.get("gpu") or f"{record['cpu']}, {record['torch_threads']} threads"
    load = f", load average {record['load_average'][0]} at the end" if record.get("load_average") else ""
    return f"{where}, torch {record['versions']['torch']}, {record['date'][:10]}{load}"


def train_step(record: dict) -> list[str]:
    """Table of the training step."""
    lines = [
        f"**Training step** ({machine(record)}):",
        "",
        "| | type | images/s | TFLOP/s | of a matrix product's rate | peak memory, MB |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, result in record["sizes"].items():
        size = result["size"]
        for variant in ("ours", "reference"):
            row = result[variant]
            title = f"{name}: `{size['backbone']}`, {size['image']} px, {size['bands']} bands, batch {size['batch']}"
            ratio = f"ours, **{result['ratio']:.2f} x**" if variant == "ours" else "plain reference"
            lines.append(
                f"| {title}, {ratio} | {row['dtype']} | {row['images_per_s']:.1f} | {row['tflops']:.3f} | "
                f"{row['share_of_matmul']:.0%} | {row.get('peak_memory_mb', '')} |"
            )
    return [*lines, "", "The factor is the median over pairs. Peak memory includes Python and torch themselves.", ""]


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


def main() -> None:
    """Write the tables of whatever results there are."""
    lines = ["## Measured", ""]
    for name, write in (("train_step", train_step), ("attention", attention)):
        path = FOLDER / "results" / f"{name}.json"
        if path.is_file():
            lines += write(json.loads(path.read_text(encoding="utf-8")))
    text = PAGE.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    body = "\n".join(lines) if len(lines) > 2 else ""
    PAGE.write_text(f"{before}{BEGIN}\n\n{body}\n{after}" if body else f"{before}{BEGIN}\n{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
