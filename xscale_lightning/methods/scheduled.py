"""Optimizer, schedules and target networks of a method, all functions of the optimizer step."""

import math
from collections.abc import Callable, Sequence, Sized
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from xscale_lightning.ema import EMA
from xscale_lightning.errors import UserError
from xscale_lightning.models.attention import Backend, choose_backend
from xscale_lightning.models.vit import Encoder
from xscale_lightning.optim import OptimizerConfig, Plan, apply_plan, build_optimizer, parameter_groups
from xscale_lightning.schedules import Schedule
from xscale_lightning.seeds import mix_seed, run_seed


class ScheduledModule(LightningModule):
    """A LightningModule with AdamW whose numbers follow the optimizer step, and with EMA targets.

    Args:
        optimizer: AdamW and its schedules.

    Attributes:
        stage: `number`, `of` and `name` of the stage of progressive pretraining that this is, if it is one.
        undecayed: parts of parameter names that weight decay leaves alone, beside vectors; a method may name some.
    """

    stage: dict[str, Any] | None = None
    undecayed: Sequence[str] = ()
    backbone: Encoder
    attention: Backend
    num_tokens: int = 1

    def __init__(self, optimizer: OptimizerConfig) -> None:
        super().__init__()
        self.optimizer_config = optimizer
        self.plan: Plan | None = None
        self._schedules: dict[str, Callable[[int, int], float]] = {}
        self._targets: list[tuple[nn.Module, EMA]] = []

    def make_target(self, student: nn.Module, momentum: Schedule) -> EMA:
        """A target network that follows `student`; the base moves it after every real optimizer step."""
        if not 0 <= min(momentum.start, momentum.end) <= max(momentum.start, momentum.end) <= 1:
            raise UserError(f"the EMA's momentum must be in [0, 1], got start {momentum.start}, end {momentum.end}.")
        target = EMA(student)
        self._targets.append((student, target))
        self.declare("ema_momentum", momentum)
        return target

    def declare(self, name: str, schedule: Callable[[int, int], float]) -> None:
        """Declare a float that changes with the optimizer step; logged as `schedule/<name>`."""
        self._schedules[name] = schedule

    def value(self, name: str) -> float:
        """Present value of a declared float."""
        total = self.plan.total_steps if self.plan else 1
        return self._schedules[name](self._optimizer_step, total)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW whose groups follow the plan of the run; prints and logs the resolved learning rate.

        Raises:
            UserError: the length of the run or its batch size is unknown.
        """
        config = self.optimizer_config
        self.trainer.fit_loop.setup_data()  # with max_steps, Lightning has not opened the loader yet
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise UserError("the schedules need the length of the run: set trainer.max_epochs or trainer.max_steps.")
        batch = self._samples_per_step()
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        warmup = min(round(config.warmup_epochs * steps_per_epoch), int(total))
        self.plan = Plan(int(total), warmup, config.resolve_lr(batch), config, max(steps_per_epoch, 1))
        scaled = f"{config.lr:g} x {batch} / 256 = " if config.scale_lr else ""
        dtype = torch.bfloat16 if "bf16" in str(self.trainer.precision) else torch.float32
        backend, why = choose_backend(self.device, dtype)
        if self.attention != "auto":
            backend, why = self.attention, "set by model.attention"
        millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (self, self.backbone)]
        rank_zero_info(
            f"{type(self).__name__}: {millions[0]:.1f} M parameters, {millions[1]:.1f} M of them in the encoder\n"
            f"learning rate {scaled}{self.plan.peak_lr:.4g} ({batch} samples per step), {int(total)} steps, "
            f"{warmup} of warm-up\nattention for whole images of {self.num_tokens} tokens: {backend} ({why})"
        )
        layers = (config.layer_decay, self.backbone.layer_index, self.backbone.depth)
        groups = parameter_groups(self, *layers, undecayed=self.undecayed)
        optimizer = build_optimizer(groups, config)
        optimizer.register_step_pre_hook(lambda opt, *_: apply_plan(opt, self._run_plan, self._optimizer_step))
        optimizer.register_step_post_hook(lambda opt, *_: self._after_update(opt))
        return optimizer

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer says; with a fused optimizer too, which Lightning refuses in every mixed precision.

        Only float16 has gradients that such an optimizer unscales itself.
        """
        if not any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            return  # the finite guard has taken them away; torch cannot clip the values of none
        plugin = self.trainer.precision_plugin
        if getattr(plugin, "scaler", None) is not None:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)

    @property
    def _optimizer_step(self) -> int:
        return self.trainer.global_step if self._trainer is not None else 0

    @property
    def _run_plan(self) -> Plan:
        assert self.plan is not None
        return self.plan

    def _scheduled(self) -> dict[str, float]:
        step = self._optimizer_step
        values = {"lr": self._run_plan.lr(step), "weight_decay": self._run_plan.weight_decay(step)}
        stage = {"stage": float(self.stage["number"])} if self.stage else {}
        return {**values, **stage, **{name: self.value(name) for name in self._schedules}}

    def _after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the targets, unless the guard has skipped the update (`FiniteGuard`; on CUDA by `found_inf`)."""
        if not getattr(optimizer, "update_skipped", False):
            self._move_targets(getattr(optimizer, "found_inf", None))

    def _move_targets(self, skipped: Tensor | None) -> None:
        for student, target in self._targets:
            target.update(student, self.value("ema_momentum"), skipped)

    def _batch_size(self) -> int | None:
        loader = self.trainer.train_dataloader
        sampler = getattr(loader, "batch_sampler", None)
        size = getattr(loader, "batch_size", None) or getattr(sampler, "batch_size", None)
        samples = getattr(loader, "sampler", None)  # those of this process
        if size and isinstance(samples, Sized):  # a set smaller than one batch gives a smaller batch
            size = min(int(size), len(samples))
        return int(size) if size else None

    def _samples_per_step(self) -> int:
        size = self._batch_size()
        if size is None and self.optimizer_config.scale_lr:
            raise UserError("the loader does not say its batch size: set model.optimizer.scale_lr to false.")
        return (size or 1) * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def _seed(self, batch: int) -> None:
        torch.manual_seed(mix_seed(run_seed(), self.global_rank, batch))
