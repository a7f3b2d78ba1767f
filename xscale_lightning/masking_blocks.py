"""I-JEPA's blocks: which tokens a context shows and which target blocks are to be predicted from it.

Drawn on the host, so that sizes are known there and the device is never waited for; any grid, square or not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from xscale_lightning.errors import UserError

Sampler = Literal["packed", "balanced", "legacy"]
MOST = 1024  # blocks of an image: no grid has room for more
TRIES = 20  # places of a context that are tried before it may overlap one target more; published code


@dataclass(frozen=True)
class Blocks:
    """Blocks of a batch of B images on a grid of L places: C contexts and T targets per image.

    Context sequences lie one after the other, shortest first, and nothing is padded.

    Attributes:
        context: `[N]` visible tokens of all C x B sequences, as image x L + place.
        lengths: tokens of each sequence, in the order of `context`.
        order: `[C * B]` which sequence of `context` belongs to (context, image), image fastest.
        targets: places on the grid `[T, B, M]`.
        places: L.
        ranks: `order` again, known on the host.
    """

    context: Tensor
    lengths: tuple[int, ...]
    order: Tensor
    targets: Tensor
    places: int
    ranks: tuple[int, ...] = ()

    @classmethod
    def of(cls, contexts: Sequence[Tensor], targets: Tensor, places: int) -> "Blocks":
        """Blocks of given contexts, one list of places each, in the order (context, image), and targets `[T, B, M]`."""
        count = targets.shape[1]
        order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
        rows = torch.cat([contexts[i] + i % count * places for i in order])
        lengths = tuple(len(contexts[i]) for i in order)
        ranks = torch.tensor(order).argsort()
        return cls(rows, lengths, ranks, targets, places, tuple(ranks.tolist()))

    @property
    def runs(self) -> list[tuple[int, int]]:
        """`(sequences, tokens of each)` of the neighbouring sequences of equal length."""
        return [(len(list(same)), length) for length, same in groupby(self.lengths)]

    @property
    def kept(self) -> Tensor | None:
        """Visible places `[C, B, K]` if all sequences are of one length, in their own order; None otherwise."""
        if len(self.runs) > 1:
            return None
        return (self.context % self.places).view(-1, self.targets.shape[1], self.lengths[0])

    @property
    def flat_targets(self) -> Tensor:
        """Target places as image x L + place `[T, B, M]`."""
        images = torch.arange(self.targets.shape[1], device=self.targets.device)
        return self.targets + images.view(1, -1, 1) * self.places

    def to(self, device: torch.device) -> "Blocks":
        """The same on `device`, without waiting for the copy."""
        tensors = (self.context, self.order, self.targets)
        if device.type == "cuda":
            tensors = tuple(t.pin_memory().to(device, non_blocking=True) for t in tensors)
        context, order, targets = tensors
        return Blocks(context, self.lengths, order, targets, self.places, self.ranks)


@dataclass(frozen=True)
class BlockMasks:
    """Sizes of I-JEPA's blocks and how contexts of different size share a batch."""

    sampler: Sampler = "packed"
    """`packed` keeps every visible token, in sequences of different length; `balanced` keeps in every image as many as
    the smallest context of the batch has, drawn at random; `legacy` is the published sampler: it keeps the first of
    them, and never shows the last row and column of the grid."""
    contexts: int = 1
    """Contexts per image."""
    targets: int = 4
    """Target blocks per context."""
    context_scale: tuple[float, float] = (0.85, 1.0)
    """Least and largest share of the grid that a context block covers, before the targets are taken out."""
    target_scale: tuple[float, float] = (0.15, 0.2)
    """Least and largest share of the grid that a target block covers."""
    target_ratio: tuple[float, float] = (0.75, 1.5)
    """Least and largest ratio of its height to its width."""
    min_keep: int = 10
    """A context must have more tokens than this; with samplers other than `legacy` at most an eighth of the grid."""

    def __post_init__(self) -> None:
        """Refuse values that make no blocks."""
        for name in ("contexts", "targets"):
            if not 1 <= getattr(self, name) <= MOST:
                raise UserError(f"masks.{name} must be in [1, {MOST}], got {getattr(self, name)}.")
        for name in ("context_scale", "target_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise UserError(f"masks.{name} must be two shares in (0, 1], the smaller first, got {[low, high]}.")
        low, high = self.target_ratio
        if not 0 < low <= high < math.inf:
            raise UserError(f"masks.target_ratio must be two ratios above 0, the smaller first, got {[low, high]}.")
        if self.min_keep < 0:
            raise UserError(f"masks.min_keep must not be negative, got {self.min_keep}.")

    def least(self, height: int, width: int) -> int:
        """Tokens that a context has at least."""
        legacy = self.sampler == "legacy"
        return 1 + (self.min_keep if legacy else min(self.min_keep, height * width // 8))

    def check(self, height: int, width: int) -> None:
        """Refuse a grid on which the blocks cannot be placed.

        Raises:
            UserError: naming the grid and what would do.
        """
        legacy, grid = self.sampler == "legacy", f"a grid of {height} x {width} tokens"
        advice = "take larger images or smaller patches"
        if legacy and min(height, width) < 2:
            raise UserError(f"masks: the legacy sampler places no block on {grid}: {advice}.")
        sizes = self._target_sizes(height, width)
        smallest, largest = min(h * w for h, w in sizes), max(h * w for h, w in sizes)
        if legacy and smallest < self.least(height, width):
            lower = (
                f"lower it to less than {smallest}, " if smallest else ""
            )  # an empty block is one token short of any
            raise UserError(
                f"masks: on {grid} a target block can have {smallest} tokens, and the legacy sampler wants more than "
                f"min_keep {self.min_keep} in every block: {lower}{advice}, or set masks.sampler to packed."
            )
        context = math.prod(_size(height, width, self.context_scale[0], 1.0, legacy))
        if min(context, height * width - largest) < self.least(height, width):
            raise UserError(
                f"masks: on {grid} a target block of {largest} tokens leaves less than {self.least(height, width)} for "
                f"the context: {advice}, or lower masks.target_scale."
            )

    def draw(self, count: int, height: int, width: int) -> Blocks:
        """Blocks for `count` images on a grid of `height x width`, from torch's global generator of the host.

        Target and context sizes are drawn once for the whole batch, places for every image.

        Raises:
            UserError: as `check`.

        Source: Assran et al. 2023 (I-JEPA), section 3 and appendix A; published code.
        """
        self.check(height, width)
        legacy = self.sampler == "legacy"
        area, ratio, extent = (float(torch.rand(())) for _ in range(3))
        ratio = area if legacy else ratio  # published: one number drives area and ratio
        size = _size(height, width, _between(area, self.target_scale), _between(ratio, self.target_ratio), legacy)
        targets = _rectangles(torch.rand(count, self.targets, 2), size, (height, width), legacy)  # [B, T, L]
        size = _size(height, width, _between(extent, self.context_scale), 1.0, legacy)
        visible = self._contexts(targets, size, (height, width), legacy)  # [B, C, L]
        places = targets.nonzero()[:, 2].view(count, self.targets, -1).transpose(0, 1)  # [T, B, M]
        return Blocks.of(self._batch(visible), places.contiguous(), height * width)

    def _contexts(self, targets: Tensor, size: tuple[int, int], grid: tuple[int, int], legacy: bool) -> Tensor:
        """Visible tokens `[B, C, L]`: context blocks without the targets, but for those that leave too little."""
        least, count = self.least(*grid), len(targets)
        visible = targets.new_zeros(count, self.contexts, targets.shape[2])
        for attempt in range(TRIES * (self.targets + 1)):
            hidden = targets[:, : self.targets - attempt // TRIES].any(1, keepdim=True)  # [B, 1, L]
            blocks = _rectangles(torch.rand(count, self.contexts, 2), size, grid, legacy)
            short = visible.sum(2, keepdim=True) < least  # [B, C, 1]
            visible = torch.where(short, blocks & ~hidden, visible)
            if bool((visible.sum(2) >= least).all()):
                break
        return visible

    def _batch(self, visible: Tensor) -> list[Tensor]:
        """Places per sequence, in the order (context, image), of booleans `[B, C, L]`."""
        rows = visible.transpose(0, 1).flatten(0, 1)  # [C * B, L]
        lengths = rows.sum(1)
        if self.sampler == "packed":
            return list(rows.nonzero()[:, 1].split(lengths.tolist()))
        rank = torch.rand(visible.shape).transpose(0, 1).flatten(0, 1) if self.sampler == "balanced" else None
        rank = torch.arange(rows.shape[1]).expand(rows.shape).float() if rank is None else rank
        chosen = rank.masked_fill(~rows, torch.inf).argsort(1)[:, : int(lengths.min())]
        return list(chosen.sort(1).values)

    def _target_sizes(self, height: int, width: int) -> set[tuple[int, int]]:
        """Sizes of target blocks at the ends of what can be drawn and between them."""
        steps = [i / 16 for i in range(17)]
        legacy = self.sampler == "legacy"
        pairs = [(a, a) for a in steps] if legacy else [(a, r) for a in steps for r in steps]
        scale, ratio = self.target_scale, self.target_ratio
        return {_size(height, width, _between(a, scale), _between(r, ratio), legacy) for a, r in pairs}


def _between(share: float, ends: tuple[float, float]) -> float:
    return ends[0] + share * (ends[1] - ends[0])


def _size(height: int, width: int, scale: float, ratio: float, legacy: bool) -> tuple[int, int]:
    """Height and width of a block of a share `scale` of the grid; the published one is smaller than the grid."""
    area = int(height * width * scale)
    rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if legacy:
        return min(rows, height - 1), min(columns, width - 1)
    return min(max(rows, 1), height), min(max(columns, 1), width)


def _rectangles(noise: Tensor, size: tuple[int, int], grid: tuple[int, int], legacy: bool) -> Tensor:
    """Booleans `[B, n, L]` of blocks of one size at places by `noise [B, n, 2]` in [0, 1).

    Every place is as likely as any other; the published code leaves out the last one of each axis.
    """
    inside = []
    for axis in range(2):
        choices = grid[axis] - size[axis] + (0 if legacy else 1)
        first = (noise[..., axis] * choices).long().clamp(max=choices - 1).unsqueeze(-1)  # [B, n, 1]
        at = torch.arange(grid[axis])
        inside.append((at >= first) & (at < first + size[axis]))
    return (inside[0].unsqueeze(-1) & inside[1].unsqueeze(-2)).flatten(2)
