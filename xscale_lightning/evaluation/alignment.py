"""Do two images of a pair show the same ground? Their displacement by cross-correlation, and pictures that show it."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

COMPONENTS = 3
WINDOW = 12  # MR pixels along a window: small enough to leave clouds out, large enough to have structure
MAX_WINDOWS = 1024
MIN_WINDOWS = 5
_FINEST = 16  # HR pixels per MR pixel that are searched one by one; finer HR is averaged first
_BANDS = 4
_RIGID = 0.25  # MR pixels by which the bands of a window may disagree


@dataclass(frozen=True)
class Displacement:
    """Where HR's content lies against MR's; positive means further down and further right.

    Where too few windows tell anything, `windows` is 0 and the displacement not a number.
    """

    rows: float
    """In HR pixels."""
    cols: float
    """In HR pixels."""
    error: float
    """Standard error of the two, in HR pixels."""
    agreeing: float
    """Share of the windows that are displaced like this, rather than not at all, 0 to 1."""
    correlation: float
    """Share of the variance of an MR band that HR explains, median over the windows, 0 to 1."""
    windows: int
    """Number of windows that were listened to."""
    looked_at: int
    """Number of windows that have any structure."""
    at_limit: bool
    """Whether the displacement lies at the end of the search, so that the true one may be larger."""

    @property
    def pixels(self) -> float:
        """Length in HR pixels."""
        return math.hypot(self.rows, self.cols)


@torch.no_grad()
def displacement(mr: Tensor, hr: Tensor, max_shift: float = 1.0, min_share: float = 0.3) -> Displacement | None:
    """Estimate how far HR is displaced against MR, to a fraction of an HR pixel, over a whole batch.

    In every window of a dozen MR pixels, HR is displaced by whole HR pixels, averaged over MR's pixels (the area mean
    of Wald's protocol) and compared with single bands of MR; a parabola through the neighbours of the best displacement
    gives the fraction. The comparison is the share of the band's variance that a linear combination of HR's main
    components explains, so bands, units and even the sign of the contrast may differ between the sensors.

    The result is the median over the windows in which the bands of MR agree. Where they do not, something moved between
    one band and the next, or is seen from different angles, as clouds are: that is not the georeference.

    Args:
        mr: `[B, C, h, w]`, any unit.
        hr: `[B, C', H, W]` of the same ground, H / h = W / w at least 1; other ratios than whole ones are resampled.
        max_shift: largest displacement that is searched, in MR pixels (and at least 3 HR pixels).
        min_share: share of a band's variance in a window that HR must explain for the band to be listened to.

    Returns:
        the displacement; None if the images are too small, or too few windows have any structure.
    """
    mr, hr = mr.float(), hr.float()
    height, width = mr.shape[-2:]
    native = hr.shape[-1] / width
    ratio = min(_FINEST, max(1, math.ceil(native - 1e-6)))
    if hr.shape[-2:] != (height * ratio, width * ratio):
        hr = F.interpolate(
            hr, size=(height * ratio, width * ratio), mode="bilinear", align_corners=False, antialias=True
        )
    reach = max(3, round(max_shift * ratio))
    margin = -(-reach // ratio)
    if min(height, width) < 2 * margin + 3:
        return None
    bands = mr[:, torch.linspace(0, mr.shape[1] - 1, min(_BANDS, mr.shape[1])).round().long().to(mr.device)]
    means = F.avg_pool2d(_components(hr), ratio, stride=1)  # [B, K, H - ratio + 1, W - ratio + 1], at every HR position
    maps = torch.cat(
        [
            _scores(bands[:, :, r0:r1, c0:c1], means, r0 * ratio, c0 * ratio, ratio, reach)
            for r0, r1 in _parts(height, margin)
            for c0, c1 in _parts(width, margin)
        ]
    )  # [windows, bands, n, n]
    if len(maps) > MAX_WINDOWS:
        maps = maps[torch.linspace(0, len(maps) - 1, MAX_WINDOWS).long()]
    return _settle(maps, native / ratio, reach, _RIGID * native, min_share)


def _parts(length: int, margin: int) -> list[tuple[int, int]]:
    """Windows along one side, inside the margin that the search needs."""
    inner = length - 2 * margin
    count = max(1, inner // WINDOW)
    edges = [margin + inner * i // count for i in range(count + 1)]
    return list(pairwise(edges))


def _scores(bands: Tensor, means: Tensor, top: int, left: int, ratio: int, reach: int) -> Tensor:
    """Share of each band's variance in one window that HR explains at each displacement, `[B, bands, n, n]`.

    Args:
        bands: `[B, bands, h, w]` of the window.
        means: `[B, K, H, W]` of HR over MR's pixels, at every HR position.
        top: HR row of the window's first row.
        left: HR column of its first column.
        ratio: HR pixels along an MR pixel.
        reach: largest displacement.
    """
    height, width = bands.shape[-2:]
    wanted = bands - bands.mean(dim=(2, 3), keepdim=True)
    wanted = F.normalize(wanted.flatten(2), dim=2)
    shifts = torch.arange(-reach, reach + 1, device=bands.device)
    cols = left + torch.arange(width, device=bands.device) * ratio + shifts[:, None]  # [n, w]
    rows = top + torch.arange(height, device=bands.device) * ratio
    lines = []
    for shift in shifts.tolist():
        part = means[:, :, rows + shift][..., cols]  # [B, K, h, n, w]
        part = part.permute(0, 3, 1, 2, 4).flatten(3)  # [B, n, K, h * w]
        part = part - part.mean(dim=3, keepdim=True)
        part = part / part.square().sum(dim=(2, 3), keepdim=True).sqrt().clamp_min(1e-9)
        gram = part @ part.mT + 1e-4 * torch.eye(part.shape[2], device=part.device)
        common = torch.einsum("bcp,bnkp->bnkc", wanted, part)
        lines.append((common * torch.linalg.solve(gram, common)).sum(dim=2))  # [B, n, bands]
    return torch.stack(lines, dim=1).movedim(3, 1)


def _settle(maps: Tensor, unit: float, reach: int, rigid: float, min_share: float) -> Displacement | None:
    """Median displacement of the windows whose bands agree; None if too few windows have any structure.

    Args:
        maps: `[windows, bands, n, n]` scores at displacements of -reach to reach.
        unit: HR pixels of the batch along one step of the search.
        reach: largest displacement, in steps.
        rigid: HR pixels by which the bands of a window may disagree.
        min_share: score from which on a band is listened to.
    """
    maps = maps[maps.flatten(1).amax(dim=1) > 1e-6]
    if len(maps) < MIN_WINDOWS:
        return None
    peaks, best = maps.flatten(2).max(dim=2)  # [windows, bands]
    places = torch.stack([best // maps.shape[3], best % maps.shape[3]], dim=2)
    found = unit * (places - reach + _vertices(maps, places))  # [windows, bands, 2]
    heard = (peaks >= min_share).unsqueeze(2) & found.isfinite()
    found = found.masked_fill(~heard, torch.nan)
    spread = found.sub(found.nanmedian(dim=1, keepdim=True).values).norm(dim=2)
    kept = heard.any(dim=1).all(dim=1) & (spread.nan_to_num(0).amax(dim=1) <= rigid)
    if int(kept.sum()) < MIN_WINDOWS:
        nowhere = float("nan")
        return Displacement(nowhere, nowhere, nowhere, 0.0, float(peaks.amax(dim=1).median()), 0, len(maps), False)
    each = found[kept].nanmedian(dim=1).values  # [kept, 2]
    middle = each.median(dim=0).values
    aside = (each - middle).norm(dim=1)
    # Of normally distributed values the median has 1.25 times the mean's error, and 1.48 times the median deviation is
    # the standard deviation.
    error = 1.25 * 1.48 * float((each - middle).abs().median(dim=0).values.norm()) / math.sqrt(len(each))
    return Displacement(
        rows=float(middle[0]),
        cols=float(middle[1]),
        error=error,
        agreeing=float((aside < each.norm(dim=1)).float().mean()),
        correlation=float(peaks[kept].amax(dim=1).median()),
        windows=len(each),
        looked_at=len(maps),
        at_limit=bool(middle.abs().max() >= unit * (reach - 0.5)),
    )


def _vertices(maps: Tensor, places: Tensor) -> Tensor:
    """Distances `[windows, bands, 2]` of a parabola's vertex from the highest of its three points, -0.5 to 0.5."""
    offsets = []
    rows, cols = places.unbind(dim=2)
    along = (maps.gather(3, cols[..., None, None].expand(-1, -1, maps.shape[2], 1)).squeeze(3), rows)
    across = (maps.gather(2, rows[..., None, None].expand(-1, -1, 1, maps.shape[3])).squeeze(2), cols)
    for line, place in (along, across):
        inside = place.clamp(1, line.shape[2] - 2)
        before, here, after = (line.gather(2, (inside + step).unsqueeze(2)).squeeze(2) for step in (-1, 0, 1))
        bend = before - 2 * here + after
        offset = (0.5 * (before - after) / bend.clamp_max(-1e-12)).clamp(-0.5, 0.5)
        offsets.append(offset.where((inside == place) & (bend < 0), torch.zeros_like(offset)))
    return torch.stack(offsets, dim=2)


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
