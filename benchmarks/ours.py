"""Our methods at the benchmarks' sizes, and their full training step as the Trainer runs it, without the Trainer.

Needs torch, timm and lightning: no imagery is read, and no command line is parsed.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

import torch
from references import ReferenceStep
from sizes import CUBE, RATIO, Size
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from xscale_lightning.data.bands import generic
from xscale_lightning.data.views import Views
from xscale_lightning.masking_blocks import BlockMasks
from xscale_lightning.methods import hosted
from xscale_lightning.methods.base import SSLModule
from xscale_lightning.methods.cross_scale_mae import CrossScaleMAE
from xscale_lightning.methods.cross_scale_recipe import Recipe
from xscale_lightning.methods.ijepa import IJEPA
from xscale_lightning.methods.latent_mim import LatentMIM
from xscale_lightning.methods.mae import MAE
from xscale_lightning.methods.s2mae import S2MAE
from xscale_lightning.methods.spatial_affinity import SpatialAffinity
from xscale_lightning.models.attention import Backend, set_backend
from xscale_lightning.models.blocks import set_compiled
from xscale_lightning.models.jepa_predictor import PredictorConfig
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.optim import OptimizerConfig, build_adamw, parameter_groups

# What the published loaders do, on the whole batch: crop scale, kernel, flips.
VIEWS = {
    "mae": Views(scale=(0.2, 1.0), interpolation="bicubic", rot90=False),
    "cross_scale_mae": Views(scale=(0.25, 1.0), interpolation="bicubic", rot90=False),
    "s2mae": Views(scale=(0.2, 1.0), interpolation="bicubic", rot90=False),
    "ijepa": Views(scale=(0.3, 1.0), flip=False, rot90=False),
    "latent_mim": Views(scale=(0.2, 1.0), interpolation="bicubic", rot90=False),
    "sa_ijepa": Views(scale=(0.3, 1.0), flip=False, rot90=False),
    "sa_latent_mim": Views(scale=(0.2, 1.0), flip=False, rot90=False),
}
# One option per method that the published code does not have and that changes the work of a step.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "cross_scale_mae": ("recommended recipe", {"recipe": Recipe()}),
    "s2mae": ("a quarter of the cubes predicted", {"predict_ratio": 0.25}),
    "ijepa": ("packed contexts, nothing cut off", {"masks": BlockMasks()}),
    "latent_mim": ("a quarter of the patches predicted", {"predict_ratio": 0.25}),
    "sa_ijepa": ("host alone", {"source": "mr"}),
    "sa_latent_mim": ("host alone", {"source": "mr"}),
}


def build(size: Size, **changes: Any) -> SSLModule:
    """Our method of the given size, with the arithmetic of the published one."""
    backbone = BackboneConfig(
        "spectral_vit_base_cube3_patch8" if size.method == "s2mae" else "vit_base_patch16",
        dim=size.dim,
        depth=size.depth,
        num_heads=size.heads,
        patch_size=size.patch,
        image_size=size.image,
    )
    shared = {"bands": generic(size.bands), "views": VIEWS[size.method]}
    decoder = {f"decoder_{name}": getattr(size, f"decoder_{name}") for name in ("dim", "depth", "heads")}
    masks = {"mask_ratio": size.mask_ratio}
    if size.method == "mae":
        return MAE(backbone=backbone, **masks, **decoder, **shared, **changes)
    if size.method == "cross_scale_mae":
        own = {"recipe": Recipe(preset="paper"), "predictor_dim": size.hidden, **changes}
        return CrossScaleMAE(backbone=backbone, **masks, **decoder, **shared, **own)
    if size.method == "s2mae":
        if size.bands % CUBE:
            backbone.pad = "mean"
        backbone.position, backbone.spectral, backbone.class_token = "learned", "learned", False
        return S2MAE(backbone=backbone, **masks, **decoder, **shared, **changes)
    if size.host == "ijepa":
        backbone.class_token = False
        least = min(10, size.tokens // 16)  # on small grids the published 10 leaves no block
        predictor = PredictorConfig(size.decoder_dim, size.decoder_depth, size.decoder_heads)
        own = {"masks": BlockMasks(sampler="legacy", min_keep=least), "predictor": predictor}
        if not size.paired:
            return IJEPA(backbone=backbone, **shared, **{**own, **changes})
    else:
        backbone.position = "stretched"
        own = {**masks, **decoder, "gap": size.gap / size.patch, "head_dim": size.hidden}
        if not size.paired:
            return LatentMIM(backbone=backbone, **shared, **{**own, **changes})
    with hosts_as_they_are():
        return SpatialAffinity(size.host, own, RATIO, backbone=backbone, **shared, **changes)


@contextmanager
def hosts_as_they_are() -> Iterator[None]:
    """Inside, a host method is built from Python objects: machines without a command line lack its parser, too."""
    before = hosted.build_host

    def direct(name: str, arguments: Any, shared: Any) -> SSLModule:
        return {"ijepa": IJEPA, "latent_mim": LatentMIM}[name](**arguments, **shared)

    hosted.build_host = direct
    try:
        yield
    finally:
        hosted.build_host = before


def synthetic_batch(size: Size) -> dict[str, Tensor]:
    """Normal noise in place of images, on the host: the arithmetic does not depend on what they show."""
    generator = torch.Generator().manual_seed(0)
    shape = (size.batch, size.bands, size.image, size.image)
    batch = {"image": torch.randn(shape, generator=generator), "gsd": torch.full((size.batch,), 10.0)}
    if size.paired:
        finer = (*shape[:2], RATIO * size.image, RATIO * size.image)
        batch |= {"image_hr": torch.randn(finer, generator=generator), "gsd_hr": batch["gsd"] / RATIO}
    return batch


class Ours:
    """The full training step of a method of this package: views, forward, backward, optimizer, targets."""

    def __init__(
        self,
        size: Size,
        device: torch.device,
        dtype: torch.dtype,
        attention: Backend = "auto",
        compiled: bool = False,
        augment: bool = True,
        fused: bool = True,
        **changes: Any,
    ) -> None:
        torch.manual_seed(0)
        self.size, self.device, self.dtype, self.augment = size, device, dtype, augment
        self.module = build(size, **changes).to(device).train()
        set_backend(self.module, attention)
        set_compiled(self.module, compiled)
        self.batch = {name: values.to(device) for name, values in synthetic_batch(size).items()}
        groups = parameter_groups(self.module)
        config = OptimizerConfig()
        if fused:
            self.optimizer = build_adamw(groups, config)
        else:
            parameters = [{"params": group["params"]} for group in groups]
            self.optimizer = torch.optim.AdamW(parameters, config.lr, (config.beta1, config.beta2), config.eps)

    def forward(self) -> Tensor:
        """Loss of one batch."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            return self.module.step(self.module.prepare(self.batch, augment=self.augment)).loss

    def step(self) -> Tensor:
        """Views, forward, backward, optimizer, targets; returns the loss."""
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.module._move_targets(None)
        return loss.detach()


