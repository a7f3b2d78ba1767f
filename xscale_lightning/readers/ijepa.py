"""Checkpoints of the published I-JEPA code: encoder, target encoder and predictor, each with a fixed position table."""

from collections.abc import Mapping
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor

from xscale_lightning.data.bands import Bands, generic
from xscale_lightning.errors import UserError
from xscale_lightning.methods.ijepa import IJEPA
from xscale_lightning.models.jepa_predictor import PredictorConfig
from xscale_lightning.models.pos_embed import SinCosPositions
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.vit import Encoder
from xscale_lightning.readers.common import Rule, State, block_count, load_state, rename, width_ratio

_ENCODER = r"(patch_embed\.proj\.\w+|blocks\..+|norm\.\w+)"
TABLES = ("encoder.pos_embed", "target_encoder.pos_embed", "predictor.predictor_pos_embed")
FROM_PUBLISHED: list[Rule] = [
    (rf"encoder\.{_ENCODER}", r"backbone.\1"),
    (rf"target_encoder\.{_ENCODER}", r"target.module.\1"),
    (r"predictor\.predictor_(embed|norm|proj)\.(\w+)", r"predictor.\1.\2"),
    (r"predictor\.predictor_blocks\.(.+)", r"predictor.blocks.\1"),
    (r"predictor\.mask_token", r"predictor.mask_token"),
]
TO_PUBLISHED: list[Rule] = [
    (rf"backbone\.{_ENCODER}", r"encoder.\1"),
    (rf"target\.module\.{_ENCODER}", r"target_encoder.\1"),
    (r"predictor\.(embed|norm|proj)\.(\w+)", r"predictor.predictor_\1.\2"),
    (r"predictor\.blocks\.(.+)", r"predictor.predictor_blocks.\1"),
    (r"predictor\.mask_token", r"predictor.mask_token"),
]


def load_published(module: IJEPA, state: Mapping[str, Tensor]) -> None:
    """Load a published state dict into `module`; a tensor that does not fit stops it before anything is loaded.

    Args:
        module: sin-cos positions, no class token, and the sizes of the checkpoint.
        state: published names, each with its network in front: `encoder.`, `target_encoder.`, `predictor.`; see
            `open_published`.

    Raises:
        UserError: tensors that are unknown, missing or of another shape; a position table that is not the published.
    """
    parts = (module.backbone, module.target.module, module.predictor)
    for name, part in zip(TABLES, parts, strict=True):
        if name in state:
            _check_table(name, state[name], part.positions)
    ours, unknown = rename({n: v for n, v in state.items() if n not in TABLES}, FROM_PUBLISHED)
    load_state(module, ours, unknown, "the published checkpoint")


def load_encoder(
    encoder: Encoder,
    state: Mapping[str, Tensor],
    network: Literal["encoder", "target_encoder"] | str = "target_encoder",
) -> None:
    """Load one network of a published state dict into an encoder of its size.

    Raises:
        UserError: as `load_published`.
    """
    part = {name.removeprefix(f"{network}."): v for name, v in state.items() if name.startswith(f"{network}.")}
    table = part.pop("pos_embed", None)
    if table is not None:
        _check_table(f"{network}.pos_embed", table, encoder.positions)
    load_state(encoder, part, [], f"the published checkpoint's {network}")


def to_published(module: IJEPA, grid: int) -> State:
    """The weights of `module` under the published names, with position tables of `grid` x `grid` places.

    Raises:
        UserError: the module has tensors that the published code does not, such as a class token.
    """
    state, unknown = rename(module.state_dict(), TO_PUBLISHED)
    if unknown:
        raise UserError(f"the published code has no counterpart of {unknown[0]!r}: use sin-cos, no class token.")
    like = module.predictor.mask_token.detach()
    parts = (module.backbone, module.target.module, module.predictor)
    tables = [
        _positions(name, part.positions)((grid, grid), like=like) for name, part in zip(TABLES, parts, strict=True)
    ]
    return {**dict(zip(TABLES, tables, strict=True)), **state}


def build_published(
    state: Mapping[str, Tensor],
    bands: Bands | None = None,
    num_heads: int | None = None,
    predictor_heads: int | None = None,
    **options: Any,
) -> IJEPA:
    """Our module of the size of a published state dict, with its weights.

    Args:
        state: published names; see `load_published`.
        bands: record of the bands; default nameless ones.
        num_heads: heads of the encoder, which no shape tells; default one per 64 channels, or 80 in the huge and 88 in
            the giant model, as published.
        predictor_heads: heads of the predictor; default the encoder's, as published.
        **options: further arguments of `IJEPA`, such as `masks`.

    Raises:
        UserError: as `load_published`, or a state dict of another method.
    """
    needed = ("encoder.patch_embed.proj.weight", "encoder.blocks.0.mlp.fc1.weight", "predictor.predictor_embed.weight")
    lacking = [name for name in needed if name not in state]
    if lacking:
        raise UserError(f"this is no pretraining checkpoint of I-JEPA: it lacks {lacking[0]!r}.")
    dim, channels, patch, _ = state[needed[0]].shape
    num_heads = num_heads or {1280: 16, 1408: 16}.get(dim, max(1, dim // 64))
    backbone = BackboneConfig(
        name="vit_base_patch16",
        class_token=False,
        patch_size=patch,
        dim=dim,
        depth=block_count(state, "encoder.blocks."),
        num_heads=num_heads,
        mlp_ratio=width_ratio(len(state[needed[1]]), dim),
    )
    mlp = "predictor.predictor_blocks.0.mlp.fc1.weight"
    predictor = PredictorConfig(
        dim=len(state[needed[2]]),
        depth=block_count(state, "predictor.predictor_blocks."),
        num_heads=predictor_heads,
        mlp_ratio=width_ratio(len(state[mlp]), len(state[needed[2]])) if mlp in state else 4.0,
    )
    module = IJEPA(
        bands=bands or generic(channels),
        backbone=options.pop("backbone", backbone),
        predictor=options.pop("predictor", predictor),
        **options,
    )
    module.to(state[needed[0]].dtype)
    load_published(module, state)
    return module


def _positions(name: str, positions: Any) -> SinCosPositions:
    if not isinstance(positions, SinCosPositions):
        raise UserError(f"the checkpoint's {name} is a sin-cos table, and the module has {type(positions).__name__}.")
    return positions


def _check_table(name: str, table: Tensor, positions: Any) -> None:
    side = isqrt(table.shape[1])
    expected = _positions(name, positions)((side, side), like=table)
    if table.shape != expected.shape or not torch.allclose(table, expected, atol=1e-6):
        raise UserError(f"the checkpoint's {name} is not the fixed sin-cos table: its positions would be lost.")
