"""Wei et al., "Towards Latent Masked Image Modeling for Self-Supervised Visual Representation Learning", ECCV 2024.

Take patches with gaps between them, so that edges give nothing away, and show a tenth of them to the encoder. Predict
what a slowly following copy of the encoder makes of the others, and tell them apart:

    z_v = f(x[visible]),   t = f'(x[hidden])             f: encoder and projection head; f' = EMA of f
    y   = g(queries(hidden), z_v)                        cross-attention decoder, position-weighted queries
    L   = 2 tau mean_i -log softmax_j(<y_i, t_j> / tau)  patch discrimination: i, j hidden patches of one image
        + w [(c(y) - s)^2 + (c(z_v) - s)^2]              similarity constraint, c the mean cosine, s falling

Differences from the published code: any number of bands and grids that are not square; momentum and s follow the step,
not the epoch; the target moves after the optimizer step, which is where the published one stands when the next begins.
Options beyond it: the shallow targets, frozen targets and negatives of Galileo (Tseng et al. 2025) and OlmoEarth
(2025), as far as they are one prediction of one image; `docs/methods/latent_mim.md` says which.
"""

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor

from xscale_lightning.errors import UserError
from xscale_lightning.losses import mean_similarity
from xscale_lightning.masking import check_ratio, keep_count, random_mask
from xscale_lightning.masking_gaps import gap_grid, jitter, take_patches
from xscale_lightning.methods.base import Batch, SSLModule, StepOutput
from xscale_lightning.methods.checks import check_plane
from xscale_lightning.methods.latent_mim_options import Objective, Target
from xscale_lightning.models.cross_decoder import CrossDecoder
from xscale_lightning.models.heads import ProjectedEncoder, ProjectionHead
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.tokenizers import check_divides
from xscale_lightning.models.tokens import Tokens, gather
from xscale_lightning.models.vit import ViT, plane_positions


