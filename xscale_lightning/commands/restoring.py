"""A checkpoint whose parts are of the right types and make no sense is refused as such, before anything is trained."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer

from xscale_lightning.errors import UserError, find_user_error

STEPS = ("_restore_modules_and_callbacks", "restore_training_state")  # Lightning's, one after the other
PARTS = {
    "resume_start": "content",
    "restore_model": "weights",
    "restore_datamodule": "data",
    "restore_callbacks": "callbacks",
    "restore_loops": "loops",
    "restore_optimizers": "optimizer",
    "restore_lr_schedulers": "schedules",
    "restore_precision_plugin_state": "precision",
}


def tell_of_damage(trainer: Trainer, checkpoint: str | None) -> None:
    """Let a trainer say of which part of a checkpoint nothing can be made; other errors pass as they are."""
    connector = trainer._checkpoint_connector
    for name in STEPS:
        setattr(connector, name, _telling(getattr(connector, name), trainer, checkpoint))


def _telling(restore: Callable[..., Any], trainer: Trainer, checkpoint: str | None) -> Callable[..., Any]:
    @functools.wraps(restore)
    def told(*args: Any, **kwargs: Any) -> Any:
        try:
            result = restore(*args, **kwargs)
            if checkpoint is not None:
                check_optimizers(trainer)
            return result
        except Exception as error:  # whatever values of other meanings do to those who take them over
            part = _part(error)
            if checkpoint is None or part is None or find_user_error(error) is not None:
                raise
            why, cause = (str(error).splitlines() or [""])[0][:120], error
        raise UserError(
            f"checkpoint '{checkpoint}' is damaged: its {part} cannot be restored ({type(cause).__name__}: {why}); "
            "give another checkpoint."
        ) from cause

    return told


def _part(error: BaseException) -> str | None:
    """The part of a checkpoint that an error comes from; None where Lightning was not restoring any."""
    trace, found = error.__traceback__, None
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename.endswith("checkpoint_connector.py"):
            found = PARTS.get(code.co_name, found)
        trace = trace.tb_next
    return found


def check_optimizers(trainer: Trainer) -> None:
    """Refuse states of optimizers of other shapes than the weights they belong to, or with options that are none.

    Raises:
        UserError: naming the entry.
    """
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for name, value in group.items():
                if name in optimizer.defaults and not _like(value, optimizer.defaults[name]):
                    raise UserError(f"checkpoint is damaged: its optimizer has {str(value)[:40]!r} as {name!r}.")
            for parameter in group["params"]:
                for name, value in optimizer.state.get(parameter, {}).items():
                    if not isinstance(value, torch.Tensor) or value.shape not in ((), parameter.shape):
                        raise UserError(f"checkpoint is damaged: its optimizer has no {name!r} of its weights.")


def _like(value: Any, usual: Any) -> bool:
    """Whether an option of an optimizer is of the kind that it is by default."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    if isinstance(usual, (tuple, list)):
        return isinstance(value, (tuple, list)) and len(value) == len(usual) and all(map(_like, value, usual))
    if isinstance(usual, bool) or usual is None:
        return isinstance(value, (bool, type(None)))
    if isinstance(usual, (int, float)):
        return isinstance(value, (int, float)) and math.isfinite(value)
    return True
