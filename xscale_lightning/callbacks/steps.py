"""Which optimizer step the weights at hand are of, also outside `fit`, where the Trainer does not restore its count."""

import functools
import os
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from xscale_lightning import checkpoints
from xscale_lightning.errors import UserError


@functools.lru_cache(maxsize=1)
def _parts(path: str, modified: int) -> tuple[int, dict[str, Any]]:
    try:
        checkpoint = checkpoints.read(path)
    except UserError:
        return 0, {}  # an unusual checkpoint that the Trainer could open: what it says of its run is "not measured"
    return checkpoint.get("global_step") or 0, checkpoint.get("callbacks") or {}


def checkpoint_record(trainer: Trainer) -> tuple[int, dict[str, Any]]:
    """Step and callbacks' states of the checkpoint the Trainer was given; (0, {}) without one. Read once per file."""
    path = trainer.ckpt_path
    if not path or not os.path.isfile(path):
        return 0, {}
    return _parts(str(path), os.stat(path).st_mtime_ns)


def current_step(trainer: Trainer) -> int:
    """Optimizer step of the present weights: the Trainer's count, outside `fit` the checkpoint's."""
    fitting = trainer.state.fn == TrainerFn.FITTING
    return trainer.global_step if fitting else trainer.global_step or checkpoint_record(trainer)[0]


def is_base_line(trainer: Trainer) -> bool:
    """Whether what is measured now is the model of this run before its first step."""
    return trainer.state.fn == TrainerFn.FITTING and trainer.global_step == 0
