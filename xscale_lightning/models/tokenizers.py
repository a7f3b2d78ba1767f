"""From images to patch tokens."""

import torch.nn.functional as F
from torch import Tensor, nn

from xscale_lightning.errors import UserError
from xscale_lightning.models.tokens import gather


def patchify(images: Tensor, patch: int, channels_last: bool = True) -> Tensor:
    """Cut `[B, C, H, W]` into `[B, H/p * W/p, p * p * C]`, row-major.

    Args:
        images: any number of channels; H and W multiples of `patch`.
        patch: p, in pixels.
        channels_last: value order inside a patch: (row, column, channel), MAE's target order; otherwise
            (channel, row, column), the order of a flattened convolution kernel.
    """
    batch, channels, height, width = images.shape
    check_divides(patch, height, width)
    x = images.reshape(batch, channels, height // patch, patch, width // patch, patch)  # [B, C, h, p, w, q]
    order = (0, 2, 4, 3, 5, 1) if channels_last else (0, 2, 4, 1, 3, 5)
    return x.permute(*order).reshape(batch, (height // patch) * (width // patch), patch * patch * channels)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Inverse of `patchify(..., channels_last=True)`: `[B, h * w, p * p * C]` -> `[B, C, h * p, w * p]`."""
    height, width = grid
    x = patches.reshape(patches.shape[0], height, width, patch, patch, -1)  # [B, h, w, p, q, C]
    return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, height * patch, width * patch)


def check_divides(patch: int, height: int, width: int) -> None:
    """Refuse an image that the patch size does not divide.

    Raises:
        UserError: with the two nearest sizes that work.
    """
    if height % patch or width % patch or not (height and width):
        smaller = tuple(max(patch, n // patch * patch) for n in (height, width))
        larger = tuple(-(-n // patch) * patch for n in (height, width))
        sizes = dict.fromkeys(f"{high} x {wide}" for high, wide in (smaller, larger))
        raise UserError(
            f"patch size {patch} does not divide the image of {height} x {width} pixels: use an image size "
            f"(image_size, or image_height and image_width) of {' or '.join(sizes)}, or another patch size."
        )


class PatchTokenizer(nn.Module):
    """What both tokenizers share: a patch size, a band count and the grid of an image."""

    proj: nn.Conv2d | nn.Conv3d

    def __init__(self, patch_size: int, in_chans: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.in_chans = in_chans

    def token_grid(self, height: int, width: int) -> tuple[int, int, int]:
        """`(G, H / p, W / p)` of an image of `height x width` pixels; G is 1 for plain patches.

        Raises:
            UserError: the patch size does not divide the image.
        """
        check_divides(self.patch_size, height, width)
        return 1, height // self.patch_size, width // self.patch_size

    def grid(self, images: Tensor) -> tuple[int, int, int]:
        """`token_grid` of `images [B, C, H, W]`.

        Raises:
            UserError: the patch size does not divide the image, or the band count is another one.
        """
        if images.shape[1] != self.in_chans:
            raise UserError(
                f"the backbone was built for {self.in_chans} bands and got images of {images.shape[1]}: "
                "give the data module and the model the same bands."
            )
        height, width = images.shape[-2:]
        return self.token_grid(height, width)


class PatchEmbed(PatchTokenizer):
    """Linear embedding of square patches; the kernel is a convolution's, so timm's weights load by name.

    It runs as one matrix product over the patches that are kept: with 75 % masked it does a quarter of the work.
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__(patch_size, in_chans)
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Embed `images [B, C, H, W]` -> `[B, N, D]`; only the patches at `keep [B, K]` when given."""
        patches = patchify(images, self.patch_size, channels_last=False)  # [B, N, C * p * p]
        if keep is not None:
            patches = gather(patches, keep)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
