"""A tokenizer and a backbone: at every place one token per spectral region, after SatMAE's groups of bands."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xscale_lightning import register_backbone
from xscale_lightning.models.pos_embed import SinCosPositions
from xscale_lightning.models.spectral_positions import LearnedSpectral, SpectralPositions
from xscale_lightning.models.tokenizers import PatchEmbed, PatchTokenizer
from xscale_lightning.models.tokens import gather
from xscale_lightning.models.vit import ViT

EDGES = (0.7, 1.0)  # um: visible, near infrared, short-wave infrared


def spectral_regions(wavelengths: Sequence[float | None]) -> list[list[int]]:
    """Band numbers by region, empty regions left out; bands of unknown wavelength (um) share one more."""
    places = [len(EDGES) + 1 if w is None else sum(w >= edge for edge in EDGES) for w in wavelengths]
    groups = [[band for band, place in enumerate(places) if place == region] for region in range(len(EDGES) + 2)]
    return [group for group in groups if group]


class RegionEmbed(PatchTokenizer):
    """Square patches of each group of bands, embedded apart: G groups make G tokens at every place.

    Args:
        patch_size: in pixels.
        groups: band numbers of every group; each band in one of them.
        dim: width of the tokens.
    """

    def __init__(self, patch_size: int, groups: Sequence[Sequence[int]], dim: int) -> None:
        super().__init__(patch_size, sum(len(group) for group in groups))
        self.groups = [list(group) for group in groups]
        self.parts = nn.ModuleList(PatchEmbed(patch_size, len(group), dim) for group in groups)

    def token_grid(self, height: int, width: int) -> tuple[int, int, int]:
        """`(G, H / p, W / p)`."""
        return len(self.groups), *super().token_grid(height, width)[1:]

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Embed `images [B, C, H, W]` -> `[B, G * h * w, D]`, group slowest; those at `keep [B, K]` when given."""
        pairs = zip(self.parts, self.groups, strict=True)
        x = torch.cat([part(images[:, group]) for part, group in pairs], dim=1)
        return x if keep is None else gather(x, keep)


@register_backbone("region_vit_tiny_patch8")
def region_vit_tiny(in_chans, config):
    """ViT-tiny over one token per spectral region and patch of 8 pixels."""
    dim, patch = config.dim or 192, config.patch_size or 8
    groups = spectral_regions(config.wavelengths or [None] * in_chans)
    return ViT(
        in_chans,
        patch,
        dim,
        depth=config.depth or 12,
        num_heads=config.num_heads or 3,
        pool=config.pool,
        patch_embed=RegionEmbed(patch, groups, dim),
        positions=SpectralPositions(SinCosPositions(dim), LearnedSpectral(dim, len(groups))),
    )
