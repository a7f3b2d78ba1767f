"""The affinity figure: how alike one patch is to all others of its image, to the student on MR and the teacher on HR.

One row per pair: MR, HR, the student's cosines, the teacher's pooled to the student's grid, and the teacher's as they
are. One colour scale for all maps, so that a teacher to whom everything is alike looks like that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from torch import Tensor

from xscale_lightning.evaluation.sheet import Sheet, cell_size, fit, to_uint8

COLUMNS = ("MR", "HR", "student on MR", "teacher on HR, pooled", "teacher on HR")
COLOURS = colormaps["viridis"]
MARGIN, GAP, LINE = 12, 8, 18


@dataclass(frozen=True)
class AffinityRow:
    """One pair: pictures and maps of cosines to the chosen patch."""

    pictures: tuple[Tensor, Tensor]
    """MR `[3, H, W]` and HR `[3, r * H, r * W]` in 0..1."""
    maps: tuple[Tensor, Tensor, Tensor]
    """Student `[h, w]`, teacher pooled `[h, w]`, teacher `[r * h, r * w]`."""
    patch: tuple[int, int]
    """Row and column of the chosen patch on the student's grid."""
    gram: float
    """Mean squared difference of the cosines between all pairs of patches, student against pooled teacher."""


def similarity_maps(student: Tensor, teacher: Tensor, patch: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines of one patch with all others.

    Args:
        student: tokens of MR `[D, h, w]`.
        teacher: tokens of HR `[D', r * h, r * w]`.
        patch: row and column on MR's grid.

    Returns:
        The student's `[h, w]`; the teacher's, its tokens averaged under each MR patch, `[h, w]`; and the cosines of the
        teacher's own tokens with their average under the chosen patch `[r * h, r * w]`.
    """
    pooled = F.avg_pool2d(teacher[None], teacher.shape[-1] // student.shape[-1])[0]
    return tuple(  # type: ignore[return-value]
        F.cosine_similarity(tokens, chosen[:, patch[0], patch[1], None, None], dim=0)
        for tokens, chosen in ((student, student), (pooled, pooled), (teacher, pooled))
    )


def affinity_figure(rows: Sequence[AffinityRow], title: str = "", gsd: Sequence[float] = ()) -> np.ndarray:
    """Draw the figure.

    Args:
        rows: one per pair, all of the same sizes.
        title: first line.
        gsd: metres per pixel of MR and of HR, where they are known.

    Returns:
        `[height, width, 3]` uint8.
    """
    height, width = cell_size(*rows[0].pictures[1].shape[-2:])
    lowest = min(float(values.min()) for row in rows for values in row.maps)
    lowest = lowest if math.isfinite(lowest) else -1.0  # of a run whose weights are no longer finite
    low = max(-1.0, math.floor(lowest * 20 - 1e-6) / 20)  # whole twentieths; 1 is always the upper end
    top, step = MARGIN + 28 + LINE, height + LINE + GAP
    sheet = Sheet(2 * MARGIN + len(COLUMNS) * (width + GAP) - GAP, top + len(rows) * step + 62 + MARGIN)
    sheet.text(MARGIN, MARGIN, title, size=10, weight="bold")
    lefts = [MARGIN + i * (width + GAP) for i in range(len(COLUMNS))]
    for left, name, metres in zip_longest(lefts, COLUMNS, gsd):
        sheet.text(left + width / 2, top - LINE, f"{name}, {metres:.3g} m" if metres else name, ha="center")
    for number, row in enumerate(rows):
        y = top + number * step
        colours = [_coloured((values - low) / (1 - low)) for values in row.maps]
        for left, picture in zip(lefts, (*row.pictures, *colours), strict=True):
            pixels = to_uint8(fit(picture, (height, width)))
            mark(pixels, row.patch, (row.maps[0].shape[0], row.maps[0].shape[1]))
            sheet.picture(left, y, pixels)
        for left, values in zip(lefts[2:], row.maps, strict=True):
            sheet.text(left, y + height + 2, f"mean {float(values.mean()):.2f}", size=7, color="dimgrey")
        sheet.text(lefts[0], y + height + 2, f"Gram error of this image {row.gram:.4f}", size=7, color="dimgrey")
    _scale(sheet, lefts[2], top + len(rows) * step + 4, 3 * width + 2 * GAP, low)
    text = "framed: the chosen patch"
    sheet.text(MARGIN, top + len(rows) * step + 4, text, size=7.5)
    return sheet.pixels()


def mark(pixels: np.ndarray, patch: tuple[int, int], grid: tuple[int, int]) -> None:
    """Frame one patch of `pixels [H, W, 3]`, cut into a grid: red with white around it, seen on any ground."""
    height, width = pixels.shape[:2]
    top, bottom = (round((patch[0] + i) * height / grid[0]) for i in (0, 1))
    left, right = (round((patch[1] + i) * width / grid[1]) for i in (0, 1))
    for grow, colour in ((2, (255, 255, 255)), (1, (230, 0, 0)), (0, (230, 0, 0))):
        a, b = max(0, top - grow), min(height, bottom + grow) - 1
        c, d = max(0, left - grow), min(width, right + grow) - 1
        pixels[[a, b], c : d + 1] = colour
        pixels[a : b + 1, [c, d]] = colour


def _coloured(values: Tensor) -> Tensor:
    """`[h, w]` in 0..1 in colours, `[3, h, w]`."""
    return torch.from_numpy(np.asarray(COLOURS(values.clamp(0, 1).cpu().numpy()))[..., :3]).permute(2, 0, 1)


def _scale(sheet: Sheet, left: int, top: int, width: int, low: float) -> None:
    """The colour scale of all maps, with its ends and middle."""
    ramp = torch.linspace(0, 1, 256)[None]  # [1, 256]
    sheet.text(left + width / 2, top, "cosine with the chosen patch of the same image", size=7.5, ha="center")
    sheet.picture(left, top + LINE, to_uint8(fit(_coloured(ramp), (12, width))))
    for share, side in ((0.0, "left"), (0.5, "center"), (1.0, "right")):
        value = low + share * (1 - low)
        sheet.text(left + share * width, top + LINE + 15, f"{value:.3g}", size=7, ha=side)
