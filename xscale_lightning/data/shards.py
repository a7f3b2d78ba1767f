"""Shards of samples on disk: every column of a shard is one plain `.npy` file, memory-mapped when it is read.

A pack is a folder with `pack.json` (what the samples are, and for every shard the size and SHA-256 of its files) and
files such as `train-00000.image.npy` `[n, C, H, W]`. Values are stored in the narrowest type that gives every bit back:
uint8, uint16 or int16 where all values are whole numbers in its range, else the type they came in. Nothing is pickled.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from xscale_lightning.errors import UserError
from xscale_lightning.files import told, whole, write_bytes
from xscale_lightning.locks import lock_file
from xscale_lightning.opening import read_json

INDEX = "pack.json"
FORMAT = 1
NARROW = (np.uint8, np.uint16, np.int16)


@dataclass(frozen=True)
class Column:
    """One file of a shard."""

    file: str
    bytes: int
    sha256: str
    stored: str
    """Type in the file."""
    delivered: str
    """Type of the samples."""
    shape: tuple[int, ...]
    """Of one sample."""


@dataclass(frozen=True)
class Shard:
    """Some samples of a split, in order."""

    samples: int
    batches: int
    """Read from the source for it; those of a source that leaves out damaged samples can be smaller than others."""
    columns: dict[str, Column]

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Shard":
        """Inverse of `asdict`.

        Raises:
            KeyError, TypeError, ValueError: it is no such record, or names a file elsewhere.
        """
        columns = {}
        for name, column in record["columns"].items():
            if Path(column["file"]).name != column["file"]:
                raise ValueError(f"file {column['file']!r} is not inside the pack")
            columns[name] = made = Column(**{**column, "shape": tuple(column["shape"])})
            text = made.delivered == "str"
            if text != (np.dtype(made.stored).kind == "S") or not (text or np.dtype(made.delivered).kind in "biuf"):
                raise ValueError(f"type {str(made.delivered)[:40]!r} of {str(name)[:40]!r} is none that a sample has")
            if not 0 < int(record["samples"]) <= made.bytes:
                raise ValueError(f"{str(record['samples'])[:40]} samples in {made.bytes} bytes")
        if "image" not in columns:
            raise ValueError("its samples have no image")
        return cls(int(record["samples"]), int(record["batches"]), columns)


def narrowest(values: np.ndarray) -> np.ndarray:
    """The same values in the narrowest type that gives back every bit of them, else `values` themselves."""
    if values.dtype.kind not in "iuf" or not values.size:
        return values
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        return values
    for kind in NARROW:
        limits = np.iinfo(kind)
        if np.dtype(kind).itemsize < values.dtype.itemsize and low >= limits.min and high <= limits.max:
            narrow = values.astype(kind)
            if narrow.astype(values.dtype).tobytes() == values.tobytes():  # not -0.0 for 0.0 either
                return narrow
    return values


def write_shard(folder: Path, name: str, parts: Sequence[Mapping[str, np.ndarray]]) -> Shard:
    """Write one shard, its record `NAME.json` last: a shard with a record is whole.

    Args:
        folder: of the pack.
        name: of the shard, for example `train-00000`.
        parts: batches of columns `[n, ...]` with the same names and sample shapes; `{}` where nothing could be read.

    Raises:
        UserError: the batches differ in columns or shapes, or the files cannot be written.
    """
    columns = {}
    read, parts = len(parts), [part for part in parts if part]
    for key in parts[0]:
        shapes = {part[key].shape[1:] if key in part else None for part in parts}
        if len(shapes) > 1:
            raise UserError(f"--data: '{key}' has different shapes ({shapes}); set --data.image_size to make them one.")
        values = np.concatenate([narrowest(part[key]) for part in parts])
        delivered = parts[0][key].dtype.str if parts[0][key].dtype.kind != "S" else "str"
        columns[key] = _write_array(folder, f"{name}.{key}.npy", values, delivered)
    shard = Shard(sum(len(next(iter(part.values()))) for part in parts), read, columns)
    write_text(folder / f"{name}.json", json.dumps(asdict(shard)))
    return shard


def _write_array(folder: Path, file: str, values: np.ndarray, delivered: str) -> Column:
    path = folder / file
    write_array(path, values)
    size, digest = path.stat().st_size, file_hash(path)
    return Column(file, size, digest, values.dtype.str, delivered, values.shape[1:])


def write_array(path: Path, values: np.ndarray) -> None:
    """Write a `.npy` file whole or not at all; it is locked while it is written.

    Raises:
        UserError: it cannot be written.
    """
    with told(path), whole(path) as part, part.open("wb") as file:
        lock_file(file.fileno())
        # Handed the file itself, NumPy would write past Python and lose the system's reason, such as a full disk.
        np.save(SimpleNamespace(write=file.write), values, allow_pickle=False)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())  # under the lock: it may take minutes


def write_text(path: Path, content: str) -> None:
    """Write a file of text whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    with told(path):
        write_bytes(path, content.encode())


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_index(root: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, list[Shard]]]:
    """What a pack says of itself, and the shards of every split.

    Raises:
        UserError: it is no pack, of another format, or its index is damaged.
    """
    path = Path(root, INDEX)
    if not path.is_file():
        raise UserError(f"data.root: '{root}' is no pack (it has no {INDEX}); `xscale pack` writes one.")
    try:
        content = read_json(path, INDEX)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        splits = {name: [Shard.from_dict(shard) for shard in shards] for name, shards in content["splits"].items()}
        for shards in splits.values():
            if len({tuple((key, c.shape) for key, c in shard.columns.items()) for shard in shards}) != 1:
                raise ValueError("its shards have different columns or shapes")
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        problem = " ".join(str(error).split())[:120]
    else:
        return content, splits
    raise UserError(f"data.root: '{path}' is damaged or of another version ({problem}); write the pack again.")


def check_shards(root: str | os.PathLike[str], shards: Sequence[Shard], hashes: bool) -> None:
    """Compare the size, and if asked the SHA-256, of every file with the index.

    Raises:
        UserError: naming the first file that differs.
    """
    for shard in shards:
        for column in shard.columns.values():
            path = Path(root, column.file)
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                problem = "is missing"
            elif size != column.bytes:
                problem = f"has {size} bytes and should have {column.bytes}"
            elif hashes and file_hash(path) != column.sha256:
                problem = "has another SHA-256 than when it was written"
            else:
                continue
            raise UserError(f"data.root: '{path}' {problem}; copy the pack again, or write it with `xscale pack`.")


def open_column(root: str | os.PathLike[str], shard: Shard, key: str) -> np.ndarray:
    """Memory-map one column `[n, ...]`.

    Raises:
        UserError: the file's header is not what the index says.
    """
    column = shard.columns[key]
    path = Path(root, column.file)
    try:
        values = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        found = (values.dtype.str, values.shape)
        problem = "" if found == (column.stored, (shard.samples, *column.shape)) else f"it holds {found}"
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())[:120]
    else:
        if not problem:
            return values
    raise UserError(f"data.root: '{path}' is damaged ({problem}); write the pack again.")
