"""Run folders: made under a name of their own, taken up again by a run that goes on."""

import tempfile
from pathlib import Path

from xscale_lightning.callbacks.event_log import RunLogger
from xscale_lightning.errors import UserError


def logger_of(folder: Path, step: int) -> RunLogger:
    """TensorBoard's logger of a run folder that goes on after `step`: what was logged later does not count."""
    folder = folder if len(folder.parts) > 2 else folder.absolute()  # else as it is: checkpoints say where they are
    above, options = folder.parent, {"default_hp_metric": False, "purge_step": step + 1}
    return RunLogger(str(above.parent), name=above.name, version=folder.name, **options)


def claim(parent: Path, name: str) -> str:
    """Make the folder `parent/name`, or `name_2`, `name_3` ... where another run has it; returns the name."""
    version, count = name, 1
    while True:
        try:
            (parent / version).mkdir(parents=True)
            return version
        except FileExistsError:
            count += 1
            version = f"{name}_{count}"


def check_writable(folder: Path) -> None:
    """Try to write below `folder` without leaving anything behind.

    Raises:
        UserError: it cannot be written, or a part of the path is a file.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"--output {str(folder)!r} cannot be written ({error.strerror}): choose another.") from error
