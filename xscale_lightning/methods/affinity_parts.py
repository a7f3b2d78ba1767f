"""Parts of spatial affinity: tokens at given places by any encoder, pooled children, frozen teachers."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xscale_lightning import checkpoints
from xscale_lightning.data.bands import Bands
from xscale_lightning.errors import UserError
from xscale_lightning.losses import at_least_float32
from xscale_lightning.masking import children
from xscale_lightning.models.pos_embed import finer_positions
from xscale_lightning.models.tokens import Tokens, pad_rows, real_rows
from xscale_lightning.models.vit import Encoder, ViT

BLOCK_SIDES = (0.4, 0.7)  # of the grid; published


def load_teacher(path: str, student: Encoder, records: Sequence[Bands]) -> Encoder:
    """The encoder of a checkpoint as a teacher that stays as it is, for a student with encoder `student`.

    Args:
        path: checkpoint of any method.
        student: its patches must be those of the teacher, in pixels and bands.
        records: the teacher must have been trained on the bands of one of these.

    Raises:
        UserError: no such file, other bands, or patches of another size.
    """
    if not Path(path).is_file():
        raise UserError(f"model.teacher {path!r} is no file: give host, own or the path of a checkpoint.")
    encoder, bands = checkpoints.load_backbone(path)
    differences = [record.difference(bands) for record in records]
    if all(differences):
        raise UserError(f"model.teacher {path!r} was trained on other bands: {differences[-1]}.")
    side = math.lcm(encoder.patch_size, student.patch_size)
    theirs, ours = (x.token_grid(side, side) for x in (encoder, student))
    if theirs != ours:
        raise UserError(
            f"model.teacher {path!r} has patches of {encoder.patch_size} pixels in {theirs[0]} group(s) of bands and "
            f"the student of {student.patch_size} in {ours[0]}: take a teacher with the student's patches."
        )
    return encoder.requires_grad_(False)


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


@contextmanager
def outputs(encoder: nn.Module, watching: bool = True) -> Iterator[list[Tokens]]:
    """Inside, the list takes all tokens that `encoder` hands on; with `watching` false it stays empty."""
    taken: list[Tokens] = []
    if not watching:
        yield taken
        return
    handle = encoder.register_forward_hook(lambda _module, _inputs, tokens: taken.append(tokens))  # pyright: ignore[reportArgumentType]
    try:
        yield taken
    finally:
        handle.remove()
