"""What `xscale doctor --data PackedData` looks at: every file of a pack, then every sample of whole files."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from xscale_lightning.data.damage import without_path
from xscale_lightning.data.inspection import Finding, check_sample
from xscale_lightning.data.packed import IMAGES, PackedData
from xscale_lightning.data.shards import Column, Shard, file_hash, open_column
from xscale_lightning.errors import UserError


def pack_findings(data: PackedData) -> Iterator[tuple[Finding, partial[Finding]]]:
    """Files and samples of a pack, each with what looks at it."""
    for split, shards in data.splits.items():
        for shard in shards:
            for key, column in shard.columns.items():
                file = Finding(str(Path(data.root, column.file)), group=f"{split} file")
                yield file, partial(_check_file, file, data.root, shard, key)
            yield from _samples(data.root, split, shard)


def _check_file(finding: Finding, root: str, shard: Shard, key: str) -> Finding:
    column = shard.columns[key]
    if problem := _size_problem(root, column):
        finding.kind, finding.detail = ("missing", problem) if "no such" in problem else ("truncated", problem)
        return finding
    try:
        open_column(root, shard, key)
        if file_hash(Path(root, column.file)) != column.sha256:
            finding.kind, finding.detail = "checksum", "it has another SHA-256 than when it was written"
    except (UserError, OSError) as error:
        finding.kind, finding.detail = "unreadable", without_path(str(error), finding.path)
    return finding


def _size_problem(root: str, column: Column) -> str:
    path = Path(root, column.file)
    if not path.is_file():
        return "there is no such file"
    size = path.stat().st_size
    return "" if size == column.bytes else f"it has {size} bytes and should have {column.bytes}"


def _samples(root: str, split: str, shard: Shard) -> Iterator[tuple[Finding, partial[Finding]]]:
    """The samples of a shard whose images can be opened; else the finding of the file says it all."""
    keys = [key for key in (*IMAGES, "image2", "file") if key in shard.columns]
    try:
        maps = {key: open_column(root, shard, key) for key in keys if not _size_problem(root, shard.columns[key])}
    except (UserError, OSError):
        return
    if "image" not in maps:
        return
    names = maps.pop("file", None)
    for row in range(shard.samples):
        own = f" ({names[row].decode(errors='replace')})" if names is not None and names.dtype.kind == "S" else ""
        sample = Finding(f"{Path(root, shard.columns['image'].file)} sample {row}{own}", group=split)
        yield sample, partial(_check_sample, sample, maps, row)


def _check_sample(finding: Finding, maps: dict[str, np.ndarray], row: int) -> Finding:
    return check_sample(finding, {key: values[row] for key, values in maps.items()})
