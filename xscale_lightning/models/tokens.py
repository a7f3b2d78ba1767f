"""What a tokenizer or an encoder hands on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Patch tokens, with or without prefix tokens, and where on the grid they stand.

    Attributes:
        x: tokens `[B, P + N, D]`: P prefix tokens (class token), then N patch tokens.
        grid: `(G, H, W)`; G is 1 for plain images and the number of spectral groups for spectral cubes.
        kept: flat indices `[B, N]` in `(G, H, W)` order of the patch tokens in `x`, or None when all of them are there.
        num_prefix: P.
        lengths: number of real tokens of every image where they differ; the rest of `x` (zeros) and `kept` is padding.
    """

    x: Tensor
    grid: tuple[int, int, int]
    kept: Tensor | None = None
    num_prefix: int = 0
    lengths: tuple[int, ...] | None = None

    @property
    def prefix(self) -> Tensor:
        """Prefix tokens `[B, P, D]`."""
        return self.x[:, : self.num_prefix]

    @property
    def patches(self) -> Tensor:
        """Patch tokens `[B, N, D]`."""
        return self.x[:, self.num_prefix :]

    @property
    def length(self) -> int:
        """Number of positions on the whole grid, kept or not."""
        groups, height, width = self.grid
        return groups * height * width

    def keep(self, ids: Tensor) -> "Tokens":
        """Return only the patch tokens at the flat grid indices `ids [B, K]`; prefix tokens stay.

        Raises:
            ValueError: tokens were dropped before, so flat grid indices no longer address them.
        """
        if self.kept is not None:
            raise ValueError("Tokens.keep: tokens were already dropped; choose all of them in one call.")
        patches = gather(self.patches, ids)
        x = torch.cat([self.prefix, patches], dim=1) if self.num_prefix else patches
        return replace(self, x=x, kept=ids)

    def feature_map(self) -> Tensor:
        """Patch tokens as `[B, G * D, H, W]`.

        Raises:
            ValueError: some tokens were dropped, so there is no full map.
        """
        if self.kept is not None:
            raise ValueError("Tokens.feature_map: some tokens were dropped; encode with keep=None.")
        groups, height, width = self.grid
        batch, _, dim = self.patches.shape
        x = self.patches.reshape(batch, groups, height, width, dim)  # [B, G, H, W, D]
        return x.permute(0, 1, 4, 2, 3).reshape(batch, groups * dim, height, width)


def gather(x: Tensor, ids: Tensor) -> Tensor:
    """Rows of `x [B, N, D]` at `ids [B, K]` -> `[B, K, D]`."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def pack(batches: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """Sequences of batches `[B_i, N_i, D]` in one row `[1, sum B_i N_i, D]`, and their lengths for `attend`."""
    seqlens = tuple(x.shape[1] for x in batches for _ in range(x.shape[0]))
    return torch.cat([x.flatten(0, 1) for x in batches]).unsqueeze(0), seqlens


def pad_rows(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sequences that lie one after the other `[sum, ...]` as `[B, longest, ...]`, filled up with zeros."""
    width = max(lengths)
    places = torch.cat([torch.arange(n) + i * width for i, n in enumerate(lengths)]).to(rows.device, non_blocking=True)
    padded = rows.new_zeros(len(lengths) * width, *rows.shape[1:]).index_copy(0, places, rows)
    return padded.unflatten(0, (len(lengths), width))


def real_rows(padded: Tensor, lengths: Sequence[int]) -> Tensor:
    """Undo `pad_rows`: `[B, longest, ...]` -> `[sum, ...]`."""
    width = padded.shape[1]
    places = torch.cat([torch.arange(n) + i * width for i, n in enumerate(lengths)])
    return padded.flatten(0, 1)[places.to(padded.device, non_blocking=True)]


def unpack(row: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Undo `pack`: `[1, sum, D]` -> one `[B_i, N_i, D]` per entry of `like [B_i, N_i, ...]`."""
    parts = row[0].split([x.shape[0] * x.shape[1] for x in like])
    return [part.unflatten(0, x.shape[:2]) for part, x in zip(parts, like, strict=True)]
