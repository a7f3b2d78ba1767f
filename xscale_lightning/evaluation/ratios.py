"""One image hidden to several degrees: what a method puts back, and the numbers that belong to it.

Masks are nested: every method keeps the tokens with the lowest noise, and the same seed gives the same noise, so a
higher ratio hides what a lower one hid and more. Everything here is in *standard units*, (raw - mean) / std of the band
record, however the method itself scales its input: so methods can be compared.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.reconstruction import (
    bilinear_inpainting,
    error_sums,
    mean_fill,
    percentile_range,
    psnr,
)
from xscale_lightning.evaluation.spectral import AngleSum, angle_sum

if TYPE_CHECKING:
    from xscale_lightning.data.bands import Bands
    from xscale_lightning.methods.output import Reconstruction, StepOutput

RATIOS = (0.5, 0.75, 0.9, 0.95)
MEAN, BILINEAR = "mean spectrum", "bilinear inpainting"


class Restores(Protocol):
    """What is needed of a method: `SSLModule`, as far as this module is concerned."""

    bands: "Bands"
    mask_ratio: float

    def evaluate(self, batch: dict[str, Any], seed: int) -> "StepOutput":
        """Step on a raw batch with a seed, without gradients."""
        ...

    def scaling(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Offset and scale of raw images."""
        ...


@dataclass(frozen=True)
class Restored:
    """What a method put back, in standard units."""

    target: Tensor
    """`[B, C, H, W]` float32."""
    prediction: Tensor
    """`[B, C, H, W]` float32."""
    visible: Tensor
    """`[B, C, H, W]` bool."""
    borrows: bool
    """Whether the prediction knows statistics of the hidden pixels, so that its numbers would mean nothing."""

    def first(self, count: int) -> "Restored":
        """The first images."""
        return Restored(self.target[:count], self.prediction[:count], self.visible[:count], self.borrows)

    def pasted(self) -> Tensor:
        """The prediction with the visible values of the original in it."""
        return torch.where(self.visible, self.target, self.prediction)


def restored(result: "Reconstruction", raw: Tensor, method: Restores) -> Restored:
    """Bring a reconstruction of the images `raw` `[B, C, H, W]` to standard units."""
    offset, scale = method.scaling(raw)
    mean, std = _statistics(method.bands, result.target)
    # For a method that scales by the record itself these are exactly 1 and 0: its numbers stay what they were.
    factor, shift = scale.float() / std, (offset.float() - mean) / std
    target, prediction = (x.float() * factor + shift for x in (result.target, result.prediction))
    return Restored(target, prediction, result.visible.expand_as(target), result.borrows)


def to_raw(images: Tensor, bands: "Bands") -> Tensor:
    """Images in standard units `[B, C, H, W]` in raw sensor units, float64."""
    mean, std = _statistics(bands, images.double())
    return images.double() * std + mean


def raw_angle_sum(target: Tensor, guess: Tensor, visible: Tensor, bands: "Bands") -> AngleSum:
    """Spectral angles, in raw units, of images `[B, C, H, W]` in standard units.

    One image after the other: float64 with its temporaries would fill the memory for a batch of long spectra.
    """
    total = AngleSum(0.0, 0)
    for images in zip(target, guess, visible, strict=True):
        original, filled, seen = (part.unsqueeze(0) for part in images)
        total += angle_sum(to_raw(original, bands), to_raw(filled, bands), seen)
    return total


