"""Position embeddings in the image plane: fixed 2-D sin-cos (MAE), GSD-scaled (Scale-MAE), learned tables that resize.

All of them are computed for the grid at hand, so any image size works and no size is baked into a checkpoint. A grid is
given as `(H, W)` or `(G, H, W)`: what stands before the last two is the spectral positions' affair.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xscale_lightning.errors import UserError
from xscale_lightning.models.tokens import gather


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of `positions [...]` at `dim / 2` frequencies `10000 ** (-k / (dim / 2))` -> `[..., dim]`.

    Source: Vaswani et al. 2017, section 3.5, in the order sines-then-cosines of MAE.
    """
    half = dim // 2
    omega = 10000.0 ** (-torch.arange(half, dtype=positions.dtype, device=positions.device) / half)
    angles = positions.unsqueeze(-1) * omega
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def check_width(dim: int) -> None:
    """Refuse a width that sine and cosine of two coordinates do not fill.

    Raises:
        UserError: it is no multiple of 4.
    """
    if dim % 4:
        raise UserError(f"sin-cos positions need a width (backbone.dim) that is a multiple of 4, got {dim}.")


def sincos_2d(dim: int, rows: Tensor, columns: Tensor) -> Tensor:
    """2-D sin-cos table: the column coordinate fills the first half of the channels, the row coordinate the second.

    Args:
        dim: number of channels, a multiple of 4.
        rows: row coordinates `[..., H]`.
        columns: column coordinates `[..., W]`.

    Returns:
        `[..., H * W, dim]` in row-major order, in the type of the coordinates.

    Source: He et al. 2022 (MAE), whose published tables have this order.

    Raises:
        UserError: `dim` is not a multiple of 4.
    """
    check_width(dim)
    height, width = rows.shape[-1], columns.shape[-1]
    x = sincos_1d(columns, dim // 2).unsqueeze(-3).expand(*columns.shape[:-1], height, width, dim // 2)
    y = sincos_1d(rows, dim // 2).unsqueeze(-2).expand(*rows.shape[:-1], height, width, dim // 2)
    return torch.cat([x, y], dim=-1).flatten(-3, -2)  # [..., H, W, dim] -> [..., H * W, dim]


def resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize a spatial table `[1, h * w, D]` from grid `old` to grid `new`, bicubic, antialiased -> `[1, H * W, D]`."""
    if old == new:
        return table
    grid = table.reshape(1, *old, -1).permute(0, 3, 1, 2)  # [1, D, h, w]
    grid = F.interpolate(grid.float(), size=new, mode="bicubic", antialias=True, align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(table.dtype)


def take_positions(positions: Tensor, ids: Tensor) -> Tensor:
    """Positions `[1 or B, N, D]` at `ids [B, K]` -> `[B, K, D]`."""
    if len(positions) == 1:  # as an embedding: its gradient is summed into N rows, not into B x N of them
        table = positions[0].to(torch.promote_types(positions.dtype, torch.float32))  # summed in float32 or better
        return F.embedding(ids, table).to(positions.dtype)
    return gather(positions, ids)


def inside_parents(coordinates: Tensor, ratio: int) -> Tensor:
    """Coordinates on a grid `ratio` times finer in steps of the coarser one: children lie around their parent."""
    return (coordinates + 0.5) / ratio - 0.5 if ratio > 1 else coordinates


@contextmanager
def finer_positions(encoder: nn.Module, ratio: int) -> Iterator[None]:
    """Inside, `encoder` takes every grid for one that is `ratio` times finer and places it by the coarser one.

    Learned tables need no telling: resized to the finer grid, they put children into their parents anyway.
    """
    fixed = [m for m in encoder.modules() if isinstance(m, (SinCosPositions, GSDPositions))]
    for positions in fixed:
        positions.finer = ratio
    try:
        yield
    finally:
        for positions in fixed:
            positions.finer = 1


class SinCosPositions(nn.Module):
    """Fixed 2-D sin-cos positions at the integer patch coordinates (MAE), computed once per grid and kept.

    The values are rounded to float32, as in every published table, so float64 runs reproduce published numbers too.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.finer = 1  # see `finer_positions`
        self._cache: dict[tuple, Tensor] = {}

    def forward(self, grid: tuple[int, ...], like: Tensor, gsd: Tensor | None = None) -> Tensor:
        """Positions `[1, H * W, D]` for `grid = (..., H, W)`, in type and on the device of `like`; `gsd` is ignored."""
        key = (*grid[-2:], self.finer, like.dtype, like.device)
        if key not in self._cache:
            height, width = (self.coordinates(n) for n in grid[-2:])
            self._cache[key] = sincos_2d(self.dim, height, width).float().to(like).unsqueeze(0)
        return self._cache[key]

    def coordinates(self, count: int) -> Tensor:
        """Coordinates `[count]` along one axis."""
        return inside_parents(torch.arange(count, dtype=torch.float64), self.finer)


class StretchedPositions(SinCosPositions):
    """Sin-cos positions at n coordinates from 0 to n, both ends included: neighbours are n / (n - 1) apart.

    Source: Wei et al. 2024 (LatentMIM), published code.
    """

    def coordinates(self, count: int) -> Tensor:
        """Coordinates `[count]` along one axis."""
        parents = count // self.finer
        return super().coordinates(count) * (parents / max(parents - 1, 1))


class GSDPositions(nn.Module):
    """Sin-cos positions scaled by the ground sample distance: `position * gsd / reference_gsd`.

    Source: Reed et al. 2023 (Scale-MAE), GSD positional encoding: a metre on the ground is the same step in the code at
    every scale.
    """

    def __init__(self, dim: int, reference_gsd: float) -> None:
        super().__init__()
        if not reference_gsd > 0:
            raise UserError(f"reference_gsd must be a positive number of metres per pixel, got {reference_gsd}.")
        self.dim = dim
        self.reference_gsd = reference_gsd
        self.finer = 1  # see `finer_positions`

    def forward(self, grid: tuple[int, ...], like: Tensor, gsd: Tensor | None = None) -> Tensor:
        """Positions `[B, H * W, D]` for `grid = (..., H, W)` and `gsd [B]` in metres per pixel.

        Raises:
            UserError: the batch has no `gsd`.
        """
        if gsd is None:
            raise UserError("position 'gsd' needs batch['gsd'] (metres per pixel): let the data module deliver it.")
        scale = (gsd.double() * self.finer / self.reference_gsd).unsqueeze(-1)  # [B, 1]
        steps = (torch.arange(n, dtype=torch.float64, device=gsd.device) for n in grid[-2:])
        rows, columns = (inside_parents(step, self.finer) * scale for step in steps)
        return sincos_2d(self.dim, rows, columns).to(like)


class LearnedPositions(nn.Module):
    """A learned table made for one grid and resized (bicubic) to any other."""

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.zeros(1, math.prod(grid), dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, grid: tuple[int, ...], like: Tensor, gsd: Tensor | None = None) -> Tensor:
        """Positions `[1, H * W, D]` for `grid = (..., H, W)`; `gsd` is ignored."""
        return resize_table(self.table, self.grid, (grid[-2], grid[-1])).to(like.dtype)

    def adapt(self, table: Tensor) -> Tensor:
        """The table `[1, n, D]` of another, square grid resized (bicubic) to this module's.

        Raises:
            UserError: n is no square, so the other grid is not known.
        """
        side = math.isqrt(table.shape[1])
        if table.shape[1] != self.table.shape[1] and side * side != table.shape[1]:
            raise UserError(f"a position table of {table.shape[1]} places belongs to no square grid: not resized.")
        return table if table.shape[1] == self.table.shape[1] else resize_table(table, (side, side), self.grid)
