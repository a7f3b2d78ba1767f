"""Whether a number is far above what it was lately: a median and a spread that single outliers do not move."""

from collections import deque
from collections.abc import Iterable
from statistics import median

WINDOW = 64  # losses that are remembered
LEAST = 16  # fewer say nothing about what is usual
_TO_DEVIATION = 1.4826  # of the median absolute deviation to the standard deviation of normal numbers


class SpikeDetector:
    """Compares every loss with the median of the last ones and their spread (median absolute deviation).

    Lightning's `SpikeDetection` compares with a running mean, waits for the device in every step, stops the run at the
    first spike and keeps no state that a weights-only checkpoint could hold; here a spike is only told.

    Args:
        factor: how many deviations above the median, and shares of it, a spike lies.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.values: deque[float] = deque(maxlen=WINDOW)

    def usual(self) -> tuple[float, float] | None:
        """Median and deviation of the last losses; None while there are too few."""
        if len(self.values) < LEAST:
            return None
        middle = median(self.values)
        return middle, _TO_DEVIATION * median(abs(value - middle) for value in self.values)

    def limit(self) -> float | None:
        """The least loss that is a spike; None while too few are known."""
        usual = self.usual()
        if usual is None:
            return None
        middle, deviation = usual
        return middle + max(self.factor * deviation, abs(middle))  # at least twice the usual: a flat loss has no spread

    def is_spike(self, value: float) -> bool:
        """Whether `value` is far above the last ones; it is remembered either way."""
        limit = self.limit()
        self.values.append(value)
        return limit is not None and value > limit

    def recall(self, values: Iterable[float]) -> None:
        """Take over the losses of a checkpoint."""
        self.values = deque(values, maxlen=WINDOW)
