"""Golden cases of I-JEPA, and of spatial affinity on it."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import fill
import torch
from run_case import Number, compare_all
from torch import Tensor, nn

from xscale_lightning.data.bands import generic
from xscale_lightning.losses import affinity_features, affinity_gram
from xscale_lightning.masking import children
from xscale_lightning.masking_blocks import Blocks
from xscale_lightning.methods.affinity_parts import pooled_children
from xscale_lightning.methods.ijepa import IJEPA
from xscale_lightning.readers.ijepa import TABLES, build_published, load_encoder, to_published

# Read below, or told by the tensors' shapes.
KNOWN = {"image_size", "image_size_hr", "channels", "patch", "dim", "depth", "heads", "batch", "grid", "tokens"}
KNOWN |= {"predictor_dim", "predictor_depth", "predictor_heads", "predictor_norm_eps", "mlp_ratio", "norm_eps"}
KNOWN |= {"sa_ratio", "target_norm_eps"}


def build(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> IJEPA:
    """Our module with a case's weights; sizes by their shapes."""
    for name in sorted(config.keys() - KNOWN):
        print(f"  not read: {name}")
    patches = state["encoder.patch_embed.proj.weight"]
    module = build_published(
        state,
        bands=generic(patches.shape[1]),
        num_heads=config.get("heads"),
        predictor_heads=config.get("predictor_heads"),
    )
    eps = config.get("norm_eps", 1e-6)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.LayerNorm):
            layer.eps = config.get("predictor_norm_eps", eps) if name.startswith("predictor.") else eps
    module.target_norm_eps = config.get("target_norm_eps", 1e-5)
    return module.train()


def numbers(case: dict[str, Any], run: str) -> Iterator[Number]:
    """Losses, checks and gradient norms of one run."""
    config, inputs, lists = fill.config(case, run), fill.input_tensors(case, run), fill.index_lists(case, run)
    theirs, golden = fill.state_dict(case, run, reference_names=True), case["runs"][run]
    own = {n: v for n, v in theirs.items() if not n.startswith("hr_teacher.")}
    module = build(config, own)
    images = inputs["image"]
    _, height, width = module.backbone.grid(images)
    back = to_published(module, height)
    lost = [n for n in own if n not in back or (back[n] - own[n]).abs().max() > (1e-6 if n in TABLES else 0)]
    yield Number("tensors lost on the way back", len(lost) + len(back.keys() - own.keys()), 0)

    contexts, targets = _numbered(lists, "context"), torch.stack(_numbered(lists, "target"))  # [T, B, M]
    blocks = Blocks.of([row for places in contexts for row in places], targets, height * width)
    seen = _watch(module)
    output = module.loss(images, blocks)
    tokens = _by_context(seen["context"].squeeze(0).flatten(0, -2), blocks, contexts)  # [B, K, D] each
    checks = {
        "target_encoder_full": seen["target"],
        "target": module.encode_target(images, blocks).unsqueeze(1).expand(-1, len(contexts), -1, -1, -1).flatten(0, 2),
        "prediction": seen["prediction"].flatten(0, 2),
        "context": torch.cat(tokens) if len({len(t[0]) for t in tokens}) == 1 else None,
    }
    ours: dict[str, Any] = {"loss": output.loss}
    terms: dict[str, Tensor] = {}
    if "image_hr" in inputs:
        teacher = copy.deepcopy(module.target.module)
        load_encoder(teacher, theirs, "hr_teacher")
        ratio = config.get("sa_ratio", inputs["image_hr"].shape[-1] // images.shape[-1])
        for i, places in enumerate(contexts):
            fine = teacher(inputs["image_hr"], keep=children(places, width, ratio)).patches  # [B, K * r * r, D]
            checks[f"hr_teacher_tokens_{i}"] = fine
            context = output.student[i]
            pooled = pooled_children(teacher, inputs["image_hr"], context, ratio)
            for name, term in (("sa_gram", affinity_gram), ("sa_mse", affinity_features)):
                terms[f"{name}_context_{i}"] = term(context.patches, pooled, context.lengths)
                ours.setdefault(name, []).append(terms[f"{name}_context_{i}"].item())
    yield from compare_all(ours, golden["golden"])
    yield from compare_all(checks, golden.get("checks", {}))

    yield from compare_all(_gradients(module, output.loss, height), golden.get("grad_norms", {}), "grad ")
    for name, term in terms.items():
        if f"grad_norms_{name}" in golden:
            yield from compare_all(_gradients(module, term, height), golden[f"grad_norms_{name}"], f"grad {name} ")


def _numbered(lists: Mapping[str, Tensor], name: str) -> list[Tensor]:
    """Lists `name_0`, `name_1` ... in the order of their numbers."""
    found = [key for key in lists if key.rpartition("_")[0] == name]
    return [lists[key] for key in sorted(found, key=lambda key: int(key.rpartition("_")[2]))]


def _by_context(rows: Tensor, blocks: Blocks, contexts: list[Tensor]) -> list[Tensor]:
    """Encoded tokens `[N, D]` of all sequences as one `[B, K, D]` per context."""
    sequences = rows.split(list(blocks.lengths))
    ordered = [sequences[i] for i in blocks.order.tolist()]
    count = len(contexts[0])
    return [torch.stack(ordered[c * count : (c + 1) * count]) for c in range(len(contexts))]


def _watch(module: IJEPA) -> dict[str, Tensor]:
    """Outputs of the three networks in the pass to come."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, part: nn.Module) -> None:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            seen.setdefault(name, output)

        part.register_forward_hook(hook)

    keep("context", module.backbone.norm)
    keep("target", module.target.module.norm)
    keep("prediction", module.predictor)
    return seen


def _gradients(module: IJEPA, loss: Tensor, grid: int) -> dict[str, Tensor]:
    """Norms of the gradients of `loss` under the published names; what has none is not there."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    carrier = copy.copy(module)
    gradients = {n: torch.full_like(p, torch.nan) for n, p in module.state_dict().items()}
    gradients |= {n: g for n, g in zip(named, found, strict=True) if g is not None}
    carrier.state_dict = lambda: gradients  # type: ignore[method-assign]
    renamed = to_published(carrier, grid)
    return {n: g.norm() for n, g in renamed.items() if n not in TABLES and not g.isnan().any()}
