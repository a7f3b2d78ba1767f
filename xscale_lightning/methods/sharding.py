"""Parameters shared out among processes (FSDP2), for encoders that do not fit on one device with their optimizer.

Used where the Trainer's strategy is Lightning's `ModelParallelStrategy` (`configs/fsdp.yaml`), through the hook
`configure_model`. Every process holds a share of every parameter, gradient, moment and target (EMA) parameter; the
weights of a block are gathered when it is their turn. Source: Zhao et al. 2023, arXiv 2304.11277.
"""

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from timm.models.vision_transformer import Block
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from xscale_lightning.models.cross_decoder import CrossBlock

BLOCKS = (Block, CrossBlock)
# Through these two all else reaches the parameters; each gathers those that belong to no block. Never one inside the
# other: the end of the inner one would count as that of both.
ENTRIES = ("step", "encode")


def shard_if_asked(module: LightningModule) -> None:
    """Shard `module` where it is trained with `ModelParallelStrategy`; once, and otherwise do nothing.

    Lightning's mesh has `data_parallel_size` x `tensor_parallel_size` processes. The parameters are shared out among
    the processes of its second dimension and repeated along its first: by default shared within a machine and repeated
    on every machine (hybrid sharding), which keeps the gathering of weights on the fast links.
    """
    trainer = module._trainer
    if trainer is None or not isinstance(trainer.strategy, ModelParallelStrategy) or isinstance(module, FSDPModule):
        return
    mesh = trainer.strategy.device_mesh
    replicas = mesh["data_parallel"].size()
    shard(module, mesh if replicas > 1 else mesh["tensor_parallel"])


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Share the parameters of `module` out among the processes of `mesh`, block by block, then the rest together.

    Args:
        module: a method; its blocks, those of targets included, become units of their own.
        mesh: of one dimension, or of two: repeated along the first, shared out along the second.
    """
    for child in list(module.modules()):
        if isinstance(child, BLOCKS):
            fully_shard(child, mesh=mesh)
    name = type(module)
    fully_shard(module, mesh=mesh)
    for attribute in ("__module__", "__name__", "__qualname__"):  # checkpoints and run folders name the method by these
        setattr(type(module), attribute, getattr(name, attribute))
    for entry in ENTRIES:
        register_fsdp_forward_method(module, entry)
