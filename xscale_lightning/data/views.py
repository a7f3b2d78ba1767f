"""Random views of a whole batch, made on the batch's own device.

Every sample gets its own crop, flip and rotation, yet nothing here loops over samples or asks the device for a value.
Any number of bands; no operation mixes bands. Needs torch only.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from xscale_lightning.data.kernels import KERNELS
from xscale_lightning.errors import UserError

Interpolation = Literal["bilinear", "bicubic"]


@dataclass
class Views:
    """Random resized crop, flips, quarter turns, band-wise intensity and band dropout, in this order.

    Random numbers come from the global generator of the images' device.

    Raises:
        UserError: on construction, naming the argument that is out of range.
    """

    size: int | None = None
    """Output height and width in pixels; null keeps those of the input, which need not be square."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest crop, as a share of the image area. [1, 1] takes the whole image."""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """Smallest and largest distortion: aspect ratio of the crop over that of the output."""
    flip: bool = True
    """Mirror left-right and top-bottom, each with probability 1/2."""
    rot90: bool = True
    """Turn by 0, 90, 180 or 270 degrees (0 or 180 where height and width differ): a satellite has no up."""
    intensity: float = 0.0
    """Contrast and brightness per band: x (1 + a) + b on normalised values with a, b uniform in +- intensity."""
    band_dropout: float = 0.0
    """Probability with which a band is set to its mean (0); one band of every sample always stays."""
    interpolation: Interpolation = "bilinear"
    """Kernel of the resize; it widens where a crop is shrunk, so that nothing aliases."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.scale = (float(self.scale[0]), float(self.scale[1]))
        self.ratio = (float(self.ratio[0]), float(self.ratio[1]))
        if self.size is not None and self.size < 1:
            raise UserError(f"views.size: {self.size} is not possible; give a number of pixels of at least 1, or null.")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"views.scale: {list(self.scale)} is not possible; needs 0 < smallest <= largest <= 1.")
        if not 0 < self.ratio[0] <= 1 <= self.ratio[1] < math.inf:
            raise UserError(f"views.ratio: {list(self.ratio)} is not possible; needs 0 < smallest <= 1 <= largest.")
        if not 0 <= self.intensity < 1:
            raise UserError(f"views.intensity: {self.intensity} is not possible; needs 0 <= intensity < 1.")
        if not 0 <= self.band_dropout < 1:
            raise UserError(f"views.band_dropout: {self.band_dropout} is not possible; needs 0 <= band_dropout < 1.")
        if self.interpolation not in KERNELS:
            raise UserError(f"views.interpolation: '{self.interpolation}' is unknown; choose from {list(KERNELS)}.")

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the views of images of this height and width."""
        return (height, width) if self.size is None else (self.size, self.size)

    def __call__(self, images: Tensor, gsd: Tensor) -> tuple[Tensor, Tensor]:
        """Return one view per image and its gsd.

        Args:
            images: `[B, C, H, W]`, normalised (0 is the mean of a band).
            gsd: `[B]`, metres per pixel.

        Returns:
            Views `[B, C, h, w]` of the same dtype, and their gsd `[B]`: multiplied by the mean linear zoom.
        """
        return self.apply(self.draw(images), images, gsd)

    def draw(self, images: Tensor) -> "Draw":
        """Draw what is random about one view of each of `images [B, C, H, W]`."""
        batch, bands, height, width = images.shape
        size, device = self.output_size(height, width), images.device
        quarters, mirror = self._random_turns(batch, size[0] == size[1], device)
        boxes = change = keep = None
        if self.scale != (1.0, 1.0) or size != (height, width):  # else the crop is the image itself, bit for bit
            boxes = random_boxes(batch, (height, width), size, self.scale, self.ratio, device)
        if self.intensity > 0:
            change = (torch.rand(2, batch, bands, 1, 1, device=device) * 2 - 1).mul(self.intensity)
        if self.band_dropout > 0:
            draw = torch.rand((batch, bands), device=device)
            keep = (draw >= self.band_dropout) | (draw == draw.amax(dim=1, keepdim=True))
        return Draw(size, quarters, mirror, boxes, change, keep)

    def apply(self, draw: "Draw", images: Tensor, gsd: Tensor, ratio: int = 1) -> tuple[Tensor, Tensor]:
        """The views that were drawn: of the images themselves, or of images `ratio` times finer of the same ground.

        Args:
            draw: what `draw` gave.
            images: `[B, C, ratio * H, ratio * W]`, normalised.
            gsd: theirs `[B]`, metres per pixel.
            ratio: how many times finer they are than the images that were drawn for.

        Returns:
            Views `[B, C, ratio * h, ratio * w]` of exactly the same ground, and their gsd `[B]`.
        """
        if draw.boxes is None:
            images = turn(images, draw.quarters, draw.mirror) if self.flip or self.rot90 else images
        else:
            size, boxes = (draw.size[0] * ratio, draw.size[1] * ratio), draw.boxes * ratio
            images = crop_resize(images, boxes, size, self.interpolation, draw.quarters, draw.mirror)
            gsd = gsd * zoom(boxes, size).to(gsd)
        if draw.change is not None:
            contrast, brightness = draw.change
            images = (images * (1 + contrast) + brightness).to(images.dtype)
        if draw.keep is not None:
            images = images * draw.keep[:, :, None, None].to(images.dtype)
        return images, gsd

    def apply_to_masks(self, draw: "Draw", masks: Tensor) -> Tensor:
        """The views that were drawn, of class maps `[B, H, W]`: the same ground, at every pixel the nearest class."""
        maps = masks.unsqueeze(1)
        if draw.boxes is None:
            return turn(maps, draw.quarters, draw.mirror).squeeze(1)
        parts = _turn_parts(draw.quarters, draw.mirror)
        with torch.autocast(masks.device.type, enabled=False):
            return _sample(maps.float(), draw.boxes.float(), draw.size, parts, "nearest").squeeze(1).to(masks.dtype)

    def _random_turns(self, batch: int, square: bool, device: torch.device) -> tuple[Tensor, Tensor]:
        quarters = torch.zeros(batch, dtype=torch.long, device=device)
        if self.rot90:
            quarters = (
                torch.randint(4, (batch,), device=device) if square else 2 * torch.randint(2, (batch,), device=device)
            )
        mirror = torch.rand(batch, 2, device=device) < (0.5 if self.flip else 0.0)
        return quarters, mirror


