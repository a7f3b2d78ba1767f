"""`xscale embed` of whole scenes: row of windows by row of windows, each kept when it is finished."""

import argparse
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xscale_lightning.commands.bars import progress
from xscale_lightning.commands.embed import weights_hash
from xscale_lightning.commands.journal import Journal
from xscale_lightning.data.feature_map import Components, write_feature_map
from xscale_lightning.data.image_window import OpenImage, open_image
from xscale_lightning.data.scene_windows import Strip, Tiling, merge, read_rows
from xscale_lightning.data.tables import polygon, write_parquet
from xscale_lightning.errors import UserError
from xscale_lightning.methods.checks import check_statistics
from xscale_lightning.pretrained import Pretrained

UNKNOWN_SIZE = 128  # windows of models that do not say what they were trained on
ROW, COL, SHARE, EMBEDDING = "row", "col", "share", "embedding"


def embed(args: argparse.Namespace, model: Pretrained) -> None:
    """Embed the scenes of a command line.

    Raises:
        UserError: a scene that cannot be read, bands that are missing, windows that do not fit, other options than
            those of an interrupted try.
    """
    images = [open_image(path, model.bands, args.file_bands, args.gsd) for path in args.sources]
    tilings = [tile(args, model, image) for image in images]
    maps = map_paths(args, images)
    args.looked = False
    journal = Journal(parts_folder(args), _job(args, model, images, tilings), args.restart)
    for image in images:
        if image.note:
            print(image.note)
    with progress() as bar:
        task = bar.add_task("windows", total=sum(len(t.rows) * len(t.cols) for t in tilings))
        for number, (image, tiling) in enumerate(zip(images, tilings, strict=True)):
            for row in tiling.rows:
                name = _name(number, row)
                if name not in journal:
                    journal.save(name, embed_row(args, model, image, tiling, row))
                bar.advance(task, len(tiling.cols))
    if not any(len(journal.load(name)[COL]) for name in _names(tilings)):
        journal.remove()
        raise UserError("no patch has enough pixels with data; lower --min-valid or check --nodata.")
    written = []
    if args.output:
        rows = write_table(args, model, images, tilings, journal)
        written.append(f"{args.output} ({rows} windows)")
    for number, path in enumerate(maps):
        if not any(len(journal.load(_name(number, row))[COL]) for row in tilings[number].rows):
            print(f"{images[number].path}: no patch has enough pixels with data, so it gets no map.")
            continue
        bands = write_map(
            args, images[number], tilings[number], path, partial(_strips, journal, number, tilings[number])
        )
        height, width = tilings[number].grid
        written.append(f"{path} ({bands} bands, {height} x {width} patches)")
    journal.remove()
    print("wrote " + "\n      ".join(written))


def _name(scene: int, row: int) -> str:
    return f"scene{scene}_row{row}"


def _names(tilings: list[Tiling]) -> Iterator[str]:
    return (_name(number, row) for number, tiling in enumerate(tilings) for row in tiling.rows)


