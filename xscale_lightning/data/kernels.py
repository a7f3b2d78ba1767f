"""Interpolation kernels of `data.views`: weights as functions of the distance in pixels, and how far they reach."""

from collections.abc import Callable

import torch
from torch import Tensor


def _triangle(distance: Tensor) -> Tensor:
    return 1 - distance


def _keys_cubic(distance: Tensor) -> Tensor:
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, far)


KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "bilinear": (_triangle, 1.0),
    "bicubic": (_keys_cubic, 2.0),
}
