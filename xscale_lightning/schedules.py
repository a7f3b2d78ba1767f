"""Schedules as pure functions of (optimizer step, total steps).

Nothing here has a state, so resuming and gradient accumulation are right by construction.
"""

import math
from dataclasses import dataclass
from typing import Literal

from xscale_lightning.errors import UserError


def linear(step: int, total: int, start: float, end: float) -> float:
    """From `start` at step 0 linearly to `end` at step `total`; `end` from there on."""
    return start + (end - start) * min(step / max(total, 1), 1.0)


def cosine(step: int, total: int, start: float, end: float) -> float:
    """From `start` at step 0 along half a cosine to `end` at step `total`; `end` from there on."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(step / max(total, 1), 1.0)))


def warmup_cosine(step: int, total: int, warmup: int, start: float, peak: float, end: float) -> float:
    """Linear from `start` to `peak` over `warmup` steps, then half a cosine to `end` at step `total`.

    Source: He et al. 2022 (MAE), appendix A.1, evaluated per step.
    """
    if step < warmup:
        return linear(step, warmup, start, peak)
    return cosine(step - warmup, total - warmup, peak, end)


@dataclass(frozen=True)
class Rise:
    """A weight that is 0 at first and then rises linearly to its value."""

    value: float
    """Value after the rise."""
    start: float
    """Share of the run before it leaves 0."""
    length: float
    """Share of the run that the rise takes; 0: it is a jump."""

    def __post_init__(self) -> None:
        """Refuse values that are no numbers, and a rise that goes back in time."""
        for name in ("value", "start", "length"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"a rise's {name} must be finite, got {getattr(self, name)}.")
        if self.length < 0:
            raise UserError(f"a rise's length must not be negative, got {self.length}.")

    def __call__(self, step: int, total: int) -> float:
        """Value at optimizer step `step` of `total`."""
        past = step / max(total, 1) - self.start
        if past < 0:
            return 0.0
        return self.value * (min(past / self.length, 1.0) if self.length else 1.0)


@dataclass(frozen=True)
class Schedule:
    """A float that changes with the optimizer step."""

    kind: Literal["constant", "linear", "cosine"]
    """Shape of the way from `start` to `end`."""
    start: float
    """Value at step 0."""
    end: float
    """Value at the last step."""

    def __post_init__(self) -> None:
        """Refuse a constant that is none, and values that are no numbers."""
        for name in ("start", "end"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"a schedule's {name} must be finite, got {getattr(self, name)}.")
        if self.kind == "constant" and self.start != self.end:
            raise UserError(f"kind: a constant schedule has one value, got start {self.start} and end {self.end}.")

    def __call__(self, step: int, total: int) -> float:
        """Value at optimizer step `step` of `total`."""
        return (cosine if self.kind == "cosine" else linear)(step, total, self.start, self.end)
