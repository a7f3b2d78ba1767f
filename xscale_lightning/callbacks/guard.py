"""The finite guard: an update whose loss or gradient is not finite is not made, on any process."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from xscale_lightning.callbacks.guard_flags import (
    MAX_HELD,
    Flags,
    Micro,
    Outcome,
    RunningStatistics,
    agree,
    local_gradients,
    peaks_of,
    to_host,
)
from xscale_lightning.callbacks.guard_report import likely_causes, marks_of, save_for_replay, told
from xscale_lightning.callbacks.probe import Measurement, run_folder
from xscale_lightning.callbacks.spikes import SpikeDetector
from xscale_lightning.errors import UserError

log = logging.getLogger(__name__)
MAX_TOLD = 20  # skipped updates that are told one by one
NEAR_ONE = 1.5  # an effective rank below this: all features are one direction
PAGE = "docs/troubleshooting.md"


class FiniteGuard(Callback):
    """Skips updates that are not finite, says which batch it was, and stops a run that makes none any more.

    A skipped update leaves weights, the optimizer's moments and its step count, EMA targets and batch norm's running
    statistics as they were. Schedules go on: they follow the number of the step, which counts skipped ones, so a
    resumed run is the same run. With a loss scaler (`16-mixed`) overflowing gradients are the scaler's search for its
    scale; they count only once that has come down to 1.

    Logs `guard/skipped` and `guard/skipped_in_row` from the first skipped update on, and writes its batch to
    `<run>/guard/step_0000041.pt` (`xscale doctor --replay FILE --ckpt_path CHECKPOINT`). Warns once of a spike of the
    loss, and once of features that collapse.

    Args:
        enabled: false lets every update through.
        max_in_row: so many skipped updates in a row stop the run.
        keep: the newest files of skipped batches that stay, per process; 0 writes none.
        spike: deviations above the usual loss, by the median of the last 64, at which a spike is told; null: never.
        collapse: share of its step-0 value below which the effective rank of the features is told; null: never.

    Raises:
        UserError: an argument is out of range.
    """

    def __init__(
        self,
        enabled: bool = True,
        max_in_row: int = 10,
        keep: int = 16,
        spike: float | None = 10.0,
        collapse: float | None = 0.1,
    ) -> None:
        super().__init__()
        if max_in_row < 1:
            raise UserError(f"guard.max_in_row: {max_in_row} is not possible; give at least 1.")
        if keep < 0:
            raise UserError(f"guard.keep: {keep} is not possible; give 0 or more.")
        if spike is not None and not 1 <= spike < math.inf:
            raise UserError(f"guard.spike: {spike} is not possible; give deviations, at least 1, or null.")
        if collapse is not None and not 0 < collapse < 1:
            raise UserError(f"guard.collapse: {collapse} is not possible; give a share between 0 and 1, or null.")
        self.enabled, self.max_in_row, self.keep, self.collapse = enabled, max_in_row, keep, collapse
        self.spikes = None if spike is None else SpikeDetector(spike)
        self.skipped, self.in_row, self.updates = 0, 0, 0
        self._told_spike, self._told_collapse = False, False
        self._rank_zero: float | None = None
        self._owner: tuple[Trainer, LightningModule] | None = None
        self._batch: Any = None
        self._place = (0, 0)
        self._micros: list[Micro] = []
        self._waiting: Flags | None = None
        self._stop: str | None = None
        self._folder: Path | None = None
        self._statistics: RunningStatistics | None = None

    # ---- the state in the checkpoint ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain types; what the device still owes is waited for, so that it is the state after the last step."""
        if self._waiting is not None and self._owner is not None:
            self._resolve(*self._owner)
        return {
            "skipped": self.skipped,
            "in_row": self.in_row,
            "updates": self.updates,
            "told": [self._told_spike, self._told_collapse],
            "rank_zero": self._rank_zero,
            "losses": list(self.spikes.values) if self.spikes else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.skipped, self.in_row = state_dict["skipped"], state_dict["in_row"]
        self.updates, self._rank_zero = state_dict["updates"], state_dict["rank_zero"]
        self._told_spike, self._told_collapse = state_dict["told"]
        if self.spikes:
            self.spikes.recall(state_dict["losses"])

    # ---- one step ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look up the run's folder, and batch norms if there are any."""
        self._owner = trainer, pl_module
        self._folder = run_folder(trainer)
        self._micros, self._waiting, self._stop = [], None, None
        self._statistics = RunningStatistics(pl_module) if self.enabled else None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch until its step is known to be finite."""
        self._batch, self._place = batch, (batch_idx, trainer.fit_loop.epoch_loop.total_batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember the loss, which comes divided by the accumulation and multiplied by the scaler."""
        if not self.enabled:
            return
        value = loss.detach().float() * trainer.accumulate_grad_batches
        if (scale := _scale(trainer)) is not None:
            value = value / scale
        terms = dict(getattr(pl_module, "newest_terms", {}))
        self._micros.append(Micro(self._batch, marks_of(self._batch), *self._place, value, terms))
        if len(self._micros) > MAX_HELD:
            self._micros[-MAX_HELD - 1].batch = None

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Decide on the update: after accumulation and the processes' exchange of gradients, before clipping.

        On CUDA nothing waits for the device: the flag goes to the fused optimizer as `found_inf`, which then leaves
        everything as it is (and `EMA.update` follows it), and the host reads it one step later, when it has long been
        copied. On a CPU, where nothing runs ahead, and with optimizers that know no `found_inf`, the host decides and
        takes the gradients away, which every optimizer understands.
        """
        if not self.enabled:
            return
        if self._waiting is not None:
            self._resolve(trainer, pl_module)
        device = pl_module.device
        names, gradients = local_gradients(pl_module)
        peaks, losses = peaks_of(gradients, device), torch.stack([micro.loss for micro in self._micros]).to(device)
        bad_loss, bad_gradient = ~torch.isfinite(losses).all(), ~torch.isfinite(peaks).all()
        scale = _scale(trainer)
        counted = bad_loss | (bad_gradient if scale is None else bad_gradient & (scale <= 1))
        flags = agree(torch.stack([bad_loss | bad_gradient, counted, bad_loss]).float())
        host, event = to_host(torch.cat([flags, losses, peaks]))
        self._waiting = Flags(trainer.global_step, trainer.current_epoch, self._micros, names, host, event)
        self._micros = []
        if self._statistics is not None:
            self._statistics.settle(flags[0])
            self._statistics.note()
        if scale is not None:  # the scaler looks at the gradients itself; a loss alone must show in them
            if gradients:
                gradients[0].add_(torch.where(flags[2] > 0, math.nan, 0.0).to(gradients[0].dtype))
        elif event is not None and _understands_found_inf(optimizer):
            optimizer.found_inf = flags[0]  # type: ignore[attr-defined]
        else:
            skip = bool(flags[0])
            optimizer.update_skipped = skip  # type: ignore[attr-defined]  # the EMA targets look at it
            if skip:
                for parameter in pl_module.parameters():
                    parameter.grad = None
        if event is None:
            self._resolve(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the counts, and stop a run that makes no updates.

        Raises:
            UserError: too many updates in a row were skipped.
        """
        self._batch = None
        if self.skipped:
            pl_module.log_dict({"guard/skipped": float(self.skipped), "guard/skipped_in_row": float(self.in_row)})
        if self._stop is not None:
            raise UserError(self._stop)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the last flag; a run that has made no update at all has not trained.

        Raises:
            UserError: every update of the run was skipped.
        """
        if self._waiting is not None:
            self._resolve(trainer, pl_module)
        if self.skipped and not self.updates and self._stop is None:
            self._stop = (
                f"no update of this run was finite: all {self.skipped} were skipped (guard); "
                f"see {PAGE}#the-loss-is-not-a-number."
            )
        if self._stop is not None:
            raise UserError(self._stop)

    # ---- what the host does with a flag ------------------------------------------------------------------------------

    def _resolve(self, trainer: Trainer, pl_module: LightningModule) -> None:
        flags, self._waiting = self._waiting, None
        assert flags is not None
        outcome = flags.read()
        if not outcome.counted:
            self.in_row = 0 if not outcome.skipped else self.in_row
            self.updates += not outcome.skipped
            self._watch(outcome, flags.step)
            return
        self.skipped += 1
        self.in_row += 1
        saved = None
        if not outcome.bad_loss_somewhere or not all(math.isfinite(loss) for loss in outcome.losses):
            saved = save_for_replay(trainer, flags, outcome, self._folder, self.keep)
            if self.skipped <= MAX_TOLD:
                log.warning("%s", told(trainer, flags, outcome, saved))
        if self.in_row >= self.max_in_row:
            causes = likely_causes(trainer, pl_module, flags, outcome)
            place = f" Replay: xscale doctor --replay {saved} --ckpt_path CHECKPOINT." if saved else ""
            self._stop = (
                f"{self.in_row} updates in a row were not finite (guard.max_in_row), the last at step {flags.step}; "
                f"checkpoints are from before.\n{causes}.{place} See {PAGE}#the-loss-is-not-a-number."
            )

    def _watch(self, outcome: Outcome, step: int) -> None:
        if self.spikes is None or outcome.skipped:
            return
        value = sum(outcome.losses) / len(outcome.losses)
        usual = self.spikes.usual()
        if self.spikes.is_spike(value) and not self._told_spike and usual is not None:
            self._told_spike = True
            rank_zero_warn(
                f"the loss spiked at step {step}: {value:.4g}, where it was {usual[0]:.4g} lately. Told once; "
                f"see {PAGE}#the-loss-spikes."
            )

    def record_probe(self, trainer: Trainer, measurement: Measurement) -> None:
        """Watch the effective rank of the features."""
        rank = measurement.metrics.get("geometry/rank")
        if rank is None or self.collapse is None:
            return
        if trainer.global_step == 0:
            self._rank_zero = float(rank)
        start = self._rank_zero
        if start is None or self._told_collapse or trainer.global_step == 0:
            return
        if rank < self.collapse * start or (rank < NEAR_ONE and start >= 2 * NEAR_ONE):
            self._told_collapse = True
            rank_zero_warn(
                f"the features collapse: effective rank {rank:.2f} at step {trainer.global_step}, {start:.2f} at step "
                f"0. Told once; see {PAGE}#the-features-collapse."
            )


def _scale(trainer: Trainer) -> Tensor | None:
    """Present factor of the loss scaler on the device; None without a scaler."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return None
    scale = scaler._scale
    return scale if scale is not None else torch.tensor(float(scaler._init_scale))


def _understands_found_inf(optimizer: Optimizer) -> bool:
    """Whether the optimizer leaves everything as it is where its `found_inf` is 1: torch's fused ones, not sharded."""
    fused = bool(optimizer.defaults.get("fused"))
    return fused and not any(hasattr(p, "to_local") for group in optimizer.param_groups for p in group["params"])
