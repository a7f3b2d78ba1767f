"""Class weights and what the labels of a training split say about them."""

from collections.abc import Sequence
from typing import Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from xscale_lightning.errors import UserError

WeightRule = Literal["balanced", "oscd"]
ClassWeights = list[float] | WeightRule | None


def class_weights(counts: Tensor, rule: WeightRule) -> Tensor:
    """Weights `[K]` of classes that occur `counts [K]` times.

    * `balanced`: total / (K * count), as in scikit-learn; a class that does not occur gets 1.
    * `oscd`: two classes, unchanged and changed: `[20 f, 2 (1 - f)]` with f the share of the changed.
      Source: published code of SpectralGPT for OSCD (Hong et al. 2024), a sibling of S2MAE.
    """
    counts = counts.double()
    if rule == "oscd":
        share = counts[1] / counts.sum().clamp(min=1)
        return torch.stack([20 * share, 2 * (1 - share)]).float()
    weights = counts.sum() / (len(counts) * counts.clamp(min=1))
    return torch.where(counts > 0, weights, 1.0).float()


def given_weights(weights: ClassWeights, num_classes: int) -> Tensor:
    """Weights `[K]` as they are given; ones where there are none, or where a rule has yet to be followed.

    Raises:
        UserError: another number of them than classes.
    """
    if not isinstance(weights, list):
        return torch.ones(num_classes)
    if len(weights) != num_classes:
        raise UserError(f"model.class_weights: {len(weights)} values for {num_classes} classes.")
    return torch.tensor(weights, dtype=torch.float32)


def check_seen(counts: Tensor, names: Sequence[str]) -> None:
    """Say which classes had no sample in the first epoch.

    Raises:
        UserError: nothing had a label at all.
    """
    if not counts.sum():
        raise UserError("every label of the training split is ignored: check the data's classes and ignore_index.")
    if missing := missing_classes(counts, names):
        rank_zero_warn(f"the first epoch had no sample of class {', '.join(missing)}: it cannot be learned.")


def missing_classes(counts: Tensor, names: Sequence[str]) -> list[str]:
    """Names of the classes without a sample; of more than eight only the first ones and how many more."""
    missing = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
    return missing if len(missing) <= 8 else [*missing[:8], f"and {len(missing) - 8} more"]


def count_classes(labels: Tensor, num_classes: int) -> Tensor:
    """How often every class occurs `[K]` in integer labels of any shape; negative ones are ignored."""
    return torch.bincount(labels[labels >= 0].flatten(), minlength=num_classes)
