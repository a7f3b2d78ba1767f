"""Images per second of the input path: files on disk to batches in memory, per core and with worker processes.

The same 13-band samples of 64 pixels as GeoTIFF files in folders of classes (EuroSAT's layout), as `xscale pack` writes
them, in a tar of raw arrays (WebDataset's layout) and, where litdata is installed, as its chunks; and random patches of
GeoTIFF scenes held in memory, read by window, and memory-mapped (`cache_dir`). Files are made by the script unless
folders are given; all of them are in the operating system's cache, so decoding is what is timed, not the disk.

Per core: images per second of CPU time without workers, which other work on the machine does not change.

    python benchmarks/input.py [--eurosat FOLDER] [--scenes FOLDER] [--files 512] [--seconds 2]
"""

import argparse
import io
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import common
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from xscale_lightning import cli
from xscale_lightning.data.bands import SENSORS, BandSelection
from xscale_lightning.data.folder import ImageFolderData
from xscale_lightning.data.packed import PackedData
from xscale_lightning.data.scenes import SceneFolder

# EuroSAT's order.
CHANNELS = [
    "B01",
    "B02",
    "B03",
    "B04",
    "B05",
    "B06",
    "B07",
    "B08",
    "B09",
    "B10",
    "B11",
    "B12",
    "B8A",
]  # EuroSAT's order
Loader = Callable[[int], DataLoader]


