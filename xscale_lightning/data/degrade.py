"""Pairs of two resolutions from one image, by area degradation."""

import torch.nn.functional as F
from torch import Tensor

from xscale_lightning.errors import UserError


def degrade(images: Tensor, ratio: int, gsd: Tensor) -> tuple[Tensor, Tensor]:
    """Degrade images to a resolution `ratio` times coarser: each new pixel is the mean of ratio x ratio old ones.

    This is the reduced-resolution protocol of Wald, Ranchin and Mangolini, "Fusion of satellite images of different
    spatial resolutions", PE&RS 63(6), 1997: the original is the reference at the fine scale. The area mean stands for
    the sensor's point spread function, which it approximates as a box of one coarse pixel.

    Args:
        images: `[B, C, H, W]`, any unit that may be averaged.
        ratio: whole number of fine pixels along a coarse pixel.
        gsd: `[B]` metres per pixel of `images`.

    Returns:
        images `[B, C, H / ratio, W / ratio]` of the same footprint, and their gsd `[B]`, which is `gsd * ratio`.

    Raises:
        UserError: if ratio is below 1 or does not divide height and width (the footprints would differ).
    """
    height, width = images.shape[-2:]
    if ratio < 1 or height % ratio or width % ratio:
        raise UserError(f"ratio: {ratio} does not divide images of {height}x{width} pixels; choose one that does.")
    if ratio == 1:
        return images, gsd
    return F.avg_pool2d(images, ratio), gsd * ratio
