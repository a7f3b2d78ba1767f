"""Checkpoints of the published SpectralGPT code, whose model S2MAE's is: separate q, k and v, separable tables."""

from collections.abc import Mapping
from math import isqrt
from typing import Any

from torch import Tensor

from xscale_lightning.data.bands import Bands, generic
from xscale_lightning.errors import UserError
from xscale_lightning.methods.s2mae import S2MAE
from xscale_lightning.models.registry import SIZES, BackboneConfig
from xscale_lightning.models.resizing import Tables
from xscale_lightning.readers.common import Report, Rule, State, block_count, fuse, load_state, rename, split

QKV = ("q", "k", "v")
FROM_PUBLISHED: list[Rule] = [
    (r"patch_embed\.proj\.(\w+)", r"backbone.patch_embed.proj.\1"),
    (r"pos_embed_spatial", "backbone.positions.spatial.table"),
    (r"pos_embed_temporal", "backbone.positions.spectral.table"),
    (r"blocks\.(\d+\..+)", r"backbone.blocks.\1"),
    (r"norm\.(\w+)", r"backbone.norm.\1"),
    (r"decoder_pos_embed_spatial", "decoder.positions.spatial.table"),
    (r"decoder_pos_embed_temporal", "decoder.positions.spectral.table"),
    (r"decoder_blocks\.(\d+\..+)", r"decoder.blocks.\1"),
    (r"decoder_(embed|norm|pred)\.(\w+)", r"decoder.\1.\2"),
    (r"mask_token", "decoder.mask_token"),
]
TO_PUBLISHED: list[Rule] = [
    (r"backbone\.positions\.spatial\.table", "pos_embed_spatial"),
    (r"backbone\.positions\.spectral\.table", "pos_embed_temporal"),
    (r"backbone\.(patch_embed\.proj\.\w+|blocks\..+|norm\.\w+)", r"\1"),
    (r"decoder\.positions\.spatial\.table", "decoder_pos_embed_spatial"),
    (r"decoder\.positions\.spectral\.table", "decoder_pos_embed_temporal"),
    (r"decoder\.mask_token", "mask_token"),
    (r"decoder\.(blocks\..+|(?:embed|norm|pred)\.\w+)", r"decoder_\1"),
]


def load_published(
    module: S2MAE, state: Mapping[str, Tensor], tables: Tables | None = None, strict: bool = True
) -> Report:
    """Load a published state dict into `module`; a tensor that does not fit stops it before anything is loaded.

    Args:
        module: learned positions, no class token, and the sizes of the checkpoint.
        state: published names; see `open_published`.
        tables: `resize` or `reinit` learned positions made for another image size or number of bands; None refuses.
        strict: refuse missing tensors (a checkpoint without decoder) and unexpected ones (a classifier's head), too.

    Raises:
        UserError: as `load_state`.
    """
    ours, unknown = rename(fuse(state, QKV, "qkv"), FROM_PUBLISHED)
    return load_state(module, ours, unknown, "the published checkpoint", tables, strict)


def to_published(module: S2MAE) -> State:
    """The weights of `module` under the published names.

    Raises:
        UserError: the module has tensors that the published code does not, such as a class token.
    """
    state, unknown = rename(split(module.state_dict(), "qkv", QKV), TO_PUBLISHED)
    if unknown:
        raise UserError(
            f"the published code has no counterpart of {unknown[0]!r}: use learned positions, no class token."
        )
    return state


def build_published(
    state: Mapping[str, Tensor],
    bands: Bands | None = None,
    num_heads: int | None = None,
    decoder_heads: int = 16,
    norm_eps: float = 1e-6,
    tables: Tables | None = "resize",
    **options: Any,
) -> tuple[S2MAE, Report]:
    """Our module of the size of a published state dict, with its weights, and what became of every tensor.

    Args:
        state: published names; see `open_published`.
        bands: record of the bands; default nameless ones, as many as the checkpoint has. With another number of groups
            the spectral tables are resized.
        num_heads: heads of the encoder, which no shape tells; default those of the published size of this width.
        decoder_heads: heads of the decoder; 16 in every published size.
        norm_eps: of every LayerNorm, which no shape tells either; 1e-6 in the published code.
        tables: as in `load_published`.
        **options: further arguments of `S2MAE`, such as `normalize`.

    Raises:
        UserError: as `load_published`, a width of no published size without `num_heads`, or a state dict of another
            method.
    """
    needed = ("patch_embed.proj.weight", "pos_embed_spatial", "pos_embed_temporal", "decoder_embed.weight")
    lacking = [name for name in needed if name not in state]
    if lacking:
        raise UserError(f"this is no pretraining checkpoint of SpectralGPT: it lacks {lacking[0]!r}.")
    dim, _, depth, patch, _ = state[needed[0]].shape
    heads = num_heads or {width: heads for width, _, heads in SIZES.values()}.get(dim)
    if heads is None:
        raise UserError(f"the checkpoint is {dim} wide, which is no published size: give num_heads, no shape tells it.")
    backbone = BackboneConfig(
        name="spectral_vit_base_cube3_patch8",
        position="learned",
        spectral="learned",
        class_token=False,
        patch_size=patch,
        cube_depth=depth,
        dim=dim,
        depth=block_count(state, "blocks."),
        num_heads=heads,
        norm_eps=norm_eps,
        final_norm_eps=norm_eps,
        mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / dim,
        image_size=patch * isqrt(state["pos_embed_spatial"].shape[1]),
    )
    module = S2MAE(
        bands=bands or generic(depth * state["pos_embed_temporal"].shape[1]),
        backbone=options.pop("backbone", backbone),
        decoder_dim=len(state["decoder_embed.weight"]),
        decoder_depth=block_count(state, "decoder_blocks."),
        decoder_heads=decoder_heads,
        **options,
    )
    module.to(state[needed[0]].dtype)
    return module, load_published(module, state, tables)
