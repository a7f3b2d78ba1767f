"""Golden cases of Cross-Scale MAE."""

from collections.abc import Iterator
from typing import Any

import fill
import torch
from run_case import Number, compare

from xscale_lightning.data.bands import generic
from xscale_lightning.data.scale_view import View
from xscale_lightning.masking import to_boolean
from xscale_lightning.methods.cross_scale_mae import CrossScaleMAE
from xscale_lightning.methods.cross_scale_recipe import Recipe
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.readers.cross_scale_mae import load_published, naming_of, to_published

# Names of the switches in the cases, where they differ from ours.
SWITCHES = {
    "apply_encoder_norm": "encoder_norm",
    "recon_reduction": "reconstruction",
    "target_stop_grad": "stop_gradient",
    "block_norm_eps": "norm_eps",
}
OWN = ("block_norm", "encoder_norm", "reconstruction", "positive_in_denominator", "predictor_norm", "stop_gradient")


def build(config: dict[str, Any]) -> CrossScaleMAE:
    """Our module at the configuration of a case."""
    config = {SWITCHES.get(name, name): value for name, value in config.items()}
    recipe = Recipe(preset="published", **{n: config[n] for n in (*OWN, "norm_eps") if n in config})
    module = CrossScaleMAE(
        recipe=recipe,
        bands=generic(config["channels"]),
        backbone=BackboneConfig(
            name="vit_base_patch16",
            patch_size=config["patch"],
            dim=config["dim"],
            depth=config["depth"],
            num_heads=config["heads"],
            mlp_ratio=config["mlp_ratio"],
            image_size=config["image_size"],
        ),
        mask_ratio=config["mask_ratio"],
        norm_pix_loss=config.get("norm_pix", False),
        decoder_dim=config["decoder_dim"],
        decoder_depth=config["decoder_depth"],
        decoder_heads=config["decoder_heads"],
        predictor_dim=config["predictor_hidden"],
        temperature=config["tau"],
    ).double()
    module.decoder.norm.eps = config["decoder_norm_eps"]
    if isinstance(module.predictor.norm, torch.nn.BatchNorm1d):
        module.predictor.norm.eps, module.predictor.norm.momentum = config["bn_eps"], config["bn_momentum"]
    return module.train()


def numbers(case: dict[str, Any], run: str) -> Iterator[Number]:
    """Losses, checks and gradient norms of one run."""
    config, inputs, lists = fill.config(case, run), fill.input_tensors(case, run), fill.index_lists(case, run)
    module = build(config)
    weights = fill.state_dict(case, run)
    theirs = fill.state_dict(case, run, reference_names=True)
    load_published(module, theirs)
    back = to_published(module, naming_of(theirs))
    assert back.keys() == theirs.keys() and all(torch.equal(back[n], theirs[n]) for n in back), "not the way back"

    masks = []
    for view in "ab":
        kept = lists[f"kept_{view}"]
        hidden = (~to_boolean(kept, config["tokens"])).nonzero()[:, 1].reshape(len(kept), -1)
        masks.append((kept, hidden if hidden.numel() else kept))
    seen = _watch(module)
    output = module.loss(View(inputs["image"]), View(inputs["view_b"]), *masks)
    logs = output.logs
    ours = {
        "l_re_a": logs["reconstruction_a"],
        "l_re_b": logs["reconstruction_b"],
        "l_re_sum": logs["reconstruction_a"] + logs["reconstruction_b"],
        "l_re": logs["reconstruction"],
        "l_cp": logs["cross_prediction"],
        "l_cc": logs["contrastive"],
        "total": output.loss,
    }
    golden = case["runs"][run]
    for name, value in golden["golden"].items():
        yield from compare(name, ours[name], value)

    output.loss.backward()
    prefix, batch = module.backbone.num_prefix, config["batch"]
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
    for name, value in golden.get("checks", {}).items():
        yield from compare(name, checks[name], value)

    grads = {name: p.grad for name, p in module.named_parameters()}
    with torch.no_grad():  # the reader's way back also renames gradients
        for p in module.parameters():
            p.copy_(torch.full_like(p, torch.nan) if p.grad is None else p.grad)
    named = to_published(module, "timm")
    assert named.keys() == weights.keys() and len(grads) <= len(named)
    for name, value in golden.get("grad_norms", {}).items():
        norm = named[name].norm()
        yield from compare(f"grad {name}", None if norm.isnan() else norm, value)


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
