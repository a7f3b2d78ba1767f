"""Golden cases of S2MAE and of SpectralGPT's loss, which is S2MAE's with the spectral term."""

from collections.abc import Iterator
from typing import Any

import fill
import torch
from run_case import Number, compare

from xscale_lightning.data.bands import generic
from xscale_lightning.masking import to_boolean
from xscale_lightning.methods.s2mae import S2MAE
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.readers.spectralgpt import load_published, to_published

READ = {"bands", "patch", "cube_depth", "dim", "depth", "heads", "mlp_ratio", "norm_eps", "image_size", "mask_ratio"}
READ |= {"norm_pix", "norm_pix_loss", "decoder_dim", "decoder_depth", "decoder_heads"}
READ |= {"batch", "grid", "groups", "tokens", "kept"}  # told by the tensors' shapes


def build(config: dict[str, Any], spectral_loss: str) -> S2MAE:
    """Our module at the configuration of a case."""
    module = S2MAE(
        bands=generic(config["bands"]),
        backbone=BackboneConfig(
            name="spectral_vit_base_cube3_patch8",
            position="learned",
            spectral="learned",
            class_token=False,
            patch_size=config["patch"],
            cube_depth=config["cube_depth"],
            dim=config["dim"],
            depth=config["depth"],
            num_heads=config["heads"],
            mlp_ratio=config.get("mlp_ratio", 4),
            norm_eps=config.get("norm_eps", 1e-6),
            final_norm_eps=config.get("norm_eps", 1e-6),
            image_size=config["image_size"],
        ),
        mask_ratio=config.get("mask_ratio", 0.9),
        norm_pix_loss=config.get("norm_pix", config.get("norm_pix_loss", False)),
        spectral_loss=spectral_loss,
        decoder_dim=config["decoder_dim"],
        decoder_depth=config["decoder_depth"],
        decoder_heads=config["decoder_heads"],
    ).double()
    return module.train()


def numbers(case: dict[str, Any], run: str) -> Iterator[Number]:
    """Losses, checks and gradient norms of one run, of the token loss alone and with the spectral term."""
    config, inputs = fill.config(case, run), fill.input_tensors(case, run)
    for key in sorted(config.keys() - READ):
        print(f"  not read: {key}")
    kept = fill.index_lists(case, run)["kept"]
    theirs, golden = fill.state_dict(case, run, reference_names=True), case["runs"][run]
    images = inputs["image"]
    length = theirs["pos_embed_spatial"].shape[1] * theirs["pos_embed_temporal"].shape[1]
    hidden = (~to_boolean(kept, length)).nonzero()[:, 1].reshape(len(kept), -1)

    modules = {}
    for loss in ("none", "sum"):
        module = modules[loss] = build(config, loss)
        report = load_published(module, theirs)
        assert not (report.missing or report.unexpected or report.resized), report
        back = to_published(module)
        assert back.keys() == theirs.keys() and all(torch.equal(back[n], theirs[n]) for n in back), "not the way back"
    plain = modules["none"].loss(images, kept, hidden if hidden.numel() else kept)
    both = modules["sum"].loss(images, kept, hidden if hidden.numel() else kept)
    ours = {"token_loss": plain.loss, "spectral_sum_term": both.logs["spectral"], "spectralgpt_total": both.loss}
    for name, value in golden["golden"].items():
        yield from compare(name, ours[name], value)

    module = modules["none"]
    module.requires_grad_(False)
    kept_tokens = module.backbone(images, keep=kept)
    unmasked = module.backbone(images).x
    checks = {
        "encoder_kept": kept_tokens.x,
        "prediction": module.decoder(kept_tokens),
        "encoder_unmasked": unmasked,
        "encoder_unmasked_mean": unmasked.mean(1),
        "encoder_unmasked_mean_abs": unmasked.abs().mean(),
        "encoder_unmasked_mean_sample0_first4": unmasked.mean(1)[0, :4].tolist(),
    }
    module.requires_grad_(True)
    for name, value in golden.get("checks", {}).items():
        yield from compare(name, checks[name], value)

    for key, loss, output in (
        ("grad_norms", "none", plain),
        ("grad_norms_spectralgpt_total", "sum", both),
    ):
        if key in golden:
            yield from gradients(modules[loss], output.loss, golden[key], key.removeprefix("grad_norms_"))


def gradients(module: S2MAE, loss: torch.Tensor, golden: dict[str, float], which: str) -> Iterator[Number]:
    """Norms of the gradients of `loss`, under the reference's names by the reader's way back."""
    loss.backward()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.full_like(p, torch.nan) if p.grad is None else p.grad)
    named = to_published(module)
    for name, value in golden.items():
        norm = named[name].norm()
        yield from compare(f"grad {which} {name}", None if norm.isnan() else norm, value)
