"""Naming damaged files: each one once, however many workers, loaders and splits come across it."""

import os
import re
import zlib

import torch

MAX_NAMED = 20  # files a data module names in the log; more are only counted
_SLOTS = 1 << 16


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
        return f"{samples} {what} replaced ({named} named above)"


def without_path(text: str, path: str) -> str:
    """A library's error message on one line, without the path that our message names already."""
    name = re.escape(os.path.basename(path))
    if name:
        text = re.sub(rf"'[^']*{name}'|\"[^\"]*{name}\"", "", text)
    text = text.replace(path, "")
    if name:
        text = re.sub(rf"[^\s'\"(]*{name}", "", text)
    return " ".join(text.split()).strip(" :,")[:200] or "no reason given"
