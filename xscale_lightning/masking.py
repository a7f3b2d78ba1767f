"""Which tokens a method sees: pure functions of noise, so that a mask can be injected, nested and tested."""

import torch
from torch import Tensor

from xscale_lightning.errors import UserError


def keep_count(length: int, ratio: float) -> int:
    """Number of visible tokens: `int(length * (1 - ratio))`, the expression of the published MAE family.

    It truncates on the floating-point error (640 tokens at 0.9 keep 63, not 64); a rounded one gives other masks.

    Raises:
        UserError: ratio outside [0, 1), or one that leaves no token.
    """
    check_ratio(ratio)
    count = int(length * (1 - ratio))
    if count < 1:
        if length < 2:
            raise UserError(f"an image of {length} token(s) has none to hide: take larger images or smaller patches.")
        raise UserError(
            f"mask_ratio {ratio} leaves none of the {length} tokens visible: "
            f"lower it to at most {highest_ratio(length):g}."
        )
    return count


def highest_ratio(length: int) -> float:
    """Highest mask ratio, to three digits, that leaves one of `length` tokens visible."""
    thousandths = int(1000 * (1 - 1 / length))
    while thousandths and int(length * (1 - thousandths / 1000)) < 1:
        thousandths -= 1
    return thousandths / 1000


def check_ratio(ratio: float) -> None:
    """Refuse a mask ratio outside [0, 1).

    Raises:
        UserError: naming the value.
    """
    if not 0 <= ratio < 1:
        raise UserError(f"mask_ratio must be in [0, 1), got {ratio}: 0.75 hides three quarters of the tokens.")


def random_mask(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Split tokens per sample by noise: the lowest are kept.

    Args:
        noise: `[B, L]`, for example uniform.
        ratio: share of the tokens to hide.

    Returns:
        Flat indices of the kept tokens `[B, K]` and of the hidden ones `[B, L - K]`, each in order of their noise;
        with the same noise a higher ratio keeps a prefix of a lower one's tokens (nested masks).

    Source: He et al. 2022, section 3 and its published shuffling by argsort.
    """
    count = keep_count(noise.shape[1], ratio)
    order = noise.argsort(dim=1)
    return order[:, :count], order[:, count:]


def to_boolean(indices: Tensor, length: int) -> Tensor:
    """Boolean mask `[B, L]`, true at `indices [B, K]`."""
    mask = torch.zeros(len(indices), length, dtype=torch.bool, device=indices.device)
    return mask.scatter(1, indices, True)


def children(parents: Tensor, width: int, ratio: int) -> Tensor:
    """Tokens of a grid `ratio` times finer that cover each of the `parents [B, N]` of a grid `width` tokens wide.

    Returns:
        Flat indices `[B, N * ratio * ratio]` into the finer grid; parents keep their order, and the children of one
        stand together in row-major order.

    Source: Waithaka et al. 2026 (spatial affinity), published code.
    """
    step = torch.arange(ratio, device=parents.device)
    rows = parents.div(width, rounding_mode="floor")[..., None] * ratio + step  # [B, N, r]
    columns = (parents % width)[..., None] * ratio + step
    return (rows[..., :, None] * (width * ratio) + columns[..., None, :]).flatten(-3)
