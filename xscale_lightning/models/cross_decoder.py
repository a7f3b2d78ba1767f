"""LatentMIM's decoder: queries for the hidden tokens that attend to each other and to the visible ones."""

import math

import torch
from timm.layers import LayerNorm, Mlp
from torch import Tensor, nn

from xscale_lightning.errors import UserError
from xscale_lightning.models.attention import Attention, CrossAttention
from xscale_lightning.models.blocks import init_weights
from xscale_lightning.models.decoders import check_sizes
from xscale_lightning.models.pos_embed import StretchedPositions, take_positions
from xscale_lightning.models.tokens import Tokens


class CrossBlock(nn.Module):
    """Self-attention among the queries, cross-attention to a context, and an MLP, each behind a LayerNorm.

    Args:
        dim: width.
        num_heads: attention heads.
        mlp_ratio: width of the MLP over `dim`.
        norm_eps: of the LayerNorms.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=norm_eps)
        self.self_attn = Attention(dim, num_heads, qkv_bias=True)
        self.norm2q = LayerNorm(dim, eps=norm_eps)
        self.norm2kv = LayerNorm(dim, eps=norm_eps)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm3 = LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Queries `x [B, M, D]` and what they attend to, `context [B, N, D]` -> `[B, M, D]`."""
        x = x + self.self_attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2q(x), self.norm2kv(context))
        return x + self.mlp(self.norm3(x))


class CrossDecoder(nn.Module):
    """Predicts hidden tokens from visible ones.

    The query of hidden token m is the mask token plus an average of the embedded visible tokens e_v, weighted by how
    near their positions are:

        q_m = mask + sum_v softmax_v(<p_m, p_v> / sqrt(dim)) e_v + p_m

    Args:
        in_dim: width of the visible tokens.
        out_dim: width of the predictions.
        dim: width of the decoder.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLPs over `dim`.
        norm_eps: of the LayerNorms.
        class_token: put a class token in front of the queries.
        positions: positions of width `dim`; default LatentMIM's.

    Source: Wei et al. 2024 (LatentMIM), published code: 512 wide, 3 blocks, 16 heads; the mask token begins at zero.

    Raises:
        UserError: a width that the heads do not divide, or nothing to decode with.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        dim: int = 512,
        depth: int = 3,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        class_token: bool = True,
        positions: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if min(dim, depth, num_heads) < 1:
            raise UserError(
                f"decoder width, depth and heads must be at least 1, got {dim}, {depth} and {num_heads} "
                "(decoder_dim, decoder_depth, decoder_heads)."
            )
        check_sizes(dim, depth, num_heads)
        if dim % num_heads:
            names = "decoder_dim or decoder_heads"
            raise UserError(f"decoder width {dim} is not divisible by its {num_heads} heads: change {names}.")
        self.embed = nn.Linear(in_dim, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = positions or StretchedPositions(dim)
        self.blocks = nn.ModuleList(CrossBlock(dim, num_heads, mlp_ratio, norm_eps) for _ in range(depth))
        self.norm = LayerNorm(dim, eps=norm_eps)
        self.head = nn.Linear(dim, out_dim)
        self.apply(init_weights)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, tokens: Tokens, hidden: Tensor, gsd: Tensor | None = None) -> Tensor:
        """Predictions `[B, M, out_dim]` of the tokens at `hidden [B, M]`, class token left out."""
        return self.decode(tokens, hidden, gsd)[:, int(self.cls_token is not None) :]

    def decode(self, tokens: Tokens, hidden: Tensor, gsd: Tensor | None = None) -> Tensor:
        """As `forward`, with the class token in front: `[B, 1 + M, out_dim]`."""
        assert tokens.kept is not None
        table = self.positions(tokens.grid, like=self.mask_token, gsd=gsd)  # [1 or B, N, dim]
        at_visible, at_hidden = take_positions(table, tokens.kept), take_positions(table, hidden)
        e = self.embed(tokens.x)  # [B, P + K, dim]
        prefix, visible = e[:, : tokens.num_prefix], e[:, tokens.num_prefix :]
        with torch.autocast(e.device.type, enabled=False):  # [B, M, K]; positions are no place to round
            near = (at_hidden @ at_visible.transpose(1, 2) / math.sqrt(table.shape[-1])).softmax(-1)
        x = self.mask_token.to(e.dtype) + near.to(e.dtype) @ visible + at_hidden.to(e.dtype)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.to(e.dtype).expand(len(x), -1, -1), x], dim=1)
        context = torch.cat([prefix, visible + at_visible.to(e.dtype)], dim=1)
        for block in self.blocks:
            x = block(x, context)
        return self.head(self.norm(x))
