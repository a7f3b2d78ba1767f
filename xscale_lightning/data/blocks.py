"""Geographic splits: which patches of which scenes belong to training, validation and test.

Scenes are cut into rectangular blocks and every block belongs to one split. A patch belongs to a split if all its
pixels do, so patches of different splits never share a pixel, however they were drawn. All positions are pixels of the
scene's grid; patch origins are multiples of `grid.snap`, the edges of the coarsest band's pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xscale_lightning.data.geotiff import Grid
from xscale_lightning.errors import UserError

AUTOMATIC_BLOCKS = 20
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class BlockMap:
    """The blocks of one scene and the split each belongs to."""

    rows: np.ndarray
    """`[R + 1]` row edges."""
    cols: np.ndarray
    """`[K + 1]` column edges."""
    owner: np.ndarray
    """`[R, K]` 0 train, 1 val, 2 test."""
    snap: int


def _edges(length: int, block: int, snap: int) -> np.ndarray:
    """Edges of blocks of about equal size, none smaller than `block` unless there is only one."""
    units = length // snap
    count = max(1, units // -(-block // snap))
    edges = np.arange(count + 1) * units // count * snap
    edges[-1] = length
    return edges


def _block_edges(grids: Sequence[Grid], size: tuple[int, int], block: int) -> list[tuple[np.ndarray, np.ndarray]]:
    height, width = (max(block, side) for side in size)
    return [(_edges(g.height, height, g.snap), _edges(g.width, width, g.snap)) for g in grids]


def _automatic_edges(grids: Sequence[Grid], size: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Largest blocks of 8, 4, 3, 2 or 1 patches that give enough of them for a split."""
    for patches in (8, 4, 3, 2, 1):
        edges = _block_edges(grids, size, patches * max(size))
        if sum((len(rows) - 1) * (len(cols) - 1) for rows, cols in edges) >= AUTOMATIC_BLOCKS:
            return edges
    return _block_edges(grids, size, 1)


def split_blocks(
    grids: Sequence[Grid],
    size: tuple[int, int],
    fractions: tuple[float, float, float],
    block: int | None = None,
    seed: int = 0,
) -> list[BlockMap]:
    """Cut the scenes into blocks of at least `size` and deal these out at random.

    Args:
        grids: one per scene, each at least as large as a patch.
        size: (height, width) of a patch.
        fractions: shares of the blocks for train, val and test.
        block: side of a block in pixels; None chooses it so that there are enough blocks to deal out.
        seed: of the dealing; the same seed, scenes and sizes give the same split.

    Raises:
        UserError: if there are fewer blocks than splits.
    """
    edges = _automatic_edges(grids, size) if block is None else _block_edges(grids, size, block)
    shapes = [(len(rows) - 1, len(cols) - 1) for rows, cols in edges]
    total = sum(r * c for r, c in shapes)
    wanted = [name for name, fraction in zip(_SPLITS, fractions, strict=True) if fraction > 0]
    if total < len(wanted):
        raise UserError(
            f"data.fractions: the imagery holds {total} separate block(s) of {size[0]}x{size[1]} pixels, too few for "
            f"{', '.join(wanted)}; make data.image_size or data.block_size smaller, or set the other fractions to 0."
        )
    counts = [max(1, round(fraction * total)) if fraction > 0 else 0 for fraction in fractions[1:]]
    while sum(counts) >= total:  # training keeps at least one block
        counts[counts.index(max(counts))] -= 1
    dealt = np.zeros(total, np.int8)
    dealt[: counts[0]] = 1
    dealt[counts[0] : sum(counts)] = 2
    dealt = np.random.default_rng(seed).permutation(dealt)
    maps, start = [], 0
    for grid, (rows, cols), (r, c) in zip(grids, edges, shapes, strict=True):
        maps.append(BlockMap(rows, cols, dealt[start : start + r * c].reshape(r, c), grid.snap))
        start += r * c
    return maps


@dataclass(frozen=True)
class OriginCells:
    """All patch origins of a split as rectangles of the snapping grid, for drawing uniformly among them."""

    cells: np.ndarray
    """`[n, 5]` int64: scene, first row, rows, first column, columns; rows and columns are counted in snaps."""
    cumulative: np.ndarray
    """`[n]` int64: running total of the number of origins."""
    snap: np.ndarray
    """`[scenes]` int64: pixels per snap."""

    @property
    def total(self) -> int:
        """Number of origins."""
        return int(self.cumulative[-1]) if len(self.cumulative) else 0

    def locate(self, number: np.ndarray) -> np.ndarray:
        """Origins `[B, 3]` (scene, row, column in pixels) of origin numbers `[B]` in [0, total)."""
        cell = np.searchsorted(self.cumulative, number, side="right")
        scene, row, rows, col, cols = self.cells[cell].T
        within = number - (self.cumulative[cell] - rows * cols)
        snap = self.snap[scene]
        return np.stack([scene, (row + within // cols) * snap, (col + within % cols) * snap], axis=1)


def origin_cells(maps: Sequence[BlockMap], split: int, size: tuple[int, int]) -> OriginCells:
    """Find all origins from which a patch stays inside the split, also across the border of two of its blocks."""
    cells = []
    for scene, blocks in enumerate(maps):
        own = np.pad(blocks.owner == split, ((0, 1), (0, 1)))  # nothing beyond the last block
        for r, c in np.argwhere(own[:-1, :-1]):
            (r0, r1), (c0, c1) = blocks.rows[r : r + 2], blocks.cols[c : c + 2]
            right, down, corner = own[r, c + 1], own[r + 1, c], own[r + 1, c + 1]
            if right and down and not corner:  # may leave the block to one side, not to both
                down = False
            last_row = r1 - 1 if down else r1 - size[0]
            last_col = c1 - 1 if right else c1 - size[1]
            first = r0 // blocks.snap, c0 // blocks.snap
            count = last_row // blocks.snap - first[0] + 1, last_col // blocks.snap - first[1] + 1
            if min(count) > 0:
                cells.append((scene, first[0], count[0], first[1], count[1]))
    table = np.array(cells, np.int64).reshape(-1, 5)
    return OriginCells(table, np.cumsum(table[:, 2] * table[:, 4]), np.array([m.snap for m in maps], np.int64))


def fixed_origins(maps: Sequence[BlockMap], split: int, size: tuple[int, int], stride: int) -> np.ndarray:
    """Origins `[n, 3]` (scene, row, column) of a regular grid inside each block of the split, block by block."""
    origins = []
    for scene, blocks in enumerate(maps):
        step = -(-stride // blocks.snap) * blocks.snap
        for r, c in np.argwhere(blocks.owner == split):
            rows = range(blocks.rows[r], blocks.rows[r + 1] - size[0] + 1, step)
            cols = range(blocks.cols[c], blocks.cols[c + 1] - size[1] + 1, step)
            origins += [(scene, row, col) for row in rows for col in cols]
    return np.array(origins, np.int64).reshape(-1, 3)
