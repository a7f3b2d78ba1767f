"""Positions of spectral cubes `(G, H, W)`: a part for the place in the image and one for the place in the spectrum."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xscale_lightning.errors import UserError
from xscale_lightning.models.pos_embed import sincos_1d

KNOTS, SHORTEST, LONGEST = 256, 0.3, 15.0  # um: from the ultraviolet to the thermal infrared


class SpectralPositions(nn.Module):
    """Separable positions: spatial plus spectral, the latter constant over the image.

    Args:
        spatial: module of `pos_embed`, learned in the paper.
        spectral: one of those below, learned in the paper.

    Source: Li et al. 2024 (S2MAE), separable learnable positions.
    """

    def __init__(self, spatial: nn.Module, spectral: nn.Module) -> None:
        super().__init__()
        self.spatial, self.spectral = spatial, spectral

    def forward(self, grid: tuple[int, ...], like: Tensor, gsd: Tensor | None = None) -> Tensor:
        """Positions `[1 or B, G * H * W, D]` for `grid = (G, H, W)`, group slowest."""
        spatial = self.spatial(grid, like=like, gsd=gsd)  # [1 or B, H * W, D]
        spectral = self.spectral(grid[0], like=like)  # [1, G, D]
        return (spatial.unsqueeze(1) + spectral.unsqueeze(2)).flatten(1, 2)  # [., G, H * W, D] -> [., G * H * W, D]


class LearnedSpectral(nn.Module):
    """One learned vector per spectral group, resized (linearly) from another number of groups when loaded."""

    def __init__(self, dim: int, groups: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, groups, dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, groups: int, like: Tensor) -> Tensor:
        """The table `[1, G, D]`."""
        return self.table.to(like.dtype)

    def adapt(self, table: Tensor) -> Tensor:
        """The table `[1, n, D]` of another number of groups, resized along the spectrum.

        First group stays first and last stays last, since both spectra are taken to span the same range.
        """
        groups = self.table.shape[1]
        if table.shape[1] == groups:
            return table
        resized = F.interpolate(table.float().mT, size=groups, mode="linear", align_corners=True)
        return resized.mT.to(table.dtype)


class _SinCosTable(nn.Module):
    """Fixed sin-cos of 0, 1, 2 ..., rounded to float32 as published tables are, and kept."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self._cache: dict[tuple, Tensor] = {}

    def table(self, count: int, like: Tensor) -> Tensor:
        """Positions `[1, count, D]` in the type and on the device of `like`."""
        key = (count, like.dtype, like.device)
        if key not in self._cache:
            numbers = torch.arange(count, dtype=torch.float64)
            self._cache[key] = sincos_1d(numbers, self.dim).float().to(like).unsqueeze(0)
        return self._cache[key]


class SinCosSpectral(_SinCosTable):
    """Fixed sin-cos of the group's number (an ablation of the paper)."""

    def forward(self, groups: int, like: Tensor) -> Tensor:
        """Positions `[1, G, D]`."""
        return self.table(groups, like)


class JointSinCos(_SinCosTable):
    """One fixed sin-cos over the flat index of the cube, spatial and spectral together.

    The paper's ablation names a "vanilla" joint sin-cos without defining it: this is Vaswani's over the sequence.
    """

    def forward(self, grid: tuple[int, ...], like: Tensor, gsd: Tensor | None = None) -> Tensor:
        """Positions `[1, G * H * W, D]`; `gsd` is ignored."""
        return self.table(math.prod(grid), like)


class WavelengthPositions(nn.Module):
    """A learned curve over the wavelength that every sensor shares; a group's position is the mean of its bands'.

    The curve is a table at knots evenly spaced in log-wavelength, linear between them; it starts as a sin-cos of the
    knot's number, so that neighbours are alike before training and where no sensor has a band. The table has no size
    that depends on the sensor: Sentinel-2, Landsat and EnMAP load each other's. Ours, not the paper's.

    Args:
        dim: width.
        groups: centre wavelengths in micrometres of the bands of every group.

    Raises:
        UserError: a wavelength is unknown or outside 0.3 to 15 um.
    """

    weights: Tensor

    def __init__(self, dim: int, groups: Sequence[Sequence[float | None]]) -> None:
        super().__init__()
        knots = sincos_1d(torch.arange(KNOTS, dtype=torch.float64), dim).float()
        self.table = nn.Parameter(knots.unsqueeze(0))  # [1, K, D]
        weights = torch.stack([torch.stack([_interpolation(w) for w in group]).mean(0) for group in groups])
        self.register_buffer("weights", weights, persistent=False)  # [G, K]

    def forward(self, groups: int, like: Tensor) -> Tensor:
        """Positions `[1, G, D]`."""
        return (self.weights.to(self.table.dtype) @ self.table).to(like.dtype)


def _interpolation(wavelength: float | None) -> Tensor:
    """Weights `[K]` of the knots at a wavelength in um."""
    if wavelength is None:
        raise UserError(
            "backbone.spectral 'wavelength' needs the centre wavelength of every band: "
            "set data.bands.wavelengths (micrometres), or backbone.spectral to learned."
        )
    if not SHORTEST <= wavelength <= LONGEST:
        raise UserError(f"band at {wavelength:g} um: wavelengths must be within {SHORTEST:g} to {LONGEST:g} um.")
    place = math.log(wavelength / SHORTEST) / math.log(LONGEST / SHORTEST) * (KNOTS - 1)
    below = min(int(place), KNOTS - 2)
    weights = torch.zeros(KNOTS)
    weights[below], weights[below + 1] = 1 - (place - below), place - below
    return weights
