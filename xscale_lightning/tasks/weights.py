"""Class weights and what the labels of a training split say about them. Pure functions."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

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


def missing_classes(counts: Tensor, names: Sequence[str]) -> list[str]:
    """Names of the classes without a sample; of more than eight only the first ones and how many more."""
    missing = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
    return missing if len(missing) <= 8 else [*missing[:8], f"and {len(missing) - 8} more"]


def count_classes(labels: Tensor, num_classes: int) -> Tensor:
    """How often every class occurs `[K]` in integer labels of any shape; negative ones are ignored."""
    return torch.bincount(labels[labels >= 0].flatten(), minlength=num_classes)
