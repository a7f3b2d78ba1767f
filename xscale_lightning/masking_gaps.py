"""Patches with gaps between them (LatentMIM): pure functions of noise, so that a grid can be injected and tested.

The image is cut into cells of patch + gap pixels, and of every cell one patch is taken, at a place of its own. Patches
that do not touch cannot be told from their neighbours' edges.
"""

import torch
from torch import Tensor

from xscale_lightning.errors import UserError


def gap_grid(height: int, width: int, patch: int, gap: int) -> tuple[int, int]:
    """Rows and columns of cells of `patch + gap` pixels that fit into an image of `height x width` pixels.

    Raises:
        UserError: not one fits.
    """
    cell = patch + gap
    if min(height, width) < cell:
        raise UserError(
            f"an image of {height} x {width} pixels has no room for a patch of {patch} pixels and a gap of {gap}: "
            f"take an image_size of at least {cell} pixels a side, a smaller patch_size or a smaller gap."
        )
    return height // cell, width // cell


def jitter(noise: Tensor, gap: int) -> Tensor:
    """Where in its cell every patch begins: whole pixels in [0, gap), of noise in [0, 1) and of the same shape.

    Source: Wei et al. 2024 (LatentMIM), published code; the last pixel of a gap is never reached.
    """
    return (noise * gap).long().clamp(max=max(gap - 1, 0))


def take_patches(images: Tensor, patch: int, gap: int, offsets: Tensor) -> Tensor:
    """The patches of all cells pushed together: images `[B, C, h * p, w * p]`, which any tokenizer can cut.

    Args:
        images: `[B, C, H, W]`; pixels that fill no cell are left out, the same number on either side.
        patch: p, in pixels.
        gap: in pixels.
        offsets: first row and column of every patch inside its cell `[B, 2, h * w]`; see `jitter`.

    Raises:
        UserError: as `gap_grid`.
    """
    height, width = images.shape[-2:]
    grid = gap_grid(height, width, patch, gap)
    inside = torch.arange(patch, device=images.device)
    pixels = []
    for axis, (size, cells) in enumerate(zip((height, width), grid, strict=True)):
        first = (size - cells * (patch + gap)) // 2
        corner = first + (patch + gap) * torch.arange(cells, device=images.device)
        corner = corner[:, None] if axis == 0 else corner  # [h, 1] or [w]
        pixels.append(offsets[:, axis].unflatten(1, grid) + corner)  # [B, h, w]
    rows = pixels[0][:, :, None, :, None] + inside[:, None, None]  # [B, h, p, w, 1]
    columns = pixels[1][:, :, None, :, None] + inside  # [B, h, 1, w, p]
    index = (rows * width + columns).flatten(1)  # [B, h * p * w * p]
    taken = images.flatten(2).gather(2, index.unsqueeze(1).expand(-1, images.shape[1], -1))
    return taken.unflatten(2, (grid[0] * patch, grid[1] * patch))
