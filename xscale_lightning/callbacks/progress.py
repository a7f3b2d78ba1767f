"""Progress: a Rich bar in a terminal, plain lines elsewhere (log files, batch jobs)."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console

from xscale_lightning.callbacks.probe import Measurement
from xscale_lightning.callbacks.steps import current_step, is_base_line
from xscale_lightning.callbacks.throughput import StepClock, batch_images
from xscale_lightning.callbacks.verdict import format_value, is_dense, is_knn, is_task_score
from xscale_lightning.errors import UserError

SECONDS_BETWEEN_METRICS = 0.5


class ProgressBar(RichProgressBar):
    """Shows loss, images/s and the newest probe with its step-0 value.

    Reading the loss makes the host wait for the device; that happens twice a second in a terminal and once per line
    elsewhere, not in every step.

    Args:
        refresh_rate: redraws per second of the bar; 0 switches the display off.
        seconds_between_lines: where the output is not a terminal, seconds between two lines.

    Raises:
        UserError: if a number is negative.
    """

    def __init__(self, refresh_rate: int = 10, seconds_between_lines: float = 10.0) -> None:
        if refresh_rate < 0 or seconds_between_lines < 0:
            raise UserError(
                f"ProgressBar: refresh_rate={refresh_rate}, seconds_between_lines={seconds_between_lines} is not "
                "possible; give 0 or more."
            )
        super().__init__(refresh_rate=refresh_rate, leave=True)
        self.seconds_between_lines = seconds_between_lines
        self._plain = False
        self._clock = StepClock()
        self._shown_at = 0.0
        self._newest: tuple[str, float] | None = None
        self._step_0: dict[str, float] = {}
        self._split = "val"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose between the bar and plain lines."""
        super().setup(trainer, pl_module, stage)
        console = get_console()
        terminal = console.is_terminal or console.is_jupyter
        self._plain = not terminal and trainer.is_global_zero and self.refresh_rate > 0
        if not terminal:
            self.disable()
        self._clock = StepClock()
        self._shown_at = 0.0

    def enable(self) -> None:
        """Switch the bar on again (Lightning's tuners do); plain lines stay plain."""
        if not self._plain:
            super().enable()

    def record_probe(self, trainer: Trainer, measurement: Measurement) -> None:
        """Remember the newest figures; without a terminal print them."""
        self._split = measurement.split
        if is_base_line(trainer):
            self._step_0.update(measurement.metrics)
        self._newest = self._headline(measurement)
        if self._plain:
            shown = []
            for name, value in measurement.metrics.items():
                rivals = measurement.baselines.get(name, {}).items()
                against = "; ".join(f"{rival} {format_value(v)}" for rival, v in rivals)
                shown.append(self._with_step_0(trainer, name, value) + (f" [{against}]" if against else ""))
            print(f"step {current_step(trainer)}: {', '.join(shown)}", flush=True)

    def _headline(self, measurement: Measurement) -> tuple[str, float] | None:
        """The figure that tells most; geometry only as long as there is nothing else."""
        for name, value in measurement.metrics.items():
            if name == "reconstruction/psnr" or is_knn(name) or is_dense(name) or is_task_score(name):
                return name, value
        first = next(iter(measurement.metrics.items()), None)
        return first if self._newest is None or self._newest[0].startswith("geometry/") else self._newest

    def _with_step_0(self, trainer: Trainer, name: str, value: float) -> str:
        if name.startswith(("val/", "test/")):  # scores of a task, whose head knows nothing at step 0
            return f"{name} {format_value(value)}"
        if is_base_line(trainer) and name in self._step_0:
            return f"{name} {format_value(value)}"  # this is the step-0 value
        zero = format_value(self._step_0[name]) if name in self._step_0 else None
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if zero is None and hasattr(callback, "step_zero"):  # a resumed run, validate, test: the summary has it
                zero = callback.step_zero(name, self._split)
        return f"{name} {format_value(value)} (step 0: {zero or 'not measured'})"

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands beside the bar."""
        shown: dict[str, Any] = {}
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None:
            shown["loss"] = f"{float(loss):.4g}"
        if self._clock.seconds > 0:
            shown["images/s"] = f"{self._clock.images / self._clock.seconds:.4g}"
        if self._newest is not None:
            name, text = self._newest[0], self._with_step_0(trainer, *self._newest)
            shown[name] = text.removeprefix(f"{name} ")
        return shown

    def _update_metrics(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning calls this after every step; most calls do nothing, so that the host does not wait each time."""
        now = time.monotonic()
        if now - self._shown_at >= SECONDS_BETWEEN_METRICS and not self._plain:
            self._shown_at = now
            super()._update_metrics(trainer, pl_module)
            self._clock.reset()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the epoch's bar and the clock."""
        super().on_train_epoch_start(trainer, pl_module)
        self._clock.resume()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note that the batch has arrived."""
        self._clock.batch_start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step; print a line when it is time."""
        self._clock.batch_end(batch_images(batch) * trainer.world_size)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self._plain:
            return
        now = time.monotonic()
        if self._shown_at == 0.0 or now - self._shown_at >= self.seconds_between_lines:
            self._shown_at = now
            epochs = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
            shown = ", ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items())
            total = trainer.estimated_stepping_batches
            print(f"epoch {trainer.current_epoch + 1}{epochs}, step {trainer.global_step}/{total}: {shown}", flush=True)
            self._clock.reset()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        super().on_validation_start(trainer, pl_module)
        self._clock.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        super().on_validation_end(trainer, pl_module)
        self._clock.resume()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        super().on_train_epoch_end(trainer, pl_module)
        self._clock.pause()
