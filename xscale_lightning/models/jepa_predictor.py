"""I-JEPA's predictor: a narrow Vision Transformer that fills target blocks in."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from torch import Tensor, nn

from xscale_lightning.errors import UserError
from xscale_lightning.masking_blocks import Blocks
from xscale_lightning.models.blocks import MAX_DEPTH, Block, init_weights
from xscale_lightning.models.pos_embed import SinCosPositions
from xscale_lightning.models.tokens import pack, unpack


@dataclass(frozen=True)
class PredictorConfig:
    """Size of I-JEPA's predictor."""

    dim: int = 384
    """Width."""
    depth: int = 6
    """Number of blocks."""
    num_heads: int | None = None
    """Number of attention heads; null takes the encoder's, as published."""
    mlp_ratio: float = 4.0
    """Width of its MLPs over `dim`; 4 as published, beside the giant encoder of another ratio, too."""

    def __post_init__(self) -> None:
        """Refuse sizes that no predictor can have."""
        for name in ("dim", "depth", "num_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"predictor.{name} must be at least 1, got {value}.")
        if self.depth > MAX_DEPTH:
            raise UserError(f"predictor.depth must be at most {MAX_DEPTH}, got {self.depth}.")
        if not self.dim * self.mlp_ratio >= 1:
            raise UserError(f"predictor.mlp_ratio {self.mlp_ratio} leaves its MLPs no width: take 4.")
        if self.dim % 4:
            raise UserError(f"predictor.dim {self.dim}: its sin-cos positions need a multiple of 4.")


class JEPAPredictor(nn.Module):
    """Predict the tokens of target blocks from those of a context.

    Args:
        in_dim: width of the encoder.
        dim: width of the predictor.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLPs over `dim`.
        norm_eps: of all its LayerNorms.
        positions: positions of width `dim`; default sin-cos.

    Source: Assran et al. 2023 (I-JEPA), section 3, "prediction".

    Raises:
        UserError: a width that the heads do not divide.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int = 384,
        depth: int = 6,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        positions: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise UserError(f"predictor.dim {dim} is not divisible by its {num_heads} heads: change one of them.")
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = positions or SinCosPositions(dim)
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio=mlp_ratio, norm_eps=norm_eps) for _ in range(depth))
        self.norm = LayerNorm(dim, eps=norm_eps)
        self.proj = nn.Linear(dim, in_dim)
        self.apply(init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context: Tensor, blocks: Blocks, grid: tuple[int, ...], gsd: Tensor | None = None) -> Tensor:
        """Predicted tokens of every target block from every context, `[T, C, B, M, in_dim]`.

        Each pair of a target block and a context is a sequence of its own; all of them go through in one pass.

        Args:
            context: encoded context tokens `[N, in_dim]`, in the order of `blocks.context`.
            blocks: where they are and what is to be predicted.
            grid: token grid `(G, H, W)`.
            gsd: metres per pixel `[B]`, for positions that are scaled by it.
        """
        targets, images, size = blocks.targets.shape
        x = self.embed(context)  # [N, dim]
        positions = self.positions(grid, like=x, gsd=gsd)  # [1 or B, L, dim]
        x = x + _rows_at(positions, blocks.context)
        wanted = blocks.flat_targets  # [T, B, M]
        masks = self.mask_token.to(x.dtype) + _rows_at(positions, wanted.flatten()).view(*wanted.shape, -1)
        masks = masks[:, blocks.order.argsort() % images].transpose(0, 1)  # [C * B, T, M, dim], in the sequences' order

        parts, rows, sequences = [], x.split([n * k for n, k in blocks.runs]), masks.split([n for n, _ in blocks.runs])
        for (n, k), visible, hidden in zip(blocks.runs, rows, sequences, strict=True):  # one run, unless packed
            visible = visible.view(n, 1, k, -1).expand(-1, targets, -1, -1)
            parts.append(torch.cat([visible, hidden], dim=2).flatten(0, 1))  # [n * T, K + M, dim]
        x, seqlens = (parts[0], None) if len(parts) == 1 else pack(parts)
        for block in self.blocks:
            x = block(x, seqlens=seqlens)
        filled = torch.cat([part[:, -size:] for part in (unpack(x, parts) if seqlens else [x])])  # [C * B * T, M, dim]
        y = self.proj(self.norm(filled)).unflatten(0, (-1, targets))[blocks.order]  # [C * B, T, M, in_dim]
        return y.unflatten(0, (-1, images)).permute(2, 0, 1, 3, 4)


def _rows_at(positions: Tensor, flat: Tensor) -> Tensor:
    """Positions `[1 or B, L, D]` at image x L + place `[N]` -> `[N, D]`."""
    if len(positions) == 1:  # as an embedding: its gradient is summed into L rows
        return F.embedding(flat % positions.shape[1], positions[0])
    return positions.flatten(0, 1)[flat]
