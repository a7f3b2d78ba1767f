"""Dense linear probe: one linear layer on frozen patch features says how well they tell land covers apart.

The protocol of Waithaka, Bwirayesu and Busogi 2026 (spatial affinity): every token's features go through one linear
layer, the logits are interpolated bilinearly to the size of the mask, and cross-entropy is taken over its pixels. Mean
IoU comes from one confusion matrix over the whole set, never from a mean over batches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xscale_lightning.errors import UserError
from xscale_lightning.schedules import warmup_cosine


@dataclass(frozen=True)
class DenseRecipe:
    """How the linear layer is trained. The defaults are the published ones around I-JEPA."""

    epochs: int = 100
    """Passes over the training features."""
    batch_size: int = 64
    """Images per step."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup_epochs: int = 10
    """Epochs in which the learning rate rises from `warmup_lr`."""
    warmup_lr: float = 1e-4
    """Learning rate at step 0."""
    min_lr: float | None = 1e-6
    """Where the cosine ends; None keeps `lr` from the first step to the last, as published around LatentMIM."""
    weight_decay: float = 0.0
    """Of AdamW."""
    class_weights: Sequence[float] | None = None
    """Weight of every class in the cross-entropy; None weighs all pixels alike."""
    standardise: bool = False
    """Bring every feature to mean 0 and deviation 1 over the training tokens first; not part of the protocol."""
    seed: int = 0
    """Of the initial weights and the order of the images."""

    def __post_init__(self) -> None:
        """Refuse numbers that are out of range.

        Raises:
            UserError: naming the number.
        """
        for name, least in (("epochs", 1), ("batch_size", 1), ("warmup_epochs", 0), ("weight_decay", 0)):
            if getattr(self, name) < least:
                raise UserError(f"dense.{name}: {getattr(self, name)} is not possible; give at least {least}.")
        if not self.lr > 0:
            raise UserError(f"dense.lr: {self.lr} is not possible; give a number above 0.")
        if self.warmup_epochs >= self.epochs and self.min_lr is not None:
            raise UserError(
                f"dense.warmup_epochs: {self.warmup_epochs} is not possible with {self.epochs} epochs; give fewer, "
                "or more dense.epochs."
            )
        if self.class_weights is not None and not all(math.isfinite(w) and w >= 0 for w in self.class_weights):
            raise UserError(f"dense.class_weights: {list(self.class_weights)} is not possible; give numbers from 0 on.")

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step, counted from 0."""
        if self.min_lr is None:
            return self.lr
        total, warmup = self.epochs * steps_per_epoch, self.warmup_epochs * steps_per_epoch
        return warmup_cosine(step, total, warmup, self.warmup_lr, self.lr, self.min_lr)


@dataclass(frozen=True)
class DenseHead:
    """A linear layer per token."""

    weight: Tensor
    """`[K, D]`."""
    bias: Tensor
    """`[K]`."""

    def predict(self, features: Tensor, size: tuple[int, int], chunk: int = 64) -> Tensor:
        """Class of every pixel, `[N, H, W]` int64 on the features' device, from features `[N, D, h, w]`."""
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            rows, cols = _interpolation(features, size)
            parts = [_logits(x, self.weight, self.bias, rows, cols).argmax(-1) for x in features.split(chunk)]
        return torch.cat(parts) if parts else torch.zeros(0, *size, dtype=torch.int64, device=features.device)


@dataclass(frozen=True)
class DenseScores:
    """What a confusion matrix over a whole set says."""

    miou: float
    """Mean IoU over the classes that occur in mask or prediction; classes in neither are left out of the mean."""
    accuracy: float
    """Share of pixels that are right."""
    iou: tuple[float, ...]
    """IoU of every class, NaN where a class is neither in a mask nor in a prediction."""


