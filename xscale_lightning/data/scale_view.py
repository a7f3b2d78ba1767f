"""The second view of Cross-Scale MAE: a part of the first one at another scale, made on the images' own device."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from xscale_lightning.data.views import Interpolation, crop_resize, random_boxes, zoom
from xscale_lightning.errors import UserError

CropPer = Literal["batch", "sample"]


@dataclass(frozen=True)
class View:
    """Images at one scale, and where on the ground they lie.

    Attributes:
        images: `[B, C, H, W]`.
        gsd: metres per pixel `[B]`, or None where the data does not know it.
        boxes: `[B, 4]` top, left, height, width in pixels of the view it was cut from; None for that one itself.
    """

    images: Tensor
    gsd: Tensor | None = None
    boxes: Tensor | None = None


@dataclass
class ScaleView:
    """Cut a random part out of every image and resize it, so that its scale is another one and known.

    A crop of share s of the area, enlarged to the size of the image, shows the ground at sqrt(s) times the gsd
    (1.15 to 2 times as fine for 0.25 to 0.75). With `scale: [1, 1]` and smaller `sizes` the view is coarser instead.

    Raises:
        UserError: on construction, naming the argument that is out of range.
    """

    scale: tuple[float, float] = (0.25, 0.75)
    """Smallest and largest crop, as a share of the image area, in (0, 1]."""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """Smallest and largest aspect ratio of the crop (its distortion, where images are not square)."""
    sizes: list[int] | None = None
    """Heights and widths in pixels, one drawn per batch; null keeps those of the image."""
    interpolation: Interpolation = "bilinear"
    """Kernel of the resize; it widens where the crop is shrunk."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.scale = (float(self.scale[0]), float(self.scale[1]))
        self.ratio = (float(self.ratio[0]), float(self.ratio[1]))
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"scale_view.scale: {list(self.scale)} is not possible; needs 0 < smallest <= largest <= 1")
        if not 0 < self.ratio[0] <= 1 <= self.ratio[1] < math.inf:
            raise UserError(f"scale_view.ratio: {list(self.ratio)} is not possible; needs 0 < smallest <= 1 <= largest")
        if self.sizes is not None and (not self.sizes or min(self.sizes) < 1):
            raise UserError(f"scale_view.sizes: {self.sizes} is not possible; give pixel sizes of at least 1, or null.")
        if self.interpolation not in get_args(Interpolation):
            known = ", ".join(get_args(Interpolation))
            raise UserError(f"scale_view.interpolation: {self.interpolation!r} is unknown; choose from {known}.")

    def output_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Heights and widths that the views of images of this size can have."""
        return [(height, width)] if self.sizes is None else [(size, size) for size in self.sizes]

    def shortest_side(self, height: int, width: int) -> float:
        """Shortest side in pixels that a crop of images of this size can have."""
        share = self.scale[0]
        distortion = max(min(self.ratio[0], 1 / self.ratio[1]), share)  # a crop of share 1 has no room for any
        if self.sizes is None:  # the crop has the shape of the image, distorted
            return min(height, width) * (share * distortion) ** 0.5
        return min(height, width, (share * height * width * distortion) ** 0.5)

    def __call__(self, view: View, crop_per: CropPer = "sample") -> View:
        """The second view of `view`; its gsd is that of the first times the linear zoom (geometric mean of both axes).

        Args:
            view: the first view.
            crop_per: `sample`, one box per image, fractions of pixels allowed; `batch`, one box of whole pixels for
                all images, drawn on the host by torchvision's rejection sampling: the published behaviour.
        """
        sizes = self.output_sizes(*view.images.shape[-2:])
        size = sizes[int(torch.randint(len(sizes), ()))] if len(sizes) > 1 else sizes[0]  # on the host: no wait
        images, boxes = (self._per_batch if crop_per == "batch" else self._per_sample)(view.images, size)
        return View(images, None if view.gsd is None else view.gsd * zoom(boxes, size).to(view.gsd), boxes)

    def _per_sample(self, images: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        batch, _, height, width = images.shape
        boxes = random_boxes(batch, (height, width), size, self.scale, self.ratio, images.device)
        return crop_resize(images, boxes, size, self.interpolation), boxes

    def _per_batch(self, images: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        box = RandomResizedCrop.get_params(images, list(self.scale), list(self.ratio))
        top, left, height, width = box
        cut = images[:, :, top : top + height, left : left + width]
        view = F.interpolate(cut, size=size, mode=self.interpolation, align_corners=False, antialias=True)
        return view, torch.tensor(box, dtype=torch.float32).to(images.device, non_blocking=True).expand(len(images), 4)
