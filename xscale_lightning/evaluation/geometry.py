"""Geometry of a set of features: does the encoder use its dimensions, and does it spread the samples?

All three need no labels. Each takes features `[N, D]` (one row per sample) and returns a float.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from xscale_lightning.errors import UserError


def _prepare(features: Tensor, least: int) -> Tensor:
    if features.ndim != 2 or len(features) < least:
        raise UserError(f"features: shape {tuple(features.shape)} is not possible; give [N, D] with N >= {least}.")
    return features.detach().double()


def effective_rank(features: Tensor) -> float:
    """RankMe (Garrido et al. 2023, eq. 1-2): exp of the entropy of the normalised singular values of `[N, D]`.

    Between 1 (all rows on one line through the origin) and min(N, D) (all singular values equal). As in the paper the
    features are not centred. NaN for features that are not finite or all zero.

    Raises:
        UserError: if the features are not `[N, D]`.
    """
    matrix = _prepare(features, 1)
    if not bool(torch.isfinite(matrix).all()):
        return math.nan
    singular = torch.linalg.svdvals(matrix)
    share = singular / singular.sum()
    return torch.special.entr(share).sum().exp().item()


def uniformity(features: Tensor, t: float = 2.0) -> float:
    """Wang & Isola 2020, eq. 2: log of the mean over pairs i < j of exp(-t |z_i - z_j|^2), rows scaled to length 1.

    0 if all directions are the same; the lower, the more evenly the samples are spread (at t = 2 about -4 at best).

    Raises:
        UserError: if the features are not `[N, D]` with N >= 2.
    """
    distances = torch.pdist(F.normalize(_prepare(features, 2), dim=1))
    return (torch.logsumexp(-t * distances.square(), dim=0) - math.log(len(distances))).item()


def mean_cosine(features: Tensor) -> float:
    """Mean cosine similarity over all pairs of different rows: near 1 means collapse to one direction.

    Raises:
        UserError: if the features are not `[N, D]` with N >= 2.
    """
    rows = F.normalize(_prepare(features, 2), dim=1)
    n = len(rows)
    # |sum z|^2 holds every pair twice and every row with itself once; no [N, N] matrix is needed.
    return ((rows.sum(dim=0).square().sum() - rows.square().sum()) / (n * (n - 1))).item()