def write_geotiff(path: Path, values: np.ndarray, names: list[str] | None = None, **profile: object) -> None:
    """Write `[C, H, W]` as EuroSAT's files are: strips, pixel-interleaved, uncompressed; or as `profile` says."""
    import rasterio
    from rasterio.transform import from_origin

    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"driver": "GTiff", "crs": "EPSG:32633", "transform": from_origin(500_000, 5_000_000, 10, 10)}
    shape = {"count": len(values), "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
    with rasterio.open(path, "w", **{"interleave": "pixel", **options, **shape, **profile}) as file:
        file.write(values)
        if names:
            file.descriptions = tuple(names)


def pixels(count: int, size: int, seed: int) -> np.ndarray:
    """Smooth fields in the units of Sentinel-2: `[C, size, size]` uint16, which compress as imagery does, about."""
    bands = SENSORS["sentinel2_l1c"].select(CHANNELS[:count])
    draws = np.random.default_rng(seed)
    coarse = np.repeat(np.repeat(draws.standard_normal((count, size // 8, size // 8)), 8, 1), 8, 2)
    values = np.array(bands.means)[:, None, None] + np.array(bands.stds)[:, None, None] * coarse
    return (values + 20 * draws.standard_normal(values.shape)).clip(1, 20_000).astype(np.uint16)


def make_folder(root: Path, files: int) -> Path:
    """EuroSAT's layout: classes, 13 bands, 64 pixels."""
    for i in range(files):
        write_geotiff(root / f"class{i % 10}" / f"class{i % 10}_{i}.tif", pixels(13, 64, i))
    return root


def make_scenes(root: Path, side: int) -> Path:
    """Two scenes of 13 bands, tiled and compressed as Cloud-Optimised GeoTIFFs are."""
    tiled = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate", "interleave": "band"}
    for i in range(2):
        write_geotiff(root / f"scene{i}.tif", pixels(13, side, i), CHANNELS, **tiled)
    return root


class Tar(IterableDataset):
    """Samples of one tar of `.npy` files per worker, in order; members are raw uint16."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __iter__(self) -> Iterator[torch.Tensor]:
        worker = get_worker_info()
        for path in self.paths if worker is None else self.paths[worker.id :: worker.num_workers]:
            with tarfile.open(path) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    yield torch.from_numpy(np.load(io.BytesIO(file.read())))


def make_tars(root: Path, samples: list[np.ndarray]) -> list[Path]:
    """Four tars."""
    paths = [root / f"{i}.tar" for i in range(4)]
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for i in range(number, len(samples), len(paths)):
                buffer = io.BytesIO()
                np.save(buffer, samples[i])
                info = tarfile.TarInfo(f"{i}.npy")
                info.size = buffer.tell()
                buffer.seek(0)
                tar.addfile(info, buffer)
    return paths


def make_litdata(root: Path, samples: list[np.ndarray]) -> Loader:
    """Chunks of litdata's own writer, read by its own dataset and loader."""
    from litdata.streaming import StreamingDataLoader, StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(root), chunk_bytes="16MB")
    for i, sample in enumerate(samples):
        writer[i] = {"image": torch.from_numpy(sample)}
    writer.done()
    writer.merge()

    def loader(workers: int) -> DataLoader:
        return StreamingDataLoader(StreamingDataset(str(root), shuffle=True), batch_size=64, num_workers=workers)

    return loader


def rate(loader: DataLoader, seconds: float) -> tuple[float, float]:
    """Images per second, and per second of this process's CPU time, over whole epochs after one that is not timed.

    The second is the rate of one core, whatever else the machine does; it means something without workers alone.
    """
    images, begin, cpu = 0, None, 0.0
    while begin is None or time.perf_counter() - begin < seconds:
        found = sum(len(batch["image"] if isinstance(batch, dict) else batch) for batch in loader)
        if begin is None:
            begin, cpu = time.perf_counter(), time.process_time()  # worker processes are running, files are cached
        else:
            images += found
    return images / (time.perf_counter() - begin), images / (time.process_time() - cpu)


def cases(work: Path, eurosat: str | None, scenes: str | None, files: int, side: int) -> Iterator[tuple[str, Loader]]:
    """Name and loader (of a number of workers) of everything that is compared."""
    bands = BandSelection(sensor="sentinel2_l1c")
    root = eurosat or str(make_folder(work / "files", files))

    def folder(workers: int) -> ImageFolderData:
        return ImageFolderData(root, bands=bands, channels=CHANNELS, batch_size=64, num_workers=workers)

    yield "files: GeoTIFF, 13 x 64 x 64", lambda workers: folder(workers).train_dataloader()
    pack = ["--data", "ImageFolderData", f"--data.root={root}", f"--data.channels=[{', '.join(CHANNELS)}]"]
    sensor = ["--data.bands.sensor", "sentinel2_l1c", "--data.num_workers", "0"]
    if cli.main(["pack", str(work / "pack"), *pack, *sensor]):
        raise SystemExit("xscale pack failed")

    def packed(workers: int, on_device: bool) -> DataLoader:
        options = {"batch_size": 64, "num_workers": workers, "cast_on_device": on_device}
        return PackedData(str(work / "pack"), **options).train_dataloader()  # type: ignore[arg-type]

    yield "xscale pack, float32", lambda workers: packed(workers, False)
    yield "xscale pack, uint16 to the device", lambda workers: packed(workers, True)
    dataset = PackedData(str(work / "pack"), num_workers=0, cast_on_device=True).train_dataloader().dataset
    samples = [dataset[i]["image"].numpy() for i in range(len(dataset))]  # type: ignore[arg-type]
    (work / "tar").mkdir()
    tars = make_tars(work / "tar", samples)
    yield "tar of arrays, uint16, in order", lambda workers: DataLoader(Tar(tars), batch_size=64, num_workers=workers)
    if find_spec("litdata"):
        (work / "litdata").mkdir()
        yield "litdata, uint16", make_litdata(work / "litdata", samples)
    place = scenes or str(make_scenes(work / "scenes", side))

    def patches(workers: int, **options: object) -> DataLoader:
        given = {"image_size": 64, "samples_per_epoch": 1024, "batch_size": 64, "num_workers": workers, **options}
        return SceneFolder(place, bands, **given).train_dataloader()  # type: ignore[arg-type]

    yield "scenes: in memory", lambda workers: patches(workers, cache_mb=100_000)
    yield "scenes: read by window", lambda workers: patches(workers, cache_mb=0, samples_per_epoch=256)
    yield "scenes: cache_dir", lambda workers: patches(workers, cache_mb=0, cache_dir=str(work / "cache"))


def main(argv: list[str] | None = None) -> int:
    """Time every case, print the table, write `input.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eurosat", help="folder of classes of 13-band GeoTIFFs, in EuroSAT's band order")
    parser.add_argument("--scenes", help="folder of Sentinel-2 scenes of 13 bands")
    parser.add_argument("--files", type=int, default=512, help="files to make without --eurosat")
    parser.add_argument("--side", type=int, default=2048, help="pixels of the scenes to make without --scenes")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="also timed with so many")
    parser.add_argument("--output", help="folder for input.json; benchmarks/results unless given")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, loader in cases(work, args.eurosat, args.scenes, args.files, args.side):
            found = {"per_core": rate(loader(0), args.seconds)[1]}
            found |= {f"{workers} workers": rate(loader(workers), args.seconds)[0] for workers in args.workers}
            figures[name] = found
            rows.append([name, *(f"{value:.0f}" for value in found.values())])
            print(*rows[-1], flush=True)
    print(common.table(["images/s", "per core", *(f"{workers} workers" for workers in args.workers)], rows))
    content: dict[str, object] = {"images_per_s": figures, "made": not args.eurosat, "scenes_made": not args.scenes}
    print("written:", common.write_result("input", torch.device("cpu"), content, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
