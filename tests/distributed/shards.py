"""One step of sharded methods on two processes, and of whole ones: `shards.py FOLDER`."""

import copy
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import clip_grad_norm_

from xscale_lightning import checkpoints
from xscale_lightning.data.bands import generic
from xscale_lightning.methods.ijepa import IJEPA
from xscale_lightning.methods.latent_mim import LatentMIM
from xscale_lightning.methods.mae import MAE
from xscale_lightning.methods.sharding import shard
from xscale_lightning.models.jepa_predictor import PredictorConfig
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.optim import OptimizerConfig, Plan, apply_plan, build_adamw, parameter_groups
from xscale_lightning.testing import NO_VIEWS, _PerSampleNoise, make_batch

torch.set_num_threads(1)
VIT, DECODER = {"name": "vit_tiny_patch8", "depth": 2}, {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4}
METHODS = {
    "mae": (MAE, VIT, DECODER),
    "ijepa": (IJEPA, {**VIT, "class_token": False}, {"predictor": PredictorConfig(48, 1)}),
    "latent_mim": (LatentMIM, {**VIT, "position": "stretched"}, {**DECODER, "head_dim": 32}),
}


def step(module, batch, start):
    # one optimizer step with clipping, our groups and plan, and the move of the targets
    config = OptimizerConfig(lr=1e-2)
    optimizer = build_adamw(parameter_groups(module), config)
    apply_plan(optimizer, Plan(10, 1, 1e-2, config), 5)
    with _PerSampleNoise(start):
        loss = module.step(module.prepare(batch)).loss
    loss.backward()
    gradients = {n: whole(p.grad) for n, p in module.named_parameters() if p.requires_grad}
    norm = whole(clip_grad_norm_([p for p in module.parameters() if p.requires_grad], 0.01))
    optimizer.step()
    for student, target in module._targets:
        target.update(student, 0.9)
    after = {n: whole(p.detach()) for n, p in module.named_parameters()}
    with _PerSampleNoise(start):
        output = module.evaluate(batch, 0)
    # Pictures are made of what `evaluate` hands back, after it is over.
    restored = output.reconstruction().prediction if output.reconstruction else batch["image"].double()
    found = {"loss": loss.detach(), "norm": norm, "gradients": gradients, "after": after, "restored": restored}
    return {**found, "features": module.features(batch)}


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name, (method, backbone, arguments) in METHODS.items():
        torch.manual_seed(0)
        plain = method(bands=generic(3), backbone=BackboneConfig(**backbone), views=NO_VIEWS, **arguments).double()
        sharded = copy.deepcopy(plain)
        shard(sharded, mesh)
        share = sum(p.to_local().numel() for p in sharded.parameters()) / sum(p.numel() for p in plain.parameters())
        batch = make_batch(generic(3), (32, 48), 8)
        half = {k: v[4 * rank : 4 * rank + 4] for k, v in batch.items()}
        two = step(sharded, half, 4 * rank)
        one = step(plain, batch, 0)
        loss = two["loss"]
        dist.all_reduce(loss)
        two["loss"], two["share"] = loss / 2, share
        two["class_path"] = checkpoints.metadata(sharded)["class_path"]
        for key in ("features", "restored"):
            one[key] = one[key][4 * rank : 4 * rank + 4]
        torch.save({"one": one, "two": two}, f"{folder}/{name}_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    child = os.fork()
    try:
        work(0 if child else 1, sys.argv[1])
    finally:
        if not child:
            sys.stderr.flush()
            code = 1 if sys.exc_info()[0] else 0
            if code:
                import traceback

                traceback.print_exc()
            os._exit(code)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
