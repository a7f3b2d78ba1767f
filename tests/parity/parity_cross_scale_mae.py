"""Golden cases of Cross-Scale MAE."""

import re
from collections.abc import Iterator, Mapping
from math import isqrt
from typing import Any

import fill
import torch
from run_case import Number, compare_all

from xscale_lightning.data.bands import generic
from xscale_lightning.data.scale_view import View
from xscale_lightning.masking import to_boolean
from xscale_lightning.methods.cross_scale_mae import CrossScaleMAE
from xscale_lightning.methods.cross_scale_recipe import Recipe
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.readers.cross_scale_mae import TABLES, load_published, naming_of, to_published

# Names of the cases for the switches of `Recipe` and for our arguments.
SWITCHES = {
    "block_norm": "block_norm",
    "block_norm_eps": "norm_eps",
    "norm_eps": "norm_eps",
    "apply_encoder_norm": "encoder_norm",
    "encoder_norm": "encoder_norm",
    "recon_reduction": "reconstruction",
    "reconstruction": "reconstruction",
    "positive_in_denominator": "positive_in_denominator",
    "predictor_norm": "predictor_norm",
    "target_stop_grad": "stop_gradient",
    "stop_gradient": "stop_gradient",
    "crop_per": "crop_per",
    "shared_mask": "shared_mask",
    "align": "align",
}
ARGUMENTS = {
    "norm_pix": "norm_pix_loss",
    "norm_pix_loss": "norm_pix_loss",
    "mask_ratio": "mask_ratio",
    "tau": "temperature",
    "temperature": "temperature",
    "decoder_heads": "decoder_heads",
}
WEIGHTS = {
    "reconstruction_weight": ("re", "recon", "reconstruction"),
    "prediction_weight": ("cp", "prediction", "cross_prediction"),
    "contrastive_weight": ("cc", "contrastive"),
}
EPSILONS = {
    "encoder_norm_eps": "backbone.norm",
    "decoder_norm_eps": "decoder.norm",
    "predictor_norm_eps": "predictor.norm",
    "predictor_ln_eps": "predictor.norm",
}
BATCH_NORM = {"bn_eps": "eps", "bn_momentum": "momentum"}
# Read elsewhere, or told by the tensors' shapes.
OTHERS = {"heads", "mlp_ratio", "image_size", "channels", "patch", "dim", "depth", "decoder_dim", "decoder_depth"}
OTHERS |= {"predictor_hidden", "batch", "tokens", "kept", "grid"}


