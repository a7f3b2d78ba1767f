"""Draw docs/images/architecture.svg: the layers of the package, as import-linter checks them, and a batch's way.

    python scripts/architecture_svg.py

The layers come from pyproject.toml, so the picture cannot differ from what is checked; a test compares the file with
what this script makes. The background is opaque: the picture reads the same on a light and on a dark page.
"""

import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "images" / "architecture.svg"
WIDTH, MARGIN, GAP = 1000, 16, 8

SAYS = {
    "cli": "xscale VERB",
    "commands": "one file per verb",
    "tasks": "fine-tuning",
    "callbacks": "evaluations, pictures, speed",
    "checkpoints": "what a file says",
    "records": "whether it can be so",
    "exports": "folders to give away",
    "exported": "and read again",
    "init_from": "start from weights",
    "sources": "what it can name",
    "pretrained": "load_backbone",
    "readers": "the papers' files",
    "methods": "a paper, a file",
    "testing": "contract suite",
    "models": "encoders, decoders",
    "losses": "pure functions",
    "masking": "what is hidden",
    "masking_blocks": "I-JEPA's blocks",
    "masking_gaps": "LatentMIM's gaps",
    "schedules": "of the step",
    "optim": "AdamW and groups",
    "ema": "target networks",
    "evaluation": "figures",
    "data": "batches with image [B, C, H, W] in raw units and gsd [B]; bands; everything that reads files",
    "opening": "files of strangers: nothing in them is run, and their claims are checked first",
    "files": "whole or not at all",
    "places": "names until then",
    "locks": "one process per folder",
    "unwritten": "what could not be written",
    "seeds": "of whole numbers",
    "errors": "UserError: one or two lines that say what to change",
}
NOTES = (
    "the command line",
    "what a run consists of",
    "torch and timm only",
    "TorchGeo and rasterio, here alone",
    "",
    "",
    "",
)
WAY = (
    ("worker", ("file", "dataset", "collate: + gsd")),
    ("device", ("check batch 1", "normalise", "views", "tokens", "keep some", "encoder", "decoder or predictor")),
    ("device", ("loss terms", "backward", "AdamW", "targets move", "one log call")),
)
FILL = {"worker": "#e8eef7", "device": "#e3f1ee"}
STYLE = (
    "text{font-family:Arial,Helvetica,sans-serif;fill:#17282b}.n{font-weight:bold;font-size:14px}"
    ".s{font-size:11px;fill:#42565a}.h{font-size:15px;font-weight:bold}"
    "rect{stroke:#5a8f88;rx:4}path{stroke:#42565a;fill:none;stroke-width:1.5;marker-end:url(#a)}"
)


def layers() -> list[list[str]]:
    """Names of the modules of every layer, top first, from the import-linter contract."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contracts = tomllib.loads(text)["tool"]["importlinter"]["contracts"]
    found = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[name.strip(" ()") for name in layer.split(" : ")] for layer in found]


def text(x: float, y: float, words: str, kind: str, anchor: str = "middle") -> str:
    """One line of text."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    """A rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"/>'


def draw_layers(y: float) -> tuple[list[str], float]:
    """Rows of boxes, at most five in a row, an arrow between layers; returns the parts and the next free y."""
    parts = [text(MARGIN, y, "Imports point down only", "h", "start")]
    y += 14
    rows = layers()
    for number, (names, note) in enumerate(zip(rows, NOTES, strict=True)):
        if note:
            parts.append(text(WIDTH - MARGIN, y + 12, note, "s", "end"))
        y += 18 if note else 12
        for start in range(0, len(names), 5):
            part = names[start : start + 5]
            width = (WIDTH - 2 * MARGIN - GAP * (len(part) - 1)) / len(part)
            for i, name in enumerate(part):
                x = MARGIN + i * (width + GAP)
                parts += [box(x, y, width, 44, "#e3f1ee"), text(x + width / 2, y + 18, name, "n")]
                parts.append(text(x + width / 2, y + 35, SAYS.get(name, ""), "s"))
            y += 44 + GAP
        if number < len(rows) - 1:
            parts.append(f'<path d="M{WIDTH / 2:g} {y - 4:g}v18"/>')
            y += 6
    return parts, y + 26


def draw_way(y: float) -> tuple[list[str], float]:
    """A batch's way as chains of boxes; returns the parts and the next free y."""
    parts = [text(MARGIN, y, "A batch's way", "h", "start")]
    y += 10
    for where, steps in WAY:
        longest = max(len(steps) for _, steps in WAY)
        width = (WIDTH - 2 * MARGIN - 18 * (longest - 1)) / longest
        parts.append(
            text(
                MARGIN,
                y + 12,
                "in a worker process, on the CPU" if where == "worker" else "on the device",
                "s",
                "start",
            )
        )
        y += 18
        for i, step in enumerate(steps):
            x = MARGIN + i * (width + 18)
            parts += [box(x, y, width, 34, FILL[where]), text(x + width / 2, y + 21, step, "s")]
            if i:
                parts.append(f'<path d="M{x - 17:g} {y + 17:g}h13"/>')
        y += 34 + GAP
    return parts, y


def draw() -> str:
    """The whole picture as SVG text."""
    upper, y = draw_layers(26)
    lower, y = draw_way(y)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 8:g}" role="img" '
        'aria-label="Layers of the package and the way of a batch">'
    )
    marker = '<marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    arrow = f'<defs>{marker}<polygon points="0,0 8,4 0,8" fill="#42565a"/></marker></defs>'
    ground = f'<rect width="{WIDTH}" height="{y + 8:g}" fill="#ffffff" style="stroke:none"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", arrow, ground, *upper, *lower, "</svg>", ""])


if __name__ == "__main__":
    OUT.write_text(draw(), encoding="utf-8")
