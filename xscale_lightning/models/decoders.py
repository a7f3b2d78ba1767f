"""Decoders that the methods put behind an encoder."""

from collections.abc import Sequence

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn

from xscale_lightning.errors import UserError
from xscale_lightning.models.blocks import MAX_DEPTH, Block, BlockNorm, init_weights
from xscale_lightning.models.pos_embed import SinCosPositions, take_positions
from xscale_lightning.models.tokens import Tokens, gather, pack, unpack


def check_sizes(dim: int, depth: int, num_heads: int) -> None:
    """Refuse sizes that no decoder can have.

    Raises:
        UserError: one is below 1 (the depth below 0), or there are too many blocks.
    """
    for name, value, least in (("decoder_dim", dim, 1), ("decoder_depth", depth, 0), ("decoder_heads", num_heads, 1)):
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}.")
    if depth > MAX_DEPTH:
        raise UserError(f"decoder_depth must be at most {MAX_DEPTH}, got {depth}.")


class MAEDecoder(nn.Module):
    """MAE's light decoder: mask tokens in the gaps, sin-cos positions, a few blocks, one linear layer to pixels.

    Args:
        in_dim: width of the encoder.
        out_dim: values per patch.
        dim: width of the decoder.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLPs over `dim`.
        block_norm: LayerNorm before (`pre`) or after (`post`) attention and MLP.
        norm_eps: of the blocks' LayerNorms.
        positions: positions of width `dim`; default MAE's sin-cos.
        final_norm_eps: of the LayerNorm after the blocks.

    Source: He et al. 2022, section 3; sizes 512 x 8 x 16 in its appendix A.1.

    Raises:
        UserError: a width that the heads do not divide.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        block_norm: BlockNorm = "pre",
        norm_eps: float = 1e-6,
        positions: nn.Module | None = None,
        final_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        check_sizes(dim, depth, num_heads)
        if dim % num_heads:
            names = "decoder_dim or decoder_heads"
            raise UserError(f"decoder width {dim} is not divisible by its {num_heads} heads: change {names}.")
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = positions or SinCosPositions(dim)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio=mlp_ratio, block_norm=block_norm, norm_eps=norm_eps) for _ in range(depth)
        )
        self.norm = LayerNorm(dim, eps=final_norm_eps)
        self.pred = nn.Linear(dim, out_dim)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def fill(self, tokens: Tokens, gsd: Tensor | None = None) -> Tensor:
        """Input of the blocks: embedded tokens, mask tokens in the gaps, positions: `[B, P + L, dim]`."""
        x = self.embed(tokens.x)  # [B, P + K, dim]
        prefix, visible = x[:, : tokens.num_prefix], x[:, tokens.num_prefix :]
        positions = self.positions(tokens.grid, like=visible, gsd=gsd)
        if tokens.kept is None:
            full = visible + positions
        else:
            index = tokens.kept.unsqueeze(-1).expand(-1, -1, x.shape[-1])
            full = self.mask_token.to(x.dtype).expand(len(x), tokens.length, -1).scatter(1, index, visible) + positions
        return torch.cat([prefix, full], dim=1)

    def decode(self, tokens: Tokens, gsd: Tensor | None = None) -> Tensor:
        """Decoder tokens of the whole grid after the last norm, prefix included: `[B, P + L, dim]`."""
        return self.decode_together([tokens], [gsd])[0]

    def decode_together(self, batches: Sequence[Tokens], gsds: Sequence[Tensor | None]) -> list[Tensor]:
        """`decode` of several token batches in one pass; grids of different size are packed into one row."""
        parts = [self.fill(tokens, gsd) for tokens, gsd in zip(batches, gsds, strict=True)]
        if len({x.shape[1] for x in parts}) == 1:
            x, seqlens = torch.cat(parts), None
        else:
            x, seqlens = pack(parts)
        for block in self.blocks:
            x = block(x, seqlens=seqlens)
        x = self.norm(x)
        return list(x.split([len(part) for part in parts])) if seqlens is None else unpack(x, parts)

    def forward(self, tokens: Tokens, predict: Tensor | None = None, gsd: Tensor | None = None) -> Tensor:
        """Predicted values `[B, L, out_dim]`, or `[B, M, out_dim]` at the flat grid indices `predict [B, M]`."""
        x = self.decode(tokens, gsd)[:, tokens.num_prefix :]
        return self.pred(x if predict is None else gather(x, predict))

    def forward_some(self, tokens: Tokens, predict: Tensor, gsd: Tensor | None = None) -> Tensor:
        """Predicted values `[B, M, out_dim]` at `predict [B, M]` by a decoder that sees the visible tokens and these.

        Other hidden tokens are left out of the attention, so the work grows with K + M, not with the whole grid.
        """
        assert tokens.kept is not None
        x = self.embed(tokens.x)  # [B, P + K, dim]
        prefix, visible = x[:, : tokens.num_prefix], x[:, tokens.num_prefix :]
        masks = self.mask_token.to(x.dtype).expand(*predict.shape, -1)
        places = torch.cat([tokens.kept, predict], dim=1)  # [B, K + M]
        positions = take_positions(self.positions(tokens.grid, like=visible, gsd=gsd), places)
        x = torch.cat([prefix, torch.cat([visible, masks], dim=1) + positions], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x[:, -predict.shape[1] :]))
