"""The Vision Transformer encoder: timm's blocks with our attention, any band count, any image size."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from timm.layers import LayerNorm
from torch import Tensor, nn

from xscale_lightning.errors import UserError
from xscale_lightning.models.blocks import Block, BlockNorm, init_weights
from xscale_lightning.models.pos_embed import (
    GSDPositions,
    LearnedPositions,
    SinCosPositions,
    StretchedPositions,
    check_width,
    resize_table,
    take_positions,
)
from xscale_lightning.models.tokenizers import PatchEmbed, PatchTokenizer, check_divides
from xscale_lightning.models.tokens import Tokens, pack, unpack

Position = Literal["sincos", "learned", "gsd", "stretched"]
Pool = Literal["mean", "cls"]


def plane_positions(
    position: Position, dim: int, patch_size: int, image_size: tuple[int, int], reference_gsd: float
) -> nn.Module:
    """Positions in the image plane by name; see `ViT` for the arguments.

    Raises:
        UserError: a learned table for a size that the patch does not divide.
    """
    if position == "learned":
        check_divides(patch_size, *image_size)
        return LearnedPositions(dim, (image_size[0] // patch_size, image_size[1] // patch_size))
    check_width(dim)
    if position == "gsd":
        return GSDPositions(dim, reference_gsd)
    return StretchedPositions(dim) if position == "stretched" else SinCosPositions(dim)


class Encoder(nn.Module):
    """What every backbone offers to the methods; see `docs/architecture.md`, "Backbone"."""

    in_chans: int
    patch_size: int
    num_features: int
    depth: int
    num_prefix: int
    pool_mode: Pool

    def embed(self, images: Tensor, gsd: Tensor | None = None, keep: Tensor | None = None) -> Tokens:
        """Prefix and patch tokens with positions; only the patches at `keep [B, K]` when given."""
        raise UserError(f"{type(self).__name__} does not embed images into tokens.")

    def encode(self, tokens: Tokens) -> Tokens:
        """Blocks and final norm over embedded tokens."""
        raise UserError(f"{type(self).__name__} does not encode tokens.")

    def forward(self, images: Tensor, gsd: Tensor | None = None, keep: Tensor | None = None) -> Tokens:
        """Encode `images [B, C, H, W]`; only the patches at flat grid indices `keep [B, K]` when given."""
        return self.encode(self.embed(images, gsd, keep))

    def encode_together(self, batches: Sequence[Tokens]) -> list[Tokens]:
        """Encode several token batches in one pass; this needs sequences of equal length.

        Raises:
            UserError: the lengths differ and this backbone cannot pack.
        """
        if len({tokens.x.shape[1] for tokens in batches}) > 1:
            raise UserError(f"{type(self).__name__} cannot encode views of different sizes in one pass: use vit_*.")
        whole = self.encode(replace(batches[0], x=torch.cat([tokens.x for tokens in batches]), kept=None))
        parts = whole.x.split([len(tokens.x) for tokens in batches])
        return [replace(tokens, x=x) for tokens, x in zip(batches, parts, strict=True)]

    def token_grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Token grid `(G, H, W)` of images of `height x width` pixels; G is 1 except with spectral cubes.

        Raises:
            UserError: the patch size does not divide the image.
        """
        check_divides(self.patch_size, height, width)
        return 1, height // self.patch_size, width // self.patch_size

    def grid(self, images: Tensor) -> tuple[int, int, int]:
        """Token grid `(G, H, W)` of `images [B, C, H, W]`."""
        height, width = images.shape[-2:]
        return self.token_grid(height, width)

    def pool(self, tokens: Tokens) -> Tensor:
        """One vector per image `[B, D]`: the mean of the patch tokens, or the class token."""
        return tokens.x[:, 0] if self.pool_mode == "cls" else tokens.patches.mean(1)

    def layer_index(self, name: str) -> int:
        """Depth of a parameter for layer decay: 0 for the embedding, i + 1 for block i, depth + 1 for what follows."""
        if "blocks." in name:
            return int(name.split("blocks.")[1].split(".")[0]) + 1
        return 0 if any(part in name for part in ("patch_embed", "positions", "pos_embed", "token")) else self.depth + 1


