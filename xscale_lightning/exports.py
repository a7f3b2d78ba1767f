"""An encoder as a folder that leaves the run: weights as safetensors, configuration, band record, model card.

Where the encoder is a plain Vision Transformer the names, the configuration and the position table are timm's, so that
`timm.create_model("local-dir:FOLDER", pretrained=True)` loads it, too. Fixed positions become the table of the images
the encoder was trained on; our own loader leaves that table out and computes positions for any size.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xscale_lightning import __version__
from xscale_lightning.checkpoints import plain
from xscale_lightning.errors import UserError
from xscale_lightning.exported import BLOCK, FORMAT, State, load_into, read_export, sums
from xscale_lightning.files import advice, reason, save_tensors, sync, sync_folder
from xscale_lightning.models.pos_embed import LearnedPositions, SinCosPositions
from xscale_lightning.models.registry import SIZES, BackboneConfig
from xscale_lightning.models.timm_vit import TimmViT
from xscale_lightning.models.vit import Encoder, ViT
from xscale_lightning.opening import load_safetensors
from xscale_lightning.places import beside, put_in_place, recover
from xscale_lightning.pretrained import BANDS, CONFIG, WEIGHTS, Pretrained

CARD = "README.md"
TIMM_EPS = 1e-6
TOLERANCE = 1e-9  # largest difference between timm's features and ours in float64

Card = Callable[[dict[str, Any]], str]


def write_export(source: Pretrained, folder: str | Path, card: Card, overwrite: bool = False) -> dict[str, Any]:
    """Write an encoder as a folder, whole or not at all; returns its configuration.

    Args:
        source: what to write.
        folder: where to.
        card: makes the text of the model card from the configuration.
        overwrite: put it in the place of an export that is there.

    Raises:
        UserError: the folder exists, cannot be written, or the weights that were written do not give the same features.
    """
    target = Path(folder).absolute()
    check_target(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with beside(target) as place:
            work = place / "new"
            work.mkdir()
            config = _fill(source, work)
            (work / CARD).write_text(card(config), encoding="utf-8")
            for file in work.iterdir():
                sync(file)
            sync_folder(work)
            check_target(target, overwrite)  # another process may have been faster
            if target.is_dir():
                work.chmod(target.stat().st_mode & 0o777)
            put_in_place(work, target)
            sync_folder(target.parent)
    except OSError as error:
        why = reason(error, target)
        raise UserError(f"OUT '{target}' cannot be written ({why}); {advice(error, 'choose another')}.") from error
    return config


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that exists, unless it is an export that may be overwritten.

    Raises:
        UserError: with the remedy.
    """
    recover(target)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise UserError(f"OUT '{target}' is a file; give a folder that does not exist yet.")
    if not (target / CONFIG).is_file() or not (target / WEIGHTS).is_file():
        raise UserError(f"OUT '{target}' exists and is no export, so it is not overwritten; choose another folder.")
    if not overwrite:
        raise UserError(f"OUT '{target}' exists; choose another folder, or replace it with --overwrite.")


def _fill(source: Pretrained, work: Path) -> dict[str, Any]:
    """Write weights, configuration and bands; timm's form is tried where it can do, and kept if it holds."""
    side = _side(source)
    why_not = why_not_timm(source.encoder, source.config)
    if not why_not:
        config = _write(source, work, side, "")
        why_not = _disagreement(source, work, side)
    if why_not:
        config = _write(source, work, side, why_not)
    images = torch.rand(2, len(source.bands), side, side, generator=torch.Generator().manual_seed(0)) * source.std
    images, gsd = images + source.mean, source.bands.gsd or 10.0
    if not torch.equal(read_export(work).patch_features(images, gsd), source.patch_features(images, gsd)):
        raise UserError(
            f"'{source.origin.path}': the encoder of {source.origin.method} is not what its configuration builds, so "
            "it cannot be exported: use it through xscale_lightning.checkpoints.load_method."
        )
    return config


def _side(source: Pretrained) -> int:
    """Pixels per side of an image that the patch divides: the trained size, else 224 or what comes next to it."""
    if isinstance(getattr(source.encoder, "positions", None), LearnedPositions):
        return source.config.image_size
    patch = source.encoder.patch_size
    return max(1, round((source.origin.image_size or 224) / patch)) * patch


