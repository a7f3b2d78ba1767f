"""One line per training batch, exact to the bit: to compare a run that was stopped with one that never was."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

FIELDS = ("batch", "step", "epoch", "loss", "lr", "images", "draws", "state")


class Trace(Callback):
    """Appends a line per training batch to a file: what went in, what was drawn, what came out.

    Numbers are written as hexadecimal floats and everything else as a hash, so equal lines mean equal bits. It waits
    for the device at every batch: for tests and `benchmarks/kill.py`, not for training.
    """

    def __init__(self, file: str | None = None, state_every: int = 1) -> None:
        """Choose the file.

        Args:
            file: where to append; null writes nothing.
            state_every: batches between two hashes of weights, target networks and AdamW's moments; 0 writes none.
        """
        super().__init__()
        self.file, self.state_every = file, state_every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the line at once: what is written survives the process."""
        if self.file is None:
            return
        number, state = trainer.fit_loop.total_batch_idx, "-"
        if self.state_every and (number + 1) % self.state_every == 0:
            moments = trainer.optimizers[0].state_dict()["state"]
            state = digest([*tensors(pl_module.state_dict()), *tensors(moments)])
        images = digest(tensors(batch))
        generators = [torch.get_rng_state()]
        if pl_module.device.type == "cuda":
            generators.append(torch.cuda.get_rng_state(pl_module.device))
        values = (
            *(str(value) for value in (number, trainer.global_step, trainer.current_epoch)),
            float(outputs["loss"]).hex(),
            float(trainer.optimizers[0].param_groups[-1]["lr"]).hex(),
            *(images, digest(generators), state),
        )
        suffix = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        descriptor = os.open(f"{self.file}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, (" ".join(values) + "\n").encode())
        finally:
            os.close(descriptor)


def tensors(content: Any) -> list[Tensor]:
    """All tensors of a nested mapping or list, in order."""
    if isinstance(content, Tensor):
        return [content]
    parts = content.values() if isinstance(content, Mapping) else content if isinstance(content, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def digest(values: Iterable[Tensor]) -> str:
    """Short hash of the bits of tensors."""
    total = hashlib.blake2b(digest_size=8)
    for value in values:
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def read_rows(path: str | Path) -> list[tuple[str, ...]]:
    """All lines of a trace; one that was cut off by the end of its process does not count."""
    rows = (tuple(line.split()) for line in Path(path).read_text(encoding="utf-8").splitlines())
    return [row for row in rows if len(row) == len(FIELDS)]


def read_trace(path: str | Path) -> dict[int, tuple[str, ...]]:
    """Lines by number of the batch; of batches that were run again after a resume the last line counts."""
    return {int(row[0]): row for row in read_rows(path)}


def differences(straight: Mapping[int, tuple[str, ...]], other: Mapping[int, tuple[str, ...]]) -> list[str]:
    """What two traces differ in, for people, from the first batch on; empty if they are equal."""
    found = []
    for number in sorted(straight.keys() | other.keys()):
        one, two = straight.get(number), other.get(number)
        if one is None or two is None:
            found.append(f"batch {number}: only in the {'second' if one is None else 'first'}")
        elif one != two:
            names = [name for name, a, b in zip(FIELDS, one, two, strict=True) if a != b]
            found.append(f"batch {number}: {', '.join(names)} differ")
    return found
