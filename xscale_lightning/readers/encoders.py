"""The encoder of a weights file from elsewhere: timm's names (MAE's among them), or those of a published method."""

import re
from collections.abc import Mapping
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from xscale_lightning.data.bands import generic
from xscale_lightning.errors import UserError
from xscale_lightning.methods.base import SSLModule
from xscale_lightning.models.pos_embed import SinCosPositions
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.vit import Encoder, ViT
from xscale_lightning.opening import load_safetensors
from xscale_lightning.readers import cross_scale_mae, ijepa, latent_mim, spectralgpt
from xscale_lightning.readers.common import State, block_count, open_published

# Reader -> a tensor that its files have and the others have not.
SIGNS = {
    "ijepa": "predictor.predictor_embed.weight",
    "latent_mim": "encoder.embed.proj.weight",
    "spectralgpt": "pos_embed_spatial",
    "cross_scale_mae": "predictor.0.weight",
    "timm": "blocks.0.attn.qkv.weight",
}
# What wraps a timm-style encoder in files of other programs.
PREFIXES = ("", "backbone.", "encoder.", "model.", "module.")
# Tensors with as many rows as an encoder or a decoder is wide.
WIDTHS = ("embed.proj.weight", "decoder_embed.weight", "decoder.embed.weight", "predictor_embed.weight")
ROOM = 10_000_000  # numbers that a small encoder may have in addition
_FILTERS, _FIRST = "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"


def read_foreign(path: Path, reader: str | None, chans: int | None) -> tuple[Encoder, BackboneConfig, list[str]]:
    """The encoder of a file, its options, and the names of tensors beside it.

    Args:
        path: `.safetensors`, or a file of torch's.
        reader: a key of `SIGNS`; None finds out.
        chans: number of bands, which LatentMIM's shapes do not tell; default 3.

    Raises:
        UserError: a file that cannot be read, of no kind that is known, or with tensors that do not fit.
    """
    if reader is not None and reader not in SIGNS:
        raise UserError(f"reader {reader!r} is unknown; choose from {', '.join(SIGNS)}.")
    state = _open(path)
    kind = reader or next((name for name, sign in SIGNS.items() if sign in state), "timm")
    problem = ""
    try:
        return _read(state, kind, str(path), chans)
    except UserError:
        raise
    except Exception as error:  # shapes that the reader does not expect
        problem = (str(error).splitlines() or [type(error).__name__])[0][:160]
    raise UserError(f"init_from '{path}' has tensors of shapes that no encoder of {kind} has: {problem}.")


def _read(state: State, kind: str, path: str, chans: int | None) -> tuple[Encoder, BackboneConfig, list[str]]:
    if kind == "timm":
        return read_timm(state, path)
    _check_size(state, path)
    module = _published(state, kind, chans)
    encoder: Encoder = module.feature_encoder
    rest = len(module.state_dict()) - len(encoder.state_dict())
    return encoder, module.backbone_config, [f"{rest} tensors of {type(module).__name__} beside its encoder"]


def _check_size(state: State, path: str) -> None:
    """Refuse a file that names far more or wider blocks than it has numbers for.

    Raises:
        UserError: it does, or it has tensors without numbers.
    """
    blocks = {found[0] for name in state if (found := re.match(r".*?\.?\d+\.", name))}
    widths = [len(value) for name, value in state.items() if name.endswith(WIDTHS) and value.ndim]
    numbers = sum(value.numel() for value in state.values())
    empty = [name for name, value in state.items() if not value.numel()]
    if empty or len(blocks) * 12 * max(widths, default=0) ** 2 > 16 * numbers + ROOM:
        what = f"tensor {empty[0]!r} is empty" if empty else f"{len(blocks)} blocks of width {max(widths)}"
        raise UserError(f"init_from {path!r} has not the numbers of the encoder it describes: {what}.")


def _published(state: State, kind: str, chans: int | None) -> SSLModule:
    if kind == "ijepa":
        return ijepa.build_published(state)
    if kind == "latent_mim":
        return latent_mim.build_published(state, bands=generic(chans or 3), strict=False)[0]
    if kind == "spectralgpt":
        return spectralgpt.build_published(state)[0]
    return cross_scale_mae.build_published(state)