def build(config: Mapping[str, Any], state: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> Any:
    """Our module at the configuration of a case; sizes that it leaves out are those of the tensors (timm's names)."""
    switches = {ours: config[name] for name, ours in SWITCHES.items() if name in config}
    arguments = {ours: config[name] for name, ours in ARGUMENTS.items() if name in config}
    arguments |= {ours: config[name] for name in config if (ours := _weight(name))}
    dim, channels, patch, _ = state["patch_embed.proj.weight"].shape
    module = CrossScaleMAE(
        recipe=Recipe(preset="published", **switches),
        bands=generic(channels),
        backbone=BackboneConfig(
            name="vit_base_patch16",
            patch_size=patch,
            dim=dim,
            depth=_depth(state, "encoder"),
            num_heads=config["heads"],
            mlp_ratio=config.get("mlp_ratio", len(state["encoder.0.mlp.fc1.weight"]) / dim),
            image_size=inputs["image"].shape[-1],
        ),
        decoder_dim=len(state["decoder_embed.weight"]),
        decoder_depth=_depth(state, "decoder"),
        predictor_dim=len(state["predictor.0.weight"]),
        **arguments,
    ).double()
    for name in config:
        if name in EPSILONS and hasattr(norm := module.get_submodule(EPSILONS[name]), "eps"):
            norm.eps = config[name]
        elif name in BATCH_NORM and isinstance(module.predictor.norm, torch.nn.BatchNorm1d):
            setattr(module.predictor.norm, BATCH_NORM[name], config[name])
        elif not (name in SWITCHES | ARGUMENTS | EPSILONS | BATCH_NORM or name in OTHERS or _weight(name)):
            print(f"  not read: {name}")
    return module.train()


def _weight(name: str) -> str | None:
    """Our argument for a loss weight of a case: `w_cc`, `contrastive_weight`, `lambda_cp` ..."""
    word = r"(?:loss_)?(?:weight|w|lambda|coeff?)"
    found = re.fullmatch(rf"{word}_(?:l_)?(\w+?)|(?:l_)?(\w+?)_{word}", name)
    term = found and (found[1] or found[2])
    return next((ours for ours, terms in WEIGHTS.items() if term in terms), None)


def _depth(state: Mapping[str, torch.Tensor], stack: str) -> int:
    return len({name.split(".")[1] for name in state if re.match(rf"{stack}\.\d+\.", name)})


def numbers(case: dict[str, Any], run: str) -> Iterator[Number]:
    """Losses, checks and gradient norms of one run."""
    config, inputs, lists = fill.config(case, run), fill.input_tensors(case, run), fill.index_lists(case, run)
    theirs = fill.state_dict(case, run, reference_names=True)
    module = build(config, fill.state_dict(case, run), inputs)
    load_published(module, theirs)
    back = to_published(module, naming_of(theirs))
    lost = [n for n in theirs if n not in back or (back[n] - theirs[n]).abs().max() > (1e-6 if n in TABLES else 0)]
    yield Number("tensors lost on the way back", len(lost) + len(back.keys() - theirs.keys()), 0)

    images, other = inputs["image"], inputs["view_b"]
    count = isqrt((images.shape[2] // module.patch_size) * (images.shape[3] // module.patch_size)) ** 2
    masks = []
    for view in "ab":
        kept = lists[f"kept_{view}"] if f"kept_{view}" in lists else lists["kept"]
        hidden = (~to_boolean(kept, count)).nonzero()[:, 1].reshape(len(kept), -1)
        masks.append((kept, hidden if hidden.numel() else kept))
    rectangle = {**case["inputs"], **case["runs"][run].get("inputs", {})}["view_b"].get("rectangle")
    boxes = torch.tensor(rectangle, dtype=other.dtype).expand(len(other), 4) if rectangle else None
    seen = _watch(module)
    output = module.loss(View(images), View(other, boxes=boxes), *masks)
    a, b = (output.logs[f"reconstruction_{view}"] for view in "ab")
    ours = {
        "l_re_a": a,
        "l_re_b": b,
        "l_re_sum": a + b,
        "l_re_mean": (a + b) / 2,
        "l_re": output.logs["reconstruction"],
        "l_cp": output.logs["cross_prediction"],
        "l_cc": output.logs["contrastive"],
        "total": output.loss,
    }
    golden = case["runs"][run]
    yield from compare_all(ours, golden["golden"])

    output.loss.backward()
    yield from compare_all(_checks(module, seen, inputs), golden.get("checks", {}))
    yield from compare_all(_gradient_norms(module), golden.get("grad_norms", {}), "grad ")


def _watch(module: CrossScaleMAE) -> dict[str, torch.Tensor]:
    """Outputs of encoder, decoder and predictor in the pass to come, both views in one batch."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: seen.__setitem__(name, output)

    module.backbone.blocks[-1].register_forward_hook(keep("encoded"))
    module.backbone.norm.register_forward_hook(keep("encoded"))
    module.decoder.norm.register_forward_hook(keep("decoded"))
    module.predictor.register_forward_hook(keep("predicted"))
    return seen


def _checks(module: CrossScaleMAE, seen: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    prefix, batch = module.backbone.num_prefix, len(inputs["image"])
    decoded = seen["decoded"][:, prefix:]
    checks = {
        "view_b": inputs["view_b"],
        "pooled_encoder_a": seen["encoded"][:batch, prefix:].mean(1),
        "pooled_encoder_b": seen["encoded"][batch:, prefix:].mean(1),
        "decoder_a": decoded[:batch],
        "decoder_b": decoded[batch:],
        "predicted_from_b": seen["predicted"],
        "pixels_a": module.decoder.pred(decoded[:batch]),
        "pixels_b": module.decoder.pred(decoded[batch:]),
    }
    if isinstance(module.predictor.norm, torch.nn.BatchNorm1d):
        checks["bn_running_mean_sum"] = module.predictor.norm.running_mean.sum()
        checks["bn_running_var_sum"] = module.predictor.norm.running_var.sum()
    return checks


def _gradient_norms(module: CrossScaleMAE) -> dict[str, float]:
    """Norms under the published names of both namings; what has no gradient, or is no parameter, is not there."""
    with torch.no_grad():  # the reader's way back also renames gradients
        for p in module.parameters():
            p.copy_(torch.full_like(p, torch.nan) if p.grad is None else p.grad)
        named = {**to_published(module, "timm"), **to_published(module, "xformers")}
    learned = {n: v for n, v in named.items() if n not in TABLES and not re.search(r"\.(running_|num_batches)", n)}
    return {name: norm for name, value in learned.items() if not (norm := value.norm()).isnan()}
