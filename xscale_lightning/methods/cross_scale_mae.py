"""Cross-Scale MAE: Tang et al., "Cross-Scale MAE: A Tale of Multi-Scale Exploitation in Remote Sensing", NeurIPS 2023.

View B is a part of view A at another scale. Both are masked and go through one encoder f and one decoder g:

    z_v = f(visible patches of v),   y_v = g(z_v)               v in {A, B}
    L_re = L_re(A) + L_re(B), each as in MAE                    reconstruction
    L_cp = mean |q(y_B) - y_A|^2                                cross-scale prediction between decoder tokens
    L_cc = decoupled NT-Xent of the mean visible tokens of z_A and z_B                              contrastive
    L    = L_re + L_cp + L_cc                                   all weights 1

Where the published code and the paper's figure differ there is a switch (`cross_scale_recipe.py`). Beyond the paper:
views of different pixel sizes in one packed pass, a cross-scale prediction that compares the same place on the ground,
positions scaled by the gsd of each view, and negatives from all processes.
"""

import math
from typing import Any

import torch
from torch import Tensor

from xscale_lightning.data.scale_view import ScaleView, View
from xscale_lightning.data.views import crop_resize
from xscale_lightning.errors import UserError
from xscale_lightning.losses import at_least_float32, normalize_patches, nt_xent, patch_mse
from xscale_lightning.masking import check_ratio, keep_count, random_mask, to_boolean
from xscale_lightning.methods.base import Batch, Reconstruction, SSLModule, StepOutput
from xscale_lightning.methods.checks import check_plane
from xscale_lightning.methods.cross_scale_recipe import Recipe
from xscale_lightning.models.decoders import MAEDecoder
from xscale_lightning.models.pos_embed import GSDPositions
from xscale_lightning.models.predictors import MLPPredictor
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.tokenizers import check_divides, patchify, unpatchify
from xscale_lightning.models.tokens import Tokens, gather

Mask = tuple[Tensor, Tensor]


