"""Exponential moving average of a module: the target encoder of the self-distilling methods."""

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class EMA(nn.Module):
    """A frozen copy of `module` that follows it: `ema = momentum * ema + (1 - momentum) * module`.

    The base module moves it once per real optimizer step, never per micro-batch.

    Args:
        module: the student; the copy starts equal to it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.moves = 0  # how often `update` was called in this process; the contract suite counts

    def train(self, mode: bool = True) -> "EMA":
        """Stay in evaluation mode: a target has no dropout and no stochastic depth."""
        return super().train(False)

    def forward(self, *args: object, **kwargs: object) -> object:
        """The copy's forward, without gradients."""
        with torch.no_grad():
            return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float, skip: Tensor | None = None) -> None:
        """Move towards `student`; a `skip` tensor of 1 (the optimizer skipped its step) cancels the move on the device.

        Parameters move in one fused operation; buffers (running statistics) are copied.
        """
        self.moves += 1
        ours, theirs = _local(self.module), _local(student)
        if skip is None:
            torch._foreach_lerp_(ours, theirs, 1.0 - momentum)
        else:  # known on the device only; a lerp by a tensor would be a kernel per parameter, this is three in all
            weight = (1.0 - momentum) * (1.0 - skip.to(ours[0].device).flatten()[0])
            moves = torch._foreach_sub(theirs, ours)
            torch._foreach_mul_(moves, weight.to(ours[0].dtype))
            torch._foreach_add_(ours, moves)
        for mine, other in zip(self.module.buffers(), student.buffers(), strict=True):
            mine.copy_(other)


def _local(module: nn.Module) -> list[Tensor]:
    """Parameters; of those that are shared out among processes (FSDP2) the share of this one."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
