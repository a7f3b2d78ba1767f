"""One label or several labels per image.

Sources: MAE's fine-tuning and linear probe (He et al. 2022, appendix A) for the heads; S2MAE (Li et al. 2024) and
Cross-Scale MAE (Tang et al. 2023) give other numbers, see `configs/finetune/`.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xscale_lightning.errors import UserError
from xscale_lightning.methods.base import Batch
from xscale_lightning.tasks.base import FineTune
from xscale_lightning.tasks.mixing import Mixing, smooth_one_hot
from xscale_lightning.tasks.scores import ClassScores, LabelScores, Scores
from xscale_lightning.tasks.weights import count_classes

HeadNorm = Literal["none", "layer", "batch"]


class Classification(FineTune):
    """One label per image: pooled features, norm, dropout, linear layer; cross-entropy.

    Args:
        head_norm: what stands before the linear layer: nothing, LayerNorm, or BatchNorm without weights (the linear
            probe of MAE).
        head_dropout: before the linear layer.
        head_std: deviation of its first weights.
        smoothing: share of the label that is spread over all classes.
        mixing: Mixup and CutMix.
        **kwargs: see `FineTune`.

    Raises:
        UserError: an option out of range; labels that are no classes of the data.
    """

    multilabel = False

    def __init__(
        self,
        head_norm: HeadNorm = "none",
        head_dropout: float = 0.0,
        head_std: float = 0.01,
        smoothing: float = 0.0,
        mixing: Mixing = Mixing(),  # noqa: B008 (never changed; shown as default in --help)
        **kwargs,
    ) -> None:
        for name, value in {"head_dropout": head_dropout, "smoothing": smoothing}.items():
            if not 0 <= value < 1:
                raise UserError(f"model.{name} must be in [0, 1), got {value}.")
        if head_std <= 0:
            raise UserError(f"model.head_std must be above 0, got {head_std}.")
        self._head_options = (head_norm, head_dropout, head_std)
        super().__init__(**kwargs)
        self.smoothing, self.mixing = smoothing, mixing

    def build_head(self, num_classes: int) -> nn.Module:
        """Norm, dropout, linear layer."""
        head_norm, head_dropout, head_std = self._head_options
        dim = self.backbone.num_features
        norms = {"layer": nn.LayerNorm(dim, eps=1e-6), "batch": nn.BatchNorm1d(dim, affine=False, eps=1e-6)}
        layer = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(layer.weight, std=head_std)
        nn.init.zeros_(layer.bias)
        return nn.Sequential(norms.get(head_norm, nn.Identity()), nn.Dropout(head_dropout), layer)

    def build_scores(self, num_classes: int) -> Scores:
        """`top1`, `macro_f1`."""
        return ClassScores(num_classes)

    def check_data(self, data: Any, fitting: bool) -> None:
        """As the base; refuse data whose images have another number of labels.

        Raises:
            UserError: naming the task that fits.
        """
        if getattr(data, "multilabel", self.multilabel) != self.multilabel and getattr(data, "num_classes", None):
            other = "MultiLabelClassification" if data.multilabel else "Classification"
            raise UserError(
                f"{type(self).__name__} does not fit the labels of {data.name}: set model.class_path to {other}."
            )
        super().check_data(data, fitting)

    def check_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Refuse a missing label, or one outside of the classes."""
        labels = self._labels(batch)
        if labels.ndim != 1 or bool((labels < 0).any()) or bool((labels >= (self.num_classes or 0)).any()):
            worst = f"{int(labels.min())} to {int(labels.max())}" if labels.numel() else "none"
            raise UserError(
                f"labels of shape {tuple(labels.shape)} from {worst} do not fit {self.num_classes} classes, 0 to "
                f"{(self.num_classes or 0) - 1}: check data.num_classes and the files."
            )
        return count_classes(labels, self.num_classes or 0)

    def _labels(self, batch: Mapping[str, Any]) -> Tensor:
        if not isinstance(batch.get("label"), Tensor):
            raise UserError(
                f"{type(self).__name__} needs batch['label'], and the data deliver none: take labelled data."
            )
        return batch["label"]

    def prepare(self, batch: Batch, augment: bool = False) -> Batch:
        """As the base; a training batch gets its soft `target [B, K]` and is mixed."""
        prepared = super().prepare(batch, augment)
        if augment:
            prepared["image"], prepared["target"] = self.mixing(prepared["image"], self.soft(prepared["label"]))
        return prepared

    def soft(self, labels: Tensor) -> Tensor:
        """Labels as shares of the classes `[B, K]`."""
        return smooth_one_hot(labels, self.num_classes or 0, self.smoothing)

    def logits(self, batch: Batch) -> Tensor:
        """`[B, K]` of a prepared batch."""
        with self.encoding():
            pooled = self.backbone.pool(self.backbone(batch["image"], gsd=batch.get("gsd")))
        return self.head(pooled)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy; with class weights its mean is weighted, as in `torch.nn.CrossEntropyLoss`."""
        target = batch["target"] if "target" in batch else self.soft(batch["label"])
        weighted = target * self.weight
        return -(weighted * logits.float().log_softmax(1)).sum() / weighted.sum()

    def target(self, batch: Batch) -> Tensor:
        """Labels `[B]`."""
        return batch["label"]


class MultiLabelClassification(Classification):
    """Several labels per image: as `Classification`, with the mean of the labels' binary cross-entropies.

    `torch.nn.BCEWithLogitsLoss` and `torch.nn.MultiLabelSoftMarginLoss`, which S2MAE's sibling uses, are this mean.
    Class weights multiply the loss of a label where it is there (`pos_weight`).
    """

    headline = "map_micro"
    multilabel = True

    def build_scores(self, num_classes: int) -> Scores:
        """`map_micro`, `map_macro`, `f1_micro`, `f1_macro`."""
        return LabelScores(num_classes)

    def check_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Refuse missing labels, another number of them, or other values than 0 and 1."""
        labels = self._labels(batch)
        if labels.ndim != 2 or labels.shape[1] != self.num_classes or bool(((labels != 0) & (labels != 1)).any()):
            raise UserError(
                f"labels of shape {tuple(labels.shape)} do not fit: {self.num_classes} columns of 0 and 1 are needed; "
                "check data.num_classes, or take model.class_path Classification for one label per image."
            )
        return labels.sum(0)

    def soft(self, labels: Tensor) -> Tensor:
        """Labels `[B, K]` as numbers; smoothing moves them towards 1/2."""
        return labels.float() * (1 - self.smoothing) + self.smoothing / 2

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean binary cross-entropy."""
        target = batch["target"] if "target" in batch else self.soft(batch["label"])
        return F.binary_cross_entropy_with_logits(logits.float(), target, pos_weight=self.weight)

    def predictions(self, logits: Tensor) -> dict[str, Tensor]:
        """Probability of every label."""
        return {"score": torch.sigmoid(logits.float())}
