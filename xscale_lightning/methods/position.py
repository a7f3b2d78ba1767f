"""Where a resumed run goes on: in the epoch and at the batch that come after those of its checkpoint."""

import warnings
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from xscale_lightning.data.samplers import begin_inside


def position(trainer: Trainer) -> tuple[int, int]:
    """`(epoch, batches of it that are done)`, once the Trainer has its loops' state (`on_train_start`)."""
    fit, inner = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epoch: Any = fit.epoch_progress.current
    if epoch.ready == epoch.processed:  # between two epochs
        return epoch.processed, 0
    batches = inner.batch_progress.current
    done = batches.completed + int(inner.restarted_on_train_batch_end)
    return (epoch.processed, done) if done < trainer.num_training_batches else (epoch.processed + 1, 0)


def go_on(trainer: Trainer) -> None:
    """Let a resumed run's loader begin where its checkpoint was written; it was opened before that was known.

    With `max_steps` Lightning takes a run resumed between two epochs for one inside an epoch, and goes through the end
    of that epoch again. Here it is told otherwise.
    """
    loop, fetcher = trainer.fit_loop, trainer.fit_loop._data_fetcher
    if fetcher is None or not loop.is_resuming:
        return
    epoch, batch = position(trainer)
    current: Any = loop.epoch_progress.current
    total: Any = loop.epoch_progress.total
    if batch == 0 and current.ready == current.processed:
        current.completed, total.completed = current.processed, total.processed
        loop.reset_restart_stage()
        loop.epoch_loop.reset_restart_stage()
        _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]  # its own setter says True under `max_steps`
    loaders = fetcher.combined_loader.flattened
    exact = [begin_inside(loader, epoch, batch) for loader in loaders]
    iter(fetcher)
    if all(exact):  # Lightning looks for a loader with a state
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
    else:
        rank_zero_warn(
            f"a loader cannot begin inside an epoch: reading past the {batch} batches that are done. The run goes on "
            "exactly if their order depends on the epoch alone; data modules of this package can begin anywhere."
        )
        for loader, known in zip(loaders, exact, strict=True):
            if known:
                begin_inside(loader, epoch, 0)
        iter(fetcher)
        assert fetcher.iterator is not None
        for _ in range(batch):
            next(fetcher.iterator)
