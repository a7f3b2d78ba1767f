"""Looking at a method without disturbing it: evaluation mode, seeds, floating-point operations."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.flop_counter import FlopCounterMode

from xscale_lightning.models.attention import set_backend
from xscale_lightning.models.blocks import set_checkpointing
from xscale_lightning.seeds import mix_seed as mix_seed

if TYPE_CHECKING:
    from xscale_lightning.methods.base import SSLModule


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode that it was in."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # its many shapes would each be compiled
            yield
    finally:
        for child, mode in modes:
            child.training = mode


def count_flops(module: "SSLModule", sample: dict[str, Any]) -> int:
    """Floating-point operations of `step` forward and backward on a prepared batch.

    Weights, gradients, buffers and random numbers stay as they are. Matrix products count, element-wise work does not.
    Where the parameters are shared out among processes it is not counted: 0.
    """
    if isinstance(module, FSDPModule):  # nothing may stand in for its parameters
        return 0
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    owned = [(child, name, p) for child in module.modules() for name, p in child.named_parameters(recurse=False)]
    parameters = [p for p in module.parameters() if p.requires_grad]
    devices = [module.device] if module.device.type == "cuda" else []
    set_backend(module, "math")  # its matrix products are all counted
    set_checkpointing(module, False)  # computing again is no work of the model
    try:
        with (
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
            torch.random.fork_rng(devices=devices),
            FlopCounterMode(display=False) as counter,
        ):
            # Views stand in for the parameters: the counter's hooks refuse a module that returns a parameter as it is,
            # such as a learned position table. Not by `functional_call`, which leaves stand-ins behind in a module that
            # is registered twice.
            for child, name, p in owned:
                if p.requires_grad:
                    child._parameters[name] = p.view_as(p)  # type: ignore[assignment]
            torch.autograd.grad(module.step(sample).loss, parameters, allow_unused=True)
    finally:
        for child, name, p in owned:
            child._parameters[name] = p
        set_backend(module, module.attention)
        set_checkpointing(module, module.activation_checkpointing)
        for buffer, value in buffers:
            buffer.copy_(value)
    return counter.get_total_flops()
