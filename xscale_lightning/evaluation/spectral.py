"""Spectral angle: how far the shape of a reconstructed spectrum is from the original's, whatever its brightness.

The angle between two spectra seen as vectors of C bands (the spectral angle mapper of Kruse et al., "The Spectral Image
Processing System", Remote Sensing of Environment 44, 1993). It is 0 for spectra that differ by a factor only. It
depends on where zero is: spectra must be in raw sensor units, not normalised by band.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def spectral_angle(a: Tensor, b: Tensor) -> Tensor:
    """Angle in degrees between the spectra of two sets of images.

    Computed in float64 from the sum and the difference of the unit vectors, 2 atan2(|u - v|, |u + v|): the arc cosine
    of their product loses all digits below a hundredth of a degree.

    Args:
        a: `[B, C, ...]`, raw sensor units.
        b: the same.

    Returns:
        `[B, ...]` float64, 0 to 180; NaN where either spectrum is zero in every band.
    """
    u, v = (_unit(x.double()) for x in (a, b))
    return torch.rad2deg(
        2 * torch.atan2(torch.linalg.vector_norm(u - v, dim=1), torch.linalg.vector_norm(u + v, dim=1))
    )


def _unit(x: Tensor) -> Tensor:
    """Vectors along dimension 1 divided by their length; NaN for zero."""
    largest = x.abs().amax(dim=1, keepdim=True)  # first, so that squares neither overflow nor vanish
    x = x / largest
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True)


@dataclass(frozen=True)
class AngleSum:
    """Sum of angles over pixels; add those of several batches before taking `mean`."""

    total: float
    """Degrees."""
    count: int
    """Pixels."""

    def __add__(self, other: "AngleSum") -> "AngleSum":
        """Sum over both sets of pixels."""
        return AngleSum(self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> float:
        """Mean angle in degrees; NaN without a pixel."""
        return self.total / self.count if self.count else math.nan


def angle_sum(target: Tensor, prediction: Tensor, visible: Tensor) -> AngleSum:
    """Spectral angles of the pixels of which at least one band is hidden.

    The reconstructed spectrum is the prediction with the visible values pasted in. Pixels that are zero in every band,
    in the original or the reconstruction, have no angle and are left out.

    Args:
        target: `[B, C, H, W]`, raw sensor units.
        prediction: the same.
        visible: `[B, C, H, W]` or `[B, 1, H, W]` bool.
    """
    visible = visible.expand_as(target)
    angles = spectral_angle(target, torch.where(visible, target, prediction))
    used = angles[(~visible).any(dim=1) & angles.isfinite()]
    return AngleSum(float(used.sum()), used.numel())
