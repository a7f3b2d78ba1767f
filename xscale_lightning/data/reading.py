"""Reading past a damaged file: it is named and replaced or left out, or it stops the run; never a black image."""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from torch.utils.data import Dataset

from xscale_lightning.data.damage import DamageLog, usable, without_path
from xscale_lightning.data.left_out import SKIPPED, LeftOut
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

    With `on_error="skip"` another readable sample takes the place of a damaged one where one sample is asked for, as
    training does; where several are, as everything that goes over a split in order does, damaged ones are left out.

    Attributes:
        left_out: the samples that were left out so far, over all worker processes.
    """

    replaces = True
    """For `SeededSamples`: what it draws for training is asked for one by one."""

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
        self.left_out = LeftOut(len(source) if hasattr(source, "__len__") else 0)  # type: ignore[arg-type]
        self.damage = DamageLog() if damage is None else damage
        self.keep_constant = keep_constant

    def __len__(self) -> int:
        """Return the number of samples, damaged ones included."""
        return len(self.source)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> dict[str, Any]:
        """Read one sample, or another readable one in its place; see `read`."""
        return self.read(index, self._next(index))

    def __getitems__(self, indices: Sequence[Any]) -> list[dict[str, Any]]:
        """Read those of these samples that can be read; the others are left out and noted.

        Raises:
            UserError: naming the file, if one is damaged and `on_error` is "stop".
        """
        found = []
        for index in indices:
            sample, _ = self._try(index, "it is left out")
            if sample is None:
                self.left_out.note(index)
            else:
                found.append(sample)
        return found

    def read(self, index: Any, others: Iterable[Any]) -> dict[str, Any]:
        """Read one sample, or the first readable of `others`, which has `SKIPPED`: 1.

        Raises:
            UserError: naming the file, if it is damaged and `on_error` is "stop", or nothing else can be read either.
        """
        problem = ""
        for candidate in itertools.chain([index], itertools.islice(others, MAX_SUBSTITUTES - 1)):
            sample, why = self._try(candidate, "another sample takes its place")
            if sample is not None:
                return {**sample, SKIPPED: 1} if problem else sample
            problem = why
        raise UserError(f"{problem}, nor is any of the samples tried in its place. Check the data folder.")

    def _try(self, index: Any, remedy: str) -> tuple[dict[str, Any] | None, str]:
        """A sample, or None and what is wrong with it."""
        try:
            sample = self.prepare(self.source[index], index)
            for key in _IMAGES:
                if key in sample:
                    sample[key] = usable(sample[key], self.keep_constant)
            return sample, ""
        except _NOT_THE_FILE:
            raise
        except Exception as error:  # readers raise whatever their libraries raise: OSError, RuntimeError, SyntaxError
            problem = self._describe(index, error)
        if self.on_error == "stop":
            raise UserError(f"{problem}. Repair or remove it, or set data.on_error to skip.")
        if self.damage.first_time(self.file_of(index) or f"sample {index} of dataset {id(self.source)}"):
            log.warning("%s; %s (data.on_error: skip).", problem, remedy)
        return None, problem

    def _next(self, index: Any) -> Iterator[Any]:
        """What takes the place of a sample: others far from it, as files that lie side by side are damaged together."""
        if isinstance(index, int):
            yield from spread(index, len(self))

    def _describe(self, index: Any, error: Exception) -> str:
        name = self.file_of(index) or _name(index)
        if "previous exception" in str(error) and error.__cause__ is not None:  # rasterio's way to say: look there
            error = error.__cause__  # type: ignore[assignment]
        return f"data: {name} is not readable ({type(error).__name__}: {without_path(str(error), name)})"


def spread(index: int, count: int) -> Iterator[int]:
    """All other numbers below `count`, each far from the one before."""
    step = next(n for n in range(max(1, round(count * _GOLDEN)), count + 1) if math.gcd(n, count) == 1)
    yield from ((index + attempt * step) % count for attempt in range(1, count))


def _name(index: Any) -> str:
    """What to call a sample without a file."""
    if isinstance(index, Sequence) and len(index) > 1 and all(isinstance(side, slice) for side in index):
        x, y = index[0], index[1]
        return f"the window x {x.start:.12g} to {x.stop:.12g}, y {y.start:.12g} to {y.stop:.12g}"
    return f"sample {index}"
