"""TensorBoard's log of a run on a disk that may be full: the run goes on, and no record is ever half written."""

import functools
import itertools
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Trainer
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.writer import FileWriter

from xscale_lightning import unwritten
from xscale_lightning.files import reason, whole

KEPT = 4_000_000  # bytes of records that wait for room on the disk
FLUSH_SECONDS = 30.0
ATTEMPT_SECONDS = 5.0  # between attempts on a disk that is full


class EventFile:
    """An event file of TensorBoard's without a thread: records are appended whole, or wait in memory.

    tensorboard's own writer ends with its thread at the first error, and raises that from every call after it.

    Args:
        folder: where the file is.
    """

    def __init__(self, folder: str) -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self.path = Path(folder) / name
        self._records = RecordWriter(self)
        self._waiting: list[bytes] = []
        self._length = 0  # bytes of whole records in the file
        self._flushed = self._tried = 0.0
        self._dropped = 0
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.flush()

    def get_logdir(self) -> str:
        """Folder of the file."""
        return str(self.path.parent)

    def add_event(self, event: Any) -> None:
        """Append an event, by the next flush at the latest."""
        self._records.write(event.SerializeToString())
        while len(self._waiting) > 1 and sum(map(len, self._waiting)) > KEPT:
            self._waiting.pop(0)
            self._dropped += 1
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def write(self, record: bytes) -> None:
        """Take a record as bytes; called by tensorboard's record writer."""
        self._waiting.append(record)

    def flush(self) -> None:
        """Append what waits. On an error the file keeps its whole records, and the rest waits for the next time."""
        now = time.monotonic()
        if not self._waiting or (self._tried and now - self._tried < ATTEMPT_SECONDS):
            return
        self._flushed = now
        content = b"".join(self._waiting)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                try:
                    rest = memoryview(content)
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    file.truncate(self._length)
                    raise
        except OSError as error:
            self._tried = now
            text = f"the log '{self.path.parent}' is not written ({reason(error, self.path)}); the run goes on."
            unwritten.note(str(self.path), text, kind="log")
            return
        self._tried = 0.0
        self._length += len(content)
        self._waiting.clear()
        if not self._dropped:
            unwritten.made_good(str(self.path))

    def close(self) -> None:
        """Append what waits, whenever the last attempt was."""
        self._tried = 0.0
        self.flush()

    def reopen(self) -> None:
        """Nothing to do: the file is opened for every flush."""


_NUMBERS = itertools.count()


class _Writer(FileWriter):
    def __init__(self, folder: str) -> None:
        self.event_writer = EventFile(folder)


class _Summaries(SummaryWriter):
    def _get_file_writer(self) -> Any:
        if self.file_writer is None:
            self.file_writer = writer = _Writer(str(self.log_dir))
            self.all_writers = {writer.get_logdir(): writer}
            if self.purge_step is not None:  # what was logged from there on does not count
                start = SessionLog(status=SessionLog.START)
                writer.add_event(Event(step=self.purge_step, file_version="brain.Event:2"))
                writer.add_event(Event(step=self.purge_step, session_log=start))
                self.purge_step = None
        return self.file_writer


class RunLogger(TensorBoardLogger):
    """Lightning's TensorBoard logger, which does without records and files that cannot be written.

    That is told once, and again when the command ends with an exit code other than 0; see `unwritten`.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:  # type: ignore[override]
        """TensorBoard's summary writer of the run's folder."""
        if self._experiment is None:
            self._experiment = _Summaries(log_dir=self.log_dir, **self._kwargs)  # type: ignore[assignment]
        return self._experiment

    @rank_zero_only
    def save(self) -> None:
        """Flush the log, and write the hyper-parameters unless they are there."""
        self.experiment.flush()
        file = Path(self.log_dir) / self.NAME_HPARAMS_FILE
        if not file.parent.is_dir() or file.is_file():
            return
        try:
            with whole(file) as part:
                save_hparams_to_yaml(part, self.hparams)
        except OSError as error:
            unwritten.note(str(file), f"'{file}' is not written ({reason(error, file)}).", kind="hparams")
        else:
            unwritten.made_good(str(file))


def protect_loggers(trainer: Trainer) -> None:
    """Let a run go on where a logger of another kind cannot write its files, such as Lightning's of CSV files."""
    for logger in trainer.loggers:
        if not isinstance(logger, RunLogger):
            for name in ("log_metrics", "log_hyperparams", "save", "finalize"):
                setattr(logger, name, _without_files(getattr(logger, name), type(logger).__name__))


def _without_files(method: Callable[..., Any], logger: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except (OSError, ValueError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__  # Lightning wraps what TensorBoard raises
            if not isinstance(cause, OSError):
                raise
            unwritten.note(logger, f"{logger} cannot write its files ({cause.strerror or cause}).", kind=logger)
            return None

    return call
