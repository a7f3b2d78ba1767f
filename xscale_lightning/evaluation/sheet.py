"""A figure laid out in whole pixels: pictures keep square, equal pixels, which matplotlib's own layouts do not give."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

DPI = 120
SMALLEST, LARGEST = 150, 256  # pixels across a picture


class Sheet:
    """White sheet; positions are pixels from the top left corner.

    Args:
        width: in pixels.
        height: in pixels.
    """

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        # The object interface: pyplot would keep figures and choose a backend for the whole process.
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        self.canvas = FigureCanvasAgg(self.figure)

    def text(self, x: float, y: float, text: str, size: float = 8, **options: Any) -> None:
        """Write `text` with its upper edge at `y`; dollars in names are no formulas."""
        options = {"va": "top", "parse_math": False, **options}
        self.figure.text(x / self.width, 1 - y / self.height, text, fontsize=size, **options)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Empty axes over a rectangle."""
        box = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)

    def picture(self, x: int, y: int, pixels: np.ndarray) -> None:
        """Put `[h, w, 3]` or `[h, w, 4]` uint8 there, pixel by pixel."""
        self.figure.figimage(pixels, xo=x, yo=self.height - y - pixels.shape[0], origin="upper")

    def pixels(self) -> np.ndarray:
        """The sheet as `[height, width, 3]` uint8."""
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()


def cell_size(height: int, width: int) -> tuple[int, int]:
    """Height and width at which an image is shown: whole multiples of small ones, large ones made smaller."""
    longest = max(height, width)
    if longest > LARGEST:
        return max(1, round(height * LARGEST / longest)), max(1, round(width * LARGEST / longest))
    factor = math.ceil(SMALLEST / longest)
    return height * factor, width * factor


def fit(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring `[3, H, W]` to `size`: single pixels stay visible where it grows, areas are averaged where it shrinks."""
    mode = "area" if size[0] < picture.shape[-2] else "nearest"
    return F.interpolate(picture[None].float(), size=size, mode=mode)[0]


def to_uint8(picture: Tensor) -> np.ndarray:
    """`[3, H, W]` in 0..1 as `[H, W, 3]` uint8."""
    return (picture.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
