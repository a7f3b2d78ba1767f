"""Change between two dates: one encoder sees both images, a decoder sees how their features differ.

Sources: Caye Daudt et al. 2018 (OSCD, siamese networks); the protocol of S2MAE (Li et al. 2024) as the published code
of its sibling has it: both dates through the same encoder, the difference of the features, a UPerNet-like decoder.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xscale_lightning.errors import UserError
from xscale_lightning.methods.base import Batch
from xscale_lightning.tasks.decoders import DenseHead, tokens_at
from xscale_lightning.tasks.scores import PixelScores, Scores
from xscale_lightning.tasks.segmentation import Segmentation

Fusion = Literal["absolute", "difference", "concat"]


class ChangeDetection(Segmentation):
    """Siamese encoder, difference of the features, decoder; precision, recall and F1 of "changed" over all pixels.

    Args:
        fusion: what the decoder sees: |first - second| (`absolute`), first - second (`difference`) or both (`concat`).
        **kwargs: see `Segmentation`; `class_weights: oscd` weighs by the share f of changed pixels, [20 f, 2 (1 - f)].

    Raises:
        UserError: data without a second image, or with one of another size.
    """

    headline = "f1"

    def __init__(self, fusion: Fusion = "absolute", **kwargs) -> None:
        self.fusion: Fusion = fusion
        super().__init__(**kwargs)

    def build_head(self, num_classes: int) -> nn.Module:
        """The decoder."""
        if num_classes != 2:
            raise UserError(
                f"num_classes: ChangeDetection knows two classes, unchanged and changed; the data has {num_classes}."
            )
        name, width, dropout = self._decoder
        times = 2 if self.fusion == "concat" else 1
        return DenseHead(name, self.backbone, self.groups(), num_classes, width, dropout, times)

    def build_scores(self, num_classes: int) -> Scores:
        """`f1`, `precision`, `recall`, `iou` of the changed pixels."""
        return PixelScores(num_classes, positive=1)

    def check_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """As the base; refuse a missing second image, or one of another size."""
        second, first = batch.get("image2"), batch["image"]
        if not isinstance(second, Tensor):
            raise UserError("ChangeDetection needs batch['image2'], and the data deliver none: take pairs of dates.")
        if second.shape != first.shape:
            raise UserError(f"both dates must have one size, got {tuple(first.shape)} and {tuple(second.shape)}.")
        return super().check_targets(batch)

    def logits(self, batch: Batch) -> Tensor:
        """`[B, 2, H, W]` of a prepared batch; both dates go through the encoder together."""
        first, gsd = batch["image"], batch.get("gsd")
        both = torch.cat([first, batch["image2"]])
        with self.encoding():
            tokens = tokens_at(self.backbone, both, None if gsd is None else torch.cat([gsd, gsd]), self.head.depths)
        fused = [self._fuse(*x.chunk(2)) for x in self.head.maps(tokens)]
        return self.head(fused, first.shape[-2:])

    def _fuse(self, first: Tensor, second: Tensor) -> Tensor:
        if self.fusion == "concat":
            return torch.cat([first, second], 1)
        difference = first - second
        return difference.abs() if self.fusion == "absolute" else difference
