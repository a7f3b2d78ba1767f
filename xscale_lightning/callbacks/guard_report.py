"""What the finite guard tells of a skipped update: which batch, why perhaps, and a file to look at it again."""

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from xscale_lightning.callbacks.guard_flags import Flags, Micro, Outcome
from xscale_lightning.callbacks.replay import FORMAT, first_not_finite
from xscale_lightning.checkpoints import plain
from xscale_lightning.files import whole

log = logging.getLogger(__name__)
MARKS = ("file", "origin", "index")
_SHOWN = 4


def marks_of(batch: Any) -> dict[str, Any]:
    """What a batch says of its samples: `file` (names), `origin [B, 3]` (scene, row, column) or `index [B]`."""
    return {key: batch[key] for key in MARKS if key in batch} if isinstance(batch, Mapping) else {}


def samples_of(trainer: Trainer, marks: Mapping[str, Any]) -> list[str]:
    """One text per sample: its file, its window in a scene, or its number; empty where the data knows none."""
    files = [str(name) for name in marks.get("file", ())]
    if "origin" in marks:
        scenes = getattr(getattr(trainer, "datamodule", None), "scenes", None)
        for scene, row, column in marks["origin"].tolist():
            name = scenes[scene].sources[0].raster.path if scenes else f"scene {scene}"
            files.append(f"{name} at row {row}, column {column}")
    return files or [f"sample {number}" for number in (marks["index"].tolist() if "index" in marks else ())]


def guilty(flags: Flags, outcome: Outcome) -> int:
    """Number of the micro-batch to look at: the first whose loss is not finite, else the newest."""
    return next((i for i, loss in enumerate(outcome.losses) if not math.isfinite(loss)), len(flags.micros) - 1)


def bad_parameters(flags: Flags, outcome: Outcome) -> list[str]:
    """Names of the parameters whose gradient is not finite, in the module's order."""
    return [name for name, peak in zip(flags.names, outcome.peaks, strict=True) if not math.isfinite(peak)]


def bad_terms(micro: Micro) -> list[str]:
    """Names of the terms of the loss that are not finite."""
    return [name for name, term in micro.terms.items() if not bool(torch.isfinite(term).all())]


def told(trainer: Trainer, flags: Flags, outcome: Outcome, saved: Path | None) -> str:
    """One line about a skipped update."""
    number = guilty(flags, outcome)
    micro = flags.micros[number]
    samples = samples_of(trainer, micro.marks)
    shown = ", ".join(samples[:_SHOWN]) + (f" and {len(samples) - _SHOWN} more" if len(samples) > _SHOWN else "")
    rank = f", process {trainer.global_rank}" if trainer.world_size > 1 else ""
    return (
        f"Skipped the update of step {flags.step} (epoch {flags.epoch}, batch {micro.batch_idx}{rank}): "
        f"{_what(flags, outcome)}. {f'Samples: {shown}. ' if shown else ''}"
        f"{f'Saved as {saved}.' if saved else 'Its batch was not saved.'}"
    )


def _what(flags: Flags, outcome: Outcome) -> str:
    loss = outcome.losses[guilty(flags, outcome)]
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    bad = bad_parameters(flags, outcome)
    return (
        f"the gradient of {len(bad)} of {len(flags.names)} parameters is not finite ({bad[0] if bad else 'elsewhere'})"
    )


def save_for_replay(trainer: Trainer, flags: Flags, outcome: Outcome, run: Path | None, keep: int) -> Path | None:
    """Write `<run>/guard/step_0000041.pt`, whole or not at all, and drop the oldest beyond `keep`; returns its path.

    It holds tensors and plain types only: `torch.load(path, weights_only=True)` opens it. A disk that is full or a
    folder that is gone costs the file, never the run.
    """
    if run is None or not keep:
        return None
    number = guilty(flags, outcome)
    micro, rank = flags.micros[number], trainer.global_rank
    batch = micro.batch if isinstance(micro.batch, Mapping) else {}
    record = {
        "format": FORMAT,
        "batch": {k: v.detach().cpu() if isinstance(v, Tensor) else plain(v) for k, v in batch.items()},
        "samples": samples_of(trainer, micro.marks),
        "step": flags.step,
        "epoch": flags.epoch,
        "batch_idx": micro.batch_idx,
        "total_batch_idx": micro.total_batch_idx,
        "seed": int(os.environ.get("PL_GLOBAL_SEED", 0)),
        "rank": rank,
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "loss": outcome.losses[number],
        "terms": {name: float(term.float().mean()) for name, term in micro.terms.items()},
        "parameters": bad_parameters(flags, outcome),
    }
    suffix = f"_process{rank}" if rank else ""
    folder = run / "guard"
    path = folder / f"step_{flags.step:07d}{suffix}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            torch.save(record, part)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        log.warning("The skipped batch of step %d could not be saved: %s", flags.step, str(error).split("\n")[0])
        return None
    own = sorted(folder.glob(f"step_???????{suffix}.pt"))
    for old in own[:-keep]:
        old.unlink(missing_ok=True)
    return path


def likely_causes(trainer: Trainer, pl_module: LightningModule, flags: Flags, outcome: Outcome) -> str:
    """What is known of the last skipped update, on one line: terms, layers, learning rate, precision, input."""
    micro = flags.micros[guilty(flags, outcome)]
    parts = [_what(flags, outcome)]
    if terms := bad_terms(micro):
        parts.append(f"first bad term of the loss: {terms[0]}")
    if trainer.world_size == 1 and isinstance(micro.batch, Mapping):  # a pass alone would wait for other processes
        with trainer.precision_plugin.forward_context():
            layer = first_not_finite(pl_module, micro.batch, micro.total_batch_idx, trainer.global_rank)
        parts.append(f"first layer with such an output: {layer}" if layer else "all layers' outputs are finite")
    if isinstance(micro.batch, Mapping) and isinstance(micro.batch.get("image"), Tensor):
        share = 1.0 - float(torch.isfinite(micro.batch["image"]).float().mean())
        parts.append(f"{share:.1%} of the input's pixels are not finite")
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    parts.append(f"learning rate {max(rates):.3g}, precision {trainer.precision}")
    return "; ".join(parts)
