"""`xscale reconstruct CKPT IMAGE`: hide parts of an image, let a method put them back, draw and score the result."""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xscale_lightning.commands.arguments import Parser, import_method
from xscale_lightning.errors import UserError
from xscale_lightning.files import strict_json, write_together

if TYPE_CHECKING:
    from torch import Tensor

    from xscale_lightning.data.image_window import OpenImage, Window
    from xscale_lightning.evaluation.ratios import RatioScores, Scores
    from xscale_lightning.methods.base import SSLModule

DEFAULT_RATIOS = (0.5, 0.75, 0.9, 0.95)
UNKNOWN_SIZE = 128  # largest window for checkpoints that do not say what they were trained on


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of the verb.

    Raises:
        UserError: unknown options, or values that make no sense.
    """
    parser = Parser(prog="xscale reconstruct", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="checkpoint of a method that puts pixels back, such as mae or s2mae")
    add("image", metavar="IMAGE", help="GeoTIFF with all bands, or folder with one file per band")
    add(
        "--out",
        metavar="FILE.png",
        help="figure; the numbers go beside it, .json (default: IMAGE_reconstruction.png)",
    )
    add("--ratios", type=float, nargs="+", default=DEFAULT_RATIOS, metavar="R", help="mask ratios (0.5 0.75 0.9 0.95)")
    add("--size", type=int, metavar="PIXELS", help="side of the window (default: what the model was trained on)")
    add("--row", type=int, help="first row of the window (default: in the middle)")
    add("--col", type=int, help="first column of the window (default: in the middle)")
    add("--seed", type=int, default=0, help="chooses what is hidden (0)")
    add("--file-bands", metavar="NAMES", help="names of the file's bands in its order, with commas: B01,B02,...")
    add("--gsd", type=float, metavar="METRES", help="metres per pixel to read at (default: the finest band's)")
    add("--nodata", type=float, metavar="V", help="value that means no data, in files that declare none")
    add("--paste-visible", action="store_true", help="show the visible values in the reconstruction")
    add("--no-false-colour", action="store_true", help="leave the rows in false colour out")
    add("--tif", metavar="FILE.tif", help="write a reconstruction as GeoTIFF in raw units, too")
    add("--tif-ratio", type=float, metavar="R", help="its mask ratio, one of --ratios (default: the highest)")
    parser.add_method_option()
    args = parser.parse_args(argv)
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    from xscale_lightning.evaluation.ratios import check_ratios

    check_ratios(args.ratios, "--ratios")
    for name, value, least in (("size", args.size, 1), ("gsd", args.gsd, 0)):
        if value is not None and not (math.isfinite(value) and value >= least and value > 0):
            raise UserError(f"--{name} {value:g} is not possible; give a number above 0.")
    if args.tif_ratio is not None and args.tif_ratio not in args.ratios:
        raise UserError(f"--tif-ratio {args.tif_ratio:g} is not among --ratios; add it there.")
    args.file_bands = None if args.file_bands is None else [n.strip() for n in args.file_bands.strip("[]").split(",")]
    stem = os.path.splitext(os.path.basename(os.path.normpath(args.image)))[0]
    args.out = Path(args.out or f"{stem}_reconstruction.png")
    for name, path, suffixes in (("out", args.out, (".png",)), ("tif", args.tif, (".tif", ".tiff"))):
        if path is not None and Path(path).suffix.lower() not in suffixes:
            raise UserError(f"--{name} '{path}' must end in {suffixes[0]}.")
    for path in filter(None, (args.out, args.tif)):
        if not os.path.isdir(folder := Path(path).absolute().parent):
            raise UserError(f"folder '{folder}' of '{path}' does not exist; make it or choose another.")
        if not os.access(folder, os.W_OK):
            raise UserError(f"folder '{folder}' of '{path}' cannot be written; choose another.")


def trained_size(checkpoint: Mapping[str, Any], method: "SSLModule") -> int | None:
    """Side in pixels of the images a method was trained on, as far as its checkpoint tells.

    The views' size; else that of the images its `ReconstructionPictures` saw; else that of learned position tables.
    """
    from xscale_lightning import checkpoints

    if method.views.size:
        return method.views.size
    for key, state in checkpoint.get("callbacks", {}).items():
        if str(key).startswith("ReconstructionPictures") and isinstance(state, dict) and state.get("image_size"):
            return min(state["image_size"])
    backbone = checkpoint[checkpoints.KEY]["init_args"]["backbone"]
    return backbone.get("image_size") if backbone.get("position") == "learned" else None


def window_size(args: argparse.Namespace, trained: int | None, patch: int, image: "OpenImage") -> int:
    """Side of the window: as asked for, or the trained one, made smaller where the image is.

    Raises:
        UserError: the patch does not divide it, or the image is smaller than a patch.
    """
    from xscale_lightning.models.tokenizers import check_divides

    if args.size is not None:
        check_divides(patch, args.size, args.size)
        return args.size
    room = min(image.grid.height, image.grid.width)
    if room < patch:
        raise UserError(
            f"IMAGE: '{image.path}' has {image.grid.height} x {image.grid.width} pixels, fewer than a patch of {patch}."
        )
    size = max(min(trained or UNKNOWN_SIZE, room) // patch, 1) * patch  # no larger than the image
    if trained is not None and size != trained:
        print(f"the model was trained on {trained} pixels; the window has {size}, what the image and patches allow.")
    return size


def check_values(method: "SSLModule", raw: "Tensor") -> str:
    """Refuse values that the band record's statistics cannot belong to, where the method uses them.

    One window is not a data set: it may be uniform, and a cirrus band may be far from its mean. So a small deviation
    counts only where every band has it, and a band far out is fatal if others are, too, or if it is very far out.

    Returns:
        what is unusual, in one line; "" if nothing.

    Raises:
        UserError: with the measured values.
    """
    import torch

    from xscale_lightning.methods.checks import MAX_MEAN, MAX_STD, MIN_STD

    offset, scale = method.scaling(raw)
    if not (torch.equal(offset, method.mean) and torch.equal(scale, method.std)):
        return ""  # it scales every image by itself, or not at all
    values = ((raw - offset) / scale).double().flatten(2)[0]  # [C, H * W]
    means, stds = values.mean(1), values.std(1)
    far = (means.abs() / MAX_MEAN).maximum(stds / MAX_STD)  # [C], 1: the limit of a training run
    worst = int(far.argmax())
    band, here = method.bands.bands[worst], raw[0, worst].double()
    measured = (
        f"band {band.name} has mean {here.mean():.4g} and std {here.std():.4g}, the model was trained on mean "
        f"{band.mean:.4g} and std {band.std:.4g}"
    )
    if far[worst] > 10 or int((far > 1).sum()) > len(far) // 4 or bool((stds < MIN_STD).all()):
        raise UserError(
            f"IMAGE: {measured}.\nGive imagery in the model's unit, {method.bands.unit}; if the file does not name its "
            "bands, name them in its order with --file-bands."
        )
    return f"unusual: {measured}." if far[worst] > 1 else ""


def record(scores: "RatioScores", ratio: float, names: Sequence[str]) -> dict[str, Any]:
    """Numbers of one ratio for the JSON file."""
    every = {"reconstruction": scores.method, **scores.base_lines}
    bands = {
        name: {who: {"rmse": s.rmse[i], "psnr": _decibel(s.share[i])} for who, s in every.items() if s is not None}
        for i, name in enumerate(names)
    }
    numbers = {who: {"psnr": s.psnr, "spectral_angle": s.angle} for who, s in every.items() if s is not None}
    return {"mask_ratio": ratio, "hidden": scores.hidden, **numbers, "bands": bands}


def _decibel(share: float) -> float:
    return math.nan if math.isnan(share) else math.inf if share == 0 else -20 * math.log10(share)


def table(scores: Mapping[float, "RatioScores"]) -> str:
    """The numbers for people."""
    from xscale_lightning.evaluation.ratios import BILINEAR, MEAN

    lines = ["hidden   PSNR dB   bilinear   mean spectrum   angle °   bilinear   mean spectrum"]
    for ratio, part in scores.items():
        every: list[Scores | None] = [part.method, part.base_lines.get(BILINEAR), part.base_lines.get(MEAN)]
        psnr = [f"{s.psnr:.2f}" if s else "-" for s in every]
        angle = [f"{s.angle:.2f}" if s and not math.isnan(s.angle) else "-" for s in every]
        columns = (f"{100 * ratio:g} %", *psnr, *angle)
        lines.append("".join(f"{c:>{w}}" for c, w in zip(columns, (6, 10, 11, 16, 10, 11, 16), strict=True)))
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Reconstruct, write figure and numbers, print the numbers."""
    args = parse(argv[1:])
    import torch

    from xscale_lightning import checkpoints
    from xscale_lightning.data.image_window import geotiff_bytes, open_image, place_window, read_window
    from xscale_lightning.evaluation.pictures import png_bytes
    from xscale_lightning.evaluation.ratio_figure import FigureText, ratio_figure
    from xscale_lightning.evaluation.ratios import restore_at_ratios, score, to_raw

    import_method(args.method)
    method = checkpoints.load_method(args.checkpoint)
    if not hasattr(method, "mask_ratio"):
        raise UserError(f"CKPT '{args.checkpoint}' is of method {method.method_name}, which puts no pixels back.")
    image = open_image(args.image, method.bands, args.file_bands, args.gsd)
    outputs = [args.out, args.out.with_suffix(".json"), *([Path(args.tif)] if args.tif else [])]
    for path in outputs:
        if path.exists() and any(os.path.samefile(path, source) for source in image.files()):
            raise UserError(f"'{path}' is the image itself; choose another file to write.")
    trained = trained_size(checkpoints.read(args.checkpoint), method)
    size = window_size(args, trained, method.backbone.patch_size, image)
    window = place_window(image.grid, size, size, args.row, args.col)
    raw = read_window(image, window, args.nodata)
    if image.note:
        print(image.note)
    if unusual := check_values(method, raw):
        print(unusual)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method.to(device)
    batch = {"image": raw.to(device), "gsd": torch.tensor([image.grid.gsd], device=device)}
    shaped: Any = method  # that it has a mask_ratio is known by now
    found, left_out = restore_at_ratios(shaped, batch, args.ratios, args.seed)
    if not found:
        raise UserError(f"CKPT '{args.checkpoint}' is of method {method.method_name}, which puts no pixels back.")
    for ratio, reason in left_out.items():
        print(f"{100 * ratio:g} % left out: {reason}")
    scores = score(found, method.bands)
    name = os.path.basename(os.path.normpath(args.image))
    place = f"rows {window.row} to {window.row + size - 1}, columns {window.col} to {window.col + size - 1}"
    notes = (f"Seed {args.seed}, {image.grid.gsd:.4g} m per pixel.",)
    text = FigureText(f"{method.method_name}: {name}, {place}", notes)
    figure = ratio_figure(found, scores, method.bands, text, args.paste_visible, not args.no_false_colour)
    contents = {
        args.out: png_bytes(figure),
        args.out.with_suffix(".json"): _json(args, method, image, window, scores, left_out),
    }
    if args.tif:
        ratio = args.tif_ratio if args.tif_ratio is not None else max(found)
        if ratio not in found:
            raise UserError(f"--tif-ratio {ratio:g}: {left_out[ratio]}")
        pixels = to_raw(found[ratio].prediction, method.bands)
        if args.paste_visible:
            pixels = torch.where(found[ratio].visible, batch["image"].double(), pixels)
        contents[Path(args.tif)] = geotiff_bytes(pixels[0].cpu().numpy(), method.bands.names, image, window)
    write_together(contents)
    print(table(scores))
    if next(iter(found.values())).borrows:
        print("the target is normalised per patch, so the pictures borrow from the original: no numbers of the method.")
    print(f"{place} of {name}, {image.grid.gsd:.4g} m per pixel, seed {args.seed}")
    print("wrote " + ", ".join(str(path) for path in contents))
    return 0


def _json(
    args: argparse.Namespace,
    method: "SSLModule",
    image: "OpenImage",
    window: "Window",
    scores: Mapping[float, "RatioScores"],
    left_out: Mapping[float, str],
) -> bytes:
    content = {
        "checkpoint": str(args.checkpoint),
        "method": method.method_name,
        "image": str(args.image),
        "window": {**asdict(window), "gsd": image.grid.gsd, "crs": image.crs},
        "seed": args.seed,
        "bands": list(method.bands.names),
        "unit": method.bands.unit,
        "ratios": [record(part, ratio, method.bands.names) for ratio, part in scores.items()],
        "left_out": {f"{ratio:g}": reason for ratio, reason in left_out.items()},
    }
    return strict_json(content)
