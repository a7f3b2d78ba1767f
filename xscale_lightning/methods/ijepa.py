"""I-JEPA (Assran et al., CVPR 2023).

"Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture", arXiv 2301.08243.

Show a block of the image, and predict the features of four other blocks, not their pixels:

    s_x = encoder(patches[context])                                 section 3, "context": targets are taken out of it
    s_y = LN(target encoder(all patches))[block i], no gradient     section 3, "targets"; LN without parameters (code)
    s^i = predictor(s_x, mask token + positions of block i)         section 3, "prediction"
    L   = mean over blocks and tokens of smooth-L1(s^i, s_y(i))     code; the paper writes a squared L2 distance

The target encoder is the exponential moving average of the encoder, and its features are the method's. Differences from
the published code: any number of bands and any grid, blocks that reach every token (`masks`), weights drawn as in MAE.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from xscale_lightning.errors import UserError
from xscale_lightning.losses import at_least_float32
from xscale_lightning.masking_blocks import BlockMasks, Blocks
from xscale_lightning.methods.base import Batch, SSLModule, StepOutput
from xscale_lightning.methods.checks import check_plane
from xscale_lightning.models.attention import Attention
from xscale_lightning.models.jepa_predictor import JEPAPredictor, PredictorConfig
from xscale_lightning.models.pos_embed import GSDPositions
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.tokens import Tokens, pad_rows
from xscale_lightning.models.vit import Encoder, ViT
from xscale_lightning.schedules import Schedule

PAPER = BackboneConfig("vit_base_patch16", class_token=False)


class IJEPA(SSLModule):
    """Joint-embedding predictive architecture for images.

    Args:
        masks: context and target blocks.
        predictor: size of the predictor.
        ema_momentum: momentum of the target encoder.
        features_from: the encoder that evaluations and embeddings use; `target` as published.
        backbone: the encoder.
        **kwargs: see `SSLModule`.

    Attributes:
        target: the EMA encoder, `target.module`.
        target_norm_eps: epsilon of the LayerNorm of the targets.

    Raises:
        UserError: a momentum outside [0, 1]; a backbone of spectral cubes; packed contexts with a backbone that has a
            class token, stochastic depth or comes from timm; a width that the heads do not divide; when a run starts,
            images so small that no blocks can be placed.
    """

    target_norm_eps = 1e-5

    def __init__(
        self,
        masks: BlockMasks = BlockMasks(),  # noqa: B008 (frozen; shown as default in --help)
        predictor: PredictorConfig = PredictorConfig(),  # noqa: B008
        ema_momentum: Schedule = Schedule("linear", 0.996, 1.0),  # noqa: B008
        features_from: Literal["target", "student"] = "target",
        backbone: BackboneConfig = PAPER,
        **kwargs,
    ) -> None:
        super().__init__(backbone=backbone, **kwargs)
        check_plane(self.backbone, "I-JEPA")
        if not all(0 <= m <= 1 for m in (ema_momentum.start, ema_momentum.end)):
            raise UserError(f"ema_momentum must be in [0, 1], got {ema_momentum.start} and {ema_momentum.end}.")
        if masks.sampler == "packed":
            self._check_packs(backbone)
        self.sample_wise = masks.sampler == "packed"  # the others cut contexts to the smallest of the batch
        self.masks, self.features_from = masks, features_from
        heads = next(layer.num_heads for layer in self.backbone.modules() if isinstance(layer, Attention))
        self.predictor = JEPAPredictor(
            self.backbone.num_features,
            predictor.dim,
            predictor.depth,
            predictor.num_heads or heads,
            predictor.mlp_ratio,
            backbone.norm_eps,
            GSDPositions(predictor.dim, backbone.reference_gsd) if backbone.position == "gsd" else None,
        )
        self.target = self.make_target(self.backbone, ema_momentum)

    @property
    def feature_encoder(self) -> Encoder:
        """The target encoder, or the student."""
        return self.target.module if self.features_from == "target" else self.backbone  # type: ignore[return-value]

    def step(self, batch: Batch) -> StepOutput:
        """Loss of `batch["image"] [B, C, H, W]`."""
        images = batch["image"]
        _, height, width = self.backbone.grid(images)
        blocks = self.masks.draw(len(images), height, width).to(images.device)
        return self.loss(images, blocks, batch.get("gsd"))

    def loss(self, images: Tensor, blocks: Blocks, gsd: Tensor | None = None) -> StepOutput:
        """Loss for given blocks."""
        context = self.encode_context(images, blocks, gsd)  # [N, D]
        prediction = self.predictor(context, blocks, self.backbone.grid(images), gsd)  # [T, C, B, M, D]
        target = self.encode_target(images, blocks, gsd)  # [T, B, M, D]
        spread = target.flatten(0, 2).std(0).mean()  # near 0: the features have collapsed
        prediction, target = at_least_float32(prediction), target.unsqueeze(1).expand_as(prediction)
        loss = F.smooth_l1_loss(prediction, target)
        return StepOutput(
            loss, {"target_spread": spread}, student=self._seen(context, blocks, self.backbone.grid(images))
        )

    def _seen(self, context: Tensor, blocks: Blocks, grid: tuple[int, int, int]) -> list[Tokens]:
        """Encoded tokens `[N, D]` of all sequences as one batch per context; padded where their lengths differ."""
        count = blocks.targets.shape[1]
        if (kept := blocks.kept) is not None:  # [C, B, K]
            return [Tokens(x, grid, k) for x, k in zip(context.view(*kept.shape, -1), kept, strict=True)]
        x = pad_rows(context, blocks.lengths)[blocks.order]  # [C * B, K, D], K the longest
        places = pad_rows(blocks.context % blocks.places, blocks.lengths)[blocks.order]
        lengths = [blocks.lengths[rank] for rank in blocks.ranks]
        found = []
        for i in range(0, len(lengths), count):  # every context as wide as its own longest
            real = tuple(lengths[i : i + count])
            padded = (part[i : i + count, : max(real)] for part in (x, places))
            found.append(Tokens(next(padded), grid, next(padded), lengths=real))
        return found

    def encode_context(self, images: Tensor, blocks: Blocks, gsd: Tensor | None = None) -> Tensor:
        """Encoded tokens of all context sequences `[N, D]`, in the order of `blocks.context`."""
        if (kept := blocks.kept) is not None:  # [C, B, K]
            tokens = self.backbone.encode_together([self.backbone.embed(images, gsd, places) for places in kept])
            return torch.cat([t.patches for t in tokens]).flatten(0, 1)
        assert isinstance(self.backbone, ViT)
        rows = self.backbone.embed(images, gsd).x.flatten(0, 1)[blocks.context]
        return self.backbone.encode_rows(rows.unsqueeze(0), blocks.lengths).squeeze(0)

    @torch.no_grad()
    def encode_target(self, images: Tensor, blocks: Blocks, gsd: Tensor | None = None) -> Tensor:
        """Normalised tokens of the target blocks `[T, B, M, D]`, from the whole image, in float32 or better."""
        tokens = at_least_float32(self.target.module(images, gsd=gsd).patches)  # [B, L, D]
        tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=self.target_norm_eps)
        return tokens.flatten(0, 1)[blocks.flat_targets]

    def check_size(self, height: int, width: int) -> None:
        """Refuse also a size on whose grid the blocks cannot be placed."""
        super().check_size(height, width)
        self.masks.check(*self.backbone.token_grid(height, width)[1:])

    def _check_packs(self, backbone: BackboneConfig) -> None:
        for bad, what, remedy in (
            (not isinstance(self.backbone, ViT), f"backbone {backbone.name!r} cannot pack", "take a vit_* backbone"),
            (self.backbone.num_prefix > 0, "a class token is in every sequence", "set backbone.class_token to false"),
            (backbone.drop_path > 0, "drop_path would drop all of them at once", "set backbone.drop_path to 0"),
        ):
            if bad:
                raise UserError(
                    f"masks.sampler packed puts contexts of different size into one row, and {what}: {remedy}, or set "
                    "masks.sampler to balanced."
                )
