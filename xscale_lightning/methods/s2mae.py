"""S2MAE: masked autoencoding of spectral cubes (Li, Hong, Chanussot, CVPR 2024).

"S2MAE: A Spatial-Spectral Pretraining Foundation Model for Spectral Remote Sensing Data", pages 24088 to 24097.

A token is a cube of 3 neighbouring bands x 8 x 8 pixels. Hide a random 90 % of the cubes, in space and spectrum alike,
encode the visible ones, put mask tokens in the gaps, decode, and compare the hidden cubes with the image:

    x_v = encoder(cubes[kept] + p_space + p_spectrum)       learned, separable positions; no class token
    y   = decoder(unshuffle(x_v, mask token) + its own positions)
    L   = mean over hidden cubes of |y - t|^2               t: every band of every image scaled to [0, 1]
        + spectral term, if asked for                       SpectralGPT's (Hong et al. 2024), of the same group

No code of the paper is public. Sizes and arithmetic are those of the authors' SpectralGPT with its first loss alone,
which is mae_st's; `docs/methods/s2mae.md` says how sure each fact is. Beyond both: any number of bands (padding takes
no part in the loss), positions by wavelength, and a decoder that predicts a random share of the hidden cubes.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from xscale_lightning.errors import UserError
from xscale_lightning.losses import (
    at_least_float32,
    normalize_patches,
    patch_mse,
    patch_statistics,
    spectral_means,
    spectral_sum,
)
from xscale_lightning.masking import check_ratio, keep_count, random_mask, to_boolean
from xscale_lightning.methods.base import Batch, Reconstruction, SSLModule, StepOutput
from xscale_lightning.methods.checks import check_finite
from xscale_lightning.models.cubes import CubeEmbed
from xscale_lightning.models.decoders import MAEDecoder
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.scaling import Scale, image_scaling
from xscale_lightning.models.spectral_vit import SpectralViT, cube_positions
from xscale_lightning.models.tokens import Tokens, gather

PAPER = BackboneConfig(
    "spectral_vit_base_cube3_patch8", position="learned", spectral="learned", image_size=96, class_token=False
)


class S2MAE(SSLModule):
    """Masked autoencoder over spectral cubes.

    Args:
        mask_ratio: share of the cubes hidden from the encoder, in [0, 1); at 0 the loss takes every cube.
        norm_pix_loss: standardise the target per cube.
        normalize: scale of the input: `minmax` brings every band of every image to [0, 1], `standardize` takes the
            band record's mean and deviation, `none` leaves raw values.
        target: scale of the target, when another than the input's; the paper does not say which its ablation changed.
        spectral_loss: `sum` adds SpectralGPT's spectral term, `means` its earlier form; they decode every cube.
        predict_ratio: share of the hidden cubes that the decoder sees and predicts, drawn anew in every step; below 1
            it makes long spectra affordable.
        decoder_dim: width of the decoder.
        decoder_depth: number of its blocks.
        decoder_heads: number of its attention heads.
        backbone: the encoder, one of `spectral_vit_*`.
        **kwargs: see `SSLModule`.

    Raises:
        UserError: a backbone without spectral cubes, bands that do not fill the cubes, a ratio out of range or one that
            leaves no cube visible, a spectral loss with a predict_ratio below 1, a width that the heads do not divide.
    """

    backbone: SpectralViT

    def __init__(
        self,
        mask_ratio: float = 0.9,
        norm_pix_loss: bool = False,
        normalize: Scale = "minmax",
        target: Scale | None = None,
        spectral_loss: Literal["none", "sum", "means"] = "none",
        predict_ratio: float = 1.0,
        decoder_dim: int = 512,
        decoder_depth: int = 4,
        decoder_heads: int = 16,
        backbone: BackboneConfig = PAPER,
        **kwargs,
    ) -> None:
        super().__init__(backbone=backbone, **kwargs)
        if not isinstance(self.backbone, SpectralViT):
            raise UserError(f"S2MAE needs spectral cubes, backbone {backbone.name!r} has none: take spectral_vit_*.")
        check_ratio(mask_ratio)
        if not 0 < predict_ratio <= 1:
            raise UserError(f"predict_ratio must be in (0, 1], got {predict_ratio}.")
        if predict_ratio < 1 and spectral_loss != "none":
            raise UserError(f"spectral_loss {spectral_loss!r} needs every cube: set predict_ratio to 1, or it to none.")
        self.mask_ratio, self.predict_ratio, self.norm_pix_loss = mask_ratio, predict_ratio, norm_pix_loss
        self.normalize: Scale = normalize
        self.target: Scale | None = target
        self.spectral_loss = spectral_loss
        config = replace(backbone, **{"wavelengths": backbone.options(self.bands.wavelengths)["wavelengths"]})
        self.decoder = MAEDecoder(
            self.backbone.num_features,
            self.cubes.depth * self.cubes.patch_size**2,
            decoder_dim,
            decoder_depth,
            decoder_heads,
            backbone.mlp_ratio,
            backbone.block_norm,
            backbone.norm_eps,
            cube_positions(decoder_dim, self.cubes, config),
            backbone.final_norm_eps,
        )

    @property
    def cubes(self) -> CubeEmbed:
        """The tokenizer: cuts images into cubes and puts them together again."""
        return self.backbone.patch_embed

    # ---- scale of input and target ---------------------------------------------------------------------------------

    def scaling(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Offset and scale `[B or 1, C, 1, 1]` of the input; a constant band gives zeros, not a division by zero."""
        return self._scaling(raw, self.normalize)

    def _scaling(self, raw: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
        return image_scaling(raw, scale, self.mean, self.std)

    def prepare(self, batch: Batch, augment: bool = False) -> Batch:
        """As the base; when the target has another scale, also what brings the input to it: `image * gain + shift`."""
        prepared = super().prepare(batch, augment)
        if self.target is not None:
            raw = batch["image"]
            offset, scale = self.scaling(raw)
            wanted_offset, wanted_scale = self._scaling(raw, self.target)
            shape = (len(raw), -1, 1, 1)
            prepared["gain"] = (scale / wanted_scale).expand(shape)
            prepared["shift"] = ((offset - wanted_offset) / wanted_scale).expand(shape)
        return prepared

    def check_first_batch(self, images: Tensor, raw: Tensor) -> None:
        """Refuse values that are not finite; per-image scaling needs no statistics, a constant band is only said."""
        if self.normalize == "standardize":
            return super().check_first_batch(images, raw)
        check_finite(raw, self.bands)
        constant = (raw.amax((0, 2, 3)) == raw.amin((0, 2, 3))).tolist()
        names = [name for name, same in zip(self.bands.names, constant, strict=True) if same]
        if names:
            rank_zero_warn(
                f"constant in the whole first batch, so there is nothing to learn of it: {', '.join(names)}."
            )
        return None

    def check_size(self, height: int, width: int) -> None:
        """Refuse also a size at which the mask leaves no cube visible."""
        super().check_size(height, width)
        keep_count(math.prod(self.backbone.token_grid(height, width)), self.mask_ratio)

    # ---- one step --------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepOutput:
        """Loss on the hidden cubes of `batch["image"] [B, C, H, W]`."""
        images = batch["image"]
        length = math.prod(self.backbone.grid(images))
        kept, hidden = random_mask(torch.rand(len(images), length, device=images.device), self.mask_ratio)
        if not self.mask_ratio:  # nothing hidden: a plain autoencoder, whose loss takes every cube
            hidden = kept
        elif self.predict_ratio < 1:  # in order of their noise, so the first ones are a random share
            hidden = hidden[:, : max(1, round(hidden.shape[1] * self.predict_ratio))]
        affine = (batch["gain"], batch["shift"]) if "gain" in batch else None
        return self.loss(images, kept, hidden, batch.get("gsd"), affine)

    def loss(
        self,
        images: Tensor,
        kept: Tensor,
        hidden: Tensor,
        gsd: Tensor | None = None,
        affine: tuple[Tensor, Tensor] | None = None,
    ) -> StepOutput:
        """Loss for given masks: flat indices of visible `[B, K]` and predicted `[B, M]` cubes.

        `affine` are gain and shift `[B, C, 1, 1]` that bring `images` to the scale of the target, if that is another.
        """
        grid = self.backbone.grid(images)
        cubes = self.cubes.cut(images)  # [B, L, V]
        target = cubes if affine is None else self.cubes.cut(images * affine[0] + affine[1])
        tokens = self.backbone.encode(self.backbone.embed_cubes(cubes, grid, gsd, kept))

        wanted, real = gather(target, hidden), self._real(hidden, grid)
        wanted = normalize_patches(wanted, real=real) if self.norm_pix_loss else wanted
        terms: dict[str, Tensor] = {}
        if self.spectral_loss != "none":
            whole = self.decoder(tokens, gsd=gsd)  # [B, L, V]
            terms["reconstruction"] = patch_mse(gather(whole, hidden), wanted, real)
            terms["spectral"] = self._spectral(whole, target, grid)
        else:
            partial = kept.shape[1] + hidden.shape[1] < tokens.length
            decode = self.decoder.forward_some if partial else self.decoder
            terms["reconstruction"] = patch_mse(decode(tokens, hidden, gsd), wanted, real)
        loss = torch.stack(list(terms.values())).sum()
        return StepOutput(loss, terms, lambda: self._reconstruct(images, target, kept, gsd, affine), (tokens,))

    def _real(self, ids: Tensor, grid: tuple[int, int, int]) -> Tensor | None:
        """Which values of the cubes `ids [B, M]` are of bands, not padding `[B, M, V]`; None where all are."""
        return self.cubes.real_values(ids // (grid[1] * grid[2])) if self.cubes.padded else None

    def _spectral(self, prediction: Tensor, target: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """SpectralGPT's second term, on all cubes and never on a target normalised per cube; padding counts as met."""
        pair = [at_least_float32(x).unflatten(1, (grid[0], -1)) for x in (prediction, target)]  # [B, G, N, V]
        if self.cubes.padded:
            groups = torch.arange(grid[0], device=target.device)
            pair = [x * self.cubes.real_values(groups)[:, None] for x in pair]
        return (spectral_sum if self.spectral_loss == "sum" else spectral_means)(*pair)

    def _reconstruct(
        self,
        images: Tensor,
        target: Tensor,
        kept: Tensor,
        gsd: Tensor | None,
        affine: tuple[Tensor, Tensor] | None,
    ) -> Reconstruction:
        """Every cube as the decoder predicts it, in the scale of the input; see `_decode_in_turns` for visible ones."""
        tokens = self.backbone(images, gsd=gsd, keep=kept)
        seen = to_boolean(kept, tokens.length)
        mean: Tensor | float = 0.0
        deviation: Tensor | float = 1.0
        if self.norm_pix_loss:
            every = torch.arange(tokens.length, device=kept.device)[None]
            mean, deviation = patch_statistics(target, real=self._real(every, tokens.grid))
        if self.predict_ratio < 1 and kept.shape[1] < tokens.length:
            cubes = self._decode_in_turns(tokens, (target - mean) / deviation, seen, gsd)
        else:
            cubes = self.decoder(tokens, gsd=gsd).to(target.dtype)
        pixels = self.cubes.join(cubes * deviation + mean, tokens.grid)
        if affine is not None:
            pixels = (pixels - affine[1]) / affine[0]
        visible = self.cubes.join(seen.unsqueeze(-1).expand_as(target), tokens.grid)
        return Reconstruction(images, pixels, visible, borrows=self.norm_pix_loss)

    def _decode_in_turns(self, tokens: Tokens, cubes: Tensor, seen: Tensor, gsd: Tensor | None) -> Tensor:
        """`cubes [B, L, V]` with the hidden ones predicted, as many at a time as the decoder was trained on.

        The order is random and fixed: neighbours in one turn would be another task than the one it learned.
        """
        order = torch.randperm(tokens.length, generator=torch.Generator().manual_seed(0)).to(seen.device)
        hidden = order.expand(len(seen), -1)[~seen[:, order]].unflatten(0, (len(seen), -1))  # [B, M]
        for part in hidden.chunk(math.ceil(1 / self.predict_ratio), dim=1):
            predicted = self.decoder.forward_some(tokens, part, gsd).to(cubes.dtype)
            cubes = cubes.scatter(1, part.unsqueeze(-1).expand_as(predicted), predicted)
        return cubes
