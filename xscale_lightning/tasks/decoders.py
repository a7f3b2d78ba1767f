"""From the tokens of a Vision Transformer to a class for every pixel."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xscale_lightning.errors import UserError
from xscale_lightning.models.tokens import Tokens
from xscale_lightning.models.vit import Encoder

DecoderName = Literal["linear", "fpn", "upernet"]
FACTORS = (8, 4, 2, 1)  # maps of the pyramid, relative to the tokens' grid
GROUPS = 32


def blocks_of(encoder: Encoder) -> list[nn.Module]:
    """Transformer blocks of an encoder, in order."""
    owner = encoder if hasattr(encoder, "blocks") else getattr(encoder, "model", encoder)
    return list(owner.blocks)  # type: ignore[arg-type]


def tokens_at(encoder: Encoder, images: Tensor, gsd: Tensor | None, depths: Sequence[int]) -> list[Tokens]:
    """Tokens after so many blocks of one pass; the last depth is the encoder's own output, with its last norm.

    Args:
        encoder: any encoder whose blocks run one after the other.
        images: `[B, C, H, W]`, normalised.
        gsd: metres per pixel `[B]`.
        depths: numbers of blocks, rising, the last one all of them.
    """
    kept: dict[int, Tensor] = {}
    blocks = blocks_of(encoder)

    def keep(depth: int):
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            kept[depth] = output

        return hook

    handles = [blocks[depth - 1].register_forward_hook(keep(depth)) for depth in depths[:-1]]
    try:
        last = encoder(images, gsd=gsd)
    finally:
        for handle in handles:
            handle.remove()
    return [*(Tokens(kept[depth], last.grid, None, last.num_prefix) for depth in depths[:-1]), last]


def even_depths(depth: int, count: int = 4) -> list[int]:
    """`count` depths, evenly spread, the last one all blocks: 3, 6, 9, 12 of twelve."""
    return [max(1, round(depth * (i + 1) / count)) for i in range(count)]


class GroupMix(nn.Module):
    """Tokens as a map `[B, D, h, w]`; of spectral cubes, a learned mean over the groups of bands.

    Source: published code of SpectralGPT for OSCD, a linear layer from the groups to one.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((groups,), 1 / groups)) if groups > 1 else None

    def forward(self, tokens: Tokens) -> Tensor:
        """Map of the patch tokens."""
        groups, height, width = tokens.grid
        x = tokens.patches.unflatten(1, (groups, height, width))  # [B, G, h, w, D]
        mixed = x[:, 0] if self.weight is None else torch.einsum("bghwd,g->bhwd", x, self.weight.to(x.dtype))
        return mixed.permute(0, 3, 1, 2)


class LinearDecoder(nn.Module):
    """One linear layer per token.

    Source: Waithaka et al. 2026, section 2.4 of our notes: weights N(0, 0.01), bias 0.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(dim, num_classes, 1)
        nn.init.normal_(self.layer.weight, std=0.01)
        nn.init.zeros_(self.layer.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits `[B, K, h, w]` of the last map."""
        return self.layer(maps[-1])


