"""Mixup and CutMix of a batch with labels, on its device, from torch's random numbers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xscale_lightning.errors import UserError


@dataclass
class Mixing:
    """Mixes every image of a batch with another one, and their labels alike."""

    mixup: float = 0.0
    """Alpha of the Beta distribution of Mixup (Zhang et al. 2018); 0: none."""
    cutmix: float = 0.0
    """Alpha of the Beta distribution of CutMix (Yun et al. 2019); 0: none."""
    switch: float = 0.5
    """Probability of CutMix where both are on."""
    probability: float = 1.0
    """Probability with which a batch is mixed at all."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise UserError(f"mixing.{name} must be 0 or more, got {getattr(self, name)}.")
        for name in ("switch", "probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"mixing.{name} must be in [0, 1], got {getattr(self, name)}.")

    def __call__(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed `images [B, C, H, W]` and their `target [B, K]` (shares of the classes)."""
        from torchvision.transforms.v2 import CutMix, MixUp

        if not (self.mixup or self.cutmix) or float(torch.rand(())) >= self.probability:
            return images, target
        cut = self.cutmix > 0 and (self.mixup == 0 or float(torch.rand(())) < self.switch)
        mix = CutMix(alpha=self.cutmix) if cut else MixUp(alpha=self.mixup)
        return mix(images, target)


def smooth_one_hot(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Targets `[B, K]` of labels `[B]`: 1 - s + s / K for the class and s / K for the others (Szegedy et al. 2016)."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes
