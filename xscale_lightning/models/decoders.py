"""Decoders that the methods put behind an encoder."""

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn

from xscale_lightning.errors import UserError
from xscale_lightning.models.pos_embed import SinCosPositions
from xscale_lightning.models.tokens import Tokens, gather
from xscale_lightning.models.vit import Block, init_weights


class MAEDecoder(nn.Module):
    """MAE's light decoder: mask tokens in the gaps, sin-cos positions, a few blocks, one linear layer to pixels.

    Args:
        in_dim: width of the encoder.
        out_dim: values per patch.
        dim: width of the decoder.
        depth: number of blocks.
        num_heads: attention heads.

    Source: He et al. 2022, section 3; sizes 512 x 8 x 16 in its appendix A.1.

    Raises:
        UserError: a width that the heads do not divide.
    """

    def __init__(self, in_dim: int, out_dim: int, dim: int = 512, depth: int = 8, num_heads: int = 16) -> None:
        super().__init__()
        if dim % num_heads:
            raise UserError(f"decoder width {dim} is not divisible by its {num_heads} heads: change one of them.")
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = SinCosPositions(dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.norm = LayerNorm(dim)
        self.pred = nn.Linear(dim, out_dim)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def decode(self, tokens: Tokens) -> Tensor:
        """Decoder tokens of the whole grid after the last norm, prefix included: `[B, P + L, dim]`."""
        x = self.embed(tokens.x)  # [B, P + K, dim]
        prefix, visible = x[:, : tokens.num_prefix], x[:, tokens.num_prefix :]
        positions = self.positions(tokens.grid[1:], like=visible)
        if tokens.kept is None:
            full = visible + positions
        else:
            index = tokens.kept.unsqueeze(-1).expand(-1, -1, x.shape[-1])
            full = self.mask_token.to(x.dtype).expand(len(x), tokens.length, -1).scatter(1, index, visible) + positions
        x = torch.cat([prefix, full], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens: Tokens, predict: Tensor | None = None) -> Tensor:
        """Predicted values `[B, L, out_dim]`, or `[B, M, out_dim]` at the flat grid indices `predict [B, M]`."""
        x = self.decode(tokens)[:, tokens.num_prefix :]
        return self.pred(x if predict is None else gather(x, predict))
