"""`xscale pack OUT --data FILE.yaml`: decode a data set once, into shards that `PackedData` memory-maps."""

import argparse
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xscale_lightning import __version__
from xscale_lightning.commands.arguments import Parser, take_data_options
from xscale_lightning.commands.bars import progress
from xscale_lightning.commands.data_module import SPLITS, data_section, is_file, open_data
from xscale_lightning.commands.embed_data import damaged_text, from_batch
from xscale_lightning.commands.journal import Journal
from xscale_lightning.data.datamodule import Split, XScaleDataModule
from xscale_lightning.data.patches import EpochSampler
from xscale_lightning.data.shards import FORMAT, INDEX, Shard, check_shards, read_index, write_shard, write_text
from xscale_lightning.errors import UserError
from xscale_lightning.files import free_space, size
from xscale_lightning.places import recover


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of the verb; `--data.NAME VALUE` are collected as `data_options`.

    Raises:
        UserError: unknown options, or values that make no sense.
    """
    words, data_options = take_data_options(argv)
    parser = Parser(prog="xscale pack", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("out", metavar="OUT", help="folder to write")
    add("--data", "--config", metavar="FILE.yaml", help="configuration with a data section, or a class name; "
        "--data.NAME VALUE changes its arguments")  # fmt: skip
    add("--splits", default=",".join(SPLITS), metavar="NAMES", help="splits to write, with commas (train,val,test)")
    add("--shard-mb", type=int, default=256, metavar="MB", help="size of a shard, about (256)")
    add("--batch-size", type=int, default=64, metavar="N", help="samples read at a time (64)")
    add("--overwrite", action="store_true", help="replace a pack that exists")
    add("--restart", action="store_true", help="begin anew, not where an earlier try was interrupted")
    add("--check", action="store_true", help="write nothing: compare every file of the pack OUT with its SHA-256")
    args = parser.parse_args(words)
    args.data_options = data_options
    if args.check == bool(args.data):
        raise UserError("give --data FILE.yaml to write a pack, or --check to check one.")
    for name, value in (("shard-mb", args.shard_mb), ("batch-size", args.batch_size)):
        if value < 1:
            raise UserError(f"--{name} {value} is not possible; give at least 1.")
    args.splits = [name.strip() for name in args.splits.split(",")]
    if unknown := [name for name in args.splits if name not in SPLITS]:
        raise UserError(f"--splits {unknown[0]!r} is unknown; choose from {', '.join(SPLITS)}.")
    args.out = Path(os.path.normpath(args.out))
    return args


def main(argv: list[str]) -> int:
    """Write or check a pack, say what there is."""
    args = parse(argv[1:])
    if args.check:
        splits = read_index(args.out)[1]
        for shards in splits.values():
            check_shards(args.out, shards, hashes=True)
        print(f"{args.out}: {_summary(splits)}; every file has its SHA-256")
        return 0
    recover(args.out)
    if args.out.exists() and not (args.overwrite and (args.out / INDEX).is_file()):
        remedy = "replace it with --overwrite" if (args.out / INDEX).is_file() else "it is no pack"
        raise UserError(f"OUT '{args.out}' exists; choose another folder ({remedy}).")
    sections, cls = ([data_section(args.data, "--data")], None) if is_file(args.data) else ([], args.data)
    data, description = open_data(sections, cls, args.data_options, args.batch_size)
    if data.downloads:
        data.prepare_data()
    splits = [split for split in args.splits if _has(data, split)]
    if not splits:
        raise UserError(f"--splits: {data.name} has none of {', '.join(args.splits)}.")
    job = {"data": description, "splits": splits, "shard-mb": args.shard_mb, "batch-size": args.batch_size}
    journal = Journal(args.out.with_name(f"{args.out.name}.parts"), job, args.restart)
    try:
        packed = {split: shards for split, shards in _write_splits(data, splits, journal.folder, args)}
    except BaseException:
        if not any(journal.folder.glob("*-[0-9]*.json")):  # no shard is whole: nothing to go on with
            journal.remove()
        raise
    content = {"format": FORMAT, **describe(data), "splits": {k: [asdict(s) for s in v] for k, v in packed.items()}}
    content["source"] = {"data": json.loads(description), "left_out": data.left_out_samples, "xscale": __version__}
    write_text(journal.folder / INDEX, json.dumps(content, indent=1, allow_nan=False))
    columns = [column for shards in packed.values() for shard in shards for column in shard.columns.values()]
    journal.become(args.out, {INDEX, *(column.file for column in columns)})
    print(f"wrote {args.out}: {_summary(packed)}, {size(sum(column.bytes for column in columns))}{damaged_text(data)}")
    print(f"  xscale fit --config ... --data PackedData --data.root {args.out}")
    return 0


def _summary(splits: Mapping[str, Sequence[Shard]]) -> str:
    return ", ".join(f"{sum(shard.samples for shard in shards)} {name}" for name, shards in splits.items())


def _has(data: XScaleDataModule, split: Split) -> bool:
    """Whether there is such a split, and it is a list of samples.

    Raises:
        UserError: its samples are random patches of scenes.
    """
    dataset = data.dataset(split)
    if dataset is None:
        return False
    if split == "train" and isinstance(getattr(data.train_dataloader(), "sampler", None), EpochSampler):
        raise UserError(
            f"--data: {type(data).__name__} draws new patches of its scenes in every epoch, so there is no list to "
            "pack.\nWhere scenes do not fit into memory, set data.cache_dir: they are decoded once and memory-mapped."
        )
    return True


def describe(data: XScaleDataModule) -> dict[str, Any]:
    """What a data module says of its samples, in plain types."""
    return {
        "name": data.name,
        "bands": data.bands.to_dict(),
        "image_size": list(data.image_size),
        "num_classes": data.num_classes,
        "multilabel": data.multilabel,
        "num_mask_classes": data.num_mask_classes,
        "class_names": None if data.class_names is None else list(data.class_names),
        "ignore_index": data.ignore_index,
        "gsd": data.gsd,
    }


def _write_splits(
    data: XScaleDataModule, splits: Sequence[Split], folder: Path, args: argparse.Namespace
) -> Iterator[tuple[str, list[Shard]]]:
    """Write what is missing of every split, and yield its shards."""
    counts = {split: len(data.probe_dataloader(split)) for split in splits}
    checked = False
    with progress() as bar:
        for split in splits:
            shards: list[Shard] = []
            stream, per_shard = None, 0
            while (record := folder / f"{split}-{len(shards):05d}.json").is_file():
                shards.append(_read_record(record))
            done = sum(shard.batches for shard in shards)
            task = bar.add_task(f"{split} batches", total=counts[split], completed=done)
            while done < counts[split]:
                stream = stream or (_columns(b) for b in from_batch(data, split, data.dataset(split), done))
                parts = list(itertools.islice(stream, per_shard or 1))
                while parts and not parts[-1]:  # a batch of damaged samples alone
                    parts += (following := list(itertools.islice(stream, 1)))
                    if not following:
                        break
                if not any(parts):
                    break
                if not per_shard:
                    batch = max(1, sum(values.nbytes for values in parts[-1].values()) // 2)  # float32 stored as uint16
                    if not checked:
                        _check_room(folder, batch * (sum(counts.values()) - done), data.name)
                        checked = True
                    per_shard = max(1, _bytes_per_shard(args) // batch)
                    parts += itertools.islice(stream, per_shard - 1)
                shards.append(write_shard(folder, f"{split}-{len(shards):05d}", parts))
                done += len(parts)
                bar.advance(task, len(parts))
            if not shards and counts[split]:
                raise UserError(f"--data: none of the samples of the {split} split can be read (named above).")
            yield split, shards


def _bytes_per_shard(args: argparse.Namespace) -> int:
    return args.shard_mb * 10**6


def _read_record(path: Path) -> Shard:
    try:
        return Shard.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, KeyError, TypeError, ValueError):
        raise UserError(f"'{path}' is damaged; begin anew with --restart.") from None


def _columns(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Columns `[B, ...]` of a batch; strings as UTF-8."""
    columns = {}
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            columns[key] = value.numpy()
        elif isinstance(value, list) and all(isinstance(text, str) for text in value):
            columns[key] = np.array([text.encode() for text in value])
    return columns


def _check_room(folder: Path, wanted: int, name: str) -> None:
    free = free_space(folder)
    if wanted > free:
        raise UserError(
            f"OUT: {name} needs about {size(wanted)} and '{folder.parent}' has {size(free)} free; make room, or choose "
            "another folder."
        )