class ViT(Encoder):
    """Vision Transformer (Dosovitskiy et al. 2021) as an encoder of visible tokens (He et al. 2022).

    Args:
        in_chans: number of bands.
        patch_size: in pixels.
        dim: width D.
        depth: number of blocks.
        num_heads: attention heads.
        position: `sincos` (fixed, MAE), `gsd` (fixed, scaled by metres per pixel), `stretched` (fixed, LatentMIM) or
            `learned` (a table that resizes).
        image_size: pixels (height, width) that the learned table is made for; the others do not need it.
        class_token: prepend a learned token; it has no position, as in MAE.
        drop_path: stochastic depth, rising linearly to this rate.
        pool: how `pool` makes one vector of the tokens.
        reference_gsd: metres per pixel at which `gsd` positions equal plain sin-cos.
        mlp_ratio: width of the MLPs over D.
        block_norm: LayerNorm before (`pre`) or after (`post`) attention and MLP.
        norm_eps: of the blocks' LayerNorms.
        final_norm: apply the LayerNorm after the last block; without, it stays as a frozen, unused parameter.
        final_norm_eps: of that LayerNorm.
        patch_embed: another tokenizer than that of square patches of all bands.
        positions: other positions than `position` says.

    Raises:
        UserError: a width that the heads do not divide, `pool='cls'` without a class token, or a learned table for
            a size that the patch does not divide.
    """

    def __init__(
        self,
        in_chans: int,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        position: Position = "sincos",
        image_size: tuple[int, int] = (224, 224),
        class_token: bool = True,
        drop_path: float = 0.0,
        pool: Pool = "mean",
        reference_gsd: float = 10.0,
        mlp_ratio: float = 4.0,
        block_norm: BlockNorm = "pre",
        norm_eps: float = 1e-6,
        final_norm: bool = True,
        final_norm_eps: float = 1e-6,
        patch_embed: PatchTokenizer | None = None,
        positions: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            names = "backbone.dim or backbone.num_heads"
            raise UserError(f"backbone width {dim} is not divisible by its {num_heads} heads: change {names}.")
        if pool == "cls" and not class_token:
            raise UserError("pool 'cls' needs a class token: set class_token to true or pool to 'mean'.")
        self.in_chans, self.patch_size, self.num_features, self.depth = in_chans, patch_size, dim, depth
        self.num_prefix = int(class_token)
        self.pool_mode: Pool = pool
        self.patch_embed: PatchTokenizer = patch_embed or PatchEmbed(patch_size, in_chans, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.positions = positions or plane_positions(position, dim, patch_size, image_size, reference_gsd)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, num_heads, rate, mlp_ratio, block_norm, norm_eps) for rate in rates)
        self.norm = LayerNorm(dim, eps=final_norm_eps).requires_grad_(final_norm)
        self.final_norm = final_norm
        self.apply(init_weights)
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)

    def embed(self, images: Tensor, gsd: Tensor | None = None, keep: Tensor | None = None) -> Tokens:
        """Class token and patch tokens with positions; only the patches at `keep [B, K]` are computed when given."""
        grid = self.patch_embed.grid(images)
        return self.place(self.patch_embed(images, keep), grid, gsd, keep)

    def place(self, x: Tensor, grid: tuple[int, int, int], gsd: Tensor | None, keep: Tensor | None) -> Tokens:
        """Tokens of embedded patches `x [B, K or N, D]`: positions are added, the class token put in front."""
        positions = self.positions(grid, like=x, gsd=gsd)  # [1 or B, N, D]
        x = x + (positions if keep is None else take_positions(positions, keep))
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        return Tokens(x, grid, keep, self.num_prefix)

    def token_grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Token grid `(G, H, W)`, as the tokenizer cuts."""
        return self.patch_embed.token_grid(height, width)

    def encode(self, tokens: Tokens) -> Tokens:
        """Blocks and final norm."""
        return replace(tokens, x=self.encode_rows(tokens.x))

    def encode_rows(self, x: Tensor, seqlens: tuple[int, ...] | None = None) -> Tensor:
        """Blocks and final norm over embedded tokens `[B, N, D]`, or over a packed row `[1, sum N, D]` of `seqlens`."""
        for block in self.blocks:
            x = block(x, seqlens=seqlens)
        return self.norm(x) if self.final_norm else x

    def encode_together(self, batches: Sequence[Tokens]) -> list[Tokens]:
        """Encode several token batches in one pass; those of different lengths are packed into one row."""
        if len({tokens.x.shape[1] for tokens in batches}) == 1:
            return super().encode_together(batches)
        rows, seqlens = pack([tokens.x for tokens in batches])
        parts = unpack(self.encode_rows(rows, seqlens), [tokens.x for tokens in batches])
        return [replace(tokens, x=x) for tokens, x in zip(batches, parts, strict=True)]

    def load_timm_state_dict(self, weights: dict[str, Tensor]) -> list[str]:
        """Load the weights of timm's `VisionTransformer` of the same size; returns the names that found no use (head).

        timm adds its position table to the class token too: that part goes into our class token, so the features stay
        equal. With fixed positions the table is left out and named in the return value.

        Raises:
            UserError: shapes differ (bands, patch, width) or weights are missing.
        """
        weights = dict(weights)
        table = weights.pop("pos_embed", None)
        unused = [name for name in weights if name not in dict(self.named_parameters())]
        weights = {name: value for name, value in weights.items() if name not in unused}
        if table is not None and isinstance(self.positions, LearnedPositions):
            prefix, patches = table[:, : self.num_prefix], table[:, self.num_prefix :]
            side = int(patches.shape[1] ** 0.5)
            old = self.positions.grid if patches.shape[1] == self.positions.table.shape[1] else (side, side)
            weights["positions.table"] = resize_table(patches, old, self.positions.grid)
            if self.num_prefix:
                weights["cls_token"] = weights["cls_token"] + prefix
        elif table is not None:
            unused.append("pos_embed")
        try:
            missing, _ = self.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            raise UserError(f"these weights do not fit the backbone: {str(error).splitlines()[1].strip()}") from error
        if missing:
            raise UserError(f"the weights lack {len(missing)} of the backbone's tensors, first {missing[0]!r}.")
        return unused
