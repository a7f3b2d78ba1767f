"""Bootstrap over samples: how far a score could be from here with other samples of the same kind.

Percentile intervals (Efron and Tibshirani 1993, chapter 13), for all draws at once: a draw is a row of multiplicities,
how often each sample was drawn, and a score is a function of many such rows. The score itself is that of a row of ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 1000
ENDS = (0.025, 0.975)
AT_ONCE = 4_000_000  # numbers per chunk of draws: 32 MB


@dataclass(frozen=True)
class Statistic:
    """Scores of a set of samples as a function of how often each sample counts."""

    measure: Callable[[Tensor], dict[str, Tensor]]
    """Multiplicities `[R, N]` float64 -> scores by name, each `[R]`; NaN where a draw cannot be scored."""
    count: int
    """Number of samples N."""
    width: int = 1
    """Numbers per sample that are at hand at once; decides how many draws are made together."""


@dataclass(frozen=True)
class Estimate:
    """A score with what the bootstrap says of it."""

    value: float
    """Over all samples."""
    error: float = 0.0
    """Standard error; 0 if it is not known."""
    interval: tuple[float, float] | None = None
    """95 % interval; None with a single sample."""


def values(statistic: Statistic) -> dict[str, float]:
    """The scores over all samples, each counted once."""
    once = torch.ones(1, statistic.count, dtype=torch.float64)
    return {name: float(score) for name, score in statistic.measure(once).items()}


def bootstrap_draws(statistic: Statistic, draws: int = DRAWS, seed: int = 0) -> dict[str, Tensor]:
    """Scores `[draws]` float64 of samples drawn anew with replacement.

    The same count and seed draw the same samples, whatever the statistic: scores of several encodings of the same
    samples may be combined draw by draw.
    """
    count, generator = statistic.count, torch.Generator().manual_seed(seed)
    rows = max(1, AT_ONCE // max(1, count * statistic.width))
    parts = []
    for first in range(0, draws, rows):
        index = torch.randint(count, (min(rows, draws - first), count), generator=generator)
        times = torch.zeros(len(index), count, dtype=torch.float64)
        parts.append(statistic.measure(times.scatter_add_(1, index, torch.ones_like(times))))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def estimate(value: float, drawn: Tensor) -> Estimate:
    """A score with error and interval from its draws; draws that could not be scored are left out."""
    drawn = drawn[drawn.isfinite()]
    if len(drawn) < 2:
        return Estimate(value)
    low, high = drawn.quantile(torch.tensor(ENDS, dtype=drawn.dtype)).tolist()
    return Estimate(value, float(drawn.std(correction=0)), (low, high))


def estimates(statistic: Statistic, draws: int = DRAWS, seed: int = 0) -> dict[str, Estimate]:
    """All scores with 95 % percentile intervals.

    Args:
        statistic: the scores.
        draws: number of draws; 0 gives the scores alone.
        seed: of the draws.
    """
    found = values(statistic)
    if draws < 1 or statistic.count < 2:
        return {name: Estimate(value) for name, value in found.items()}
    drawn = bootstrap_draws(statistic, draws, seed)
    return {name: estimate(value, drawn[name]) for name, value in found.items()}