def _statistics(bands: "Bands", like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a band record, each `[1, C, 1, 1]`."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    mean, std = (torch.tensor(v, dtype=dtype, device=like.device).view(1, -1, 1, 1) for v in (bands.means, bands.stds))
    return mean, std


@contextmanager
def masked_at(method: Restores, ratio: float) -> Iterator[None]:
    """The method with another `mask_ratio`; afterwards, also after an error, it has its own again."""
    before = method.mask_ratio
    method.mask_ratio = ratio
    try:
        yield
    finally:
        method.mask_ratio = before


def check_ratios(ratios: Sequence[float], argument: str) -> None:
    """Refuse ratios that hide nothing or everything.

    Raises:
        UserError: naming the argument and the value.
    """
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise UserError(f"{argument}: {ratio:g} is not possible; give shares above 0 and below 1, such as 0.75.")
    if len(set(ratios)) != len(ratios):
        raise UserError(f"{argument}: a ratio is given twice; give every ratio once.")


@torch.no_grad()
def restore_at_ratios(
    method: Restores, batch: Mapping[str, Any], ratios: Sequence[float], seed: int
) -> tuple[dict[float, Restored], dict[float, str]]:
    """Reconstruct a raw batch at several mask ratios with nested masks.

    Args:
        method: in evaluation mode; its `mask_ratio` is set for each and put back.
        batch: raw, on the method's device; `image [B, C, H, W]`.
        ratios: shares of the tokens to hide.
        seed: of the noise that chooses them.

    Returns:
        what was put back, by ratio in rising order (empty for methods that put no pixels back); and why ratios were
        left out, by ratio: those that leave no token visible at this size.

    Raises:
        UserError: if no ratio at all is possible.
    """
    found: dict[float, Restored] = {}
    left_out: dict[float, str] = {}
    problem = None
    for ratio in sorted(ratios):
        with masked_at(method, ratio):
            try:
                output = method.evaluate(dict(batch), seed)
            except UserError as error:
                left_out[ratio], problem = str(error), error
                continue
            if output.reconstruction is None:
                return {}, {}
            found[ratio] = restored(output.reconstruction(), batch["image"], method)
    if problem is not None and not found:
        raise problem
    return found, left_out


@dataclass(frozen=True)
class Scores:
    """Numbers of one ratio for one way to fill the gaps, over the hidden pixels of all images."""

    psnr: float
    """dB, all bands together; NaN where nothing is hidden."""
    angle: float
    """Mean spectral angle in degrees over pixels with a hidden band; NaN with fewer than two bands."""
    rmse: list[float]
    """Root mean squared error per band in raw units; NaN where none of it is hidden."""
    share: list[float]
    """The same over the band's range (2nd to 98th percentile of the original); NaN for a constant band."""


@dataclass(frozen=True)
class RatioScores:
    """Numbers of one ratio: of the method and of the base lines that see the same pixels."""

    hidden: float
    """Share of the values that are hidden in fact."""
    method: Scores | None
    """None where the method borrows from the hidden pixels."""
    base_lines: dict[str, Scores]
    """By name."""


def score(found: Mapping[float, Restored], bands: "Bands", base_lines: bool = True) -> dict[float, RatioScores]:
    """Numbers of every ratio; all ratios, the method and the base lines share the range of the originals."""
    limits = None
    scores = {}
    for ratio, part in found.items():
        limits = percentile_range(part.target) if limits is None else limits
        guesses = {}
        if base_lines:
            guesses[MEAN] = mean_fill(part.target, part.visible)
            guesses[BILINEAR] = bilinear_inpainting(part.target, part.visible)
        own = None if part.borrows else _scores(part, part.prediction, limits, bands)
        rivals = {name: _scores(part, guess, limits, bands) for name, guess in guesses.items()}
        scores[ratio] = RatioScores(float((~part.visible).double().mean()), own, rivals)
    return scores


def _scores(part: Restored, guess: Tensor, limits: Tensor, bands: "Bands") -> Scores:
    sums = error_sums(part.target, guess, part.visible)
    rmse = (sums.squared / sums.count).sqrt()  # [C]; 0 / 0 where no value of a band is hidden
    share = torch.where(limits > 0, rmse / limits.double(), math.nan)
    angle = math.nan
    if len(bands) > 1:
        angle = raw_angle_sum(part.target, guess, part.visible, bands).mean
    std = torch.tensor(bands.stds, dtype=torch.float64, device=rmse.device)
    return Scores(psnr(sums, limits), angle, (rmse * std).tolist(), share.tolist())