class LatentMIM(SSLModule):
    """Masked prediction of latent patches, told apart by contrast.

    Args:
        mask_ratio: share of the patches hidden from the encoder; 0.897 leaves the published 20 of 196.
        predict_ratio: share of the hidden patches that are predicted, drawn anew in every step.
        gap: pixels between two patches, as a share of the patch size; a patch lies anywhere in its cell of both.
        objective: what makes a prediction good.
        target: the network that makes the targets.
        head_dim: hidden width of the projection head.
        head_layers: its layers; 0 leaves it out.
        decoder_dim: width of the decoder.
        decoder_depth: number of its blocks.
        decoder_heads: number of its attention heads.
        backbone: the encoder.
        **kwargs: see `SSLModule`.

    Attributes:
        target: the network f', an EMA.

    Raises:
        UserError: ratios or sizes out of range, a backbone of spectral cubes, a target as deep as the encoder, a width
            that the heads do not divide; when a run starts, images with too few cells for the mask.
    """

    undecayed = ("bias", "norm", "embed", "positions")  # parts of names; published: bias, norm, embed, pos_embed too

    def __init__(
        self,
        mask_ratio: float = 0.897,
        predict_ratio: float = 1.0,
        gap: float = 0.25,
        objective: Objective = Objective(),  # noqa: B008 (frozen; shown as default in --help)
        target: Target = Target(),  # noqa: B008
        head_dim: int = 4096,
        head_layers: int = 3,
        decoder_dim: int = 512,
        decoder_depth: int = 3,
        decoder_heads: int = 16,
        backbone: BackboneConfig = BackboneConfig(position="stretched"),  # noqa: B008
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone=backbone, **kwargs)
        check_ratio(mask_ratio)
        check_plane(self.backbone, "LatentMIM")
        if not 0 < predict_ratio <= 1:
            raise UserError(f"predict_ratio must be in (0, 1], got {predict_ratio}.")
        if not 0 <= gap < math.inf:
            raise UserError(f"gap must be 0 or more, got {gap}: 0.25 leaves 4 pixels between patches of 16.")
        if target.depth is not None and not (isinstance(self.backbone, ViT) and target.depth < self.backbone.depth):
            raise UserError(
                f"target.depth {target.depth} must be below the {self.backbone.depth} blocks of a vit_* backbone, or "
                "null for all of them."
            )
        self.mask_ratio, self.predict_ratio = mask_ratio, predict_ratio
        self.patch_size = self.backbone.patch_size
        self.gap = round(gap * self.patch_size)
        self.objective, self.target_depth, self.target_tokens = objective, target.depth, target.tokens
        self.sample_wise = objective.sample_wise
        dim = self.backbone.num_features
        self.head = ProjectionHead(dim, head_dim, head_layers)
        self._student = (ProjectedEncoder(self.backbone, self.head),)  # in a tuple: both are registered already
        self.target = self.make_target(self._student[0], target.momentum)
        if objective.similarity_weight:
            self.declare("similarity", objective.similarity)
        position = "stretched" if backbone.position == "learned" else backbone.position
        self.decoder = CrossDecoder(
            *(dim, dim, decoder_dim, decoder_depth, decoder_heads, backbone.mlp_ratio, backbone.norm_eps),
            class_token=self.backbone.num_prefix > 0,
            positions=plane_positions(position, decoder_dim, self.patch_size, (0, 0), backbone.reference_gsd),
        )

    # ---- sizes -----------------------------------------------------------------------------------------------------

    def token_grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Grid of the patches that a training image of `height x width` pixels gives: one per cell."""
        if not self.gap:
            return super().token_grid(height, width)
        return (1, *gap_grid(height, width, self.patch_size, self.gap))

    def check_size(self, height: int, width: int) -> None:
        """Refuse a size at which no patch is visible, or fewer than two are predicted."""
        count = math.prod(self.token_grid(height, width))
        if count < 3:
            raise UserError(
                f"LatentMIM needs three patches, one visible and two to predict; an image of {height} x {width} pixels "
                f"has {count}: take larger images, smaller patches or less gap."
            )
        predicted = self._predicted(count - keep_count(count, self.mask_ratio))
        if predicted < 2:
            raise UserError(
                f"mask_ratio {self.mask_ratio} and predict_ratio {self.predict_ratio} leave {predicted} of the {count} "
                f"patches of an image of {height} x {width} pixels to predict: raise them, or take larger images."
            )

    def check_data(self, data: Any, fitting: bool) -> None:
        """Refuse also images of which `features` can make no patches: there they lie without gaps."""
        super().check_data(data, fitting)
        if getattr(data, "image_size", None):
            check_divides(self.patch_size, *data.image_size)

    def _predicted(self, hidden: int) -> int:
        return round(hidden * self.predict_ratio)

    # ---- one step --------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepOutput:
        """Loss of `batch["image"] [B, C, H, W]`."""
        images, gsd, encoded = batch["image"], batch.get("gsd"), None
        count = math.prod(self.token_grid(images.shape[-2], images.shape[-1]))
        if self.gap:
            offsets = jitter(torch.rand(len(images), 2, count, device=images.device), self.gap)
            finer = self._finer(batch, offsets)
            images = take_patches(images, self.patch_size, self.gap, offsets)
            gsd = self._spread(gsd)
            encoded = {"image": images, "gsd": gsd, **finer}
        visible, hidden = random_mask(torch.rand(len(images), count, device=images.device), self.mask_ratio)
        output = self.loss(images, visible, hidden[:, : self._predicted(hidden.shape[1])], gsd)
        output.encoded = encoded
        return output

    def _spread(self, gsd: Tensor | None) -> Tensor | None:
        """Metres per pixel with gaps taken out: so far apart are the patches now."""
        return None if gsd is None else gsd * (1 + self.gap / self.patch_size)

    def _finer(self, batch: Batch, offsets: Tensor) -> Batch:
        """`image_hr` cut like the image: of every patch the same ground, in r x r patches without gaps; and its gsd."""
        if not self.paired or "image_hr" not in batch:  # of paired data that nobody asked for it is still as loaded
            return {}
        (height, width), finer = batch["image"].shape[-2:], batch["image_hr"]
        ratio, cell = finer.shape[-2] // height, self.patch_size + self.gap
        (top, rows), (left, columns) = (((n % cell) // 2 * ratio, n // cell * cell * ratio) for n in (height, width))
        finer = finer[..., top : top + rows, left : left + columns]
        cut = take_patches(finer, ratio * self.patch_size, ratio * self.gap, ratio * offsets)
        return {"image_hr": cut, "gsd_hr": self._spread(batch.get("gsd_hr"))}

    @property
    def student_encoder(self) -> ProjectedEncoder:
        """The encoder with its projection head."""
        return self._student[0]

    def loss(self, images: Tensor, visible: Tensor, hidden: Tensor, gsd: Tensor | None = None) -> StepOutput:
        """Loss for patches pushed together `[B, C, h * p, w * p]` and given masks.

        `visible [B, K]` and `hidden [B, M]` are the flat indices of the patches that are seen and predicted.
        """
        seen = self.encode_kept(images, visible, gsd)  # z_v: [B, P + K, D]
        target = self.targets(images, hidden, gsd)  # t: [B, M, D]
        prediction = self.decoder(seen, hidden, gsd)  # y: [B, M, D]
        loss = self.objective(prediction, target)
        similar = {"prediction": mean_similarity(prediction), "visible": mean_similarity(seen.patches)}
        logs = {self.objective.kind: loss, **{f"similarity_{name}": c for name, c in similar.items()}}
        if self.objective.similarity_weight:
            s = self.value("similarity")
            loss = loss + self.objective.similarity_weight * sum((c - s).square() for c in similar.values())
        return StepOutput(loss, logs, student=(seen,))

    def targets(self, images: Tensor, hidden: Tensor, gsd: Tensor | None = None) -> Tensor:
        """What the target network makes of the patches at `hidden [B, M]`: `[B, M, D]`."""
        keep = hidden if self.target_tokens == "hidden" else None
        tokens = self.encode_kept(images, keep, gsd, "ema", self.target_depth).patches
        return tokens if keep is not None else gather(tokens, hidden)

    def encode_kept(
        self,
        images: Tensor,
        kept: Tensor | None = None,
        gsd: Tensor | None = None,
        which: Literal["student", "ema"] = "student",
        depth: int | None = None,
    ) -> Tokens:
        """Projected tokens of the patches at `kept [B, K]` alone (None: of all) by the student or its EMA."""
        if which == "student":
            return self._student[0](images, kept, gsd, depth)
        return cast(Tokens, self.target(images, kept, gsd, depth))
