"""A view: haze over an image, stronger at short wavelengths."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xscale_lightning.errors import UserError

BLUE = 0.49  # um: where the strength is stated


@dataclass
class Haze:
    """Adds a smooth field of light to every image, falling with the fourth power of the wavelength (Rayleigh)."""

    strength: float = 0.0
    """Largest addition at 0.49 um, in deviations of the band; 0 leaves images as they are."""
    cells: int = 3
    """The field is made of so many cells per side, joined smoothly."""

    def __post_init__(self) -> None:
        """Refuse what no haze can be."""
        if self.strength < 0 or self.cells < 1:
            raise UserError(f"haze: strength {self.strength} and cells {self.cells} must be at least 0 and 1.")

    def __call__(self, images: Tensor, wavelengths: Sequence[float | None]) -> Tensor:
        """Normalised `images [B, C, H, W]` under haze; bands of unknown wavelength (um) stay as they are."""
        if not self.strength:
            return images
        share = [0.0 if w is None else min(1.0, (BLUE / w) ** 4) for w in wavelengths]
        field = torch.rand(len(images), 1, self.cells, self.cells, device=images.device, dtype=images.dtype)
        field = F.interpolate(field, size=images.shape[-2:], mode="bilinear", align_corners=True)  # [B, 1, H, W]
        return images + self.strength * field * images.new_tensor(share).view(1, -1, 1, 1)