Step = Ours | ReferenceStep


def count_flops(step: Step) -> int:
    """Floating-point operations of one forward and backward pass: matrix products and attention."""
    if isinstance(step, Ours):
        set_backend(step.module, "math")  # its matrix products are all counted
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        step.forward().backward()
    step.optimizer.zero_grad()
    if isinstance(step, Ours):
        set_backend(step.module, "auto")
    return counter.get_total_flops()


def variants(
    size: Size,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    augment: bool = True,
    compiled: bool = False,
) -> dict[str, Callable[[], Step]]:
    """What is timed of a method, by name; each is built when it is called."""
    from references import build_reference

    low = str(dtype).removeprefix("torch.")
    name, changes = OPTIONS.get(size.method, ("", {}))

    def reference() -> ReferenceStep:
        torch.manual_seed(0)
        return ReferenceStep(build_reference(size), synthetic_batch(size), device, augment=augment)

    found: dict[str, Callable[[], Step]] = {
        "reference float32": reference,
        "ours float32": lambda: Ours(size, device, torch.float32, augment=augment),
        f"ours {low}": lambda: Ours(size, device, dtype, augment=augment),
    }
    if name:
        found[f"ours {low}, {name}"] = lambda: Ours(size, device, dtype, augment=augment, **changes)
    if compiled:
        found[f"ours {low}, compiled"] = lambda: Ours(size, device, dtype, augment=augment, compiled=True)
    return found


def resized(size: Size, image: int | None = None, bands: int | None = None, batch: int | None = None) -> Size:
    """The size with other images, bands or batch; with gaps `image` counts the patches' own pixels."""
    changes = {"bands": bands, "batch": batch}
    if image is not None:
        changes["image"] = image // size.patch * (size.patch + size.gap)
    return dataclasses.replace(size, **{name: value for name, value in changes.items() if value is not None})
