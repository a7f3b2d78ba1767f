"""Checkpoints that are written whole or not at all, and a run that goes on where one cannot be written."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from xscale_lightning import opening, unwritten
from xscale_lightning.errors import UserError
from xscale_lightning.files import free_space, is_full, size, whole
from xscale_lightning.records import check_state

# What `ModelCheckpoint` says of its files; a save that failed leaves it as it was.
LISTED = (
    *("best_model_path", "best_model_score", "best_k_models", "kth_best_model_path", "kth_value", "current_score"),
    *("last_model_path", "_last_checkpoint_saved", "_last_global_step_saved"),
)


class CheckpointFiles(TorchCheckpointIO):
    """Checkpoints as files: written under another name, synced and renamed; opened without running code.

    A checkpoint that cannot be written (a full disk, for one) does not end the run: it is told with the room that was
    needed and the room there is, and no other checkpoint is removed in its favour.

    Attributes:
        failed: whether the last one could not be written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failed = False
        self._good = ""
        self._missing: dict[str, int] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a file; an `OSError` is told and remembered, see `xscale_lightning.unwritten`."""
        if storage_options is not None or _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        step, file = int(checkpoint.get("global_step") or 0), Path(path)
        writer: Any = _Writer()  # torch wants no more of a file than that
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole(file) as part, part.open("wb") as opened:
                writer.file = opened
                torch.save(checkpoint, writer)
                writer.finish()
        except OSError as error:
            self._note(file, step, error, writer.length)
            return
        self.failed, self._good = False, f"the last good one is '{file}' of step {step}"
        for earlier in [name for name, at in self._missing.items() if at < step or name == str(file)]:
            del self._missing[earlier]  # a later one is there
            unwritten.made_good(earlier)

    def _note(self, file: Path, step: int, error: OSError, needed: int) -> None:
        self.failed = True
        why = error.strerror or str(error)
        if is_full(error):
            why += f": {size(needed)} needed, {size(free_space(file))} free"
        self._missing[str(file)] = step
        kept = self._good or "none has been written before"
        unwritten.note(str(file), f"checkpoint '{file}' of step {step} is not written ({why}); {kept}.")

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: Any = None
    ) -> Any:
        """Open a file; with `weights_only` a file that is damaged or could run code is refused.

        Raises:
            UserError: as `opening.load_torch`.
        """
        if not weights_only or _is_remote(path):
            return super().load_checkpoint(path, map_location=map_location, weights_only=weights_only)
        checkpoint = opening.load_torch(path, what="checkpoint", map_location=map_location)
        if not isinstance(checkpoint, dict):
            raise UserError(f"{str(path)!r} is no training checkpoint: it is a {type(checkpoint).__name__}.")
        check_state(checkpoint, str(path))
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file, unless the one that was to take its place is not there."""
        if not self.failed:
            super().remove_checkpoint(path)


def _is_remote(path: Any) -> bool:
    return "://" in str(path)


def _lies_in(path: Any, folder: Any) -> bool:
    """Whether a path is of a file below a folder; one on another system is if it begins with the folder's name."""
    if not isinstance(path, str) or not path or folder is None or "::" in path or ".." in Path(path).parts:
        return False
    if _is_remote(path) or _is_remote(folder):
        return path.startswith(str(folder).rstrip("/") + "/")
    return Path(folder).absolute() in Path(path).absolute().parents


class _Writer:
    """Passes bytes on to a file and counts them; after the first error it only counts, and `finish` raises it.

    torch's writer is native code, through which an exception would not come as it is.
    """

    def __init__(self) -> None:
        self.file: Any = None
        self.length = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Take bytes; their number."""
        count = memoryview(data).nbytes
        self.length += count
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return count

    def flush(self) -> None:
        """Torch asks for it."""

    def finish(self) -> None:
        """Raise what has happened on the way."""
        if self.error is not None:
            raise self.error


class Checkpoint(ModelCheckpoint):
    """Lightning's, which after a checkpoint that could not be written keeps the files it had, and lists them.

    Attributes:
        last_step: optimizer step of the newest `last.ckpt` that this process has written; None before the first.
    """

    last_step: int | None = None
    _failed = False

    @property
    def state_key(self) -> str:
        """That of Lightning's class: checkpoints of earlier versions have it."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the base, for the files that lie in this run's folder: what is listed is removed when better ones come."""
        names = ("kth_best_model_path", "last_model_path")
        models = state_dict.get("best_k_models")
        listed = {
            **{name: path for name in names if _lies_in(path := state_dict.get(name), self.dirpath)},
            "best_k_models": {
                path: score
                for path, score in (models if isinstance(models, dict) else {}).items()
                if _lies_in(path, self.dirpath)
            },
        }
        best = state_dict.get("best_model_path")
        kept = {name: value for name, value in state_dict.items() if name not in (*names, "best_k_models")}
        kept.setdefault("dirpath", None)
        kept.setdefault("best_model_score", None)
        super().load_state_dict({**kept, **listed, "best_model_path": best if isinstance(best, str) else ""})

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._attempt(super()._save_topk_checkpoint, trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self._attempt(super()._save_last_checkpoint, trainer, monitor_candidates)
        if self.save_last and not self._failed:
            self.last_step = trainer.global_step

    def _attempt(self, save: Callable[..., None], trainer: Trainer, candidates: dict[str, Tensor]) -> None:
        before = {name: copy.copy(getattr(self, name)) for name in LISTED}
        self._failed = False
        save(trainer, candidates)
        if self._failed:
            for name, value in before.items():
                setattr(self, name, value)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        failed = getattr(trainer.strategy.checkpoint_io, "failed", False)
        self._failed = trainer.strategy.broadcast(failed)  # the first process writes, all go on alike

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if not self._failed:
            super()._remove_checkpoint(trainer, filepath)


def use_checkpoint_files(trainer: Trainer) -> None:
    """Let a trainer write and read its checkpoints with `CheckpointFiles`, unless the user has chosen a way."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = CheckpointFiles()
