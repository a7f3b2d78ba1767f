"""Images beside their masks and what a dense probe makes of them, as one plain uint8 picture."""

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from xscale_lightning.evaluation.pictures import FONT_SIZE, HIDDEN_GREY, MARGIN, picture_grid

_FIRST = [(0.80, 0.72, 0.52), (0.16, 0.42, 0.75), (0.20, 0.55, 0.25), (0.85, 0.25, 0.20)]
_ROW = 24


def palette(num_classes: int) -> Tensor:
    """A colour per class, `[K, 3]` in 0..1, always the same ones; the first four are told apart by brightness too."""
    turn = 0.618034  # golden ratio: neighbouring classes get distant hues
    more = [
        colorsys.hsv_to_rgb((0.75 + i * turn) % 1, 0.55 + 0.3 * (i % 2), 0.95 - 0.25 * (i % 3))
        for i in range(num_classes)
    ]
    return torch.tensor((_FIRST + more)[:num_classes])


def class_picture(masks: Tensor, num_classes: int) -> Tensor:
    """Masks `[B, H, W]` as colours `[B, 3, H, W]` in 0..1; what is no class (ignored) is grey."""
    colours = torch.cat([palette(num_classes), torch.full((1, 3), HIDDEN_GREY)]).to(masks.device)
    known = (masks >= 0) & (masks < num_classes)
    return colours[torch.where(known, masks, num_classes).long()].permute(0, 3, 1, 2)


def dense_picture(
    images: Tensor, masks: Tensor, predictions: Tensor, names: Sequence[str], titles: Sequence[str]
) -> np.ndarray:
    """Rows of image, mask and prediction, with a legend below.

    Args:
        images: `[B, 3, H, W]` in 0..1.
        masks: `[B, H, W]`, what is no class is grey.
        predictions: `[B, H, W]`; pixels that are ignored in the mask are drawn all the same.
        names: of the classes.
        titles: of the three columns.

    Returns:
        `[height, width, 3]` uint8.
    """
    count = len(names)
    grid = picture_grid([images, class_picture(masks, count), class_picture(predictions, count)], titles)
    canvas, font = Image.fromarray(grid), ImageFont.load_default(FONT_SIZE)
    entries = [*zip(names, palette(count).tolist(), strict=True), ("ignored", [HIDDEN_GREY] * 3)]
    draw = ImageDraw.Draw(canvas)
    places, x, row = [], MARGIN, 0
    for name, colour in entries:
        width = int(_ROW + draw.textlength(name, font=font) + 2 * MARGIN)
        if x > MARGIN and x + width > canvas.width:
            x, row = MARGIN, row + 1
        places.append((name, tuple(round(255 * part) for part in colour), x, row))
        x += width
    whole = Image.new("RGB", (canvas.width, canvas.height + (row + 1) * _ROW + MARGIN), "white")
    whole.paste(canvas)
    draw = ImageDraw.Draw(whole)
    for name, colour, left, line in places:
        top = canvas.height + line * _ROW
        draw.rectangle((left, top + 4, left + FONT_SIZE - 4, top + FONT_SIZE), fill=colour)
        draw.text((left + _ROW, top), name, fill="black", font=font)
    return np.asarray(whole)