def group_norm(width: int) -> nn.GroupNorm:
    """GroupNorm of at most 32 groups, each of at least 8 channels: a pooled map of one pixel has something to norm."""
    return nn.GroupNorm(min(GROUPS, width // 8), width)


class Pyramid(nn.Module):
    """Maps of one size from four depths `[B, dim, h, w]` as four sizes `[B, width, f h, f w]`, f = 8, 4, 2, 1.

    Source: published code of SpectralGPT for OSCD: 1 x 1 convolution, GroupNorm, GELU, transposed convolution; here the
    width is the same at every size.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(dim, width, 1, bias=False),
                group_norm(width),
                nn.GELU(),
                nn.ConvTranspose2d(width, width, factor, factor) if factor > 1 else nn.Identity(),
            )
            for factor in FACTORS
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Finest map first."""
        return [branch(x) for branch, x in zip(self.branches, maps, strict=True)]


def convolution(dim: int, width: int, kernel: int) -> nn.Sequential:
    """Convolution, GroupNorm, GELU: batches of one image train as well."""
    return nn.Sequential(nn.Conv2d(dim, width, kernel, padding=kernel // 2, bias=False), group_norm(width), nn.GELU())


class UPerNet(nn.Module):
    """Pyramid pooling over the coarsest map, a top-down way, and all maps joined (Xiao et al. 2018), with GroupNorm.

    Args:
        dim: width of the encoder.
        num_classes: number of classes.
        width: channels of the decoder, a multiple of 32.
        dropout: before the last layer.
        pools: sides of the maps that the coarsest one is pooled to.
    """

    def __init__(
        self, dim: int, num_classes: int, width: int, dropout: float, pools: Sequence[int] = (1, 2, 3, 6)
    ) -> None:
        super().__init__()
        self.pyramid = Pyramid(dim, width)
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveMaxPool2d(n), convolution(width, width, 1)) for n in pools)
        self.pooled = convolution(width * (1 + len(pools)), width, 3)
        self.lateral = nn.ModuleList(convolution(width, width, 1) for _ in FACTORS[:-1])
        self.smooth = nn.ModuleList(convolution(width, width, 3) for _ in FACTORS[:-1])
        self.join = convolution(width * len(FACTORS), width, 3)
        self.last = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(width, num_classes, 1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits `[B, K, 8 h, 8 w]` of maps from four depths `[B, dim, h, w]`."""
        *finer, coarse = self.pyramid(maps)
        pooled = [_resize(pool(coarse), coarse) for pool in self.pools]
        levels = [self.pooled(torch.cat([coarse, *pooled], 1))]
        for lateral, x in zip(reversed(self.lateral), reversed(finer), strict=True):
            levels.append(lateral(x) + _resize(levels[-1], x))
        smooth = [level if i == 0 else self.smooth[-i](level) for i, level in enumerate(levels)]
        return self.last(self.join(torch.cat([_resize(level, levels[-1]) for level in smooth], 1)))


class FPN(nn.Module):
    """Feature pyramid (Kirillov et al. 2019) of segmentation-models-pytorch over the same pyramid.

    Args:
        dim: width of the encoder.
        num_classes: number of classes.
        width: channels of the pyramid, a multiple of 32; the maps that are added have half of them.
        dropout: before the last layer.
    """

    def __init__(self, dim: int, num_classes: int, width: int, dropout: float) -> None:
        super().__init__()
        from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder

        self.pyramid = Pyramid(dim, width)
        self.decoder = FPNDecoder([width] * 5, 4, width, max(GROUPS, width // 2), dropout)
        self.last = nn.Conv2d(self.decoder.out_channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits `[B, K, 8 h, 8 w]` of maps from four depths `[B, dim, h, w]`."""
        return self.last(self.decoder(self.pyramid(maps)))


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


class DenseHead(nn.Module):
    """Tokens of one or four depths, or the combination of those of two images, to logits for every pixel.

    Args:
        name: `linear`, `fpn` or `upernet`.
        encoder: whose tokens these are.
        groups: spectral groups of its tokens.
        num_classes: number of classes.
        width: channels of `fpn` and `upernet`.
        dropout: before their last layer.
        times: how many images' features are joined along the channels.

    Raises:
        UserError: a width that is no multiple of 32.
    """

    def __init__(
        self,
        name: DecoderName,
        encoder: Encoder,
        groups: int,
        num_classes: int,
        width: int,
        dropout: float,
        times: int = 1,
    ) -> None:
        super().__init__()
        if width < GROUPS or width % GROUPS:
            raise UserError(f"model.decoder_dim must be a multiple of {GROUPS}, got {width}.")
        self.depths = [encoder.depth] if name == "linear" else even_depths(encoder.depth)
        self.mix = nn.ModuleList(GroupMix(groups) for _ in self.depths)
        dim = times * encoder.num_features
        if name == "linear":
            self.decoder: nn.Module = LinearDecoder(dim, num_classes)
        else:
            self.decoder = (FPN if name == "fpn" else UPerNet)(dim, num_classes, width, dropout)

    def maps(self, tokens: Sequence[Tokens]) -> list[Tensor]:
        """Feature maps `[B, D, h, w]` of the tokens from `depths`."""
        return [mix(part) for mix, part in zip(self.mix, tokens, strict=True)]

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits `[B, K, H, W]` for images of `size`."""
        return F.interpolate(self.decoder(maps).float(), size, mode="bilinear", align_corners=False)
