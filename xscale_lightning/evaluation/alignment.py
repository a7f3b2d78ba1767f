"""Do two images of a pair show the same ground? Their displacement by cross-correlation, and pictures that show it."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

COMPONENTS = 3
_FINEST = 16  # HR pixels per MR pixel that are searched one by one; finer HR is averaged first


@dataclass(frozen=True)
class Displacement:
    """Where HR's content lies against MR's; positive means further down and further right."""

    rows: float
    """In HR pixels."""
    cols: float
    """In HR pixels."""
    correlation: float
    """Share of HR's variance (at MR's resolution) that MR explains at the best displacement, 0 to 1."""
    at_zero: float
    """The same without displacement."""
    at_limit: bool
    """Whether the best displacement lies at the end of the search, so that the true one may be larger."""

    @property
    def pixels(self) -> float:
        """Length in HR pixels."""
        return math.hypot(self.rows, self.cols)


@torch.no_grad()
def displacement(mr: Tensor, hr: Tensor, max_shift: float = 1.0) -> Displacement | None:
    """Estimate how far HR is displaced against MR, to a fraction of an HR pixel, over a whole batch.

    HR is displaced by whole HR pixels, averaged over MR's pixels (the area mean of Wald's protocol) and compared with
    MR; a parabola through the neighbours of the best displacement gives the fraction. The comparison is the share of
    the variance of HR's main components that a linear combination of MR's explains, so bands, units and even the sign
    of the contrast may differ between the sensors.

    Args:
        mr: `[B, C, h, w]`, any unit.
        hr: `[B, C', H, W]` of the same ground, H / h = W / w at least 1; other ratios than whole ones are resampled.
        max_shift: largest displacement that is searched, in MR pixels (and at least 2 HR pixels).

    Returns:
        the displacement; None if the images are too small or without any contrast.
    """
    mr, hr = mr.float(), hr.float()
    height, width = mr.shape[-2:]
    native = hr.shape[-1] / width
    ratio = min(_FINEST, max(1, math.ceil(native - 1e-6)))
    if hr.shape[-2:] != (height * ratio, width * ratio):
        hr = F.interpolate(
            hr, size=(height * ratio, width * ratio), mode="bilinear", align_corners=False, antialias=True
        )
    reach = max(2, round(max_shift * ratio))
    margin = -(-reach // ratio)
    if min(height, width) < 2 * margin + 3:
        return None
    inner = slice(margin, -margin)
    basis = _orthonormal(_components(mr)[:, :, inner, inner])
    fine = _components(hr)
    means = F.avg_pool2d(fine, ratio, stride=1)  # [B, K, H - ratio + 1, W - ratio + 1], at every HR position
    if basis is None:
        return None
    rows, cols = (margin * ratio + torch.arange(n - 2 * margin, device=hr.device) * ratio for n in (height, width))
    steps = range(-reach, reach + 1)
    scores = torch.stack(
        [torch.stack([_explained(basis, means[:, :, rows + dy][:, :, :, cols + dx]) for dx in steps]) for dy in steps]
    ).cpu()
    if not bool(scores.isfinite().all()) or float(scores.max()) <= 0:
        return None
    best = int(scores.argmax())
    row, col = divmod(best, len(steps))
    unit = native / ratio  # HR pixels of the batch along one of the search
    return Displacement(
        rows=unit * (row - reach + _vertex(scores[:, col], row)),
        cols=unit * (col - reach + _vertex(scores[row], col)),
        correlation=float(scores[row, col]),
        at_zero=float(scores[reach, reach]),
        at_limit=row in (0, 2 * reach) or col in (0, 2 * reach),
    )


def _components(images: Tensor) -> Tensor:
    """Main components `[B, K, H, W]` of the bands, K at most 3, without each image's mean."""
    pixels = images - images.mean(dim=(2, 3), keepdim=True)
    pixels = pixels / pixels.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-12)
    channels = pixels.shape[1]
    if channels <= COMPONENTS:
        return pixels
    flat = pixels.transpose(0, 1).flatten(1).double()  # [C, B * H * W]
    vectors = torch.linalg.eigh(flat @ flat.T).eigenvectors[:, -COMPONENTS:].float()
    return torch.einsum("bchw,ck->bkhw", pixels, vectors)


def _centred(images: Tensor) -> Tensor:
    """`[B, K, h, w]` -> `[B * h * w, K]` without each image's mean."""
    return (images - images.mean(dim=(2, 3), keepdim=True)).permute(0, 2, 3, 1).flatten(0, 2).double()


def _orthonormal(images: Tensor) -> Tensor | None:
    values = _centred(images)
    left, singular, _ = torch.linalg.svd(values, full_matrices=False)
    kept = singular > 1e-6 * singular[0].clamp_min(1e-9)
    return left[:, kept] if bool(kept.any()) else None


def _explained(basis: Tensor, images: Tensor) -> Tensor:
    values = _centred(images)
    return (basis.T @ values).square().sum() / values.square().sum().clamp_min(1e-12)


def _vertex(scores: Tensor, place: int) -> float:
    """Distance of a parabola's vertex from the highest of its three points, -0.5 to 0.5."""
    if place in (0, len(scores) - 1):
        return 0.0
    before, here, after = (float(value) for value in scores[place - 1 : place + 2])
    bend = before - 2 * here + after
    return 0.0 if bend >= 0 else max(-0.5, min(0.5, 0.5 * (before - after) / bend))


def edges(grey: Tensor) -> Tensor:
    """Strength of the edges of `[B, 1, H, W]`, 0 to 1 per image (Sobel, clipped at the 98th percentile)."""
    kernel = grey.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = torch.stack([kernel, kernel.T]).unsqueeze(1)  # [2, 1, 3, 3]
    strength = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels).norm(dim=1, keepdim=True)
    limit = torch.quantile(strength.flatten(1), 0.98, dim=1).clamp_min(1e-6)
    return (strength / limit.view(-1, 1, 1, 1)).clamp(0, 1)


def edge_overlay(base: Tensor, other: Tensor) -> Tensor:
    """Edges of `other` in red over a grey `base`, both `[B, 3, H, W]` in 0..1 and of the same size."""
    grey = base.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1) * 0.8
    strength = edges(other.mean(dim=1, keepdim=True))
    red = torch.zeros_like(grey)
    red[:, 0] = 1.0
    return grey * (1 - strength) + red * strength


def checkerboard(a: Tensor, b: Tensor, cells: int = 6) -> Tensor:
    """Cells of `a` and `b` in turn, both `[B, 3, H, W]`: displaced lines break at the borders of the cells."""
    rows, cols = (torch.arange(n, device=a.device) * cells // n for n in a.shape[-2:])
    return torch.where((rows[:, None] + cols) % 2 == 0, a, b)