def _interpolation(features: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Matrices `[H, h]` and `[W, w]` of bilinear interpolation: their products are repeatable, backwards too."""

    def matrix(count: int, wanted: int) -> Tensor:
        unit = torch.eye(count, dtype=features.dtype, device=features.device)[None]  # every row is one impulse
        return F.interpolate(unit, size=wanted, mode="linear", align_corners=False)[0].T

    return matrix(features.shape[2], size[0]), matrix(features.shape[3], size[1])


def _logits(features: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Logits `[B, H, W, K]` from features `[B, D, h, w]`."""
    maps = torch.einsum("kd,bdhw->bkhw", weight, features.float()) + bias[:, None, None]
    return (rows @ maps @ cols.T).permute(0, 2, 3, 1)


def check_maps(features: Tensor, masks: Tensor, num_classes: int, ignore_index: int, what: str) -> None:
    """Refuse masks that do not go with the features or the classes.

    Args:
        features: `[N, D, h, w]`.
        masks: `[N, H, W]`.
        num_classes: number of classes.
        ignore_index: label of pixels that do not count.
        what: what they are, for messages ("the training split of floods").

    Raises:
        UserError: naming the shapes, or the label that is no class; also if not a single pixel counts.
    """
    if features.ndim != 4 or masks.ndim != 3 or len(features) != len(masks) or not len(masks):
        raise UserError(
            f"masks: {tuple(masks.shape)} does not go with features {tuple(features.shape)} of {what}; "
            "needs [N, H, W] and [N, D, h, w], N at least 1."
        )
    counted = masks != ignore_index
    wrong = masks[counted & ((masks < 0) | (masks >= num_classes))]
    if len(wrong):
        raise UserError(
            f"masks: label {int(wrong[0])} of {what} is not one of the {num_classes} classes 0 to {num_classes - 1}, "
            f"nor {ignore_index} (ignored); mend the masks or the number of classes."
        )
    if not bool(counted.any()):
        raise UserError(f"masks: all pixels of {what} are ignored ({ignore_index}); nothing is left to learn or score.")


def absent_classes(masks: Tensor, num_classes: int) -> list[int]:
    """Classes that not one pixel of masks `[N, H, W]` has."""
    present = set(masks.unique().tolist())
    return [number for number in range(num_classes) if number not in present]


def fit_dense_head(
    features: Tensor,
    masks: Tensor,
    num_classes: int,
    recipe: DenseRecipe = DenseRecipe(),
    selection: tuple[Tensor, Tensor] | None = None,
    ignore_index: int = -1,
) -> DenseHead:
    """Train the linear layer. The same inputs and seed give the same layer; torch's own random numbers are not used.

    Args:
        features: `[N, D, h, w]`, frozen.
        masks: `[N, H, W]` classes, on any device.
        num_classes: number of classes K.
        recipe: how it is trained.
        selection: features and masks of a split that neither trains nor scores: the epoch with the best mean IoU on it
            is kept. None keeps the last epoch.
        ignore_index: label of pixels that do not count.

    Raises:
        UserError: as `check_maps`, and if there is not one class weight per class.
    """
    check_maps(features, masks, num_classes, ignore_index, "the training split")
    if recipe.class_weights is not None and len(recipe.class_weights) != num_classes:
        raise UserError(
            f"dense.class_weights: {len(recipe.class_weights)} weights for {num_classes} classes; give one per class."
        )
    device = features.device
    # Probes run in `no_grad`, in `test` even in `inference_mode`, whose tensors cannot be trained on.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        features = features.clone() if features.is_inference() else features
        masks = masks.clone() if masks.is_inference() else masks
        draws = torch.Generator().manual_seed(recipe.seed)
        weight = 0.01 * torch.randn(num_classes, features.shape[1], generator=draws)
        weight = weight.to(device).requires_grad_()
        bias = torch.zeros(num_classes, device=device, requires_grad=True)
        optimizer = torch.optim.AdamW([weight, bias], lr=recipe.lr, weight_decay=recipe.weight_decay)
        weights = None if recipe.class_weights is None else torch.tensor(recipe.class_weights, device=device).float()
        mean, std = _statistics(features) if recipe.standardise else (None, None)
        rows, cols = _interpolation(features.float(), (masks.shape[1], masks.shape[2]))
        steps, best = math.ceil(len(features) / recipe.batch_size), (-1.0, None)
        for epoch in range(recipe.epochs):
            order = torch.randperm(len(features), generator=draws)
            for i, index in enumerate(order.split(recipe.batch_size)):
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr_at(epoch * steps + i, steps)
                x = features[index.to(device)].float()
                x = x if mean is None or std is None else (x - mean) / std
                target = masks[index.to(masks.device)].to(device).long()
                loss = _cross_entropy(_logits(x, weight, bias, rows, cols), target, weights, ignore_index)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if selection is not None:
                head = _folded(weight, bias, mean, std)
                found = dense_scores(confusion_matrices(head, *selection, ignore_index=ignore_index))
                best = max(best, (found.miou, head), key=lambda item: item[0])  # of equals the first
        return best[1] or _folded(weight, bias, mean, std)


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation `[D, 1, 1]` of every feature; a constant one is left at its scale."""
    std = features.float().std(dim=(0, 2, 3), correction=0)
    return features.float().mean(dim=(0, 2, 3))[:, None, None], torch.where(std > 1e-6, std, 1.0)[:, None, None]


def _folded(weight: Tensor, bias: Tensor, mean: Tensor | None, std: Tensor | None) -> DenseHead:
    """A copy of the layer that takes features as they are."""
    if mean is None or std is None:
        return DenseHead(weight.detach().clone(), bias.detach().clone())
    scaled = weight.detach() / std[:, 0, 0]
    return DenseHead(scaled, bias.detach() - scaled @ mean[:, 0, 0])


def _cross_entropy(logits: Tensor, target: Tensor, weights: Tensor | None, ignore_index: int) -> Tensor:
    """Weighted mean over the pixels `[B, H, W]` that count, 0 where none does; logits `[B, H, W, K]`."""
    flat, labels = logits.flatten(0, 2), target.flatten()
    counted = labels != ignore_index
    shares = counted.float() if weights is None else weights[labels.clamp(min=0)] * counted
    losses = F.cross_entropy(flat, labels, reduction="none", ignore_index=ignore_index)
    return (losses * shares).sum() / shares.sum().clamp(min=1e-12)


def confusion_matrices(
    head: DenseHead, features: Tensor, masks: Tensor, ignore_index: int = -1, chunk: int = 64
) -> Tensor:
    """Confusion matrix of every image, `[N, K, K]` int64 on the CPU: mask in rows, prediction in columns.

    Raises:
        UserError: as `check_maps`.
    """
    classes = len(head.bias)
    check_maps(features, masks, classes, ignore_index, "the evaluated split")
    size = (masks.shape[1], masks.shape[2])
    parts = []
    for x, target in zip(features.split(chunk), masks.split(chunk), strict=True):
        predicted = head.predict(x, size, chunk).flatten(1)
        labels = target.to(predicted.device).long().flatten(1)
        image = torch.arange(len(x), device=predicted.device)[:, None].expand_as(labels)
        cell = (image * classes + labels) * classes + predicted
        counts = torch.bincount(cell[labels != ignore_index], minlength=len(x) * classes**2)
        parts.append(counts.view(len(x), classes, classes).cpu())
    return torch.cat(parts)


def dense_scores(confusion: Tensor) -> DenseScores:
    """Scores over all images of `[N, K, K]` (or of one matrix `[K, K]`)."""
    total = confusion.reshape(-1, *confusion.shape[-2:]).sum(0).double()
    right = total.diagonal()
    iou = right / (total.sum(0) + total.sum(1) - right)  # 0 / 0: in neither
    return DenseScores(float(iou.nanmean()), float(right.sum() / total.sum()), tuple(iou.tolist()))
