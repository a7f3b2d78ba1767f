"""Parts of spatial affinity: tokens at given places by any encoder, pooled children, and what a teacher is."""

from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xscale_lightning import checkpoints
from xscale_lightning.errors import UserError
from xscale_lightning.losses import at_least_float32
from xscale_lightning.masking import children
from xscale_lightning.methods.base import SSLModule
from xscale_lightning.methods.discovery import load_class
from xscale_lightning.models.pos_embed import finer_positions
from xscale_lightning.models.tokens import Tokens, pad_rows, real_rows
from xscale_lightning.models.vit import ViT

BLOCK_SIDES = (0.4, 0.7)  # of the grid; published
SHARED = ("bands", "backbone", "optimizer", "views", "attention")


def build_host(name: str, arguments: Mapping[str, Any], shared: Mapping[str, Any]) -> SSLModule:
    """The host method `name` (announced name or class path) with its own and the shared arguments.

    Raises:
        UserError: no such method, arguments it does not have, or some that the wrapper is to be given.
    """
    if twice := sorted(set(arguments) & set(SHARED)):
        raise UserError(f"host_args has {', '.join(twice)}: give them to spatial_affinity, the host takes its own.")
    cls = load_class(name)
    try:
        return checkpoints.build_method(cls, checkpoints.plain({**arguments, **shared}))
    except ArgumentError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"host_args {dict(arguments)} do not fit host {name!r}: {reason}") from error


def encode_at(encoder: nn.Module, images: Tensor, kept: Tensor, gsd: Tensor | None, lengths: Any = None) -> Tokens:
    """Tokens of the patches at `kept [B, N]` of `images [B, C, H, W]`, seen alone.

    With `lengths`, image b has so many patches and the rest of its row is padding, which takes no part: only a `ViT`.
    """
    if lengths is None:
        return encoder(images, keep=kept, gsd=gsd)
    assert isinstance(encoder, ViT)
    tokens = encoder.embed(images, gsd, kept)
    rows = real_rows(tokens.x, lengths)  # [sum, D]
    rows = encoder.encode_rows(rows.unsqueeze(0), tuple(lengths)).squeeze(0)
    return replace(tokens, x=pad_rows(rows, lengths), lengths=tuple(lengths))


def pooled_children(
    encoder: nn.Module,
    images: Tensor,
    seen: Tokens,
    ratio: int,
    gsd: Tensor | None = None,
    positions: Literal["native", "aligned"] = "native",
) -> Tensor:
    """What `encoder` makes of the `ratio x ratio` finer patches under each seen patch, averaged: `[B, N, D]`.

    Nothing else of `images [B, C, ratio * H, ratio * W]` is looked at. In float32 or better.

    Source: Waithaka et al. 2026, published code; its bilinear pooling equals the mean at ratio 2 alone.
    """
    assert seen.kept is not None
    finer = children(seen.kept, seen.grid[2], ratio)  # [B, N * r * r]
    lengths = None if seen.lengths is None else [n * ratio**2 for n in seen.lengths]
    with finer_positions(encoder, ratio if positions == "aligned" else 1):
        tokens = encode_at(encoder, images, finer, gsd, lengths)
    return at_least_float32(tokens.patches).unflatten(1, (-1, ratio**2)).mean(2)


def random_block(count: int, grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Places `[B, G * h * w]` of one rectangle per image; its size is drawn once for the batch.

    Source: Waithaka et al. 2026, published code (mode `block`): sides of 0.4 to 0.7 of the grid.
    """
    groups, height, width = grid
    low, high = BLOCK_SIDES
    rows, columns = (max(1, int(n * (low + (high - low) * float(torch.rand(()))))) for n in (height, width))
    noise = torch.rand(count, 2, device=device)
    top = (noise[:, 0] * (height - rows + 1)).long().clamp(max=height - rows)
    left = (noise[:, 1] * (width - columns + 1)).long().clamp(max=width - columns)
    y = top[:, None] + torch.arange(rows, device=device)  # [B, h]
    x = left[:, None] + torch.arange(columns, device=device)  # [B, w]
    plane = (y[:, :, None] * width + x[:, None]).flatten(1)  # [B, h * w]
    return (torch.arange(groups, device=device)[:, None] * (height * width) + plane[:, None]).flatten(1)