def _write(source: Pretrained, work: Path, side: int, why_not: str) -> dict[str, Any]:
    encoder = source.encoder
    state = encoder.state_dict() if why_not else timm_state(encoder, side)
    save_tensors({k: v.detach().cpu().contiguous() for k, v in state.items()}, work / WEIGHTS, {"format": "pt"})
    own = {
        "format": FORMAT,
        "method": source.origin.method,
        "version": __version__,
        "trained_with": source.origin.version,
        "backbone": plain(source.config),
        "scaling": source.scaling,
        "pool": encoder.pool_mode,
        "gsd": source.bands.gsd,
        "image_size": source.origin.image_size,
        "timm": not why_not,
        "why_not_timm": why_not or None,
    }
    (work / BANDS).write_text(json.dumps(source.bands.to_dict(), indent=2) + "\n", encoding="utf-8")
    own["sha256"] = sums(work, own)
    config = {**timm_config(source, side, bool(why_not)), BLOCK: own}
    (work / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


def why_not_timm(encoder: Encoder, config: BackboneConfig) -> str:
    """What keeps timm's `VisionTransformer` from being this encoder; "" if nothing does."""
    if isinstance(encoder, TimmViT):
        return "" if ":" not in config.name.removeprefix("timm:") else "its timm name is a place of its own"
    if type(encoder) is not ViT:
        return f"{type(encoder).__name__} is no plain Vision Transformer (its tokens are of another kind)"
    if not isinstance(encoder.positions, (LearnedPositions, SinCosPositions)):
        return f"positions '{config.position}' follow the metres per pixel of every image"
    reasons = {
        "its LayerNorms come after attention and MLP (block_norm post)": config.block_norm != "pre",
        "it has no LayerNorm after the last block (final_norm false)": not config.final_norm,
        f"the epsilon of its LayerNorms is not {TIMM_EPS:g}": {config.norm_eps, config.final_norm_eps} != {TIMM_EPS},
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def timm_state(encoder: Encoder, side: int) -> State:
    """Weights of a plain encoder under timm's names; `pos_embed` is the table of images of `side` pixels."""
    state = dict(encoder.state_dict())
    if isinstance(encoder, TimmViT):
        return {name.removeprefix("model."): value for name, value in state.items()}
    assert isinstance(encoder, ViT)
    state.pop("positions.table", None)
    positions: Any = encoder.positions
    return {"pos_embed": positions(encoder.token_grid(side, side), like=state["norm.weight"]), **state}


def timm_config(source: Pretrained, side: int, foreign: bool) -> dict[str, Any]:
    """Configuration in timm's schema; mean and std are in raw units, because images are."""
    encoder, config = source.encoder, source.config
    chans = len(source.bands)
    pool = "token" if encoder.pool_mode == "cls" else "avg"
    arguments: dict[str, Any] = {"in_chans": chans, "global_pool": pool, "fc_norm": False}
    if isinstance(encoder, TimmViT):
        architecture = config.name.removeprefix("timm:")
        # The size its table is made for, which an architecture's default need not be; other sizes resample it.
        arguments |= {"img_size": list(encoder.model.patch_embed.img_size), "dynamic_img_size": True}  # type: ignore
    else:
        architecture = config.name
        if not foreign and isinstance(encoder, ViT):
            name = {width: name for name, (width, _, _) in SIZES.items()}.get(encoder.num_features, "base")
            architecture = f"vit_{name}_patch{14 if name == 'huge' else 16}_224"
            arguments |= {
                "img_size": side,
                "patch_size": encoder.patch_size,
                "embed_dim": encoder.num_features,
                "depth": encoder.depth,
                "num_heads": encoder.blocks[0].attn.num_heads,  # type: ignore[union-attr]
                "mlp_ratio": config.mlp_ratio,
                "class_token": bool(encoder.num_prefix),
                "no_embed_class": True,  # the class token has no position
            }
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": encoder.num_features,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": source.origin.method,
            "custom_load": False,
            "input_size": [chans, side, side],
            "fixed_input_size": not isinstance(encoder, TimmViT),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": source.bands.means if source.scaling == "standardize" else [0.0] * chans,
            "std": source.bands.stds if source.scaling == "standardize" else [1.0] * chans,
            "num_classes": 0,
            "pool_size": None,
            "first_conv": None,  # never adapted: the weights have the bands they have
            "classifier": "head",
        },
    }


def _disagreement(source: Pretrained, folder: Path, side: int) -> str:
    """Why timm's model of this folder is not the encoder; "" if its features are the same, compared in float64."""
    import timm

    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().double()
    except Exception as error:  # whatever timm's models and loader raise: it does not load there
        return f"timm does not load it ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    ours = _again(source, folder).double()
    images = torch.randn(1, len(source.bands), side, side, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        difference = (model(images) - ours.pool(ours(images))).abs().max().item()
    return "" if difference < TOLERANCE else f"timm's model of the same weights gives other features ({difference:.2g})"


def _again(source: Pretrained, folder: Path) -> Encoder:
    """A copy of the encoder, so that nothing happens to the one at hand."""
    encoder = source.config.build(len(source.bands), source.bands.wavelengths)
    load_into(encoder, load_safetensors(folder / WEIGHTS, str(folder)), True, folder)
    return encoder.eval()
