"""Evaluation images at coarser scales: the same ground on fewer pixels.

The protocol is that of Reed et al. 2023 (Scale-MAE), which Tang et al. 2023 (Cross-Scale MAE) probably follow: kNN
accuracy at 12.5, 25, 50 and 100 % of the native image size. Images are averaged over areas, as in Scale-MAE's published
evaluation.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from xscale_lightning.errors import UserError

Size = tuple[int, int]


def check_shares(shares: Iterable[float]) -> list[float]:
    """Shares of the native size, largest first; 1.0, the native size itself, is always among them.

    Raises:
        UserError: if there is none, one is outside (0, 1], or one is given twice.
    """
    found = [float(f"{share:g}") for share in shares]  # no finer than the log names (`scale_12.5`) tell
    if not found:
        raise UserError("knn.scales: [] is not possible; give shares of the native size, for example [0.5, 1.0].")
    for share in found:
        if not 0 < share <= 1:
            raise UserError(
                f"knn.scales: {share:g} is not possible; give shares of the native size above 0 and up to 1, "
                "such as 0.125."
            )
        if found.count(share) > 1:
            raise UserError(f"knn.scales: {share:g} is given twice, which is not possible; give every share once.")
    return sorted({*found, 1.0}, reverse=True)


def scaled_size(size: Size, share: float, patch: int) -> Size:
    """Height and width at a share of `size`: the nearest multiples of `patch`; `size` itself at share 1.

    Raises:
        UserError: if less than one patch would be left.
    """
    if share == 1:
        return size
    wanted = [side * share for side in size]
    if min(wanted) < patch * (1 - 1e-6):  # 1e-6: shares have six digits
        least = min(1.0, math.ceil(1e4 * patch / min(size)) / 1e4)
        raise UserError(
            f"knn.scales: {share:g} of {size[0]} x {size[1]} pixels is {wanted[0]:g} x {wanted[1]:g}, less than one "
            f"patch of {patch}; give {least:g} or more, or leave it out."
        )
    # Never above the native size, which the patch need not divide.
    height, width = (
        min(math.floor(n / patch + 0.5), side // patch) * patch for n, side in zip(wanted, size, strict=True)
    )
    return height, width


def scaled_sizes(size: Size, shares: Iterable[float], patch: int) -> dict[float, Size]:
    """Height and width at every share of `size`.

    Raises:
        UserError: as `scaled_size`, and if two shares come to the same size, so that one name would tell a lie.
    """
    sizes: dict[float, Size] = {}
    for share in shares:
        new = scaled_size(size, share, patch)
        for other, taken in sizes.items():
            if new == taken:
                raise UserError(
                    f"knn.scales: {other:g} and {share:g} of {size[0]} x {size[1]} pixels are both {new[0]} x {new[1]} "
                    f"with patches of {patch}; leave one of them out."
                )
        sizes[share] = new
    return sizes


def downsample(images: Tensor, share: float, patch: int = 1) -> tuple[Tensor, float]:
    """Images at a share of their height and width, rounded to the nearest multiple of the patch size.

    Args:
        images: `[B, C, H, W]`, any unit that may be averaged.
        share: of height and width, in (0, 1]; at 1 the images come back as they are.
        patch: pixels per side of a patch.

    Returns:
        images `[B, C, h, w]`, every pixel the mean of the area it covers, and the linear factor that the rounding has
        led to: h / H, or the geometric mean of h / H and w / W. Metres per pixel divided by it are the new ones.

    Raises:
        UserError: if less than one patch would be left.
    """
    height, width = images.shape[-2:]
    new = scaled_size((height, width), share, patch)
    if new == (height, width):
        return images, 1.0
    return F.interpolate(images, size=new, mode="area"), math.sqrt(new[0] * new[1] / (height * width))


def scale_batch(batch: dict[str, Any], share: float, patch: int) -> dict[str, Any]:
    """Copy of a batch with `image [B, C, H, W]` downsampled and `gsd [B]`, if there is one, of the coarser pixels.

    Raises:
        UserError: as `downsample`.
    """
    images, factor = downsample(batch["image"], share, patch)
    scaled = {**batch, "image": images}
    if batch.get("gsd") is not None:
        scaled["gsd"] = batch["gsd"] / factor
    return scaled


def score_names(share: float, name: str) -> str:
    """Log name of a score: `top1` at the native size, `scale_12.5/top1` at an eighth of it."""
    return name if share == 1 else f"scale_{100 * share:g}/{name}"
