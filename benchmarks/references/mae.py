"""MAE as the paper describes it: every patch embedded, then shuffled; every patch predicted, then masked."""

import torch
from sizes import Size
from torch import Tensor, nn

from references.parts import Batch, Encoder, Reference, blocks, table, take


class ReferenceMAE(Reference):
    """He et al. 2022."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.backbone = Encoder(size, True, table(size.dim, size.side))
        self.decoder = decoder = nn.Module()
        decoder.embed = nn.Linear(size.dim, size.decoder_dim)
        decoder.mask_token = nn.Parameter(torch.randn(1, 1, size.decoder_dim) * 0.02)
        decoder.blocks = blocks(size.decoder_dim, size.decoder_depth, size.decoder_heads)
        decoder.norm = nn.LayerNorm(size.decoder_dim, eps=1e-6)
        decoder.pred = nn.Linear(size.decoder_dim, size.patch**2 * size.bands)
        self.register_buffer("decoder_positions", table(size.decoder_dim, size.side), persistent=False)

    def loss(self, batch: Batch, noise: Tensor) -> Tensor:
        """The patches with the lowest `noise [B, L]` stay visible."""
        return self.view(batch["image"], noise)[2]

    def view(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encoder tokens `[B, 1 + K, D]`, decoder tokens `[B, 1 + L, d]` and the loss of `images [B, C, H, W]`."""
        decoder, size = self.decoder, self.size
        keep = int(size.tokens * (1 - size.mask_ratio))
        order = noise.argsort(dim=1)
        back = order.argsort(dim=1)
        encoded = self.backbone(images, order[:, :keep])
        x = decoder.embed(encoded)
        full = torch.cat([x[:, 1:], decoder.mask_token.expand(len(x), size.tokens - keep, -1)], dim=1)
        full = take(full, back) + self.decoder_positions
        x = torch.cat([x[:, :1], full], dim=1)
        for block in decoder.blocks:
            x = block(x)
        decoded = decoder.norm(x)
        prediction = decoder.pred(decoded)[:, 1:]  # [B, L, p * p * C]
        side, p = size.side, size.patch
        target = images.reshape(len(images), size.bands, side, p, side, p).permute(0, 2, 4, 3, 5, 1)
        mask = (back >= keep).float()
        error = (prediction - target.reshape(prediction.shape)).square().mean(-1)
        return encoded, decoded, (error * mask).sum() / mask.sum()
