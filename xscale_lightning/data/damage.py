"""Naming damaged files: each one once, however many workers, loaders and splits come across it."""

import os
import re
import zlib

import numpy as np
import torch
from torch import Tensor

MAX_NAMED = 20  # files a data module names in the log; more are only counted
_SLOTS = 1 << 16
MAX_MISSING = 0.5  # largest share of pixels that are not finite in an image which is delivered all the same
LEAST_PIXELS = 16  # of fewer, all may well be alike


class DamageLog:
    """Which files of a data module are damaged, shared by all its datasets and their worker processes.

    A file is a slot of a table in shared memory, found by a checksum of its name: no locks and no queue. Two files of
    one slot (1 in 65536) count as one, and two workers that meet a file in the same moment may both name it.
    """

    def __init__(self) -> None:
        """Nothing is damaged yet."""
        self._found = torch.zeros(_SLOTS, dtype=torch.uint8).share_memory_()

    def first_time(self, file: str) -> bool:
        """Note that a file is damaged; returns whether it is to be named now."""
        slot = zlib.crc32(file.encode()) % _SLOTS
        known = bool(self._found[slot])
        self._found[slot] = 1
        return not known and self.files <= MAX_NAMED

    @property
    def files(self) -> int:
        """Number of damaged files so far."""
        return int(self._found.sum(dtype=torch.int64))

    def summary(self, samples: int) -> str:
        """One line for the end of a run in which `samples` damaged samples were replaced."""
        files = self.files
        named = f"{files} file{'s' * (files != 1)}" if files <= MAX_NAMED else f"{MAX_NAMED} of {files} files"
        what = "damaged sample was" if samples == 1 else "damaged samples were"
        where = f"{named} named above" if files else "their files are named in the log of the run's first part"
        return f"{samples} {what} replaced ({where})"


def without_path(text: str, path: str) -> str:
    """A library's error message on one line, without the path that our message names already."""
    name = re.escape(os.path.basename(path))
    if name:
        text = re.sub(rf"'[^']*{name}'|\"[^\"]*{name}\"", "", text)
    text = text.replace(path, "")
    if name:
        text = re.sub(rf"[^\s'\"(]*{name}", "", text)
    return " ".join(text.split()).strip(" :,")[:200] or "no reason given"


def is_constant(pixels: np.ndarray) -> bool:
    """Whether an image `[C, H, W]` has one value per band, to the digit: a sensor never sees that, a broken file does.

    The last row settles nearly every image, so little is read of a good one.
    """
    if pixels.shape[-2] * pixels.shape[-1] < LEAST_PIXELS:
        return False
    first = pixels[..., :1, :1]
    return bool((pixels[..., -1:, :] == first).all()) and bool((pixels == first).all())


def usable(image: Tensor, keep_constant: bool = False) -> Tensor:
    """An image `[C, H, W]` whose pixels that are not finite have the mean of their band.

    Raises:
        ValueError: more than half of its pixels are not finite, all of a band's, or all have one value.
    """
    finite = torch.isfinite(image)
    if not finite.all():
        missing = 1.0 - float(finite.float().mean())
        if missing > MAX_MISSING:
            raise ValueError(f"{missing:.0%} of its pixels are NaN or infinite")
        counts = finite.sum((1, 2), keepdim=True)
        if not counts.all():
            raise ValueError("a band has no finite pixel")
        means = torch.where(finite, image, 0).sum((1, 2), keepdim=True) / counts
        image = torch.where(finite, image, means)
    if not keep_constant and is_constant(image.numpy()):
        raise ValueError(f"every pixel has the value {float(image.flatten()[0]):g}, which is taken for damage")
    return image
