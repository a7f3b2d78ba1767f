"""S2MAE with the arithmetic of the authors' SpectralGPT code and its first loss.

A 3-D convolution over all cubes, every cube decoded and predicted, and the mask applied to the error.
"""

import torch
from sizes import CUBE, Size
from torch import Tensor, nn

from references.parts import Batch, Reference, blocks, take


class _Tables(nn.ModuleDict):
    def __init__(self, places: int, groups: int, dim: int) -> None:
        super().__init__({"spatial": nn.Module(), "spectral": nn.Module()})
        self["spatial"].table = nn.Parameter(torch.randn(1, places, dim) * 0.02)
        self["spectral"].table = nn.Parameter(torch.randn(1, groups, dim) * 0.02)

    def forward(self) -> Tensor:
        """Both tables for all cubes `[1, G * h * w, D]`."""
        spatial, spectral = self["spatial"].table, self["spectral"].table
        places, groups = spatial.shape[1], spectral.shape[1]
        return spatial.repeat(1, groups, 1) + spectral.repeat_interleave(places, dim=1)


class ReferenceS2MAE(Reference):
    """Li et al. 2024; Hong et al. 2024."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.groups = size.bands // CUBE
        places, kernel = size.side**2, (CUBE, size.patch, size.patch)
        self.backbone, self.decoder = encoder, decoder = nn.Module(), nn.Module()
        encoder.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(1, size.dim, kernel, kernel)})
        encoder.positions = _Tables(places, self.groups, size.dim)
        encoder.blocks = blocks(size.dim, size.depth, size.heads)
        encoder.norm = nn.LayerNorm(size.dim, eps=1e-6)
        decoder.embed = nn.Linear(size.dim, size.decoder_dim)
        decoder.mask_token = nn.Parameter(torch.randn(1, 1, size.decoder_dim) * 0.02)
        decoder.positions = _Tables(places, self.groups, size.decoder_dim)
        decoder.blocks = blocks(size.decoder_dim, size.decoder_depth, size.decoder_heads)
        decoder.norm = nn.LayerNorm(size.decoder_dim, eps=1e-6)
        decoder.pred = nn.Linear(size.decoder_dim, CUBE * size.patch**2)

    def scaled(self, image: Tensor) -> Tensor:
        """Every band of the image `[C, H, W]` brought to [0, 1], as the authors' reader does it."""
        low, high = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
        return (image - low) / (high - low + 1e-10)

    def loss(self, batch: Batch, noise: Tensor) -> Tensor:
        """The cubes with the lowest `noise [B, L]` stay visible."""
        encoder, decoder, size, images = self.backbone, self.decoder, self.size, batch["image"]
        keep = int(size.tokens * (1 - size.mask_ratio))
        order = noise.argsort(dim=1)
        back = order.argsort(dim=1)
        kept = order[:, :keep]
        x = encoder.patch_embed["proj"](images.unsqueeze(1)).flatten(2).transpose(1, 2)  # [B, L, D]
        x = take(x, kept) + take(encoder.positions().expand(len(x), -1, -1), kept)
        for block in encoder.blocks:
            x = block(x)
        x = decoder.embed(encoder.norm(x))
        x = torch.cat([x, decoder.mask_token.expand(len(x), size.tokens - keep, -1)], dim=1)
        x = take(x, back) + decoder.positions()
        for block in decoder.blocks:
            x = block(x)
        prediction = decoder.pred(decoder.norm(x))  # [B, L, V]
        side, p = size.side, size.patch
        target = images.reshape(len(images), self.groups, CUBE, side, p, side, p).permute(0, 1, 3, 5, 2, 4, 6)
        mask = (back >= keep).float()
        return ((prediction - target.reshape(prediction.shape)).square().mean(-1) * mask).sum() / mask.sum()
