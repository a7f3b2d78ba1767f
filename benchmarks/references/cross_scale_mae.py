"""Cross-Scale MAE: the published arithmetic on the pre-norm blocks, encoder norm and mean of the paper's figure.

Two passes, one per view; a contrastive loss that writes out the product of all pairs of features.
"""

import torch
from sizes import Size
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import RandomResizedCrop

from references.mae import ReferenceMAE
from references.parts import Batch


class ReferenceCrossScale(ReferenceMAE):
    """Tang et al. 2023."""

    scale = (0.25, 1.0)
    flips = (True, True)

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        fc1, fc2 = nn.Linear(size.decoder_dim, size.hidden), nn.Linear(size.hidden, size.decoder_dim)
        self.predictor = nn.ModuleDict({"fc1": fc1, "norm": nn.BatchNorm1d(size.tokens), "fc2": fc2})

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """View B, cut out of the whole batch, and the mask noise of both views."""
        images = batch["image"]
        top, left, height, width = RandomResizedCrop.get_params(images, [0.25, 0.75], [0.75, 1.3333])
        cut = images[:, :, top : top + height, left : left + width]
        second = functional.interpolate(cut, images.shape[-2:], mode="bilinear", align_corners=False, antialias=True)
        noise = torch.rand(2, len(images), self.size.tokens, device=images.device)
        return noise[0], second, noise[1]

    def loss(self, batch: Batch, noise: Tensor, second: Tensor, second_noise: Tensor) -> Tensor:
        """Sum of the three losses for the image, a second view `[B, C, H, W]` and their mask noise `[B, L]`."""
        z_a, y_a, loss_a = self.view(batch["image"], noise)
        z_b, y_b, loss_b = self.view(second, second_noise)
        hidden = self.predictor["norm"](self.predictor["fc1"](y_b[:, 1:])).relu()
        prediction = (self.predictor["fc2"](hidden) - y_a[:, 1:]).square().mean()
        features = torch.cat([z_a[:, 1:].mean(1), z_b[:, 1:].mean(1)])  # [2n, D]
        similarity = functional.cosine_similarity(features[:, None], features[None], dim=-1) / 0.5  # [2n, 2n, D] inside
        count = len(z_a)
        own = torch.eye(2 * count, dtype=torch.bool, device=features.device)
        positive = own.roll(count, 1)
        negatives = (similarity.exp() * ~(own | positive)).sum(1)
        contrastive = ((negatives + 1e-8).log() - similarity[positive]).mean()
        return (loss_a + loss_b) / 2 + prediction + contrastive
