"""Golden cases of LatentMIM, alone and with spatial affinity."""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import fill
import torch
from run_case import Number, compare_all
from torch import Tensor, nn

from xscale_lightning.data.bands import generic
from xscale_lightning.losses import affinity_features, affinity_gram, mean_similarity
from xscale_lightning.masking import children
from xscale_lightning.masking_gaps import take_patches
from xscale_lightning.methods.affinity_parts import encode_at, pooled_children
from xscale_lightning.methods.latent_mim import LatentMIM
from xscale_lightning.methods.latent_mim_options import Objective, Target
from xscale_lightning.models.heads import ProjectedEncoder
from xscale_lightning.readers.latent_mim import TABLE, build_published, load_published, to_published
from xscale_lightning.schedules import Schedule

KINDS = {
    "infonce_patches": "patch_discrimination",
    "patch_discrimination": "patch_discrimination",
    "norm_l2": "norm_l2",
}
TEACHER = "hr_gram_teacher."
READ = {"grid", "patch", "channels", "dim", "depth", "heads", "decoder_dim", "decoder_depth", "decoder_heads"}
READ |= {"head_width", "head_layers", "num_vis", "tau", "batch", "image_size", "tokens", "patch_gap", "sa_ratio"}
READ |= {"image_size_hr", "mlp_ratio", "norm_eps", "head_norm_eps", "sim_coeff", "sim_target", "loss", "ema_first"}
READ |= {"momentum", "sa_mode", "sa_weight", "mask_target", "pred2unit", "decoder_norm_eps"}


def build(
    config: Mapping[str, Any], state: Mapping[str, Tensor], channels: int
) -> tuple[LatentMIM, ProjectedEncoder | None]:
    """Our module with a case's weights, and the teacher on the finer grid where the case has one; sizes by shape."""
    for name in config.keys() - READ:
        print(f"  not read: {name}")
    momentum, similarity = (
        Schedule("constant", *[config.get(k, d)] * 2) for k, d in (("momentum", 0.99), ("sim_target", 0.75))
    )
    objective = Objective(
        kind=KINDS[config.get("loss", "infonce_patches")],
        temperature=config.get("tau", 0.2),
        standardize=config.get("pred2unit", True),
        similarity_weight=config.get("sim_coeff", 0.0),
        similarity=similarity,
    )
    module, _ = build_published(
        {name: value for name, value in state.items() if not name.startswith(TEACHER)},
        bands=generic(channels),
        num_heads=config.get("heads"),
        decoder_heads=config.get("decoder_heads", 16),
        gap=config.get("patch_gap", 0) / math.isqrt(state["encoder.embed.proj.weight"].shape[1] // channels),
        objective=objective,
        target=Target(momentum, tokens="hidden" if config.get("mask_target", True) else "all"),
    )
    eps = config.get("norm_eps", 1e-6)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.LayerNorm) and "head." in name:
            layer.eps = config.get("head_norm_eps", 1e-5)
        elif isinstance(layer, nn.LayerNorm):
            layer.eps = config.get("decoder_norm_eps", eps) if name.startswith("decoder.") else eps
    teacher = None
    if any(name.startswith(TEACHER) for name in state):
        teacher = copy.deepcopy(module.target.module)
        assert isinstance(teacher, ProjectedEncoder)
        load_published(module, state, teacher)
    return module.train(), teacher


def numbers(case: dict[str, Any], run: str) -> Iterator[Number]:
    """Losses, checks and gradient norms of one run."""
    config, inputs, lists = fill.config(case, run), fill.input_tensors(case, run), fill.index_lists(case, run)
    theirs = fill.state_dict(case, run, reference_names=True)
    module, teacher = build(config, theirs, inputs["image"].shape[1])
    grid, finer = (math.isqrt(len(theirs.get(f"{net}{TABLE}", [None])) - 1) for net in ("encoder.", TEACHER))
    sides = (grid, teacher, finer)
    back = to_published(module, *sides)
    lost = [n for n in theirs if n not in back or (back[n] - theirs[n]).abs().max() > (1e-6 if TABLE in n else 0)]
    yield Number("tensors lost on the way back", len(lost) + len(back.keys() - theirs.keys()), 0)

    images, visible, hidden = _cut(module, inputs["image"], lists, ""), lists["visible"], lists["masked"]
    if config.get("ema_first"):
        module._move_targets(None)
    output = module.loss(images, visible, hidden)
    seen = output.student[0]
    ours, total = {"loss": output.loss, "base_loss": output.loss}, output.loss
    checks: dict[str, Tensor] = {"encoder": seen.x}
    if teacher is not None:
        weight, ratio = config.get("sa_weight", 1.0), config.get("sa_ratio", finer // grid)
        block = config.get("sa_mode", "block" if "sa_block" in lists else "default") == "block"
        places, images_hr = lists["sa_block"] if block else visible, _cut(module, inputs["image_hr"], lists, "hr")
        student = encode_at(module.student_encoder, images, places, None) if block else seen
        young = children(places, grid, ratio)
        yield Number("children", float((young != lists.get("hr_children", young)).sum()), 0)
        with torch.no_grad():
            fine = teacher(images_hr, young)
            pooled = pooled_children(teacher, images_hr, student, ratio)
        gram, features = (term(student.patches, pooled) for term in (affinity_gram, affinity_features))
        ours |= {"sa_gram": gram, "sa_mse": features}
        ours |= {"total_gram": output.loss + weight * gram, "total_mse": output.loss + weight * features}
        total, checks["hr_teacher"] = ours["total_gram"], fine.x
    golden = case["runs"][run]
    yield from compare_all(ours, golden["golden"])

    target = module.encode_kept(images, hidden if module.target_tokens == "hidden" else None, which="ema")
    checks |= {
        "target": target.x,
        "decoder": module.decoder.decode(seen, hidden),
        "mean_similarity_prediction": output.logs["similarity_prediction"],
        "mean_similarity_visible": output.logs["similarity_visible"],
        "mean_similarity_target": mean_similarity(module.targets(images, hidden)),
    }
    yield from compare_all({name: value.detach() for name, value in checks.items()}, golden.get("checks", {}))
    if "grad_norms" in golden:
        total.backward()
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.full_like(p, torch.nan) if p.grad is None else p.grad)
        norms = {name: value.norm().item() for name, value in to_published(module, *sides).items()}
        known = {name: None if norm != norm else norm for name, norm in norms.items()}
        yield from compare_all(known, golden["grad_norms"], "grad ")


def _cut(module: LatentMIM, images: Tensor, lists: Mapping[str, Tensor], which: str) -> Tensor:
    """Images without gaps, by places in their cells that the case gives; for `hr` in lists with that in the name."""
    if not module.gap:
        return images
    named = [name for name in lists if "jitter" in name and ("hr" in name.split("_")) == (which == "hr")]
    if not named:  # of finer images: as they are
        return images
    rows, columns = (next(lists[name] for name in named if axis in name) for axis in ("row", "col"))
    return take_patches(images, module.patch_size, module.gap, torch.stack([rows, columns], dim=1))
