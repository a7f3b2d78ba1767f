"""`xscale stats`: statistics of a data set's bands, and the YAML that makes a run use them."""

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from xscale_lightning.commands.arguments import Parser, take_data_options
from xscale_lightning.errors import UserError

if TYPE_CHECKING:
    from xscale_lightning.data.bands import Bands
    from xscale_lightning.data.datamodule import XScaleDataModule
    from xscale_lightning.data.statistics import BandFigures, BandStatistics

DIGITS = 7  # as many as float32 holds


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of the verb; `--data.NAME VALUE` are collected as `data_options`.

    Raises:
        UserError: unknown options, or values that make no sense.
    """
    words, data_options = take_data_options(argv)
    parser = Parser(prog="xscale stats", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("-c", "--config", action="append", default=[], metavar="FILE.yaml",
        help="configuration with a data section; later ones are laid over earlier ones")  # fmt: skip
    add("--data", metavar="CLASS", help="data module, such as SceneFolder; --data.NAME VALUE sets its arguments")
    add("--split", choices=("train", "val", "test"), default="train", help="split to measure (train)")
    add("--samples", type=int, metavar="N", help="measure N random samples of the split (default: all)")
    add("--nodata", type=float, metavar="V", help="value that means no data, where files do not declare it")
    add("--batch-size", type=int, default=64, metavar="N", help="samples at a time (64)")
    add("--write", metavar="FILE.yaml", help="write the overlay for `xscale fit --config`")
    add("--overwrite", action="store_true", help="replace a file that exists")
    args = parser.parse_args(words)
    args.data_options = data_options
    if not (args.config or args.data):
        raise UserError("missing: the data. Give --data SceneFolder --data.root FOLDER, or --config FILE.yaml.")
    for name, value in (("samples", args.samples), ("batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} is not possible; give at least 1.")
    if args.write:
        args.write = Path(args.write)
        if args.write.suffix not in (".yaml", ".yml"):
            raise UserError(f"--write '{args.write}' must end in .yaml.")
        if args.write.is_dir() or (args.write.exists() and not args.overwrite):
            raise UserError(f"--write '{args.write}' exists; choose another, or replace it with --overwrite.")
        if not args.write.absolute().parent.is_dir():
            raise UserError(f"--write: folder '{args.write.absolute().parent}' does not exist; make it first.")
    return args


def main(argv: list[str]) -> int:
    """Measure, print the table and the YAML, write it where asked to."""
    args = parse(argv[1:])
    from xscale_lightning.commands.data_module import choose_split, data_sections, open_data
    from xscale_lightning.files import write_together

    data, _ = open_data(data_sections(args.config, "--config"), args.data, args.data_options, args.batch_size)
    if hasattr(data, "validity"):
        data.validity = True  # type: ignore[attr-defined]  # which pixels have data, beside the images
    _, dataset = choose_split(data, args.split)
    statistics, about = measure(data, dataset, args)
    figures = statistics.figures()
    empty = [band.name for band, found in zip(data.bands.bands, figures, strict=True) if not found.count]
    show(data.bands, figures, about, statistics)
    if empty:
        raise UserError(f"bands {', '.join(empty)} have no data at all: leave them out with data.bands.names.")
    constant = [band.name for band, found in zip(data.bands.bands, figures, strict=True) if not found.std > 0]
    if constant:
        raise UserError(
            f"bands {', '.join(constant)} have one value everywhere, which nothing can be learned from: leave them out "
            "with data.bands.names, or name the value with --nodata."
        )
    text = f"# {about}\n{yaml.dump(overlay(data.bands, figures), sort_keys=False, width=110, Dumper=_Dumper)}"
    print("\n" + text)
    for line in remarks(data.bands, figures):
        print(line)
    if args.write:
        write_together({args.write: text.encode()})
        print(f"wrote {args.write}: xscale fit --config CONFIG.yaml --config {args.write}")
    return 0


def measure(data: "XScaleDataModule", dataset: Any, args: argparse.Namespace) -> "tuple[BandStatistics, str]":
    """Go over the split once; also returns what was measured, in words."""
    import numpy as np

    from xscale_lightning.commands.bars import progress
    from xscale_lightning.data.statistics import BandStatistics

    loader, total = batches(data, args)
    statistics, files, samples = BandStatistics(len(data.bands)), set[str](), 0
    with progress() as bar:
        task = bar.add_task("batches", total=total)
        for batch in itertools.islice(loader, total):
            images = batch["image"].numpy()
            valid = batch["valid"].numpy() if "valid" in batch else None
            if valid is not None and valid.shape[-2:] != images.shape[-2:]:
                valid = None  # that of `image_hr`
            if args.nodata is not None:
                known = images != np.float32(args.nodata)
                valid = known if valid is None else known & (valid[:, None] if valid.ndim == 3 else valid)
            statistics.update(images, valid)
            files.update(batch.get("file", ()))
            samples += len(images)
            bar.advance(task)
    scenes = getattr(dataset, "scenes", None)
    origin = _counted(scenes, "scene") or _counted(files, "file")
    height, width = images.shape[-2:]
    pixels = sum(f.count + f.without for f in statistics.figures()) // len(data.bands)
    return statistics, (
        f"{data.name}, {args.split} split: {samples} samples of {height} x {width}{' from ' + origin if origin else ''}"
        f", {pixels} pixels per band"
    )


def _counted(things: Any, name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) > 1)}" if things else ""


def batches(data: "XScaleDataModule", args: argparse.Namespace) -> tuple[Any, int]:
    """Loader of the samples to measure, and the number of its batches."""
    import numpy as np
    from torch.utils.data import SequentialSampler, Subset

    loader = data.probe_dataloader(args.split)
    if not len(loader):
        raise UserError(f"--split {args.split}: the {args.split} split of {data.name} is empty; choose another.")
    if args.samples is None:
        return loader, len(loader)
    if isinstance(loader.sampler, SequentialSampler) and args.samples < len(loader.dataset):  # type: ignore[arg-type]
        chosen = np.random.default_rng(0).permutation(len(loader.dataset))[: args.samples]  # type: ignore[arg-type]
        loader = data._loader(Subset(loader.dataset, sorted(chosen.tolist())))
        return loader, len(loader)
    return loader, min(len(loader), math.ceil(args.samples / args.batch_size))


def show(bands: "Bands", figures: "Sequence[BandFigures]", about: str, statistics: "BandStatistics") -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    from xscale_lightning.data.statistics import PERCENTILES

    console = Console()
    console = console if console.is_terminal else Console(width=130)
    titles = ["mean", "std", "min", *[f"{p:g} %" for p in PERCENTILES], "max", "no data"]
    table = Table("band", title=about)
    for title in titles:
        table.add_column(title, justify="right")
    for band, found in zip(bands.bands, figures, strict=True):
        numbers = (found.mean, found.std, found.low, *found.percentiles, found.high)
        table.add_row(band.name, *[f"{number:.6g}" for number in numbers], f"{found.empty_share:.2%}")
    console.print(table)
    if not statistics.exact_percentiles:
        print(f"percentiles: of at most {statistics.limit} values per band, evenly from all; the rest is exact.")


def overlay(bands: "Bands", figures: "Sequence[BandFigures]") -> dict[str, Any]:
    """The `data` section that sets bands and statistics, over whatever the configuration has."""
    from xscale_lightning.data.bands import SENSORS

    chosen: dict[str, Any] = {"sensor": bands.sensor, "names": list(bands.names)}
    numbered = bands.sensor == "generic" and all(name == f"band{i + 1}" for i, name in enumerate(bands.names))
    if numbered:
        chosen = {"sensor": "generic", "names": None, "count": len(bands)}
    for key, values in (("mean", [f.mean for f in figures]), ("std", [f.std for f in figures])):
        chosen[key] = [float(f"{value:.{DIGITS}g}") for value in values]
    preset = SENSORS[bands.sensor].select(bands.names).wavelengths if bands.sensor in SENSORS else [None] * len(bands)
    if bands.wavelengths != preset:
        chosen["wavelengths"] = bands.wavelengths
    return {"data": {"init_args": {"bands": chosen}}}


def remarks(bands: "Bands", figures: "Sequence[BandFigures]") -> list[str]:
    """What to make of the figures: whether they fit the sensor preset, and which one they fit."""
    from xscale_lightning.data.bands import SENSORS
    from xscale_lightning.data.statistics import fitting_presets, misfits

    fitting = fitting_presets(bands, figures)
    if bands.sensor == "generic":
        return [f"Bands and figures fit the sensor preset {fitting[0]} (data.bands.sensor)."] if fitting else []
    preset = SENSORS[bands.sensor].select(bands.names)
    far = misfits(preset, figures)
    if not far:
        return [f"The statistics of sensor preset {bands.sensor} would do as well."]
    text = f"Far from the statistics of sensor preset {bands.sensor} in {', '.join(far[:6])}"
    text += f" and {len(far) - 6} more" if len(far) > 6 else ""
    hint = f"; those of {fitting[0]} fit." if fitting else ": is it another product, unit or processing level?"
    return [f"{text}{hint} Use the measured ones."]


class _Dumper(yaml.SafeDumper):
    """Lists in one line, as people write them."""

    def represent_list(self, data: list[Any]) -> yaml.Node:
        """A list in flow style."""
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Dumper.add_representer(list, _Dumper.represent_list)
