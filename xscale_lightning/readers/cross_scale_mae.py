"""Checkpoints of the published Cross-Scale MAE code.

They come in two namings: timm's blocks (pre-norm) and xFormers' blocks (post-norm, separate q, k and v).
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor

from xscale_lightning.data.bands import Bands, generic
from xscale_lightning.errors import UserError
from xscale_lightning.methods.cross_scale_mae import CrossScaleMAE
from xscale_lightning.methods.cross_scale_recipe import Recipe
from xscale_lightning.models.blocks import BlockNorm
from xscale_lightning.models.pos_embed import SinCosPositions
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.readers.common import Rule, State, block_count, fuse, load_state, rename, split

Naming = Literal["timm", "xformers"]
QKV = ("q_proj", "k_proj", "v_proj")
TABLES = ("encoder_pos_embed", "decoder_pos_embed")
# Attention heads of the published widths, which no tensor's shape tells.
ENCODER_HEADS = {128: 8, 512: 8, 768: 12, 1024: 16, 1280: 16}
DECODER_HEADS = {256: 8, 512: 16}

FROM_TIMM: list[Rule] = [
    (r"(cls_token|patch_embed\.proj\.\w+)", r"backbone.\1"),
    (r"encoder\.(\d+\..+)", r"backbone.blocks.\1"),
    (r"encoder_norm\.(\w+)", r"backbone.norm.\1"),
    (r"decoder\.(\d+\..+)", r"decoder.blocks.\1"),
    (r"decoder_(embed|norm|pred)\.(\w+)", r"decoder.\1.\2"),
    (r"mask_token", r"decoder.mask_token"),
    (r"predictor\.0\.(\w+)", r"predictor.fc1.\1"),
    (r"predictor\.1\.(\w+)", r"predictor.norm.\1"),
    (r"predictor\.3\.(\w+)", r"predictor.fc2.\1"),
]
TO_TIMM: list[Rule] = [
    (r"backbone\.(cls_token|patch_embed\.proj\.\w+)", r"\1"),
    (r"backbone\.blocks\.(.+)", r"encoder.\1"),
    (r"backbone\.norm\.(\w+)", r"encoder_norm.\1"),
    (r"decoder\.blocks\.(.+)", r"decoder.\1"),
    (r"decoder\.(embed|norm|pred)\.(\w+)", r"decoder_\1.\2"),
    (r"decoder\.mask_token", r"mask_token"),
    (r"predictor\.fc1\.(\w+)", r"predictor.0.\1"),
    (r"predictor\.norm\.(\w+)", r"predictor.1.\1"),
    (r"predictor\.fc2\.(\w+)", r"predictor.3.\1"),
]
_ATTENTION, _MLP = r"wrap_att.sublayer.layer", r"wrap_ff.sublayer.layer.mlp"
FROM_XFORMERS: list[Rule] = [
    (r"((?:en|de)coder)\.encoders\.(\d+)\.wrap_att\.norm\.(\w+)", r"\1.\2.norm1.\3"),
    (r"((?:en|de)coder)\.encoders\.(\d+)\.wrap_ff\.norm\.(\w+)", r"\1.\2.norm2.\3"),
    (rf"((?:en|de)coder)\.encoders\.(\d+)\.{_ATTENTION}\.in_proj_container\.(\w+\.\w+)", r"\1.\2.attn.\3"),
    (rf"((?:en|de)coder)\.encoders\.(\d+)\.{_ATTENTION}\.proj\.(\w+)", r"\1.\2.attn.proj.\3"),
    (rf"((?:en|de)coder)\.encoders\.(\d+)\.{_MLP}\.0\.(\w+)", r"\1.\2.mlp.fc1.\3"),
    (rf"((?:en|de)coder)\.encoders\.(\d+)\.{_MLP}\.3\.(\w+)", r"\1.\2.mlp.fc2.\3"),
    (r"((?:(?:en|de)coder_|cls_|mask_|patch_|predictor).*)", r"\1"),
]
TO_XFORMERS: list[Rule] = [
    (r"((?:en|de)coder)\.(\d+)\.norm1\.(\w+)", r"\1.encoders.\2.wrap_att.norm.\3"),
    (r"((?:en|de)coder)\.(\d+)\.norm2\.(\w+)", r"\1.encoders.\2.wrap_ff.norm.\3"),
    (r"((?:en|de)coder)\.(\d+)\.attn\.(\w_proj\.\w+)", rf"\1.encoders.\2.{_ATTENTION}.in_proj_container.\3"),
    (r"((?:en|de)coder)\.(\d+)\.attn\.proj\.(\w+)", rf"\1.encoders.\2.{_ATTENTION}.proj.\3"),
    (r"((?:en|de)coder)\.(\d+)\.mlp\.fc1\.(\w+)", rf"\1.encoders.\2.{_MLP}.0.\3"),
    (r"((?:en|de)coder)\.(\d+)\.mlp\.fc2\.(\w+)", rf"\1.encoders.\2.{_MLP}.3.\3"),
    (r"((?:(?:en|de)coder_|cls_|mask_|patch_|predictor).*)", r"\1"),
]


def naming_of(state: Mapping[str, Tensor]) -> Naming:
    """Whose blocks a published state dict has."""
    return "xformers" if any(".encoders." in name for name in state) else "timm"


def load_published(module: CrossScaleMAE, state: Mapping[str, Tensor]) -> None:
    """Load a published state dict in either naming into `module`: every tensor fits, or nothing is loaded.

    Raises:
        UserError: tensors are unknown, missing or of another shape, or the position tables are not MAE's sin-cos ones.
    """
    state = dict(state)
    tables = [state.pop(name, None) for name in TABLES]
    if naming_of(state) == "xformers":
        state, strange = rename(state, FROM_XFORMERS)
        state = fuse(state, QKV, "qkv")
    else:
        strange = []
    ours, unknown = rename(state, FROM_TIMM)
    for name, table, positions in zip(TABLES, tables, _positions(module), strict=True):
        if table is not None:
            _check_table(name, table, positions)
    load_state(module, ours, [*strange, *unknown], "the published checkpoint")


def to_published(module: CrossScaleMAE, naming: Naming = "timm") -> State:
    """The weights of `module` under the published names, position tables of `backbone.image_size` included.

    Only modules with predictor_norm bn_position have a counterpart in the published code.
    """
    side = isqrt(module.predictor.positions)
    state, _ = rename(module.state_dict(), TO_TIMM)
    if naming == "xformers":
        state, _ = rename(split(state, "qkv", QKV), TO_XFORMERS)
    like = module.decoder.mask_token
    tables = [_table(positions, side, like.detach()) for positions in _positions(module)]
    return {**dict(zip(TABLES, tables, strict=True)), **state}


def build_published(
    state: Mapping[str, Tensor],
    bands: Bands | None = None,
    num_heads: int | None = None,
    decoder_heads: int | None = None,
    block_norm: BlockNorm | None = None,
    **options: Any,
) -> CrossScaleMAE:
    """Our module of the size of a published state dict, with its weights.

    Args:
        state: published names, either naming; see `open_published`.
        bands: record of the bands; default nameless ones.
        num_heads: heads of the encoder, which no shape tells; default those of the published width.
        decoder_heads: heads of the decoder, likewise.
        block_norm: default that of the naming: timm's blocks are pre-norm, xFormers' post-norm.
        **options: further arguments of `CrossScaleMAE`, such as `recipe`.

    Raises:
        UserError: as `load_published`; a state dict of another method; a width that was not published, without heads.
    """
    naming = naming_of(state)
    needed = ("patch_embed.proj.weight", "decoder_embed.weight", "predictor.0.weight", "predictor.1.weight")
    lacking = [name for name in needed if name not in state]
    if lacking:
        raise UserError(f"this is no published Cross-Scale MAE (class suffix MsLdCeCd): it lacks {lacking[0]!r}.")
    dim, channels, patch, _ = state[needed[0]].shape
    decoder_dim = len(state["decoder_embed.weight"])
    middle = "encoders." if naming == "xformers" else ""
    hidden = f"{_MLP}.0.weight" if naming == "xformers" else "mlp.fc1.weight"
    block_norm = block_norm or ("post" if naming == "xformers" else "pre")
    recipe = Recipe(preset="published", block_norm=block_norm, norm_eps=1e-5 if block_norm == "post" else 1e-6)
    backbone = BackboneConfig(
        name="vit_base_patch16",
        patch_size=patch,
        dim=dim,
        depth=block_count(state, f"encoder.{middle}"),
        num_heads=_heads("num_heads", ENCODER_HEADS, dim) if num_heads is None else num_heads,
        mlp_ratio=len(state[f"encoder.{middle}0.{hidden}"]) / dim,
        image_size=patch * isqrt(len(state["predictor.1.weight"])),
    )
    module = CrossScaleMAE(
        recipe=options.pop("recipe", recipe),
        bands=bands or generic(channels),
        backbone=options.pop("backbone", backbone),
        decoder_dim=decoder_dim,
        decoder_depth=block_count(state, f"decoder.{middle}"),
        decoder_heads=_heads("decoder_heads", DECODER_HEADS, decoder_dim) if decoder_heads is None else decoder_heads,
        predictor_dim=len(state["predictor.0.weight"]),
        **options,
    )
    module.to(state[needed[0]].dtype)
    load_published(module, state)
    return module


def _heads(name: str, published: Mapping[int, int], dim: int) -> int:
    if dim not in published:
        raise UserError(
            f"no published model is {dim} wide, so its heads are not known: give {name} (published: "
            f"{', '.join(f'{heads} of {width}' for width, heads in published.items())})."
        )
    return published[dim]


def _positions(module: CrossScaleMAE) -> tuple[Any, Any]:
    return module.backbone.positions, module.decoder.positions


def _table(positions: Any, side: int, like: Tensor) -> Tensor:
    """MAE's table `[1, 1 + side^2, D]`: a row of zeros for the class token, then the patches."""
    table = positions((side, side), like=like)
    return torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)


def _check_table(name: str, table: Tensor, positions: Any) -> None:
    side = isqrt(table.shape[1] - 1)
    if not isinstance(positions, SinCosPositions) or table.shape[-1] != positions.dim:
        raise UserError(f"the checkpoint's {name} is a sin-cos table of width {table.shape[-1]}; the module's is not.")
    if side * side != table.shape[1] - 1 or not torch.allclose(table, _table(positions, side, table), atol=1e-6):
        raise UserError(f"the checkpoint's {name} is not MAE's fixed sin-cos table: its positions would be lost.")
