"""Checkpoints of the published LatentMIM code: `encoder`, `target_encoder`, `decoder`, position tables among them.

Those of its fork with spatial affinity have an `hr_gram_teacher` too, an encoder for images of finer resolution.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from xscale_lightning.data.bands import Bands, generic
from xscale_lightning.errors import UserError
from xscale_lightning.methods.latent_mim import LatentMIM
from xscale_lightning.models.heads import ProjectedEncoder
from xscale_lightning.models.pos_embed import SinCosPositions, StretchedPositions
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.readers.common import Report, Rule, State, block_count, load_state, rename, width_ratio

TABLE, PATCH = "pos_embed.pos_embeds", "backbone.patch_embed.proj.weight"
# Of a published encoder into our `ProjectedEncoder`, and back.
FROM_ENCODER: list[Rule] = [
    (r"(cls_token|blocks\.\d+\..+|norm\.\w+)", r"backbone.\1"),
    (r"embed\.proj\.(\w+)", r"backbone.patch_embed.proj.\1"),
    (r"(head\..+)", r"\1"),
]
TO_ENCODER: list[Rule] = [
    (r"backbone\.patch_embed\.proj\.(\w+)", r"embed.proj.\1"),
    (r"backbone\.(cls_token|blocks\..+|norm\.\w+)", r"\1"),
    (r"(head\..+)", r"\1"),
]
# Where each published network is in our module.
NETWORKS = {"encoder.": "", "target_encoder.": "target.module.", "hr_gram_teacher.": ""}


def load_published(
    module: LatentMIM, state: Mapping[str, Tensor], teacher: ProjectedEncoder | None = None, strict: bool = True
) -> Report:
    """Load a published state dict into `module`; a tensor that does not fit stops it before `module` changes.

    Args:
        module: stretched positions and the sizes of the checkpoint.
        state: published names; see `open_published`.
        teacher: takes the `hr_gram_teacher`; without it a checkpoint that has one is refused as not all loaded.
        strict: refuse missing tensors (a checkpoint without target or decoder) and unexpected ones, too.

    Raises:
        UserError: as `load_state`, or position tables that are not LatentMIM's sin-cos ones.
    """
    ours, unknown = {}, []
    for prefix, place in NETWORKS.items():
        if prefix == "hr_gram_teacher." and teacher is not None:
            continue
        part, strange = _take_encoder(state, prefix, module.backbone)
        if prefix == "hr_gram_teacher.":
            strange = [f"{prefix}{name}" for name in part] + strange
        else:
            ours |= {f"{place}{name}": value for name, value in part.items()}
        unknown += strange
    for name, value in _part(state, "decoder.").items():
        if name == TABLE:
            _check_table(f"decoder.{name}", value, module.decoder.positions)
        else:
            ours[f"decoder.{name}"] = value
    unknown += [name for name in state if not name.startswith((*NETWORKS, "decoder."))]
    report = load_state(module, ours, unknown, "the published checkpoint", strict=strict)
    if teacher is not None:
        part, strange = _take_encoder(state, "hr_gram_teacher.", module.backbone)
        load_state(teacher, part, strange, "the published hr_gram_teacher", strict=strict)
    return report


def to_published(
    module: LatentMIM, side: int = 14, teacher: ProjectedEncoder | None = None, teacher_side: int = 28
) -> State:
    """The weights of `module` under the published names.

    Args:
        module: stretched positions.
        side: patches per side of the image that the fixed position tables are made for.
        teacher: becomes the `hr_gram_teacher`.
        teacher_side: its `side`.

    Raises:
        UserError: the module has other positions.
    """
    networks = {"encoder.": (module, side), "target_encoder.": (module.target.module, side)}
    if teacher is not None:
        networks["hr_gram_teacher."] = (teacher, teacher_side)
    state: State = {}
    for prefix, (network, patches) in networks.items():
        weights = {n: v for n, v in network.state_dict().items() if n.startswith(("backbone.", "head."))}
        weights[PATCH] = weights[PATCH].permute(0, 2, 3, 1).flatten(1)  # values of a patch: (row, column, channel)
        state |= {f"{prefix}{name}": value for name, value in rename(weights, TO_ENCODER)[0].items()}
        state[f"{prefix}{TABLE}"] = _table(module.backbone.positions, patches, weights[PATCH])
    state |= {f"decoder.{name}": value for name, value in module.decoder.state_dict().items()}
    state[f"decoder.{TABLE}"] = _table(module.decoder.positions, side, state["decoder.mask_token"])
    return state


def build_published(
    state: Mapping[str, Tensor],
    bands: Bands | None = None,
    num_heads: int | None = None,
    decoder_heads: int = 16,
    teacher: ProjectedEncoder | None = None,
    strict: bool = True,
    **options: Any,
) -> tuple[LatentMIM, Report]:
    """Our module of the size of a published state dict, with its weights, and what became of every tensor.

    Args:
        state: published names; see `open_published`.
        bands: record of the bands; default three nameless ones, as published: no shape tells bands from pixels.
        num_heads: heads of the encoder, which no shape tells; default one per 64 channels, as in every published size.
        decoder_heads: heads of the decoder; 16 in the published code.
        teacher: as in `load_published`.
        strict: as in `load_published`.
        **options: further arguments of `LatentMIM`, such as `objective`.

    Raises:
        UserError: as `load_published`; a state dict of another method; a patch that is no square with so many bands.
    """
    needed = ("encoder.embed.proj.weight", "encoder.blocks.0.mlp.fc1.weight", "decoder.embed.weight")
    lacking = [name for name in needed if name not in state]
    if lacking:
        raise UserError(f"this is no pretraining checkpoint of LatentMIM: it lacks {lacking[0]!r}.")
    bands = bands or generic(3)
    dim, values = state[needed[0]].shape
    patch = isqrt(values // len(bands))
    if patch**2 * len(bands) != values:
        raise UserError(
            f"the checkpoint's patches have {values} values, no square of {len(bands)} bands: give its bands."
        )
    mlp = "decoder.blocks.0.mlp.fc1.weight"
    decoder_dim = len(state["decoder.embed.weight"])
    ratio = width_ratio(len(state[needed[1]]), dim)
    if mlp in state and len(state[mlp]) != int(decoder_dim * ratio):
        raise UserError(
            f"the decoder's MLPs are {len(state[mlp])} wide, not {ratio:g} times {decoder_dim} as the encoder's."
        )
    backbone = BackboneConfig(
        name="vit_base_patch16",
        position="stretched",
        class_token="encoder.cls_token" in state,
        patch_size=patch,
        dim=dim,
        depth=block_count(state, "encoder.blocks."),
        num_heads=num_heads or max(1, dim // 64),
        mlp_ratio=ratio,
    )
    layers = block_count(state, "encoder.head.linear")
    module = LatentMIM(
        bands=bands,
        backbone=options.pop("backbone", backbone),
        head_layers=layers,
        head_dim=len(state["encoder.head.linear0.weight"]) if layers else 1,
        decoder_dim=decoder_dim,
        decoder_depth=block_count(state, "decoder.blocks."),
        decoder_heads=decoder_heads,
        **options,
    )
    module.to(state[needed[0]].dtype)
    return module, load_published(module, state, teacher, strict)


def _part(state: Mapping[str, Tensor], prefix: str) -> State:
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def _take_encoder(state: Mapping[str, Tensor], prefix: str, backbone: Any) -> tuple[State, list[str]]:
    """A published encoder under the names of `ProjectedEncoder`, its table checked; and the names that are unknown."""
    part = _part(state, prefix)
    if TABLE in part:
        _check_table(f"{prefix}{TABLE}", part.pop(TABLE), backbone.positions)
    ours, unknown = rename(part, FROM_ENCODER)
    if PATCH in ours and ours[PATCH].shape[1] == backbone.in_chans * backbone.patch_size**2:
        cut = (backbone.patch_size, backbone.patch_size, backbone.in_chans)
        ours[PATCH] = ours[PATCH].unflatten(1, cut).permute(0, 3, 1, 2)
    return ours, [f"{prefix}{name}" for name in unknown]


def _table(positions: Any, side: int, like: Tensor) -> Tensor:
    """LatentMIM's table `[1 + side^2, D]`: a row of zeros for the class token, then the patches."""
    if not isinstance(positions, StretchedPositions):
        raise UserError("the published code has LatentMIM's positions alone: set backbone.position to stretched.")
    table = positions((side, side), like=like)[0]
    return torch.cat([torch.zeros_like(table[:1]), table])


def _check_table(name: str, table: Tensor, positions: Any) -> None:
    side = isqrt(len(table) - 1)
    if not isinstance(positions, SinCosPositions) or table.shape[-1] != positions.dim:
        raise UserError(f"the checkpoint's {name} is a sin-cos table of width {table.shape[-1]}; the module's is not.")
    # The published tables were computed in float32, whose angles are off by up to 1e-6 at grids of 14.
    if side * side != len(table) - 1 or not torch.allclose(table, _table(positions, side, table), atol=1e-5):
        raise UserError(f"the checkpoint's {name} is not LatentMIM's fixed table: its positions would be lost.")
