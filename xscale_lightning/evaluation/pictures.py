"""Pictures of multispectral images and their reconstructions, as plain uint8 arrays and PNG files.

One stretch serves a whole row of columns: it is taken from the original (2nd to 98th percentile of each shown channel),
so that a reconstruction that is too dark looks too dark.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from xscale_lightning.errors import UserError
from xscale_lightning.files import write_bytes

if TYPE_CHECKING:
    from xscale_lightning.data.bands import Bands

HIDDEN_GREY = 0.5
MARGIN = 4
TITLE_HEIGHT = 26
FONT_SIZE = 18  # still read where TensorBoard shows the picture at a third of its size
MIN_CELL = 160  # pixels; smaller images are enlarged by whole factors so that single pixels stay visible


def shown_channels(bands: "Bands", false_colour: bool = False) -> tuple[int, int, int]:
    """Channels for red, green and blue: natural colour, or (near infrared, red, green).

    Raises:
        UserError: if a false-colour picture is asked for and a band for it is missing.
    """
    if not false_colour:
        return bands.rgb
    if bands.false_colour is None:
        raise UserError(
            f"false_colour: {bands.sensor} with {', '.join(bands.names)} lacks near infrared, red or green; "
            "set false_colour to false."
        )
    return bands.false_colour


def stretch_limits(images: Tensor, low: float = 0.02, high: float = 0.98) -> Tensor:
    """Percentile limits `[B, C, 2]` of every image and band of `[B, C, H, W]`; never empty, also for flat bands."""
    quantiles = torch.tensor([low, high], dtype=torch.float32, device=images.device)
    limits = torch.quantile(images.float().flatten(2), quantiles, dim=2).permute(1, 2, 0)  # [2, B, C] -> [B, C, 2]
    flat = limits[..., 1] <= limits[..., 0]
    # A flat band is shown as middle grey.
    widened = torch.stack([limits[..., 0] - 0.5, limits[..., 0] + 0.5], dim=-1)
    return torch.where(flat.unsqueeze(-1), widened, limits)


def composite(
    images: Tensor, channels: tuple[int, int, int], limits: Tensor | None = None, visible: Tensor | None = None
) -> Tensor:
    """Compose three channels of `images` `[B, C, H, W]` to `[B, 3, H, W]` in 0..1.

    Args:
        images: raw or normalised; the stretch makes both look the same.
        channels: indices shown as red, green, blue; the same one thrice gives a grey picture.
        limits: `[B, C, 2]` from `stretch_limits` of the originals; None takes the images' own.
        visible: `[B, C, H, W]` or `[B, 1, H, W]` bool; pixels that are not visible are grey.
    """
    limits = stretch_limits(images) if limits is None else limits
    index = torch.tensor(channels, device=images.device)
    low, high = limits.index_select(1, index)[..., None, None].unbind(dim=2)  # [B, 3, 1, 1] each
    shown = ((images.index_select(1, index).float() - low) / (high - low)).clamp(0, 1).nan_to_num(0.0)
    if visible is None:
        return shown
    mask = visible.expand_as(images).index_select(1, index)
    return shown.masked_fill(~mask, HIDDEN_GREY)


def picture_grid(columns: Sequence[Tensor], titles: Sequence[str]) -> np.ndarray:
    """Lay out columns of pictures, one row per image, with a title above each column.

    Args:
        columns: each `[B, 3, H, W]` in 0..1, all of the same shape.
        titles: one per column.

    Returns:
        `[height, width, 3]` uint8.

    Raises:
        UserError: if columns and titles do not go together.
    """
    if not columns or len(columns) != len(titles) or len({tuple(column.shape) for column in columns}) != 1:
        shapes = ", ".join(str(tuple(column.shape)) for column in columns)
        raise UserError(f"columns: {len(titles)} titles for columns of shape {shapes or 'none'}; give one title each.")
    count, _, height, width = columns[0].shape
    factor = max(1, -(-MIN_CELL // max(height, width)))
    height, width = height * factor, width * factor
    canvas = Image.new(
        "RGB",
        (len(columns) * (width + MARGIN) + MARGIN, count * (height + MARGIN) + MARGIN + TITLE_HEIGHT),
        "white",
    )
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT_SIZE)
    for i, (column, title) in enumerate(zip(columns, titles, strict=True)):
        left = MARGIN + i * (width + MARGIN)
        # Titles that are wider than their column would run into the next one.
        while len(title) > 1 and draw.textlength(title, font=font) > width:
            title = title[:-1]
        draw.text((left, MARGIN // 2), title, fill="black", font=font)
        pixels = (column.detach().float() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for row in range(count):
            cell = Image.fromarray(pixels[row]).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(cell, (left, TITLE_HEIGHT + MARGIN + row * (height + MARGIN)))
    return np.asarray(canvas)


def png_bytes(picture: np.ndarray) -> bytes:
    """`[height, width, 3]` uint8 as the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(picture: np.ndarray, path: str | os.PathLike[str]) -> Path:
    """Write `[height, width, 3]` uint8 as a PNG, whole or not at all; folders are made. Returns the path."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    return write_bytes(target, png_bytes(picture))