class CrossScaleMAE(SSLModule):
    """Masked autoencoder that learns from two scales of every image.

    Args:
        recipe: the published code, the paper's figure or our recommendation, and single switches that differ.
        scale_view: how view B is cut out of view A.
        mask_ratio: share of the patches hidden from the encoder, in [0, 1), in both views.
        norm_pix_loss: standardise the target per patch; off in the published code.
        decoder_dim: width of the decoder.
        decoder_depth: number of its blocks.
        decoder_heads: number of its attention heads.
        predictor_dim: hidden width of the predictor q.
        temperature: of the contrastive loss.
        reconstruction_weight: weight of L_re.
        prediction_weight: weight of L_cp.
        contrastive_weight: weight of L_cc.
        gather_negatives: take negatives from all processes; the published code keeps to each process's own.
        backbone: the encoder; its norms are the recipe's.
        **kwargs: see `SSLModule`.

    Raises:
        UserError: a ratio outside [0, 1), a weight that is negative or not finite, sizes that the decoder cannot have;
            when a run starts, batches of one image, and images or views that the patches or a switch of the recipe
            cannot take.
    """

    sample_wise = False  # a batch is contrasted with itself

    def __init__(
        self,
        recipe: Recipe = Recipe(),  # noqa: B008 (frozen; shown as default in --help)
        scale_view: ScaleView = ScaleView(),  # noqa: B008
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = False,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        predictor_dim: int = 2048,
        temperature: float = 0.5,
        reconstruction_weight: float = 1.0,
        prediction_weight: float = 1.0,
        contrastive_weight: float = 1.0,
        gather_negatives: bool = False,
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008
        **kwargs,
    ) -> None:
        recipe = recipe.resolve()
        backbone = recipe.apply(backbone)
        super().__init__(backbone=backbone, **kwargs)
        check_ratio(mask_ratio)
        check_plane(self.backbone, "Cross-Scale MAE")
        self.weights = (reconstruction_weight, prediction_weight, contrastive_weight)
        if not all(0 <= weight < math.inf for weight in self.weights):
            names = "reconstruction_weight, prediction_weight, contrastive_weight"
            raise UserError(f"{names} must be finite and not negative, got {self.weights}.")
        if not 1e-6 <= temperature < math.inf:
            raise UserError(f"temperature must be finite and at least 1e-6, got {temperature}.")
        _check_sizes(decoder_dim=decoder_dim, decoder_heads=decoder_heads, predictor_dim=predictor_dim)
        self.recipe, self.scale_view = recipe, scale_view
        self.mask_ratio, self.norm_pix_loss = mask_ratio, norm_pix_loss
        self.temperature, self.gather_negatives = temperature, gather_negatives
        self.patch_size = self.backbone.patch_size
        self.decoder = MAEDecoder(
            self.backbone.num_features,
            self.patch_size**2 * len(self.bands),
            decoder_dim,
            decoder_depth,
            decoder_heads,
            backbone.mlp_ratio,
            backbone.block_norm,
            backbone.norm_eps,
            GSDPositions(decoder_dim, backbone.reference_gsd) if backbone.position == "gsd" else None,
        )
        positions = (backbone.image_size // self.patch_size) ** 2
        if recipe.predictor_norm == "bn_position" and positions < 1:
            raise UserError(
                f"recipe.predictor_norm bn_position counts the patches of backbone.image_size {backbone.image_size}, "
                f"which is smaller than a patch of {self.patch_size}: set it to the size of the views."
            )
        self.predictor = MLPPredictor(decoder_dim, predictor_dim, recipe.predictor_norm or "ln", positions)  # q

    # ---- one step -------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepOutput:
        """Loss of `batch["image"] [B, C, H, W]`, view A, and a view B cut out of it."""
        first = View(batch["image"], batch.get("gsd"))
        second = self.scale_view(first, self.recipe.crop_per or "sample")
        masks = [self._draw_mask(view.images) for view in (first, second)]
        if self.recipe.shared_mask:
            masks[1] = masks[0]
        return self.loss(first, second, masks[0], masks[1])

    def _draw_mask(self, images: Tensor) -> Mask:
        _, height, width = self.backbone.grid(images)
        kept, hidden = random_mask(torch.rand(len(images), height * width, device=images.device), self.mask_ratio)
        return kept, hidden if self.mask_ratio else kept  # nothing hidden: the loss takes every patch, as in MAE

    def loss(self, first: View, second: View, first_mask: Mask, second_mask: Mask) -> StepOutput:
        """The three losses for given views and masks: flat indices of visible `[B, K]` and hidden `[B, M]` patches."""
        views, masks = (first, second), (first_mask, second_mask)
        pairs = list(zip(views, masks, strict=True))
        tokens = self.backbone.encode_together([self.backbone.embed(v.images, v.gsd, kept) for v, (kept, _) in pairs])
        decoded = self.decoder.decode_together(tokens, [view.gsd for view in views])  # y_A, y_B: [B, P + L, dim]
        decoded = [y[:, self.backbone.num_prefix :] for y in decoded]

        terms = {
            f"reconstruction_{name}": self._reconstruction(view.images, y, hidden)
            for name, y, (view, (_, hidden)) in zip("ab", decoded, pairs, strict=True)
        }
        share = 0.5 if self.recipe.reconstruction == "mean" else 1.0
        terms["reconstruction"] = share * (terms["reconstruction_a"] + terms["reconstruction_b"])
        terms["cross_prediction"] = self._cross_prediction(decoded[1], decoded[0], tokens, second)
        if self.training or len(first.images) > 1:  # a last validation batch of one image has nothing to contrast
            terms["contrastive"] = self._contrastive(*(at_least_float32(z.patches).mean(1) for z in tokens))
        weighted = zip(self.weights, ("reconstruction", "cross_prediction", "contrastive"), strict=True)
        loss = torch.stack([weight * terms[name] for weight, name in weighted if name in terms]).sum()
        return StepOutput(loss, terms, lambda: self._reconstruct(first.images, decoded[0], tokens[0]), (tokens[0],))

    def _reconstruction(self, images: Tensor, decoded: Tensor, hidden: Tensor) -> Tensor:
        """L_re of one view: mean squared error of its hidden patches."""
        target = gather(patchify(images, self.patch_size), hidden)  # [B, M, p * p * C]
        target = normalize_patches(target) if self.norm_pix_loss else target
        return patch_mse(self.decoder.pred(gather(decoded, hidden)), target)

    def _cross_prediction(self, source: Tensor, target: Tensor, tokens: list[Tokens], view: View) -> Tensor:
        """L_cp: q(y_B) against y_A `[B, L, dim]`, at the same index or at the same place on the ground."""
        target = target.detach() if self.recipe.stop_gradient else target
        if self.recipe.align == "ground" and view.boxes is not None:
            grid_a, grid_b = (z.grid[1:] for z in tokens)
            maps = target.mT.unflatten(2, grid_a)  # [B, dim, h, w]
            target = crop_resize(maps, view.boxes / self.patch_size, grid_b).flatten(2).mT  # [B, L_B, dim]
        return patch_mse(self.predictor(source), target)

    def _contrastive(self, a: Tensor, b: Tensor) -> Tensor:
        """L_cc of features `[B, D]`, against this process's batch or all processes'."""
        keys, first = None, 0
        if self.gather_negatives and self.training and self._trainer is not None and self.trainer.world_size > 1:
            gathered = self.all_gather(torch.cat([a, b]), sync_grads=True)  # [W, 2B, D]
            assert isinstance(gathered, Tensor)
            keys, first = gathered.flatten(0, 1), self.global_rank * 2 * len(a)
        return nt_xent(a, b, self.temperature, bool(self.recipe.positive_in_denominator), keys, first)

    def _reconstruct(self, images: Tensor, decoded: Tensor, tokens: Tokens) -> Reconstruction:
        """View A as the decoder sees it, visible patches too."""
        target = patchify(images, self.patch_size)
        pixels = self.decoder.pred(decoded).to(target.dtype)
        if self.norm_pix_loss:
            pixels = pixels * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)
        assert tokens.kept is not None
        seen = to_boolean(tokens.kept, target.shape[1]).unsqueeze(-1).expand_as(target)
        whole = (unpatchify(x, self.patch_size, tokens.grid[1:]) for x in (pixels, seen))
        return Reconstruction(images, *whole, borrows=self.norm_pix_loss)

    # ---- what is refused before the first step --------------------------------------------------------------------

    def check_data(self, data: Any, fitting: bool) -> None:
        """Refuse also batches of one image."""
        super().check_data(data, fitting)
        if fitting:
            _check_batch("data.batch_size", getattr(data, "batch_size", None))

    def on_train_start(self) -> None:
        """Refuse also a loader of single images, which a data module that does not say its batch size can have."""
        super().on_train_start()
        _check_batch("the training loader's batch size", self._batch_size())

    def check_size(self, height: int, width: int) -> None:
        """Refuse also view sizes that the patches, the mask or the recipe cannot take."""
        super().check_size(height, width)
        shortest = self.scale_view.shortest_side(height, width)
        if shortest < self.patch_size:
            raise UserError(
                f"scale_view.scale: {self.scale_view.scale[0]:g} of {height} x {width} pixels, with scale_view.ratio "
                f"{list(self.scale_view.ratio)}, can be a crop of {shortest:.3g} pixels, smaller than a patch of "
                f"{self.patch_size}: raise it."
            )
        for size in ((height, width), *self.scale_view.output_sizes(height, width)):
            if min(size) < self.patch_size:
                raise UserError(
                    f"scale_view.sizes: a view of {size[0]} x {size[1]} pixels is smaller than a patch of "
                    f"{self.patch_size}: enlarge it, or take a backbone with smaller patches."
                )
            check_divides(self.patch_size, *size)
            keep_count(size[0] * size[1] // self.patch_size**2, self.mask_ratio)
            self._check_recipe((height, width), size)

    def _check_recipe(self, first: tuple[int, int], size: tuple[int, int]) -> None:
        for name, remedy, bad in (
            ("align index", "align to ground", self.recipe.align == "index"),
            ("shared_mask", "shared_mask to false", self.recipe.shared_mask),
        ):
            if bad and size != first:
                raise UserError(
                    f"recipe.{name} needs views of one size, and scale_view.sizes has {size[0]} px beside "
                    f"{first[0]} px: set recipe.{remedy}, or scale_view.sizes to null."
                )
        count = size[0] * size[1] // self.patch_size**2
        if self.recipe.predictor_norm == "bn_position" and count != self.predictor.positions:
            raise UserError(
                f"recipe.predictor_norm bn_position is made for {self.predictor.positions} patches and a view has "
                f"{count}: set recipe.predictor_norm to ln, or backbone.image_size to the size of every view."
            )


def _check_sizes(decoder_dim: int, decoder_heads: int, predictor_dim: int) -> None:
    if decoder_dim < 4 or decoder_dim % 4:
        raise UserError(f"decoder_dim {decoder_dim}: its sin-cos positions need a multiple of 4.")
    for name, value in (("decoder_heads", decoder_heads), ("predictor_dim", predictor_dim)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}.")


def _check_batch(name: str, size: int | None) -> None:
    if size is not None and size < 2:
        raise UserError(
            f"{name} {size}: the contrastive loss needs at least 2 images per process; raise the batch size, or train "
            "method mae."
        )
