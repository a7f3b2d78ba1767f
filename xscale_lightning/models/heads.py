"""Heads that a method puts on the tokens of an encoder."""

from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from xscale_lightning.errors import UserError
from xscale_lightning.models.blocks import init_weights
from xscale_lightning.models.tokens import Tokens
from xscale_lightning.models.vit import Encoder, ViT


class ProjectionHead(nn.Module):
    """Linear layers without bias, each followed by a LayerNorm, with a GELU between them, token by token.

    Args:
        dim: width of the tokens, in and out.
        hidden_dim: width between the layers.
        layers: how many; 0 makes the head an identity.
        norm_eps: epsilon of the LayerNorms.

    Source: Wei et al. 2024 (LatentMIM), published code: 3 layers, 4096 wide.

    Raises:
        UserError: a hidden width below 1, or fewer than 0 layers.
    """

    def __init__(self, dim: int, hidden_dim: int = 4096, layers: int = 3, norm_eps: float = 1e-5) -> None:
        super().__init__()
        if hidden_dim < 1 or layers < 0:
            raise UserError(f"head_dim must be at least 1 and head_layers 0 or more, got {hidden_dim} and {layers}.")
        self.layers = layers
        widths = [dim, *[hidden_dim] * (layers - 1), dim]
        for i in range(layers):
            self.add_module(f"linear{i}", nn.Linear(widths[i], widths[i + 1], bias=False))
            self.add_module(f"norm{i}", nn.LayerNorm(widths[i + 1], eps=norm_eps))
        self.act = nn.GELU()
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Project tokens `[B, N, dim]` -> `[B, N, dim]`."""
        for i in range(self.layers):
            x = self.get_submodule(f"norm{i}")(self.get_submodule(f"linear{i}")(x))
            x = self.act(x) if i < self.layers - 1 else x
        return x


class ProjectedEncoder(nn.Module):
    """An encoder with a projection head behind it; what a target network is a copy of."""

    def __init__(self, backbone: Encoder, head: ProjectionHead) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(
        self, images: Tensor, keep: Tensor | None = None, gsd: Tensor | None = None, depth: int | None = None
    ) -> Tokens:
        """Projected tokens of the patches at `keep [B, K]` of `images [B, C, H, W]`, or of all.

        With a `depth`, those after so many blocks instead, without last norm and head; at depth 0 the embedded patches
        without positions and class token. Only a `ViT` has depths.
        """
        if depth is None:
            tokens = self.backbone(images, gsd=gsd, keep=keep)
            return replace(tokens, x=self.head(tokens.x))
        backbone = cast(ViT, self.backbone)
        if depth == 0:
            return Tokens(backbone.patch_embed(images, keep), backbone.grid(images), keep)
        tokens = backbone.embed(images, gsd, keep)
        x = tokens.x
        for block in list(backbone.blocks)[:depth]:
            x = block(x)
        return replace(tokens, x=x)
