"""`xscale embed --data`: one split of a data set, some batches after others, each group kept when it is finished."""

import argparse
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from xscale_lightning.commands.bars import progress
from xscale_lightning.commands.data_module import choose_split, data_section, is_file, open_data
from xscale_lightning.commands.embed import weights_hash
from xscale_lightning.commands.journal import Journal
from xscale_lightning.data.datamodule import Split, XScaleDataModule
from xscale_lightning.data.tables import polygon, write_parquet
from xscale_lightning.errors import UserError
from xscale_lightning.init_from import same_bands
from xscale_lightning.pretrained import Pretrained

GROUP = 1024  # samples of a part, about


def embed(args: argparse.Namespace, model: Pretrained) -> None:
    """Embed a split of the data set of a command line.

    Raises:
        UserError: no such data, other bands than the model's, or other options than those of an interrupted try.
    """
    sections, cls = ([data_section(args.data, "--data")], None) if is_file(args.data) else ([], args.data)
    data, description = open_data(sections, cls, args.data_options, args.batch_size)
    if not same_bands(model.bands, data.bands):
        difference = model.bands.difference(data.bands) or "wavelengths or unit"
        raise UserError(
            f"--data: its bands are not those of {args.checkpoint}: {difference}.\nChoose the same by name: "
            f"--data.bands.sensor {model.bands.sensor} --data.bands.names '[{', '.join(model.bands.names)}]'."
        )
    split, dataset = choose_split(data, args.split)
    per_part = max(1, GROUP // args.batch_size)
    batches = len(data.probe_dataloader(split))
    if not batches:
        raise UserError(f"--data: the {split} split of {data.name} is empty; choose another with --split.")
    job = {
        "checkpoint": weights_hash(args.checkpoint),
        "data": description,
        "split": split,
        "samples": _count(dataset),
        "batch-size": args.batch_size,
        "crs": args.crs,
    }
    journal = Journal(args.output.with_name(f"{args.output.name}.parts"), job, args.restart)
    names = [f"part{number:06d}" for number in range(-(-batches // per_part))]
    done = next((number for number, name in enumerate(names) if name not in journal), len(names))
    with progress() as bar:
        task = bar.add_task("batches", total=batches, completed=min(done * per_part, batches))
        stream = from_batch(data, split, dataset, done * per_part)
        for name in names[done:]:
            parts = []
            for batch in itertools.islice(stream, per_part):
                parts.append(embed_batch(model, batch) if batch else {})
                bar.advance(task)
            journal.save(name, _join(parts))
    table = _join([journal.load(name) for name in names])
    if not table:
        raise UserError(f"--data: none of the samples of the {split} split of {data.name} can be read (named above).")
    rows = len(table["embedding"])
    vectors = table.pop("embedding")
    crs, footprints = _footprints(args, dataset, table)
    files = table.pop("file", None)
    columns: dict[str, Any] = {"file": files.tolist()} if files is not None else {}
    about = {
        "checkpoint": str(args.checkpoint),
        "method": model.origin.method,
        "bands": list(model.bands.names),
        "data": data.name,
        "split": split,
    }
    write_parquet(args.output, vectors, {**columns, **table}, footprints, crs, about)
    journal.remove()
    print(f"wrote {args.output} ({rows} samples of {data.name}, {split}){damaged_text(data)}")


def damaged_text(data: XScaleDataModule) -> str:
    """What to say of damaged samples after a command that has read every sample of some splits once."""
    count = sum(data.left_out_samples.values())
    return f"; {count} damaged sample{'s were' if count > 1 else ' was'} left out" if count else ""


def _count(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def from_batch(data: XScaleDataModule, split: Split, dataset: Any, first: int) -> Iterator[Mapping[str, Any]]:
    """Batches of a split from number `first` on; those before are not read where their places are known.

    A batch of damaged samples alone is `{}`, so that the number of a batch says where its samples are.
    """
    loader = data.probe_dataloader(split)
    in_order = isinstance(loader.sampler, torch.utils.data.SequentialSampler)
    if first and in_order:
        rest = Subset(dataset, range(min(first * data.batch_size, len(dataset)), len(dataset)))
        loader, first = data._loader(rest), 0
    loader.keep_empty = True  # type: ignore[attr-defined]
    return itertools.islice(iter(loader), first, None)


def embed_batch(model: Pretrained, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Columns of a batch: embedding, gsd, and what is known of label, file and place."""
    device = model.mean.device
    gsd = batch["gsd"]
    columns = {"embedding": model.features(batch["image"].to(device), gsd.to(device)).cpu().numpy()}
    for name in ("label", "origin", "gsd"):
        if name in batch:
            columns[name] = batch[name].numpy()
    if "file" in batch:
        columns["file"] = np.asarray(batch["file"], dtype=str)
    return columns


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    parts = [part for part in parts if part]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def _footprints(args: argparse.Namespace, dataset: Any, table: dict[str, np.ndarray]) -> tuple[str | None, Any]:
    """Footprints of the samples where all have one; scene, row and column join the table."""
    origin = table.pop("origin", None)
    if origin is not None and hasattr(dataset, "scenes"):
        scenes, (height, width) = dataset.scenes, dataset.size
        table["file"] = np.asarray([scenes[scene].name for scene in origin[:, 0]], dtype=str)
        table["row"], table["col"] = origin[:, 1], origin[:, 2]
        boxes = []
        for scene, row, col in origin.tolist():
            grid, crs = scenes[scene].grid, scenes[scene].sources[0].raster.crs
            left, top = grid.left + col * grid.dx, grid.top - row * grid.dy
            boxes.append((left, top, left + width * grid.dx, top - height * grid.dy, crs))
    elif "file" in table:
        boxes = _file_boxes(table["file"].tolist())
    else:
        return None, None
    placed = [(left, top, right, bottom, crs) for left, top, right, bottom, crs in boxes if crs is not None]
    known = {crs for *_, crs in placed}
    if not known or len(placed) < len(boxes):
        return None, None
    crs: str = args.crs or (known.pop() if len(known) == 1 else "EPSG:4326")
    return crs, [polygon(left, top, right, bottom, own, crs) for left, top, right, bottom, own in placed]


def _file_boxes(files: list[str]) -> list[tuple[float, float, float, float, str | None]]:
    """Extent of every file; nothing if one of them is no georeferenced raster."""
    from xscale_lightning.data.geotiff import SUFFIXES, UnreadableFile, inspect

    boxes = []
    for file in files:
        if not file.lower().endswith(SUFFIXES):
            return []
        try:
            raster = inspect(file)
        except (UnreadableFile, OSError):
            return []
        if raster.crs is None:
            return []
        right, bottom = raster.left + raster.width * raster.dx, raster.top - raster.height * raster.dy
        boxes.append((raster.left, raster.top, right, bottom, raster.crs))
    return boxes
