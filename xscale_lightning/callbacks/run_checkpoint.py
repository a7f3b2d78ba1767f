"""When a run's checkpoints are written: only where a resumed run can go on exactly."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from xscale_lightning.callbacks.saving import Checkpoint
from xscale_lightning.errors import Stopped, UserError

CHECKED_EVERY = 20  # optimizer steps between two looks at the clock where several processes have to agree on it


class RunCheckpoint(Checkpoint):
    """Lightning's `ModelCheckpoint` at three kinds of moments, each of which a resumed run goes on from exactly.

    After an optimizer step, never between the batches whose gradients are added up; after a validation that follows
    such a step, never before it; and between two epochs, never at the last batch of one. What falls due elsewhere is
    written at the next such moment. So `every_n_train_steps` and `train_time_interval` may be written a little later.
    """

    def __init__(self, minutes: float | None = 10.0, **kwargs: Any) -> None:
        """Take the options of `ModelCheckpoint`, too.

        Args:
            minutes: `last.ckpt` is written inside an epoch, too, when it is older than that; null or 0: at the ends
                of epochs alone, and where `every_n_train_steps` or `train_time_interval` say so.
            **kwargs: see `ModelCheckpoint`.

        Raises:
            UserError: `minutes` is below 0.
        """
        if minutes is not None and not minutes >= 0:
            raise UserError(f"checkpoint.minutes is {minutes}: give a number of minutes, or null.")
        super().__init__(**kwargs)
        self.minutes = minutes
        self.stopped: Stopped | None = None  # what to raise after the next checkpoint: see `Preemption`
        self.ended = False  # whether the last one of the training is written, or could not be
        self.leave: Callable[[], None] | None = None  # what to do then
        self._due_files = self._due_last = self._stop_later = False
        self._written = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """In the folder of the run that is resumed, files of the same name are those that it goes on with."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        begun = trainer.ckpt_path
        if stage == "fit" and begun and self.dirpath and Path(begun).absolute().parent == Path(self.dirpath).absolute():
            self._enable_version_counter = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._written = time.monotonic()
        self._due_files = self._due_last = self._stop_later = self.ended = False
        self.leave = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write what is due, unless a validation or the end of the epoch follows, which does it."""
        loop = trainer.fit_loop.epoch_loop
        if self._stops_inside_epoch(trainer):
            self._due_last = bool(self.save_last)
            self._write(trainer)
        if loop._should_accumulate():
            return
        steps = self._every_n_train_steps
        if steps >= 1 and trainer.global_step % steps == 0:
            self._due_files = True
        if self._train_time_interval is not None and self._is_old(trainer, self._train_time_interval.total_seconds()):
            self._due_files = True
        if self.minutes and self.save_last and self._is_old(trainer, 60 * self.minutes):
            self._due_last = True
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if not (loop._num_ready_batches_reached() or loop._should_check_val_fx(fetcher)):
            self._write(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is due, unless the end of the epoch follows or a step is not complete."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._due_last = self._due_last or (self._stops_inside_epoch(trainer) and bool(self.save_last))
        if not self._should_save_on_train_epoch_end(trainer) and self._is_epochs_turn(trainer):
            self._due_files = True
        loop = trainer.fit_loop.epoch_loop
        if not (loop._num_ready_batches_reached() or loop._should_accumulate()):
            self._write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is due; after the last epoch that is `last.ckpt` in any case, here and not at the end of training.

        Lightning counts the epoch as complete only in between: the same weights would have one epoch or another.
        """
        if self._should_save_on_train_epoch_end(trainer) and self._is_epochs_turn(trainer):
            self._due_files = True
        if trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs:
            self._due_last = bool(self.save_last)
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The end of training is in `last.ckpt`, wherever the last checkpoint fell."""
        super().on_train_end(trainer, pl_module)
        if self.save_last and not self._should_skip_saving_checkpoint(trainer) and trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self.ended = True
        if self.leave is not None:
            self.leave()

    def _stops_inside_epoch(self, trainer: Trainer) -> bool:
        """Whether the run ends here (`max_time`, early stopping), before the end of an epoch.

        That is put off while gradients are added up. What Lightning does next counts as the end of the epoch, and a
        resumed run would leave out the rest of it: the checkpoint is written before.
        """
        loop = trainer.fit_loop
        if loop._should_accumulate():
            self._stop_later = self._stop_later or trainer.should_stop
            trainer.should_stop = False
            return False
        trainer.should_stop = trainer.should_stop or self._stop_later
        return trainer.should_stop and loop._can_stop_early and not loop.epoch_loop._num_ready_batches_reached()

    def _is_epochs_turn(self, trainer: Trainer) -> bool:
        return self._every_n_epochs >= 1 and (trainer.current_epoch + 1) % self._every_n_epochs == 0

    def _is_old(self, trainer: Trainer, seconds: float) -> bool:
        if trainer.world_size == 1:
            return time.monotonic() - self._written >= seconds
        if trainer.global_step % CHECKED_EVERY:
            return False
        return trainer.strategy.broadcast(time.monotonic() - self._written >= seconds)

    def _write(self, trainer: Trainer) -> None:
        candidates = self._monitor_candidates(trainer)
        if not self._should_skip_saving_checkpoint(trainer):
            if self._due_files and (self.monitor is None or self.monitor in candidates):
                self._save_topk_checkpoint(trainer, candidates)
                self._save_last_checkpoint(trainer, candidates)
                self._due_files = self._due_last = False
            elif self._due_last or self.stopped:
                self._save_last(trainer)
        if self.stopped:
            raise self.stopped

    def _save_last(self, trainer: Trainer) -> None:
        asked, self.save_last = self.save_last, True  # who stops a run wants to go on with it
        try:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        finally:
            self.save_last = asked
        self._due_last = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The same folder by another path is the same folder."""
        there = state_dict.get("dirpath")
        if there and self.dirpath and Path(there).absolute() == Path(self.dirpath).absolute():
            state_dict = {**state_dict, "dirpath": self.dirpath}
        super().load_state_dict(state_dict)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        for logger in trainer.loggers:
            logger.save()  # what was logged before a checkpoint is not logged again after a kill
        super()._save_checkpoint(trainer, filepath)
        self._written = time.monotonic()
