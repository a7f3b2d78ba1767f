"""What all online evaluations share: when they run, that they disturb nothing, and how their figures are published."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from xscale_lightning import unwritten
from xscale_lightning.callbacks.steps import current_step
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.pictures import save_png
from xscale_lightning.files import reason


@dataclass(frozen=True)
class Measurement:
    """Figures of one evaluation at one step."""

    metrics: Mapping[str, float]
    """By log name, for example `knn/eurosat/top1`."""
    split: str
    """What they were measured on: "train", "val" or "test"."""
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """For a metric, what simple methods reach on the same data: `{"reconstruction/psnr": {"mean fill": 17.1}}`."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Standard error of a metric, where it is known."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """95 % interval of a metric, where it is known."""
    protocols: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """How a metric was measured, in plain types: data, number of samples, k, scale ..."""


@runtime_checkable
class ProbeListener(Protocol):
    """A callback that wants to hear of every measurement (summary, progress bar)."""

    def record_probe(self, trainer: Trainer, measurement: Measurement) -> None:
        """Take note of figures measured at `current_step(trainer)`."""
        ...


def log_scalars(trainer: Trainer, scalars: Mapping[str, float]) -> None:
    """Log at the present optimizer step and put into `trainer.callback_metrics` (for `monitor=`); works in any hook."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step=current_step(trainer))
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})


def publish(trainer: Trainer, measurement: Measurement) -> None:
    """Hand figures to the loggers, to `trainer.callback_metrics` (for `monitor=`) and to the listening callbacks.

    Works from any hook, also from those where `self.log` is refused (`on_train_start`, `on_train_end`).
    """
    if not measurement.metrics:
        return
    extra = {f"{name}_{_key(b)}": v for name, values in measurement.baselines.items() for b, v in values.items()}
    log_scalars(trainer, {**measurement.metrics, **extra})
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ProbeListener):
            callback.record_probe(trainer, measurement)


def _key(baseline: str) -> str:
    """Log name of a base line: "mean fill" -> "mean_fill", "bilinear inpainting" -> "bilinear"."""
    return baseline.removesuffix(" inpainting").replace(" ", "_")


def run_folder(trainer: Trainer) -> Path | None:
    """Folder of this run (pictures, `results.json`): that of the first logger; None without a logger.

    Without a logger there is no folder that belongs to this run alone (`trainer.log_dir` is then the working
    directory), so nothing is written. Unlike `trainer.log_dir` this may be called on one process only.
    """
    for logger in trainer.loggers[:1]:
        folder = getattr(logger, "log_dir", None) or logger.save_dir
        if folder and "://" not in str(folder):
            return Path(folder)
    return None


def publish_picture(trainer: Trainer, picture: np.ndarray, tag: str, prefix: str = "") -> bool:
    """Write `[height, width, 3]` uint8 to `<run>/pictures/<prefix>step_0000123.png` and, as `tag`, to TensorBoard.

    Returns:
        Whether there is a run folder; without one nothing is written. To be called on one process only.
    """
    folder, step = run_folder(trainer), current_step(trainer)
    if folder is None:
        return False
    path = folder / "pictures" / f"{prefix}step_{step:07d}.png"
    try:
        save_png(picture, path)
    except OSError as error:
        unwritten.note(str(path), f"picture '{path}' is not written ({reason(error, path)}).", kind="pictures")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # A copy: TensorBoard turns the array into a tensor, which needs a writable one.
            logger.experiment.add_image(tag, picture.copy(), global_step=step, dataformats="HWC")
    return True


@contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluate without a trace: random numbers and the train/eval mode of every submodule are put back exactly."""
    modes = [(part, part.training) for part in module.modules()]
    python, array, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        # no_grad, not inference_mode: what a model caches here (position tables) must be usable in training.
        with torch.no_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        for part, mode in modes:
            part.training = mode


def is_sharded(trainer: Trainer) -> bool:
    """Whether the parameters are spread over processes, so that a forward pass needs all of them."""
    return any(word in type(trainer.strategy).__name__ for word in ("FSDP", "ModelParallel", "DeepSpeed"))


class ProbeCallback(Callback, ABC):
    """An evaluation that runs at step 0, every n epochs, at the end of `fit`, and once in `validate` and `test`.

    It runs on the first process while the others wait (on all where the parameters are sharded).

    Args:
        every_n_epochs: epochs between evaluations; 0 leaves only those at step 0 and at the end.

    Raises:
        UserError: if `every_n_epochs` is negative.
    """

    def __init__(self, every_n_epochs: int = 10) -> None:
        super().__init__()
        if every_n_epochs < 0:
            raise UserError(
                f"{type(self).__name__}.every_n_epochs: {every_n_epochs} is not possible; "
                "give 0 (only at the start and the end) or more."
            )
        self.every_n_epochs = every_n_epochs
        self._last_step = -1

    @abstractmethod
    def probe(self, trainer: Trainer, pl_module: LightningModule) -> Measurement | None:
        """Evaluate the model as it is now; None if there is nothing to evaluate."""

    def run_probe(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate and publish, without a trace in the training."""
        self._last_step = trainer.global_step
        if trainer.is_global_zero or is_sharded(trainer):
            with undisturbed(pl_module, pl_module.device):
                measurement = self.probe(trainer, pl_module)
            if measurement is not None and trainer.is_global_zero:
                publish(trainer, measurement)
        trainer.strategy.barrier(type(self).__name__)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the base line: the model before its first step. A resumed run has it already."""
        self._last_step = -1
        if trainer.global_step == 0:
            probes = (c for c in trainer.callbacks if isinstance(c, ProbeCallback))  # type: ignore[attr-defined]
            if self is next(probes):
                rank_zero_info("measuring step 0 ...")  # it can take longer than the first epoch
            self.run_probe(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure every n epochs."""
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.run_probe(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the result, unless this step has been measured."""
        if self._last_step != trainer.global_step:
            self.run_probe(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same in a run that was killed while it measured the result, and has nothing left to train."""
        if trainer.global_step > 0 and self._last_step != trainer.global_step:
            self.run_probe(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure once in `validate`; the validation inside `fit` is not the moment."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.run_probe(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure once in `test`."""
        self.run_probe(trainer, pl_module)


def evaluation_split(trainer: Trainer) -> Literal["val", "test"]:
    """The held-out split of the present command: "test" in `test`, else "val"."""
    return "test" if trainer.state.fn == TrainerFn.TESTING else "val"


def to_device(trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any]) -> dict[str, Any]:
    """Batch in the run's precision on the model's device. Data module hooks (augmentation) are left out on purpose."""
    return move_data_to_device(trainer.precision_plugin.convert_input(batch), pl_module.device)