def tile(args: argparse.Namespace, model: Pretrained, image: OpenImage) -> Tiling:
    """Windows of a scene: as asked for, or as large as the model's training images, and no larger than the scene."""
    patch = model.encoder.patch_size
    room = min(image.grid.height, image.grid.width)
    if room < patch:
        raise UserError(f"SOURCE '{image.path}' has a side of {room} pixels, less than a patch of {patch}.")
    size = args.size or max(min(model.origin.image_size or UNKNOWN_SIZE, room) // patch, 1) * patch
    stride = args.stride or (max(size // 2 // patch, 1) * patch if args.map else size)
    return Tiling(image.grid.height, image.grid.width, size, stride, patch)


def map_paths(args: argparse.Namespace, images: list[OpenImage]) -> list[Path]:
    """File of every scene's map; none without `--map`.

    Raises:
        UserError: scenes with the same name, or a file that exists.
    """
    if not args.map or len(images) == 1:
        return [args.map] if args.map else []
    stems = [os.path.splitext(os.path.basename(os.path.normpath(image.path)))[0] for image in images]
    repeated = sorted({stem for stem in stems if stems.count(stem) > 1})
    if repeated:
        raise UserError(f"--map: several scenes are called '{repeated[0]}'; embed them one at a time.")
    paths = [args.map / f"{stem}_features.tif" for stem in stems]
    existing = [path for path in paths if path.exists()]
    if existing and not args.overwrite:
        raise UserError(f"--map '{existing[0]}' exists; choose another folder, or replace it with --overwrite.")
    args.map.mkdir(parents=True, exist_ok=True)
    return paths


def parts_folder(args: argparse.Namespace) -> Path:
    """Where finished parts wait, beside the output."""
    output = args.output or args.map
    return output.with_name(f"{output.name}.parts")


def _job(args: argparse.Namespace, model: Pretrained, images: list[OpenImage], tilings: list[Tiling]) -> dict[str, Any]:
    files = [sorted((f, os.stat(f).st_size, os.stat(f).st_mtime) for f in image.files()) for image in images]
    return {
        "checkpoint": weights_hash(args.checkpoint),
        "sources": files,
        "windows": [asdict(tiling) for tiling in tilings],
        "gsd": [image.grid.gsd for image in images],
        "nodata": args.nodata,
        "min-valid": args.min_valid,
        "file-bands": args.file_bands,
        "map": bool(args.map),
    }


def look_at(model: Pretrained, windows: Tensor) -> None:
    """Say it if the values of the first windows cannot belong to the statistics of the encoder's bands."""
    if model.scaling == "standardize":
        try:
            check_statistics(model.normalise(windows), windows, model.bands)
        except UserError as error:  # a note, because a first row may be all water or cloud
            print("note: " + str(error).split("\n")[0] + "\nIf not cloud or water, the scene has another unit.")


def embed_row(
    args: argparse.Namespace, model: Pretrained, image: OpenImage, tiling: Tiling, row: int
) -> dict[str, np.ndarray]:
    """One row of windows: table columns of those with data, and what they add to the map."""
    device = model.mean.device
    fill = np.asarray(model.bands.means, np.float32)
    found: dict[str, list[Any]] = {ROW: [], COL: [], SHARE: [], EMBEDDING: []}
    strip: Strip | None = None
    for cols, pixels, shares in read_rows(image, tiling, row, args.batch_size, fill, args.nodata):
        valid = shares >= args.min_valid  # [B, h, w]
        some = valid.any(axis=(1, 2))
        if not some.any():
            continue
        windows = torch.from_numpy(pixels[some]).to(device)
        if not args.looked:
            args.looked = True
            look_at(model, windows)
        vectors, features = encode(model, windows, torch.from_numpy(valid[some]).to(device), image.grid.gsd)
        places = np.asarray(cols)[some]
        found[ROW] += [row] * len(places)
        found[COL] += places.tolist()
        found[SHARE] += shares[some].mean(axis=(1, 2)).tolist()
        found[EMBEDDING].append(vectors.cpu().numpy())
        if args.map:
            maps = features.cpu().numpy()
            strip = strip or Strip.empty(row // tiling.patch, maps.shape[1], maps.shape[2], tiling.grid[1])
            for col, values, which in zip(places, maps, valid[some], strict=True):
                strip.add(int(col) // tiling.patch, values, which)
    width = model.encoder.num_features
    vectors = np.concatenate(found[EMBEDDING]) if found[EMBEDDING] else np.zeros((0, width), np.float32)
    parts = {EMBEDDING: vectors, **{name: np.asarray(found[name]) for name in (ROW, COL, SHARE)}}
    return parts if strip is None else {**parts, "total": strip.total, "count": strip.count}


@torch.no_grad()
def encode(model: Pretrained, windows: Tensor, valid: Tensor, gsd: float) -> tuple[Tensor, Tensor]:
    """Vectors `[B, D]` and maps `[B, D, h, w]` of raw windows `[B, C, H, W]`.

    Patches that are not `valid [B, h, w]` take part in the attention, filled with the bands' means, not in the mean.
    """
    tokens = model(windows, gsd)
    vectors = model.encoder.pool(tokens).float()
    holes = ~valid.flatten(1).all(1)
    if model.encoder.pool_mode == "mean" and bool(holes.any()):
        weights = valid.flatten(1).repeat(1, tokens.grid[0]).unsqueeze(-1).float()  # [B, G * h * w, 1]
        means = (tokens.patches.float() * weights).sum(1) / weights.sum(1)
        vectors = torch.where(holes.unsqueeze(1), means, vectors)
    return vectors, tokens.feature_map().float()


def write_table(
    args: argparse.Namespace, model: Pretrained, images: list[OpenImage], tilings: list[Tiling], journal: Journal
) -> int:
    """Write the table of all windows; returns their number."""
    crs = footprint_crs(args, images)
    columns: dict[str, list[Any]] = {name: [] for name in ("file", ROW, COL, "size", "gsd", "valid")}
    vectors, footprints = [], []
    for number, (image, tiling) in enumerate(zip(images, tilings, strict=True)):
        for row in tiling.rows:
            part = journal.load(_name(number, row))
            count = len(part[COL])
            vectors.append(part[EMBEDDING])
            same = {"file": image.path, "size": tiling.size, "gsd": image.grid.gsd}
            for name, value in same.items():
                columns[name] += [value] * count
            for name, key in ((ROW, ROW), (COL, COL), ("valid", SHARE)):
                columns[name] += part[key].tolist()
            if crs and image.crs:
                footprints += [_footprint(image, tiling.size, row, col, crs) for col in part[COL].tolist()]
    table = np.concatenate(vectors)
    about = {"checkpoint": str(args.checkpoint), "method": model.origin.method, "bands": list(model.bands.names)}
    write_parquet(args.output, table, columns, footprints if crs else None, crs, about)
    return len(table)


def footprint_crs(args: argparse.Namespace, images: list[OpenImage]) -> str | None:
    """Coordinate system of the footprints; None where a scene does not say where it lies."""
    known = {image.crs for image in images}
    if None in known:
        return None
    return args.crs or (known.pop() if len(known) == 1 else "EPSG:4326")


def _footprint(image: OpenImage, size: int, row: int, col: int, crs: str) -> bytes:
    grid = image.grid
    left, top = grid.left + col * grid.dx, grid.top - row * grid.dy
    return polygon(left, top, left + size * grid.dx, top - size * grid.dy, image.crs or crs, crs)


def _strips(journal: Journal, number: int, tiling: Tiling) -> Iterator[tuple[int, np.ndarray]]:
    """The map's rows, from the parts of one scene."""
    names = [_name(number, row) for row in tiling.rows]
    shape = next(part["total"].shape for part in map(journal.load, names) if "total" in part)

    def strips() -> Iterator[Strip]:
        for row, name in zip(tiling.rows, names, strict=True):
            part, first = journal.load(name), row // tiling.patch
            yield Strip(first, part["total"], part["count"]) if "total" in part else Strip.empty(first, *shape)

    return merge(strips(), tiling.grid[0])


def write_map(args: argparse.Namespace, image: OpenImage, tiling: Tiling, path: Path, rows: Any) -> int:
    """Write the map of one scene; returns its number of bands."""
    if args.pca:
        components = Components(rows, args.pca)
        names = [f"PC{i + 1} ({share:.1%} of the variance)" for i, share in enumerate(components.shares)]
    else:
        components, names = None, [f"feature {i}" for i in range(len(next(rows())[1]))]
    write_feature_map(path, rows, image, tiling, names, components)
    return len(names)
