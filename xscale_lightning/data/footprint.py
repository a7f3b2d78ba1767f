"""One footprint for two pixel grids: where a crop of the coarse grid lies in the fine one, exactly.

MR (medium resolution) is the coarse image, HR (high resolution) the fine one. Crops are chosen on MR's pixel edges and
their edges are multiplied by one affine per pair, so both crops show the same ground: nothing is floored, and no half
pixel is lost. Coordinates are pixel *edges* (pixel i spans i to i + 1).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from xscale_lightning.data.geotiff import Grid, Raster

MAX_DENOMINATOR = 16
_EXACT = 0.02  # HR pixels over a whole image: less than decimal fractions in a header lose

Window = Callable[[int, int, int, int], tuple[np.ndarray, np.ndarray | None]]


class Misfit(Exception):
    """Two images that do not make a pair; says by how much they disagree."""


@dataclass(frozen=True)
class Placement:
    """The affine from MR pixel edges to HR pixel edges, per axis: `hr = offset + step * mr`."""

    row: Fraction | float
    """HR row edge of MR row edge 0."""
    col: Fraction | float
    """HR column edge of MR column edge 0."""
    step_y: Fraction | float
    """HR rows along one MR row."""
    step_x: Fraction | float
    """HR columns along one MR column."""

    @property
    def exact(self) -> bool:
        """Whether MR edges at multiples of `snap` lie on HR pixel edges, so that crops need no resampling."""
        steps = all(isinstance(step, Fraction) for step in (self.step_y, self.step_x))
        starts = all(isinstance(start, Fraction) and start.denominator == 1 for start in (self.row, self.col))
        return steps and starts

    @property
    def snap(self) -> int:
        """MR pixels from one pair of coinciding edges to the next; 1 where the ratio is a whole number."""
        steps = [step for step in (self.step_y, self.step_x) if isinstance(step, Fraction)]
        return math.lcm(*(step.denominator for step in steps)) if self.exact else 1

    def window(self, row: int, col: int, height: int, width: int) -> tuple[float, float, float, float]:
        """HR window (row, column, height, width) of the same ground as an MR window."""
        return (
            float(self.row + self.step_y * row),
            float(self.col + self.step_x * col),
            float(self.step_y * height),
            float(self.step_x * width),
        )


@dataclass(frozen=True)
class Footprint:
    """The ground that both images of a pair show, and how far their own extents are apart."""

    grid: Grid
    """MR's grid, cut to the shared ground."""
    placement: Placement
    """From the pixel edges of `grid` to those of HR's grid."""
    disagreement: float
    """Largest distance between corresponding edges of the two extents, in MR pixels."""
    shared: float
    """Share of the smaller extent that both show, 0 to 1."""


def footprint(mr: Grid, hr: Grid, georeferenced: bool) -> Footprint:
    """Find the ground that both grids cover.

    Args:
        mr: grid of the coarse image.
        hr: grid of the fine image, in the same coordinate reference system.
        georeferenced: whether the grids' coordinates mean anything; without them both are taken to show the same
            ground, from corner to corner.

    Raises:
        Misfit: if they share no MR pixel, or HR is not finer than MR; with the numbers.
    """
    if not georeferenced:
        ratio_y, ratio_x = Fraction(hr.height, mr.height), Fraction(hr.width, mr.width)
        if ratio_y != ratio_x:
            raise Misfit(
                f"HR has {hr.height}x{hr.width} pixels and MR {mr.height}x{mr.width}, {float(ratio_y):g} times in "
                f"height and {float(ratio_x):g} times in width: not the same ground (no georeference says where)"
            )
        _require_finer(float(ratio_y))
        corner = Placement(Fraction(0), Fraction(0), ratio_y, ratio_x)
        return Footprint(replace(mr, snap=math.lcm(mr.snap, corner.snap)), corner, 0.0, 1.0)
    edges = np.array(_edges(hr)) - np.array(_edges(mr))
    apart = float(np.abs(edges / [mr.dx, mr.dy, mr.dx, mr.dy]).max())
    overlap = [
        min(mr.left + mr.width * mr.dx, hr.left + hr.width * hr.dx) - max(mr.left, hr.left),
        min(mr.top, hr.top) - max(mr.top - mr.height * mr.dy, hr.top - hr.height * hr.dy),
    ]
    if min(overlap) <= 0:
        gap = max(0.0, -overlap[0] / mr.dx, -overlap[1] / mr.dy) * mr.gsd
        raise Misfit(f"HR and MR share no ground: they lie {gap:.6g} m apart")
    _require_finer(mr.dx / hr.dx)
    smaller = min(mr.width * mr.dx * mr.height * mr.dy, hr.width * hr.dx * hr.height * hr.dy)
    row, step_y = _rational((hr.top - mr.top) / hr.dy, mr.dy / hr.dy, hr.height)
    col, step_x = _rational((mr.left - hr.left) / hr.dx, mr.dx / hr.dx, hr.width)
    return replace(
        _cut(mr, hr, Placement(row, col, step_y, step_x)), disagreement=apart, shared=overlap[0] * overlap[1] / smaller
    )


