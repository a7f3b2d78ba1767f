"""Masked autoencoder: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022.

Hide a random 75 % of the patches, encode only the visible ones, put mask tokens in the gaps, decode, and compare the
hidden patches with the image:

    x_v = encoder(patches[kept])                        section 3, "MAE encoder": no mask tokens here
    y   = decoder(unshuffle(x_v, mask token))           section 3, "MAE decoder"
    L   = mean over hidden patches of |y - t|^2         section 3, "Reconstruction target"

with t the pixels, or (norm_pix_loss) the pixels standardised per patch. Differences from the published code: any number
of bands, any image size, and the prediction layer runs on the hidden patches only, which changes no number.
"""

import torch
from torch import Tensor

from xscale_lightning.losses import normalize_patches, patch_mse
from xscale_lightning.masking import check_ratio, keep_count, random_mask, to_boolean
from xscale_lightning.methods.base import Batch, Reconstruction, SSLModule, StepOutput
from xscale_lightning.methods.checks import check_plane
from xscale_lightning.models.decoders import MAEDecoder
from xscale_lightning.models.tokenizers import patchify, unpatchify


class MAE(SSLModule):
    """Masked autoencoder with an asymmetric decoder.

    Args:
        mask_ratio: share of the patches hidden from the encoder, in [0, 1); at 0 the loss takes every patch.
        norm_pix_loss: standardise the target per patch; better features in the paper (its table 1d), but the decoder
            then no longer knows the colours, so pictures borrow mean and deviation from the original.
        decoder_dim: width of the decoder.
        decoder_depth: number of its blocks.
        decoder_heads: number of its attention heads.
        **kwargs: see `SSLModule`.

    Raises:
        UserError: a ratio outside [0, 1) or one that leaves no patch visible; a width that the heads do not divide.
    """

    def __init__(
        self,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = False,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        check_ratio(mask_ratio)
        check_plane(self.backbone, "MAE")
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        self.patch_size = self.backbone.patch_size
        values = self.patch_size**2 * len(self.bands)
        self.decoder = MAEDecoder(self.backbone.num_features, values, decoder_dim, decoder_depth, decoder_heads)

    def check_size(self, height: int, width: int) -> None:
        """Refuse also a size at which the mask leaves no patch visible."""
        super().check_size(height, width)
        keep_count(height * width // self.patch_size**2, self.mask_ratio)

    def step(self, batch: Batch) -> StepOutput:
        """Loss on the hidden patches of `batch["image"] [B, C, H, W]`."""
        images = batch["image"]
        _, height, width = self.backbone.grid(images)
        noise = torch.rand(len(images), height * width, device=images.device)
        kept, hidden = random_mask(noise, self.mask_ratio)  # [B, K], [B, M]
        if not self.mask_ratio:  # nothing hidden: a plain autoencoder, whose loss takes every patch
            hidden = kept
        return self.loss(images, kept, hidden, batch.get("gsd"))

    def loss(self, images: Tensor, kept: Tensor, hidden: Tensor, gsd: Tensor | None = None) -> StepOutput:
        """Loss for given masks: flat indices of the visible `[B, K]` and hidden `[B, M]` patches."""
        tokens = self.backbone(images, gsd=gsd, keep=kept)
        target = patchify(images, self.patch_size)  # [B, L, p * p * C]
        index = hidden.unsqueeze(-1).expand(-1, -1, target.shape[-1])
        wanted = target.gather(1, index)  # [B, M, p * p * C]
        prediction = self.decoder(tokens, predict=hidden)
        loss = patch_mse(prediction, normalize_patches(wanted) if self.norm_pix_loss else wanted)

        def reconstruct() -> Reconstruction:
            pixels = self.decoder(tokens).to(target.dtype)  # the whole grid, visible patches too
            if self.norm_pix_loss:
                pixels = pixels * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)
            seen = to_boolean(kept, target.shape[1]).unsqueeze(-1).expand_as(target)
            whole = (unpatchify(x, self.patch_size, tokens.grid[1:]) for x in (pixels, seen))
            return Reconstruction(images, *whole, borrows=self.norm_pix_loss)

        return StepOutput(loss, {"reconstruction": loss}, reconstruct, (tokens,))
