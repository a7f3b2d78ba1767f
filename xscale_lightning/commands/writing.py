"""A run's folder while the run writes into it: held by one process, and never that of another run."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from xscale_lightning.callbacks.event_log import protect_loggers
from xscale_lightning.callbacks.saving import use_checkpoint_files
from xscale_lightning.commands.restoring import tell_of_damage
from xscale_lightning.errors import UserError, is_users
from xscale_lightning.locks import held
from xscale_lightning.places import PART


@contextlib.contextmanager
def writing(trainer: Trainer, resumed: Path | None, checkpoint: str | None) -> Iterator[None]:
    """Let a trainer write its files whole or not at all, in a folder that is its own until the body is done.

    Args:
        trainer: with its loggers; without one there is no folder of its own.
        resumed: folder of the run that goes on.
        checkpoint: file that is resumed from.

    Raises:
        UserError: another process writes into the folder, or another run's results are in it.
    """
    use_checkpoint_files(trainer)
    tell_of_damage(trainer, checkpoint)
    protect_loggers(trainer)
    folder = own_folder(trainer) if rank_zero_only.rank == 0 else None
    if folder is not None and not goes_on(folder, resumed, checkpoint):
        check_unused(folder)
    fresh = folder is not None and folder.is_dir() and not any(folder.iterdir())
    try:
        with held(folder, "run folder"):
            for part in folder.rglob(f".*{PART}") if folder is not None else ():  # of a process that was killed
                shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
            yield
    except Exception as error:
        if folder is not None and fresh and is_users(error) and not begun(trainer):
            take_back(folder)
        raise


def begun(trainer: Trainer) -> bool:
    """Whether anything was trained or evaluated; a callback or the Trainer itself may refuse a run before that."""
    return trainer.state.fn != TrainerFn.FITTING or trainer.fit_loop.epoch_loop.batch_progress.total.ready > 0


def take_back(folder: Path) -> None:
    """Remove the folder of a run that was refused, and those above it that hold nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # not empty
        folder.parent.rmdir()
        folder.parent.parent.rmdir()


def own_folder(trainer: Trainer) -> Path | None:
    """Folder that the first logger has for this run alone; None without one."""
    folder = getattr(trainer.loggers[0], "log_dir", None) if trainer.loggers else None
    return None if folder is None or "://" in str(folder) else Path(folder)


def goes_on(folder: Path, resumed: Path | None, checkpoint: str | None) -> bool:
    """Whether a folder is that of the run that is resumed."""
    here = folder.absolute()
    if resumed is not None and here.is_relative_to(resumed.absolute()):
        return True
    return checkpoint is not None and Path(checkpoint).absolute().is_relative_to(here)


def check_unused(folder: Path) -> None:
    """Refuse a folder with the results or checkpoints of a run.

    Raises:
        UserError: with the remedy.
    """
    found = [name for name in ("results.json", "config.yaml", "checkpoints") if (folder / name).exists()]
    if found:
        raise UserError(
            f"run folder '{folder}' holds a run already ({found[0]}): give the logger another version, or go on with "
            "that run by --ckpt_path."
        )