def _edges(grid: Grid) -> tuple[float, float, float, float]:
    return grid.left, grid.top, grid.left + grid.width * grid.dx, grid.top - grid.height * grid.dy


def _require_finer(ratio: float) -> None:
    if ratio < 1 - 1e-6:
        raise Misfit(f"HR is coarser than MR ({1 / ratio:g} times); swap the two")


def _rational(offset: float, step: float, length: int) -> tuple[Fraction | float, Fraction | float]:
    """Offset and step as fractions, where that is within `_EXACT` pixels all over the image."""
    near = Fraction(step).limit_denominator(MAX_DENOMINATOR)
    if abs(float(near) - step) / step * length > _EXACT:
        return offset, step
    # MR edges come to lie at multiples of 1 / denominator of an HR pixel from the first: the offset must be one too.
    start = Fraction(round(offset * near.denominator), near.denominator)
    return (start, near) if abs(float(start) - offset) <= _EXACT else (offset, step)


def _cut(mr: Grid, hr: Grid, placement: Placement) -> Footprint:
    """Cut MR to whole pixels inside HR, starting where both grids have an edge (and the bands of MR have one)."""
    first_row, rows = _inside(placement.row, placement.step_y, mr.height, hr.height, mr.snap)
    first_col, cols = _inside(placement.col, placement.step_x, mr.width, hr.width, mr.snap)
    if rows < 1 or cols < 1:
        raise Misfit("HR and MR share less than one MR pixel")
    moved = replace(
        placement,
        row=placement.row + placement.step_y * first_row,
        col=placement.col + placement.step_x * first_col,
    )
    grid = replace(
        mr,
        left=mr.left + first_col * mr.dx,
        top=mr.top - first_row * mr.dy,
        width=cols,
        height=rows,
        snap=math.lcm(mr.snap, moved.snap),
    )
    return Footprint(grid, moved, 0.0, 1.0)


def _inside(
    offset: Fraction | float, step: Fraction | float, length: int, hr_length: int, snap: int
) -> tuple[int, int]:
    """First MR pixel inside HR, and the number of them."""
    slack = 0 if isinstance(offset, Fraction) else 1e-6
    first = max(0, math.ceil(-offset / step - slack))
    first = -(-first // snap) * snap
    if isinstance(offset, Fraction) and isinstance(step, Fraction):
        for candidate in range(first, first + snap * step.denominator, snap):
            if (offset + step * candidate).denominator == 1:
                first = candidate
                break
    last = min(length, math.floor((hr_length - offset) / step + slack))
    return first, last - first


def read_resampled(
    read: Window, extent: tuple[int, int], window: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Read a window with edges between pixels, at a size of its own, by one affine.

    Every new pixel is the mean over its area where it is as large as an old one or larger, and interpolated linearly
    between pixel centres where it is smaller; both keep the footprint.

    Args:
        read: reads (row, column, height, width) in whole pixels: values and validity `[C, h, w]`.
        extent: (height, width) of what can be read.
        window: (row, column, height, width) in pixel edges, any fractions, inside the extent.
        size: (height, width) of the result in pixels.

    Returns:
        values `[C, *size]` float32 and their validity (a pixel that any invalid one contributes to is invalid).
    """
    rows, row_weights = _weights(window[0], window[2], size[0], extent[0])
    cols, col_weights = _weights(window[1], window[3], size[1], extent[1])
    values, valid = read(rows[0], cols[0], rows[1], cols[1])
    if valid is not None:
        values = np.where(valid, values, 0)
        share = row_weights @ valid.astype(np.float32) @ col_weights.T
        valid = share > 1 - 1e-4
    return (row_weights @ values.astype(np.float32) @ col_weights.T).astype(np.float32), valid


def _weights(start: float, length: float, count: int, limit: int) -> tuple[tuple[int, int], np.ndarray]:
    """Old pixels (first, number) that `count` new ones are made of, and their weights `[count, number]`."""
    step = length / count
    if step >= 1:
        edges = start + step * np.arange(count + 1)
        first, last = max(0, math.floor(start + 1e-9)), min(limit, math.ceil(start + length - 1e-9))
        pixel = np.arange(first, last)
        low, high = np.maximum.outer(edges[:-1], pixel), np.minimum.outer(edges[1:], pixel + 1)
        weights = np.clip(high - low, 0, None)
    else:
        centre = np.clip(start + step * (np.arange(count) + 0.5) - 0.5, 0, limit - 1)
        first, last = math.floor(centre[0]), min(limit, math.floor(centre[-1]) + 2)
        weights = np.clip(1 - np.abs(centre[:, None] - np.arange(first, last)), 0, None)
    weights = weights / weights.sum(axis=1, keepdims=True)
    return (first, last - first), weights.astype(np.float32)


def same_reference(mr: Raster, hr: Raster) -> bool:
    """Whether both rasters say where they lie; False if neither does.

    Raises:
        Misfit: if only one does, or in different coordinate reference systems.
    """
    if mr.crs == hr.crs:
        return mr.crs is not None
    raise Misfit(f"HR has the coordinate system {hr.crs} and MR {mr.crs}; warp one to the other's")
