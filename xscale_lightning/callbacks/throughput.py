"""Speed of training: images per second, time spent waiting for data, arithmetic and its share of the peak."""

import time
import warnings
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer

from xscale_lightning.callbacks.probe import log_scalars
from xscale_lightning.errors import UserError

WARMUP_STEPS = 2  # compilation, memory allocation and kernel selection happen in these


class StepClock:
    """Time spent in training steps and waiting for the next batch; validation and probes in between do not count."""

    def __init__(self) -> None:
        self.reset()
        self._mark: float | None = None

    def reset(self) -> None:
        """Start a new window; a running interval goes on."""
        self.seconds = 0.0
        self.waited = 0.0
        self.images = 0
        self.steps = 0

    def resume(self) -> None:
        """From now on time counts (as waiting, until `batch_start`)."""
        self._mark = time.perf_counter()

    def pause(self, device: torch.device | None = None) -> None:
        """Time no longer counts. With a CUDA device its queued work is finished and counted first."""
        if self._mark is not None and device is not None:
            self.settle(device)
        self._mark = None

    def batch_start(self) -> None:
        """The batch has arrived."""
        now = time.perf_counter()
        if self._mark is not None:
            self.waited += now - self._mark
            self.seconds += now - self._mark
        self._mark = now

    def batch_end(self, images: int) -> None:
        """The step is over (on CUDA: queued)."""
        now = time.perf_counter()
        self.seconds += now - (self._mark if self._mark is not None else now)
        self.images += images
        self.steps += 1
        self._mark = now

    def settle(self, device: torch.device) -> None:
        """Wait for queued CUDA work and count the time it took."""
        if device.type != "cuda":
            return
        start = time.perf_counter()
        torch.cuda.synchronize(device)
        self._mark = time.perf_counter()
        self.seconds += self._mark - start


class Throughput(Callback):
    """Logs `speed/images_per_s`, `speed/data_wait`, `speed/tflops` and `speed/mfu`.

    * `images_per_s`: over all devices.
    * `data_wait`: share of the time that passes between the end of a step and the arrival of the next batch on the
      device. On CUDA the host runs ahead of the device, so a wait that the device never notices is part of it.
    * `tflops`: 10^12 floating-point operations per second and device, from the module's `flops_per_batch`.
    * `mfu`: their share of the device's peak (model FLOPs utilisation); missing where the peak is not known.

    Validation and probes do not count, nor do the first two steps. The host waits for the device only when it
    logs, never in between. The last point, at the end of `fit`, is the average of the whole run.

    Args:
        every_n_steps: optimizer steps between points; null takes the Trainer's `log_every_n_steps`.
        peak_tflops: peak of one device in the run's precision; null looks it up in Lightning's table.

    Raises:
        UserError: if a number is out of range.
    """

    def __init__(self, every_n_steps: int | None = None, peak_tflops: float | None = None) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"Throughput.every_n_steps: {every_n_steps} is not possible; give at least 1, or null.")
        if peak_tflops is not None and peak_tflops <= 0:
            raise UserError(f"Throughput.peak_tflops: {peak_tflops} is not possible; give a number above 0, or null.")
        self.every_n_steps = every_n_steps
        self.peak_tflops = peak_tflops
        self._window = StepClock()
        self._run = StepClock()
        self._warmup = 0
        self._logged_step = 0
        self._flops = 0
        self._peak: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from nothing and look up the peak."""
        self._window, self._run = StepClock(), StepClock()
        self._warmup = WARMUP_STEPS
        self._logged_step = trainer.global_step
        self._flops = 0
        self._peak = self.peak_tflops or peak_tflops(pl_module.device, str(trainer.precision))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count again; starting the loader's workers is waiting for data."""
        self._window.resume()
        self._run.resume()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note that the batch has arrived."""
        self._window.batch_start()
        self._run.batch_start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step; log when it is time."""
        images = batch_images(batch) * trainer.world_size
        self._window.batch_end(images)
        self._run.batch_end(images)
        if self._warmup:
            self._warmup -= 1
            if self._warmup == 0:
                self._flops = count_flops(trainer, pl_module)
                for clock in (self._window, self._run):
                    clock.settle(pl_module.device)
                    clock.reset()
                    clock.resume()
            return
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step != self._logged_step and trainer.global_step % max(1, every) == 0:
            self._logged_step = trainer.global_step
            self._window.settle(pl_module.device)
            self._log(trainer, self._window)
            self._window.reset()
            self._window.resume()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop counting."""
        self._pause(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count again, when the training goes on."""
        if not trainer.sanity_checking:
            self._window.resume()
            self._run.resume()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop counting."""
        self._pause(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the average of the whole run."""
        self._pause(pl_module)
        self._flops = self._flops or count_flops(trainer, pl_module)
        self._log(trainer, self._run)

    def _pause(self, pl_module: LightningModule) -> None:
        for clock in (self._window, self._run):
            clock.pause(pl_module.device)

    def _log(self, trainer: Trainer, clock: StepClock) -> None:
        if clock.steps == 0 or clock.seconds <= 0:
            return
        scalars = {
            "speed/images_per_s": clock.images / clock.seconds,
            "speed/data_wait": clock.waited / clock.seconds,
        }
        if self._flops:
            scalars["speed/tflops"] = self._flops * clock.steps / clock.seconds / 1e12
            if self._peak:
                scalars["speed/mfu"] = scalars["speed/tflops"] / self._peak
        log_scalars(trainer, scalars)


def batch_images(batch: Any) -> int:
    """Number of images in a batch, 0 if it has none."""
    return len(batch["image"]) if isinstance(batch, dict) and "image" in batch else 0


def count_flops(trainer: Trainer, pl_module: LightningModule) -> int:
    """The module's `flops_per_batch`, 0 for modules that do not count. On all processes: it may be collective."""
    with trainer.precision_plugin.forward_context():
        return int(getattr(pl_module, "flops_per_batch", 0))


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """Peak of one device at a Trainer precision ("bf16-mixed", ...) in 10^12 per second; None where it is not known."""
    prefixes = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    dtype = next((dtype for prefix, dtype in prefixes.items() if precision.startswith(prefix)), torch.float32)
    if device.type != "cuda":
        return None
    with warnings.catch_warnings():  # an unknown device is no reason to warn: the figure is left out
        warnings.simplefilter("ignore")
        try:
            flops = get_available_flops(device, dtype)
        except (IndexError, KeyError, RuntimeError):  # names of devices that the table's reader does not expect
            return None
    return flops / 1e12 if flops else None