@dataclass(frozen=True)
class Draw:
    """What is random about the views of a batch; see `Views.draw`."""

    size: tuple[int, int]
    """(h, w) of the views."""
    quarters: Tensor
    """Turns `[B]`, 0 to 3; see `turn`."""
    mirror: Tensor
    """`[B, 2]` bool: top-bottom, left-right."""
    boxes: Tensor | None
    """Crops `[B, 4]`; None where the view is the whole image."""
    change: Tensor | None
    """Contrast and brightness per band `[2, B, C, 1, 1]`, if they change."""
    keep: Tensor | None
    """Bands that stay `[B, C]`, if some are dropped."""


def random_boxes(
    batch: int,
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw one crop per sample: area uniform in `scale`, distortion log-uniform in `ratio`, position uniform.

    The distortions are limited to those whose box fits into the image. Only where none of them fits (a long image made
    square, for example) the box is made smaller than the drawn area.

    Returns:
        `[B, 4]` float: top, left, height, width in input pixels, not rounded.
    """
    height, width = image_size
    aspect = output_size[1] / output_size[0]
    area, shape, top, left = torch.rand(4, batch, device=device).unbind()
    area = (scale[0] + (scale[1] - scale[0]) * area) * (height * width)
    # A distortion r makes the box sqrt(area r aspect) wide and sqrt(area / (r aspect)) high.
    low = (area / (height * height * aspect)).clamp(*ratio).log()
    high = (width * width / (area * aspect)).clamp(*ratio).log()
    box_aspect = (low + (high - low) * shape).exp() * aspect
    box_height, box_width = (area / box_aspect).sqrt(), (area * box_aspect).sqrt()
    fit = torch.minimum(height / box_height, width / box_width).clamp(max=1.0)
    box_height, box_width = (box_height * fit).clamp(max=height), (box_width * fit).clamp(max=width)
    return torch.stack([top * (height - box_height), left * (width - box_width), box_height, box_width], dim=1)


def zoom(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Input pixels per output pixel `[B]`, geometric mean of both directions, of boxes `[B, 4]` resized to `size`."""
    return (boxes[:, 2] * boxes[:, 3] / (size[0] * size[1])).sqrt()


def crop_resize(
    images: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    interpolation: Interpolation = "bilinear",
    quarters: Tensor | None = None,
    mirror: Tensor | None = None,
) -> Tensor:
    """Cut a box out of every image, resize it with antialiasing where it shrinks, and turn it as `turn` does.

    Args:
        images: `[B, C, H, W]`.
        boxes: `[B, 4]` top, left, height, width in input pixels; fractions are allowed.
        size: (h, w) of the output.
        interpolation: kernel, "bilinear" or "bicubic" (Keys 1981, a = -0.5).
        quarters: `[B]` int in 0..3, or None for no rotation; odd quarters need h = w.
        mirror: `[B, 2]` bool: top-bottom, left-right, or None.

    Returns:
        `[B, C, h, w]` of the same dtype.
    """
    batch, _, height, width = images.shape
    if quarters is None:
        quarters = torch.zeros(batch, dtype=torch.long, device=images.device)
    if mirror is None:
        mirror = torch.zeros(batch, 2, dtype=torch.bool, device=images.device)
    never_shrinks = size[0] >= height and size[1] >= width
    sample = (
        _sample if never_shrinks and interpolation == "bilinear" else partial(_resample, interpolation=interpolation)
    )
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 would blur positions
        return sample(images.float(), boxes.float(), size, _turn_parts(quarters, mirror)).to(images.dtype)


def turn(images: Tensor, quarters: Tensor, mirror: Tensor) -> Tensor:
    """Rotate every image `[B, C, H, W]` by `quarters` `[B]` (counter-clockwise), then mirror it.

    Args:
        images: `[B, C, H, W]`; odd quarters need H = W.
        quarters: `[B]` int in 0..3.
        mirror: `[B, 2]` bool: top-bottom, left-right.

    Returns:
        The same pixels in another order, `[B, C, H, W]`.
    """
    swap, flip_rows, flip_columns = (part.view(-1, 1, 1, 1) for part in _turn_parts(quarters, mirror))
    if images.shape[2] == images.shape[3]:
        images = torch.where(swap, images.mT, images)
    images = torch.where(flip_rows, images.flip(2), images)
    return torch.where(flip_columns, images.flip(3), images)


Turn = tuple[Tensor, Tensor, Tensor]


def _turn_parts(quarters: Tensor, mirror: Tensor) -> Turn:
    """Every turn is: swap rows and columns, then flip the rows, then flip the columns; three masks `[B]`."""
    return quarters % 2 == 1, ((quarters == 1) | (quarters == 2)) ^ mirror[:, 0], (quarters >= 2) ^ mirror[:, 1]


def _sample(images: Tensor, boxes: Tensor, size: tuple[int, int], parts: Turn, mode: str = "bilinear") -> Tensor:
    """Crop, enlarge and turn in one pass: output coordinates in [-1, 1] map to input ones by one matrix per image."""
    batch, bands, height, width = images.shape
    top, left, box_height, box_width = boxes.unbind(1)
    swap = parts[0].to(boxes.dtype)
    down, right = (1 - 2 * part.to(boxes.dtype) for part in parts[1:])  # -1 where flipped
    across, along = box_width / width, box_height / height
    x = torch.stack([across * right * (1 - swap), across * down * swap, (2 * left + box_width) / width - 1], dim=1)
    y = torch.stack([along * right * swap, along * down * (1 - swap), (2 * top + box_height) / height - 1], dim=1)
    grid = functional.affine_grid(torch.stack([x, y], dim=1), [batch, bands, *size], align_corners=False)
    return functional.grid_sample(images, grid, mode=mode, padding_mode="border", align_corners=False)


def _resample(
    images: Tensor, boxes: Tensor, size: tuple[int, int], parts: Turn, interpolation: Interpolation
) -> Tensor:
    """Crop, resize with antialiasing and turn: separable, so one small matrix per image and direction."""
    swap, flip_rows, flip_columns = parts
    top, left, height, width = boxes.unbind(1)
    # Swapping comes first in a turn and last here, so in swapped images the two flips change places.
    flip_y, flip_x = torch.where(swap, flip_columns, flip_rows), torch.where(swap, flip_rows, flip_columns)
    rows = _resampling_matrix(top, height, images.shape[2], size[0], flip_y, interpolation)  # [B, h, H]
    columns = _resampling_matrix(left, width, images.shape[3], size[1], flip_x, interpolation)  # [B, w, W]
    resized = rows.unsqueeze(1) @ (images @ columns.mT.unsqueeze(1))  # [B, C, h, w]
    return torch.where(swap.view(-1, 1, 1, 1), resized.mT, resized) if size[0] == size[1] else resized


def _resampling_matrix(
    start: Tensor, length: Tensor, inputs: int, outputs: int, flip: Tensor, interpolation: Interpolation
) -> Tensor:
    """Weights `[B, outputs, inputs]` that resample `[start, start + length)` `[B]`; every row sums to 1."""
    kernel, support = KERNELS[interpolation]
    step = (length / outputs).view(-1, 1, 1)
    pixels = torch.arange(inputs, device=start.device) + 0.5
    offsets = (torch.arange(outputs, device=start.device).view(1, -1, 1) + 0.5) * step
    centres = start.view(-1, 1, 1) + torch.where(flip.view(-1, 1, 1), length.view(-1, 1, 1) - offsets, offsets)
    distance = (pixels - centres).abs() / step.clamp(min=1.0)  # a shrunk crop averages over `step` input pixels
    weights = torch.where(distance < support, kernel(distance), 0.0)
    return weights / weights.sum(dim=2, keepdim=True)
