"""Reading past a damaged file: it is named, counted and replaced, or it stops the run; never a black image."""

import logging
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from xscale_lightning.data.damage import DamageLog, usable, without_path
from xscale_lightning.errors import UserError

OnError = Literal["skip", "stop"]
MAX_SUBSTITUTES = 32
_GOLDEN = 0.618  # share of all samples from one substitute to the next: they spread evenly, however many are tried

# Mistakes in code or configuration: no other file would read any better.
_NOT_THE_FILE = (UserError, TypeError, AttributeError, NameError, ImportError, MemoryError)

_IMAGES = ("image", "image2", "image_hr")

log = logging.getLogger(__name__)


def check_on_error(on_error: str) -> None:
    """Raise `UserError` unless the value is "skip" or "stop"."""
    if on_error not in ("skip", "stop"):
        raise UserError(f"data.on_error: '{on_error}' is unknown; choose from skip, stop.")


class Reader(Dataset[dict[str, Any]]):
    """Reads samples of any map-style dataset, prepares them, and deals with those that cannot be read.

    With `on_error="skip"` another readable sample takes the place of a damaged one; `skips` counts how often, over all
    worker processes. An index that is not an integer (a window of a GeoDataset) is replaced by the last readable one.
    """

    def __init__(
        self,
        source: Dataset[Any],
        prepare: Callable[[Any, Any], dict[str, Any]],
        on_error: OnError = "skip",
        file_of: Callable[[Any], str | None] = lambda index: None,
        damage: DamageLog | None = None,
        keep_constant: bool = False,
    ) -> None:
        """Wrap a dataset.

        Args:
            source: what to read from.
            prepare: makes our sample of (the source's sample, its index).
            on_error: "skip" or "stop".
            file_of: name of the file behind an index, for messages.
            damage: the data module's list of damaged files; null makes one.
            keep_constant: deliver images with one value everywhere, too.
        """
        check_on_error(on_error)
        self.source = source
        self.prepare = prepare
        self.on_error = on_error
        self.file_of = file_of
        self.skips = torch.zeros((), dtype=torch.int64).share_memory_()  # worker processes write, the trainer reads
        self.damage = DamageLog() if damage is None else damage
        self.keep_constant = keep_constant
        self._last_good: Any = None

    def __len__(self) -> int:
        """Return the number of samples, damaged ones included."""
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> dict[str, Any]:
        """Read one sample.

        Raises:
            UserError: naming the file, if it is damaged and `on_error` is "stop", or nothing else can be read either.
        """
        wanted = index
        for attempt in range(1, MAX_SUBSTITUTES + 1):
            try:
                sample = self.prepare(self.source[index], index)
                for key in _IMAGES:
                    if key in sample:
                        sample[key] = usable(sample[key], self.keep_constant)
                self._last_good = index
                return sample
            except _NOT_THE_FILE:
                raise
            except (
                Exception
            ) as error:  # readers raise whatever their libraries raise: OSError, RuntimeError, SyntaxError
                problem = self._describe(index, error)
            if self.on_error == "stop":
                raise UserError(f"{problem}. Repair or remove it, or set data.on_error to skip.")
            self.skips += 1
            if self.damage.first_time(self.file_of(index) or f"sample {index} of dataset {id(self.source)}"):
                log.warning("%s; another sample takes its place (data.on_error: skip).", problem)
            index = self._substitute(wanted, attempt)
            if index is None:
                break
        raise UserError(f"{problem}, nor is any of the samples tried in its place. Check the data folder.")

    def _substitute(self, index: Any, attempt: int) -> Any:
        """Far from the damaged one: files that lie side by side are damaged together."""
        if not isinstance(index, int):
            return self._last_good
        count = len(self)
        step = next(step for step in range(max(1, round(count * _GOLDEN)), count + 1) if math.gcd(step, count) == 1)
        return (index + attempt * step) % count if attempt < count else None

    def _describe(self, index: Any, error: Exception) -> str:
        name = self.file_of(index) or f"sample {index}"
        return f"data: {name} is not readable ({type(error).__name__}: {without_path(str(error), name)})"
