"""`xscale embed CKPT SOURCE...`: embeddings of whole GeoTIFF scenes, or of a data set, as Parquet and feature map."""

import argparse
import hashlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from xscale_lightning.commands.arguments import Parser, import_method, take_data_options
from xscale_lightning.errors import UserError
from xscale_lightning.pretrained import WEIGHTS

SPLITS = ("train", "val", "test")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of the verb; `--data.NAME VALUE` are collected as `data_options`.

    Raises:
        UserError: unknown options, or values that make no sense.
    """
    words, data_options = take_data_options(argv)
    parser = Parser(prog="xscale embed", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="checkpoint, folder of a run, or folder that `xscale export` wrote")
    add("sources", metavar="SOURCE", nargs="*", help="scene: GeoTIFF with all bands, or folder with one file per band")
    add("--data", metavar="FILE.yaml", help="instead of scenes: a configuration with a data section, or a class name; "
        "--data.NAME VALUE changes its arguments")  # fmt: skip
    add("--split", choices=SPLITS, help="split of --data (default: test, else val, else train)")
    add("--output", metavar="FILE.parquet", help="table: a row per window or sample, with footprint where it is known")
    add("--map", metavar="FILE.tif", help="feature map of a scene: a pixel per patch; with several scenes, a folder")
    add("--pca", type=int, metavar="K", help="write K principal components into the map, not all features")
    add("--size", type=int, metavar="PIXELS", help="side of the windows (default: what the model was trained on)")
    add(
        "--stride",
        type=int,
        metavar="PIXELS",
        help="from window to window (default: half a window with --map, else one)",
    )
    add("--min-valid", type=float, default=0.5, metavar="SHARE",
        help="share of a patch's pixels that must have data, else it is left out, NaN in the map (0.5)")  # fmt: skip
    add("--nodata", type=float, metavar="V", help="value that means no data, in files that declare none")
    add("--file-bands", metavar="NAMES", help="names of the files' bands in their order, with commas: B01,B02,...")
    add("--gsd", type=float, metavar="METRES", help="metres per pixel to read at (default: the finest band's)")
    add("--crs", help="of the footprints (default: the scenes' if they share one, else EPSG:4326)")
    add("--batch-size", type=int, default=32, metavar="N", help="windows or samples at a time (32)")
    add("--overwrite", action="store_true", help="replace output that exists")
    add("--restart", action="store_true", help="begin anew, not where an earlier try was interrupted")
    parser.add_method_option()
    args = parser.parse_args(words)
    args.data_options = data_options
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    if bool(args.sources) == bool(args.data):
        raise UserError("give either scenes (SOURCE ...) or a data set (--data FILE.yaml).")
    if not (args.output or args.map):
        raise UserError("nothing to write: give --output FILE.parquet, --map FILE.tif, or both.")
    if args.data and (args.map or not args.output):
        raise UserError("--map is for scenes; with --data give --output FILE.parquet alone.")
    if args.data_options and not args.data:
        raise UserError(f"{args.data_options[0]} needs --data FILE.yaml.")
    if args.pca is not None and (not args.map or args.pca < 1):
        raise UserError(f"--pca {args.pca}: give --map FILE.tif, too, and at least 1.")
    positive = (("size", args.size), ("stride", args.stride), ("batch-size", args.batch_size), ("gsd", args.gsd))
    for name, value in positive:
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name} {value:g} is not possible; give a number above 0.")
    if not 0 < args.min_valid <= 1:
        raise UserError(f"--min-valid {args.min_valid:g} is not possible; give a share above 0, at most 1.")
    args.file_bands = None if args.file_bands is None else [n.strip() for n in args.file_bands.strip("[]").split(",")]
    if args.output:
        args.output = Path(args.output)
        _check_file("output", args.output, (".parquet", ".geoparquet"), args.overwrite)
    if args.map:
        args.map = Path(args.map)
        if len(args.sources) == 1:
            _check_file("map", args.map, (".tif", ".tiff"), args.overwrite)
        elif args.map.suffix or args.map.is_file():
            raise UserError(f"--map '{args.map}': {len(args.sources)} scenes need a folder, not a file.")


def _check_file(name: str, path: Path, suffixes: Sequence[str], overwrite: bool) -> None:
    if path.suffix.lower() not in suffixes:
        raise UserError(f"--{name} '{path}' must end in {suffixes[0]}.")
    if path.is_dir() or (path.exists() and not overwrite):
        raise UserError(f"--{name} '{path}' exists; choose another, or replace it with --overwrite.")
    if not path.absolute().parent.is_dir():
        raise UserError(f"folder '{path.absolute().parent}' of '{path}' does not exist; make it or choose another.")


def weights_hash(path: Path) -> str:
    """SHA-256 of the file with an encoder's weights."""
    file = path / WEIGHTS if path.is_dir() else path
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def main(argv: list[str]) -> int:
    """Embed, write, say what was written."""
    args = parse(argv[1:])
    import torch

    from xscale_lightning.data.tables import check_crs, require_parquet
    from xscale_lightning.pretrained import load_backbone, locate

    if args.output:
        require_parquet()
    args.crs = args.crs and check_crs(args.crs, "--crs")
    args.checkpoint = locate(args.checkpoint)
    import_method(args.method)
    model = load_backbone(args.checkpoint)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if args.data:
        from xscale_lightning.commands.embed_data import embed
    else:
        from xscale_lightning.commands.embed_scenes import embed
    try:
        embed(args, model)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here.", file=sys.stderr)
        raise
    return 0