def read_timm(state: Mapping[str, Tensor], source: str) -> tuple[Encoder, BackboneConfig, list[str]]:
    """A `ViT` of the size of a state dict with timm's names, with its weights.

    No shape tells the number of heads: 64 channels each, as in all of timm's and MAE's sizes. A position table that is
    MAE's sin-cos one is recognised and computed from then on; any other is learned.

    Raises:
        UserError: nothing of the kind, or blocks with tensors of another architecture.
    """
    state, rest = _encoder_part(state, source)
    dim, chans, patch = state[_FILTERS].shape[:3]
    table = state.get("pos_embed")
    prefix = int("cls_token" in state)
    side = isqrt(table.shape[1] - prefix) if table is not None else 0
    if table is not None and side * side not in (table.shape[1], table.shape[1] - prefix):
        raise UserError(f"init_from {source!r}: its position table of {table.shape[1]} places is of no square image.")
    fixed = table is None or _is_sincos(table, side)
    config = BackboneConfig(
        name="vit_base_patch16",
        position="sincos" if fixed else "learned",
        image_size=patch * side if side else 224,
        class_token=bool(prefix),
        patch_size=patch,
        dim=dim,
        depth=block_count(state, "blocks."),
        num_heads=max(1, dim // 64),
        mlp_ratio=len(state[_FIRST]) / dim,
    )
    if fixed:
        state.pop("pos_embed", None)
    elif table is not None and prefix and table.shape[1] == side * side:  # the class token has no position
        state["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], 1)
    lacking = [i for i in range(config.depth or 0) if f"blocks.{i}.attn.qkv.weight" not in state]
    if lacking:
        raise UserError(
            f"init_from {source!r} names {config.depth} blocks and lacks 'blocks.{lacking[0]}.attn.qkv.weight'."
        )
    with torch.device("meta"):  # an encoder without memory: how large would it be?
        wanted = sum(tensor.numel() for tensor in config.build(chans).state_dict().values())
    if wanted > 2 * sum(tensor.numel() for tensor in state.values()):
        raise UserError(f"init_from {source!r} has not the tensors of {config.depth} blocks of width {dim}.")
    encoder = config.build(chans).to(state[_FILTERS].dtype)
    assert isinstance(encoder, ViT)
    try:
        unused = encoder.load_timm_state_dict(state)
    except UserError as error:
        raise UserError(f"init_from {source!r}: {error}") from None
    strange = [name for name in unused if name.startswith("blocks.")]
    if strange:
        raise UserError(
            f"init_from {source!r} is no plain Vision Transformer: it has {strange[0]!r}. "
            "If it is one of timm's, give its name, timm:NAME."
        )
    return encoder, config, [*rest, *unused]


def _open(path: Path) -> State:
    if path.suffix != ".safetensors":
        return open_published(path)
    return load_safetensors(path, f"init_from '{path}'")


def _encoder_part(state: Mapping[str, Tensor], source: str) -> tuple[State, list[str]]:
    """The tensors of the encoder without what stands before their names, and the names of the others."""
    for prefix in PREFIXES:
        if f"{prefix}{_FILTERS}" in state and f"{prefix}{_FIRST}" in state:
            break
    else:
        shown = ", ".join(list(state)[:3])
        raise UserError(
            f"init_from {source!r} holds no encoder that is known: no '{_FILTERS}' or no blocks, but {shown}, ...\n"
            f"Readable are checkpoints of xscale, timm's names, and {', '.join(list(SIGNS)[:-1])}."
        )
    part = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    decoder = [name for name in part if name.startswith(("decoder", "mask_token"))]  # published MAE
    rest = [name for name in state if not name.startswith(prefix)] + decoder
    return {name: value for name, value in part.items() if name not in decoder}, rest


def _is_sincos(table: Tensor, side: int) -> bool:
    """Whether a table `[1, n, D]` is MAE's: zeros for a class token, if it has a place, then sines and cosines."""
    if table.shape[-1] % 4:
        return False
    patches, prefix = table[:, -side * side :], table[:, : -side * side]
    fixed = SinCosPositions(table.shape[-1])((side, side), like=table)
    return bool(torch.allclose(patches, fixed, atol=1e-5) and (prefix == 0).all())
