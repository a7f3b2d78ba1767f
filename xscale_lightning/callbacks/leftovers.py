"""What a run says at its end of damaged data and skipped updates; what a run that was refused must not leave behind."""

import contextlib
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from xscale_lightning.callbacks.guard import FiniteGuard
from xscale_lightning.callbacks.probe import run_folder
from xscale_lightning.locks import LOCK

MAX_REASONS = 100  # in results.json; a folder with thousands of damaged files would bury the rest
CLOCK_SLACK = 2.0  # seconds; file systems round their times


def _skipped(trainer: Trainer) -> int:
    return int(getattr(getattr(trainer, "datamodule", None), "skipped", 0))


def left_out_samples(trainer: Trainer) -> dict[str, int]:
    """By split, how many damaged samples were left out of evaluations."""
    return dict(getattr(getattr(trainer, "datamodule", None), "left_out_samples", {}))


def _left_out(trainer: Trainer) -> dict[str, str]:
    return getattr(getattr(trainer, "datamodule", None), "left_out", {})


def _skipped_updates(trainer: Trainer) -> int:
    return sum(callback.skipped for callback in trainer.callbacks if isinstance(callback, FiniteGuard))  # type: ignore[attr-defined]


def damage_lines(trainer: Trainer) -> list[str]:
    """Lines for people about updates, samples and files that were left out; none if there were none."""
    lines = []
    if updates := _skipped_updates(trainer):
        was = "updates were" if updates > 1 else "update was"
        lines.append(f"{updates} {was} not finite and left out (guard); see docs/troubleshooting.md.")
    if skipped := _skipped(trainer):
        lines.append(trainer.datamodule.damage.summary(skipped) + ".")  # type: ignore[attr-defined]
    for split, count in left_out_samples(trainer).items():
        was = "samples are" if count > 1 else "sample is"
        lines.append(f"{count} damaged {was} left out of the {split} split: no score counts them.")
    if count := len(_left_out(trainer)):
        lines.append(f"{count} file{'s or scenes were' if count > 1 else ' or scene was'} left out (named above).")
    return lines


def damage_record(trainer: Trainer) -> dict[str, Any]:
    """For `results.json`: `skipped_samples`, `skipped_updates`, samples left out by split, and files with reasons."""
    record: dict[str, Any] = {"skipped_samples": _skipped(trainer), "skipped_updates": _skipped_updates(trainer)}
    if samples := left_out_samples(trainer):
        record["left_out_samples"] = samples
    if left_out := _left_out(trainer):
        reasons = dict(list(left_out.items())[:MAX_REASONS])
        record["left_out"] = {"count": len(left_out), "reasons": reasons}
    return record


def remove_unused_run(trainer: Trainer, since: float) -> None:
    """Remove the folder of a run that was refused before it trained, unless anything in it may be of value.

    Only a folder that holds nothing but what every run writes at its start, written after `since` (seconds since the
    epoch), goes; checkpoints, results or older files keep it. The method's folder goes too if it is empty then.
    """
    folder = run_folder(trainer)
    if folder is None or not folder.is_dir():
        return
    for logger in trainer.loggers:
        logger.finalize("failed")
    paths = sorted(folder.rglob("*"), reverse=True)  # contents before their folders
    if not all(_is_start(path, folder, since) for path in paths):
        return
    with contextlib.suppress(OSError):  # tidying up must not hide the error that is on its way to the user
        for path in paths:
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
        if folder.parent != Path(trainer.loggers[0].save_dir or "."):
            folder.parent.rmdir()


def _is_start(path: Path, folder: Path, since: float) -> bool:
    name = path.relative_to(folder).as_posix()
    if path.is_symlink():
        return False
    if path.is_dir():
        return name in ("pictures", "checkpoints")
    known = name in ("config.yaml", "hparams.yaml", "command.txt", "environment.json", LOCK)
    known = known or (name.startswith("pictures/") and name.endswith("step_0000000.png"))
    known = known or (path.parent == folder and name.startswith("events.out."))
    return known and path.stat().st_mtime >= since - CLOCK_SLACK
