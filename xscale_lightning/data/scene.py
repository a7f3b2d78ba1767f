"""One scene: the chosen bands on a common grid, in memory, memory-mapped, or read by window."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from xscale_lightning.data.geotiff import Grid, RasterReader, Source
from xscale_lightning.data.scene_cache import mapped


class Scene:
    """The chosen bands of one scene on their common grid; held in memory after `load`, read by window otherwise."""

    def __init__(self, name: str, sources: Sequence[Source], grid: Grid, reader: RasterReader) -> None:
        """Describe the scene; nothing is read yet."""
        self.name, self.sources, self.grid, self.reader = name, tuple(sources), grid, reader
        self.labels: np.ndarray | None = None
        """`[H / snap, W / snap]` class of the patch that starts at each snapped origin; None without labels."""
        self.classes: np.ndarray | None = None
        """`[H, W]` class of every pixel; None without masks."""
        self._memory: tuple[np.ndarray, np.ndarray | None] | None = None

    @property
    def nbytes(self) -> int:
        """Size in memory, in bytes; the files' type is kept (uint16 for most products)."""
        itemsize = max(np.dtype(source.raster.dtype).itemsize for source in self.sources)
        return len(self.sources) * self.grid.height * self.grid.width * min(itemsize, 4)

    @property
    def masked(self) -> bool:
        """Whether pixels can be without data."""
        return self.reader.nodata is not None or any(source.raster.masked for source in self.sources)

    @property
    def held(self) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Pixels and validity as `read` returns them, of the whole scene; None unless it is held in memory."""
        return self._memory

    def load(self, cache_dir: str | None = None) -> None:
        """Read all of it into memory, or map the decoded copy in `cache_dir`, which is made if there is none.

        Raises:
            UnreadableFile: if any part of a file cannot be read.
            UserError: if the copy cannot be written.
        """
        window = (self.sources, self.grid, 0, 0, self.grid.height, self.grid.width)
        read = partial(self.reader.read, *window)
        self._memory = read() if cache_dir is None else mapped(cache_dir, (*window[:2], self.reader.nodata), read)

    def check(self, height: int, width: int) -> None:
        """Read the first and the last patch, which finds missing and truncated files without reading all of them.

        Raises:
            UnreadableFile: if one of them cannot be read.
        """
        self.read(0, 0, height, width)
        self.read(self.grid.height - height, self.grid.width - width, height, width)

    def read(self, row: int, col: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Pixels `[C, height, width]` in the files' type, and their validity (bool, same shape; None: all valid).

        Raises:
            UnreadableFile: if this part of a file cannot be read.
        """
        if self._memory is None:
            return self.reader.read(self.sources, self.grid, row, col, height, width)
        pixels, valid = self._memory
        window = (slice(None), slice(row, row + height), slice(col, col + width))
        return pixels[window], None if valid is None else valid[window]
