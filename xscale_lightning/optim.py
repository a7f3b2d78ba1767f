"""Optimizer with parameter groups whose learning rate and weight decay are functions of the optimizer step."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from xscale_lightning.errors import UserError
from xscale_lightning.schedules import cosine, warmup_cosine


@dataclass
class OptimizerConfig:
    """AdamW and its schedules."""

    lr: float = 1.5e-4
    """Peak learning rate per 256 samples; the resolved one is `lr * global batch / 256`, printed and logged."""
    scale_lr: bool = True
    """Scale `lr` by the global batch (batch size x devices x accumulation); false takes it as it is."""
    min_lr: float = 0.0
    """Learning rate at the last step (as given, not scaled)."""
    warmup_lr: float = 0.0
    """Learning rate at step 0 of the warm-up (as given, not scaled)."""
    floor: float = 0.0
    """Least learning rate, in the warm-up and at the end, as a share of the peak."""
    warmup_epochs: float = 0.0
    """Length of the linear warm-up in epochs, fractions allowed; at most the whole run."""
    weight_decay: float = 0.05
    """Decay of matrices; vectors (biases, norms) have none."""
    final_weight_decay: float | None = None
    """Weight decay at the last step, reached along half a cosine; null keeps it constant."""
    beta1: float = 0.9
    """AdamW's first moment."""
    beta2: float = 0.95
    """AdamW's second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    first_step: Literal[0, 1] = 0
    """Step of the learning rate's and weight decay's schedules at which the first update is made; 1 as with published
    schedulers that step before the optimizer does (I-JEPA)."""
    layer_decay: float | None = None
    """Learning rate of block i times `layer_decay ** (depth + 1 - i)`; null: all alike."""
    epoch_decay: float | None = None
    """Factor of the learning rate from epoch to epoch after the warm-up, in place of the cosine; null: the cosine."""
    kind: Literal["adamw", "sgd", "lars"] = "adamw"
    """`adamw`, or for linear probes `sgd` or `lars` (You et al. 2017), both with `beta1` as momentum."""

    def __post_init__(self) -> None:
        """Refuse values that cannot train."""
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}.")
        for name in ("lr", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "final_weight_decay", "eps"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:  # NaN fails as well
                raise UserError(f"optimizer.{name} must be finite and not negative, got {value}.")
        if not 0 <= self.floor <= 1:
            raise UserError(f"optimizer.floor must be in [0, 1], got {self.floor}.")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UserError(f"optimizer.layer_decay must be in (0, 1], got {self.layer_decay}.")
        if self.epoch_decay is not None and not 0 < self.epoch_decay <= 1:
            raise UserError(f"optimizer.epoch_decay must be in (0, 1], got {self.epoch_decay}.")

    def resolve_lr(self, global_batch: int) -> float:
        """Peak learning rate for `global_batch` samples per step. Source: Goyal et al. 2017, linear scaling."""
        return self.lr * global_batch / 256 if self.scale_lr else self.lr


def parameter_groups(
    module: nn.Module,
    layer_decay: float | None = None,
    layer_index: Callable[[str], int] | None = None,
    depth: int = 0,
    undecayed: Sequence[str] = (),
) -> list[dict]:
    """Trainable parameters in groups of equal decay and learning-rate scale.

    Vectors and scalars (biases, norms) are not decayed; class and mask tokens and tables are, as in the published
    code of MAE.

    Args:
        module: whose parameters to group.
        layer_decay: factor per layer, or None.
        layer_index: maps a parameter name under `backbone.` to 0..depth + 1; names outside it count as depth + 1.
        depth: number of blocks.
        undecayed: parts of names of further parameters that are not decayed.

    Returns:
        Dictionaries with `params`, `names`, `decay` (bool) and `lr_scale`.
    """
    groups: dict[tuple[bool, float], dict] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if layer_decay is not None and layer_index is not None and name.startswith("backbone."):
            scale = layer_decay ** (depth + 1 - layer_index(name))
        decay = parameter.ndim > 1 and not any(part in name for part in undecayed)
        group = groups.setdefault((decay, scale), {"params": [], "names": [], "decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


@dataclass(frozen=True)
class Plan:
    """The resolved numbers of one run: everything the schedules depend on."""

    total_steps: int
    warmup_steps: int
    peak_lr: float
    config: OptimizerConfig
    steps_per_epoch: int = 1

    def lr(self, step: int) -> float:
        """Learning rate for optimizer step `step` (0-based)."""
        c = self.config
        least = c.floor * self.peak_lr
        start, end = max(c.warmup_lr, least), max(c.min_lr, least)
        past = step + c.first_step - self.warmup_steps
        if c.epoch_decay is not None and past >= 0:
            return max(end, self.peak_lr * c.epoch_decay ** (past // self.steps_per_epoch))
        return warmup_cosine(step + c.first_step, self.total_steps, self.warmup_steps, start, self.peak_lr, end)

    def weight_decay(self, step: int) -> float:
        """Weight decay for optimizer step `step` (0-based)."""
        c = self.config
        final = c.weight_decay if c.final_weight_decay is None else c.final_weight_decay
        return cosine(step + c.first_step, self.total_steps, c.weight_decay, final)


def build_optimizer(groups: Iterable[dict], config: OptimizerConfig) -> Optimizer:
    """The optimizer of `config.kind` over `groups`; AdamW is fused: one kernel for all parameters."""
    if config.kind == "adamw":
        return build_adamw(groups, config)
    if config.kind == "sgd":
        return SGD(_without_names(groups), lr=config.lr, momentum=config.beta1)
    from timm.optim import Lars

    return Lars(_without_names(groups), lr=config.lr, momentum=config.beta1)  # type: ignore[arg-type]


def build_adamw(groups: Iterable[dict], config: OptimizerConfig) -> AdamW:
    """AdamW over `groups`, fused: one kernel for all parameters."""
    return AdamW(_without_names(groups), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def _without_names(groups: Iterable[dict]) -> list[dict]:
    return [{k: v for k, v in group.items() if k != "names"} for group in groups]


def apply_plan(optimizer: Optimizer, plan: Plan, step: int) -> None:
    """Set every group's learning rate and weight decay for optimizer step `step`."""
    lr, weight_decay = plan.lr(step), plan.weight_decay(step)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decay"] else 0.0
