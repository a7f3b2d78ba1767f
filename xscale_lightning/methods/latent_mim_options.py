"""What LatentMIM predicts and how predictions are judged: options of `latent_mim.py`, with those of its relatives."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from xscale_lightning.errors import UserError
from xscale_lightning.losses import at_least_float32, normalize_patches, patch_discrimination, patch_mse
from xscale_lightning.schedules import Schedule

MOMENTUM = Schedule("cosine", 0.99, 1.0)  # published configuration
SIMILARITY = Schedule("cosine", 0.75, 0.25)  # published README, with weight 0.1


@dataclass(frozen=True)
class Target:
    """The network that makes the targets: a copy of encoder and head that follows them."""

    momentum: Schedule = MOMENTUM
    """Of the copy; constant 1 leaves it as initialised (with `depth` 0: OlmoEarth's frozen random projection)."""
    depth: int | None = None
    """Blocks of the copy to run, without its last norm and head: 0 is the patch embedding alone, without positions
    (Galileo's local task, OlmoEarth); null runs everything."""
    tokens: Literal["hidden", "all"] = "hidden"
    """What the copy sees: the `hidden` patches that are to be predicted, as published, or `all` of the image."""

    def __post_init__(self) -> None:
        """Refuse values that no copy can have."""
        ends = (self.momentum.start, self.momentum.end)
        if not (min(ends) >= 0 and max(ends) <= 1):
            raise UserError(f"target.momentum must stay in [0, 1], got {ends[0]} to {ends[1]}.")
        if self.depth is not None and self.depth < 0:
            raise UserError(f"target.depth must be 0 or more, or null for all blocks; got {self.depth}.")


@dataclass(frozen=True)
class Objective:
    """What makes a prediction good."""

    kind: Literal["patch_discrimination", "norm_l2"] = "patch_discrimination"
    """Tell the targets apart, or squared error to the target standardised per token."""
    temperature: float = 0.2
    """tau of patch discrimination; Galileo and OlmoEarth: 0.1."""
    standardize: bool = True
    """Standardise the predictions over the tokens of an image first; Galileo and OlmoEarth do not."""
    negatives: Literal["image", "batch"] = "image"
    """Patches that a target is told from: of the same `image`, or of the whole `batch` (Galileo's AllDisc)."""
    similarity_weight: float = 0.0
    """w, weight of the similarity constraint."""
    similarity: Schedule = SIMILARITY
    """s, the mean cosine that the constraint asks for."""

    def __post_init__(self) -> None:
        """Refuse values that make no loss."""
        if not 0 < self.temperature < math.inf:
            raise UserError(f"objective.temperature must be finite and above 0, got {self.temperature}.")
        if not 0 <= self.similarity_weight < math.inf:
            raise UserError(f"objective.similarity_weight must be finite, 0 or more; got {self.similarity_weight}.")

    @property
    def sample_wise(self) -> bool:
        """Whether the loss of a batch is the mean of its images'; the constraint's cosine is a mean over the batch."""
        return self.negatives == "image" and not self.similarity_weight

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Loss of `prediction` and `target` `[B, M, D]`, without the similarity constraint."""
        if self.kind == "norm_l2":
            return patch_mse(prediction, normalize_patches(at_least_float32(target)))
        return patch_discrimination(prediction, target, self.temperature, self.standardize, self.negatives)
