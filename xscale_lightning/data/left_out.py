"""What happens to damaged samples: training puts others in their place, all else leaves them out; both are counted.

A training batch keeps its size, so that schedules and gradients mean what they say; it brings the number of its samples
that took the place of others, and what is counted is what was trained on, not what a worker process has read ahead: so
a resumed run counts as one that was never stopped. Everything that is read in order (validation, test, probes, kNN,
embeddings, packs, statistics) has every sample at most once: a substitute would count twice.
"""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from xscale_lightning.errors import UserError

SKIPPED = "skipped"  # key of a training batch: how many of its samples took the place of damaged ones
_SLOTS = 1 << 16


class LeftOut:
    """Which samples of a split are damaged, shared with the worker processes.

    A sample is a slot of a table in shared memory: noting it twice, or by two processes, is noting it once. Windows of
    a GeoDataset have no number; theirs is a checksum, and two of one slot (1 in 65536) count as one.
    """

    def __init__(self, samples: int) -> None:
        """Nothing is left out yet, of so many samples."""
        self._table = torch.zeros(max(samples, _SLOTS), dtype=torch.uint8).share_memory_()

    def note(self, index: Any) -> None:
        """This sample could not be read."""
        slot = index if isinstance(index, int) else zlib.crc32(repr(index).encode()) % _SLOTS
        self._table[slot % len(self._table)] = 1

    @property
    def slots(self) -> list[int]:
        """The noted samples, in order."""
        return self._table.nonzero().flatten().tolist()


class InOrder(DataLoader[Any]):
    """Loader of samples in order, without those that are damaged: a batch of damaged ones alone does not come.

    Attributes:
        keep_empty: hand on such a batch as `{}`, for those who count batches.
    """

    keep_empty = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches.

        Raises:
            UserError: no sample can be read; or, among several processes, none of a batch, which others wait for.
        """
        came = dropped = 0
        for batch in super().__iter__():
            if self.keep_empty or not isinstance(batch, dict) or batch:
                came += 1
                yield batch
                continue
            dropped += 1
            if getattr(self.sampler, "num_replicas", 1) > 1:
                raise UserError(
                    "data: none of the samples of a batch can be read (their files are named above); with several "
                    "processes every batch needs one: mend or remove the files, or evaluate on one device."
                )
        if dropped and not came:
            raise UserError("data: none of the samples can be read (files are named above); check the data folder.")


def pop_skipped(batch: Any) -> tuple[Any, int]:
    """A batch without the number of its substitutes, and that number."""
    if not isinstance(batch, Mapping) or SKIPPED not in batch:
        return batch, 0
    return {key: value for key, value in batch.items() if key != SKIPPED}, int(batch[SKIPPED])


def checked_state(state: Any) -> tuple[int, dict[str, list[int]]]:
    """The counts of a checkpoint: samples replaced in training, and by split the slots of those left out.

    Raises:
        UserError: it is none of ours.
    """
    skipped = state.get("skipped") if isinstance(state, Mapping) else None
    left_out = state.get("left_out") if isinstance(state, Mapping) else None
    if isinstance(skipped, int) and 0 <= skipped < 2**62 and isinstance(left_out, Mapping):
        slots = {str(split): found for split, found in left_out.items()}
        if all(isinstance(found, list) and all(isinstance(n, int) for n in found) for found in slots.values()):
            return skipped, slots
    raise UserError("checkpoint: its counts of damaged samples are damaged; give another checkpoint of the run.")
