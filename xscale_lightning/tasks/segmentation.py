"""A class for every pixel, of one image."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from xscale_lightning.errors import UserError
from xscale_lightning.methods.base import Batch
from xscale_lightning.tasks.base import FineTune
from xscale_lightning.tasks.decoders import DecoderName, DenseHead, tokens_at
from xscale_lightning.tasks.scores import PixelScores, Scores
from xscale_lightning.tasks.weights import count_classes


class Segmentation(FineTune):
    """Tokens, decoder, bilinear enlargement; cross-entropy over the pixels that have a label.

    Args:
        decoder: `linear` (one layer per token), `fpn` (segmentation-models-pytorch) or `upernet`, both over tokens from
            four depths.
        decoder_dim: channels of `fpn` and `upernet`.
        decoder_dropout: before their last layer.
        ignore_index: a value of the mask that has no class; null takes the data's, else -1. Negative values never have
            one.
        **kwargs: see `FineTune`.

    Raises:
        UserError: an option out of range; masks of another size than the images, or with values that are no classes.
    """

    headline = "miou"

    def __init__(
        self,
        decoder: DecoderName = "linear",
        decoder_dim: int = 256,
        decoder_dropout: float = 0.1,
        ignore_index: int | None = None,
        **kwargs,
    ) -> None:
        if not 0 <= decoder_dropout < 1:
            raise UserError(f"model.decoder_dropout must be in [0, 1), got {decoder_dropout}.")
        self._decoder: tuple[DecoderName, int, float] = (decoder, decoder_dim, decoder_dropout)
        self.ignore_index = -1 if ignore_index is None else ignore_index
        self._ignore_given = ignore_index is not None
        super().__init__(**kwargs)

    head: DenseHead

    def groups(self) -> int:
        """Spectral groups of the encoder's tokens."""
        return self.backbone.token_grid(self.backbone.patch_size, self.backbone.patch_size)[0]

    def build_head(self, num_classes: int) -> nn.Module:
        """The decoder."""
        name, width, dropout = self._decoder
        return DenseHead(name, self.backbone, self.groups(), num_classes, width, dropout)

    def build_scores(self, num_classes: int) -> Scores:
        """`miou`, `accuracy`, `iou/<class>`."""
        return PixelScores(num_classes)

    def classes_of(self, data: Any) -> int | None:
        """Number of classes of the masks."""
        found = getattr(data, "num_mask_classes", None)
        return getattr(data, "num_classes", None) if found is None else found

    def check_data(self, data: Any, fitting: bool) -> None:
        """As the base; the data's ignored value counts unless another was given."""
        if not self._ignore_given:
            value = getattr(data, "ignore_index", None)
            self.ignore_index = -1 if value is None else int(value)
        super().check_data(data, fitting)

    def check_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Refuse a missing mask, one of another size than the image, or values that are no classes."""
        mask, image = batch.get("mask"), batch["image"]
        if not isinstance(mask, Tensor):
            raise UserError(
                f"{type(self).__name__} needs batch['mask'], and the data deliver none: take data with masks."
            )
        if mask.shape != (len(image), *image.shape[-2:]):
            raise UserError(
                f"masks of shape {tuple(mask.shape)} do not fit images of {image.shape[-2]} x {image.shape[-1]} "
                "pixels: they need [B, H, W] of the same size."
            )
        labels = mask[mask != self.ignore_index]
        labels = labels[labels >= 0]
        if labels.numel() and int(labels.max()) >= (self.num_classes or 0):
            raise UserError(
                f"a mask has the value {int(labels.max())}, and there are {self.num_classes} classes, 0 to "
                f"{(self.num_classes or 0) - 1}: name it as ignore_index, or check the data's classes."
            )
        return count_classes(labels, self.num_classes or 0)

    def target(self, batch: Batch) -> Tensor:
        """Mask `[B, H, W]`; pixels without a class are -1."""
        mask = batch["mask"]
        return mask.where((mask != self.ignore_index) & (mask >= 0), -1)

    def logits(self, batch: Batch) -> Tensor:
        """`[B, K, H, W]` of a prepared batch."""
        image = batch["image"]
        with self.encoding():
            tokens = tokens_at(self.backbone, image, batch.get("gsd"), self.head.depths)
        return self.head(self.head.maps(tokens), image.shape[-2:])

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Weighted mean over the pixels that have a class; 0 where none has."""
        target = self.target(batch)
        total = F.cross_entropy(logits.float(), target, self.weight, ignore_index=-1, reduction="sum")
        share = self.weight[target.clamp(min=0)] * (target >= 0)
        return total / share.sum().clamp(min=1e-6)

    def predictions(self, logits: Tensor) -> dict[str, Tensor]:
        """Class of every pixel `[B, H, W]`."""
        return {"prediction": logits.argmax(1).to("cpu").short()}
