"""Signals that ask a run to stop: it writes a checkpoint at the next optimizer step and ends in good order."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from xscale_lightning.callbacks.run_checkpoint import RunCheckpoint
from xscale_lightning.errors import Stopped

PREEMPTED = 75  # exit code: EX_TEMPFAIL of sysexits.h, "try again later"
INTERRUPTED = 130  # the shell's code of a command that Ctrl-C has ended
# Several processes have to agree, for which the host waits for the device: not at every step.
AGREED_EVERY = 10  # optimizer steps at most between two agreements
AGREED_SECONDS = 5.0  # and about so many seconds, where steps are slow


class Preemption(Callback):
    """Ends a training run on SIGTERM, SIGUSR1 and Ctrl-C, so that `--ckpt_path last` goes on exactly.

    The handler only takes a note. At the next moment that a checkpoint may be of (see `RunCheckpoint`) `last.ckpt` is
    written, and the run ends. Of several processes any may get the signal: they agree every 10 optimizer steps, more
    often where 10 steps take over 5 seconds, and leave together. A second Ctrl-C ends the run at once. Lightning's own
    handlers are replaced: they save between the parts of a step, not on all processes alike, and have every process
    wait for its device before every batch.
    """

    def __init__(self, requeue: bool = True) -> None:
        """Choose what SLURM is told.

        Args:
            requeue: after the signal that Lightning's SLURM environment knows (SIGUSR1), queue the job again.
        """
        super().__init__()
        self.requeue = requeue
        self._signal: signal.Signals | None = None
        self._requeue_signal: int | None = None
        self._next, self._agreed = 0, (0, 0.0)  # step of the next agreement; step and time of the last one

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals as soon as Lightning has: before data is opened and anything is measured."""
        self._signal = self._requeue_signal = None
        connector: Any = trainer._signal_connector

        def register() -> None:
            del connector.register_signal_handlers  # Lightning's again
            connector.register_signal_handlers()
            if trainer.state.fn == TrainerFn.FITTING:
                self._listen(trainer)

        connector.register_signal_handlers = register

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting the steps between two agreements."""
        self._listen(trainer)
        self._next, self._agreed = 0, (trainer.global_step, time.monotonic())

    def _listen(self, trainer: Trainer) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        environment = trainer._accelerator_connector.cluster_environment
        user = signal.SIGUSR1
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and self.requeue:
            user = self._requeue_signal = environment.requeue_signal or user
        for number in (signal.SIGTERM, signal.SIGINT, user):
            signal.signal(number, self._note)
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # it waits for the device at every batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, see whether any process was asked to stop."""
        turn = trainer.world_size == 1 or trainer.global_step >= self._next
        if turn and not trainer.fit_loop.epoch_loop._should_accumulate():
            self._agree(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a validation, too, which can take long."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._agree(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Between two epochs, too."""
        self._agree(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there is nothing to train: last measurements end at once, a last checkpoint is written first."""
        if not self._ours():
            return
        writer = next(iter(_writers(trainer)[-1:]), None)

        def leave(number: int, frame: FrameType | None = None) -> None:
            if writer is not None and not writer.ended:
                writer.leave = functools.partial(leave, number)
                return
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            raise _stopped_after_end(number, writer, trainer.global_step)

        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, leave)
        if self._signal is not None and trainer.world_size == 1:  # since the last step
            leave(self._signal)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop listening, so that Ctrl-C ends a report that takes too long."""
        if self._ours():
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ours(self) -> bool:
        main = threading.current_thread() is threading.main_thread()
        return main and signal.getsignal(signal.SIGTERM) == self._note

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        if self._signal is None:
            self._signal = signal.Signals(number)
            again = ", or press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            # The signal can come in the middle of a print: what Python buffers must not be written to here.
            os.write(2, f"\nxscale: {self._signal.name}: stopping after an optimizer step{again}\n".encode())

    def _agree(self, trainer: Trainer) -> None:
        mine = self._signal
        if trainer.world_size > 1:
            mine = self._highest(trainer)
        if mine is None:
            return
        writers = _writers(trainer)
        stopped = self._stopped(trainer, mine, writers)
        if not writers:
            raise stopped
        if writers[-1].stopped is None:
            writers[-1].stopped = stopped  # it comes after this callback, in the same hook or a later one

    def _highest(self, trainer: Trainer) -> signal.Signals | None:
        """The highest signal that any process has got; the next agreement is at the same step for all of them."""
        step, now = trainer.global_step, time.monotonic()
        pace = (now - self._agreed[1]) / max(1, step - self._agreed[0])
        own = torch.tensor([float(self._signal or 0), pace], device=trainer.strategy.root_device)
        number, slowest = trainer.strategy.reduce(own, reduce_op="max").tolist()  # type: ignore[union-attr, arg-type]
        self._next = step + max(1, min(AGREED_EVERY, int(AGREED_SECONDS / max(slowest, 1e-9))))
        self._agreed = (step, now)
        return signal.Signals(int(number)) if number else None

    def _stopped(self, trainer: Trainer, number: signal.Signals, writers: list[RunCheckpoint]) -> Stopped:
        code = INTERRUPTED if number == signal.SIGINT else PREEMPTED
        how = "no checkpoint is configured, so nothing of it is kept"
        if writers:
            folder = trainer.log_dir or os.path.dirname(str(writers[-1].dirpath))
            how = f"to go on: xscale fit --config {os.path.join(folder, 'config.yaml')} --ckpt_path last"
        requeue = self._requeue_signal is not None and number == self._requeue_signal
        name = "Ctrl-C" if number == signal.SIGINT else number.name
        first = trainer.is_global_zero  # a launcher takes another code than 0 of the others for a crash
        return Stopped(f"stopped by {name}; {how}", code if first else 0, requeue and first)


def _writers(trainer: Trainer) -> list[RunCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, RunCheckpoint)]


def _stopped_after_end(number: int, writer: RunCheckpoint | None, step: int) -> Stopped:
    """What is said of a training that was at its end, of `step` optimizer steps."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    if writer is None or not writer.save_last:
        where = "no last.ckpt is configured: what other checkpoints have is kept"
    elif writer.last_step == step:
        where = f"its weights are in '{writer.last_model_path}'"
    else:
        found = "what was there before" if writer.last_step is None else f"that of step {writer.last_step}"
        where = f"the last.ckpt of its end (step {step}) could not be written; {found} is kept"
    code = INTERRUPTED if number == signal.SIGINT else PREEMPTED
    return Stopped(f"stopped by {name} after the end of training; {where}", code)


def queue_again() -> None:
    """Ask SLURM to run this job again."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], check=False).returncode
    except OSError as error:
        done = error.strerror
    if done:
        rank_zero_warn(f"scontrol requeue {job} failed ({done}): queue the job again by hand.")
    else:
        print(f"xscale: job {job} is queued again", file=sys.stderr)
