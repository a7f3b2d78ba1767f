"""How raw images are scaled before a model sees them: by the band record, every image by itself, or not at all."""

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["minmax", "standardize", "none"]


def image_scaling(raw: Tensor, kind: Scale, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Offset and scale `[B or 1, C, 1, 1]` of raw images `[B, C, H, W]`: the model sees `(raw - offset) / scale`.

    Args:
        raw: images in raw units.
        kind: `standardize` by `mean` and `std`, `minmax` of every band of every image, or `none`.
        mean: mean of every band `[1, C, 1, 1]`; its type is that of the result.
        std: deviation of every band `[1, C, 1, 1]`.
    """
    if kind == "standardize":
        return mean, std
    if kind == "none":
        return torch.zeros_like(mean), torch.ones_like(std)
    values = raw.to(mean.dtype)
    low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)  # of the whole tile, uncut
    # 1e-10 as in the sibling's code, but not alone: dividing by it would blow up the rounding of a constant band.
    return low, torch.where(high > low, high - low + 1e-10, 1.0)
