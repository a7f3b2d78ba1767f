"""Vision Transformer over spectral cubes: a plain `ViT` with another tokenizer and with spectral positions."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from xscale_lightning.errors import UserError
from xscale_lightning.models.cubes import CubeEmbed
from xscale_lightning.models.spectral_positions import (
    JointSinCos,
    LearnedSpectral,
    SinCosSpectral,
    SpectralPositions,
    WavelengthPositions,
)
from xscale_lightning.models.tokens import Tokens, gather
from xscale_lightning.models.vit import ViT, plane_positions

if TYPE_CHECKING:
    from xscale_lightning.models.registry import BackboneConfig

Spectral = Literal["learned", "sincos", "joint", "wavelength"]


class SpectralViT(ViT):
    """ViT whose tokens are spectral cubes; the grid is `(G, H, W)` with G groups of bands."""

    patch_embed: CubeEmbed

    def embed_cubes(
        self, cubes: Tensor, grid: tuple[int, int, int], gsd: Tensor | None = None, keep: Tensor | None = None
    ) -> Tokens:
        """As `embed`, of images that were cut already: `cubes [B, L, V]` from `patch_embed.cut`."""
        return self.place(self.patch_embed.embed(cubes if keep is None else gather(cubes, keep)), grid, gsd, keep)


def cube_positions(dim: int, patch_embed: CubeEmbed, config: "BackboneConfig") -> nn.Module:
    """Positions of width `dim` for the cubes of a backbone; encoder and decoder each have their own.

    Raises:
        UserError: `joint` with another spatial position than `sincos`, or wavelengths that are not known.
    """
    if config.spectral == "joint":
        if config.position != "sincos":
            raise UserError(
                f"backbone.spectral joint is a sin-cos over both: set backbone.position to sincos, not "
                f"{config.position}."
            )
        return JointSinCos(dim)
    size = (config.image_size, config.image_size)
    spatial = plane_positions(config.position, dim, patch_embed.patch_size, size, config.reference_gsd)
    if config.spectral == "learned":
        return SpectralPositions(spatial, LearnedSpectral(dim, patch_embed.groups))
    if config.spectral == "sincos":
        return SpectralPositions(spatial, SinCosSpectral(dim))
    known: Sequence[float | None] = config.wavelengths or [None] * patch_embed.in_chans
    groups = [[known[band] for band in group] for group in patch_embed.band_groups()]
    return SpectralPositions(spatial, WavelengthPositions(dim, groups))
