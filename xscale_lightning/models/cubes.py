"""Spectral cubes: tokens of a few neighbouring bands times a square patch."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xscale_lightning.errors import UserError
from xscale_lightning.models.tokenizers import PatchTokenizer, check_divides
from xscale_lightning.models.tokens import gather

Pad = Literal["mean", "edge", "zero"]


def cut_cubes(images: Tensor, depth: int, patch: int) -> Tensor:
    """Cut `[B, G * t, H, W]` into cubes `[B, G * h * w, t * p * p]`.

    Args:
        images: bands a multiple of `depth`, height and width multiples of `patch`.
        depth: t, bands per cube.
        patch: p, in pixels.

    Token order: group slowest, then row, then column; value order inside a cube: (band, row, column), that of a
    flattened 3-D convolution kernel.
    """
    batch, bands, height, width = images.shape
    shape = batch, bands // depth, depth, height // patch, patch, width // patch, patch
    return images.reshape(shape).permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, -1, depth * patch * patch)


def join_cubes(cubes: Tensor, depth: int, patch: int, grid: tuple[int, int, int]) -> Tensor:
    """Inverse of `cut_cubes`: `[B, G * h * w, t * p * p]` -> `[B, G * t, h * p, w * p]`."""
    groups, height, width = grid
    x = cubes.reshape(cubes.shape[0], groups, height, width, depth, patch, patch)  # [B, G, h, w, t, p, q]
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(len(x), groups * depth, height * patch, width * patch)


class CubeEmbed(PatchTokenizer):
    """Linear embedding of spectral cubes; the kernel is a 3-D convolution's with one input channel, as published.

    The weights do not depend on the number of bands. Bands that do not fill the last cube are padded.

    Args:
        patch_size: in pixels.
        in_chans: number of bands.
        dim: width.
        depth: bands per cube.
        pad: what fills the last cube: the `mean` of all bands per pixel, the last band again (`edge`), or `zero`. None
            refuses bands that do not fill it.

    Source: Li et al. 2024 (S2MAE), 3-D tokens of 3 bands x 8 x 8 pixels.

    Raises:
        UserError: the depth does not divide the number of bands and there is no padding rule.
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int, depth: int, pad: Pad | None = None) -> None:
        super().__init__(patch_size, in_chans)
        self.depth, self.pad = depth, pad
        self.padded = -in_chans % depth
        if self.padded and pad is None:
            fitting = [str(d) for d in range(1, min(in_chans, 16) + 1) if in_chans % d == 0]
            raise UserError(
                f"{in_chans} bands are not divisible by the cube depth {depth}: set backbone.cube_depth to "
                f"{' or '.join(fitting)}, or backbone.pad to mean, edge or zero (left out of the loss)."
            )
        self.groups = (in_chans + self.padded) // depth
        self.proj = nn.Conv3d(
            1, dim, kernel_size=(depth, patch_size, patch_size), stride=(depth, patch_size, patch_size)
        )

    def token_grid(self, height: int, width: int) -> tuple[int, int, int]:
        """`(G, H / p, W / p)`."""
        check_divides(self.patch_size, height, width)
        return self.groups, height // self.patch_size, width // self.patch_size

    def cut(self, images: Tensor) -> Tensor:
        """Cubes `[B, L, V]` of `images [B, C, H, W]`, padded as configured; see `cut_cubes` for the order."""
        if self.padded:
            batch, _, height, width = images.shape
            if self.pad == "mean":
                filling = images.mean(1, keepdim=True)
            elif self.pad == "edge":
                filling = images[:, -1:]
            else:
                filling = images.new_zeros(batch, 1, height, width)
            images = torch.cat([images, filling.expand(-1, self.padded, -1, -1)], dim=1)
        return cut_cubes(images, self.depth, self.patch_size)

    def join(self, cubes: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Images `[B, C, H, W]` of cubes `[B, L, V]`; padding is dropped."""
        return join_cubes(cubes, self.depth, self.patch_size, grid)[:, : self.in_chans]

    def real_values(self, groups: Tensor) -> Tensor:
        """Which values of cubes are of real bands, not padding: `groups [...]` (numbers) -> booleans `[..., V]`."""
        value = torch.arange(self.depth * self.patch_size**2, device=groups.device)
        band = groups.unsqueeze(-1) * self.depth + value // self.patch_size**2
        return band < self.in_chans

    def band_groups(self) -> list[range]:
        """Band numbers of every group."""
        starts = range(0, self.in_chans, self.depth)
        return [range(start, min(start + self.depth, self.in_chans)) for start in starts]

    def embed(self, cubes: Tensor) -> Tensor:
        """Embed cubes `[B, N, V]` -> `[B, N, D]`."""
        return F.linear(cubes, self.proj.weight.flatten(1), self.proj.bias)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Embed `images [B, C, H, W]` -> `[B, N, D]`; only the cubes at `keep [B, K]` when given."""
        cubes = self.cut(images)
        return self.embed(cubes if keep is None else gather(cubes, keep))
