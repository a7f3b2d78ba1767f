import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from xscale_lightning.data.bands import SENSORS, Bands, generic
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.ratio_figure import FigureText, ratio_figure
from xscale_lightning.evaluation.ratios import (
    BILINEAR,
    MEAN,
    RATIOS,
    Restored,
    check_ratios,
    masked_at,
    raw_angle_sum,
    restore_at_ratios,
    restored,
    score,
    to_raw,
)
from xscale_lightning.evaluation.reconstruction import masked_psnr
from xscale_lightning.evaluation.spectral import angle_sum, spectral_angle
from xscale_lightning.methods.cross_scale_mae import CrossScaleMAE
from xscale_lightning.methods.mae import MAE
from xscale_lightning.methods.output import Reconstruction, StepOutput
from xscale_lightning.methods.s2mae import S2MAE
from xscale_lightning.models.registry import BackboneConfig


class MinMax:
    """Scales every image by itself, hides random values per band and puts back `1.1 x`."""

    def __init__(self, bands: Bands) -> None:
        self.bands, self.mask_ratio = bands, 0.5

    def scaling(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        low, high = raw.amin((2, 3), keepdim=True), raw.amax((2, 3), keepdim=True)
        return low, high - low

    def evaluate(self, batch: dict[str, Any], seed: int) -> StepOutput:
        offset, scale = self.scaling(batch["image"])
        images = (batch["image"] - offset) / scale
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
        result = Reconstruction(images, 1.1 * images, noise >= self.mask_ratio)
        return StepOutput(torch.zeros(()), {}, lambda: result)


def raw_images(bands: Bands, count: int = 2, size: int = 32) -> Tensor:
    noise = torch.randn(count, len(bands), size, size, generator=torch.Generator().manual_seed(3))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (bands.means, bands.stds))
    return noise.cumsum(2).cumsum(3) / 40 * std + mean


def mae(cls: type = MAE, **options: Any) -> Any:
    torch.manual_seed(0)
    cubes = {"cube_depth": 2, "class_token": False} if cls is S2MAE else {}
    backbone = BackboneConfig(f"{'spectral_vit_tiny_cube3' if cubes else 'vit_tiny'}_patch8", depth=1, **cubes)
    small = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    return cls(bands=SENSORS["sentinel2_10"], backbone=backbone, **small, **options).eval()


@pytest.mark.parametrize("cls", [MAE, CrossScaleMAE, S2MAE])
def test_masks_of_the_methods_are_nested_and_the_ratio_is_put_back(cls) -> None:
    method = mae(cls, mask_ratio=0.6)
    batch = {"image": raw_images(method.bands, size=64)}
    found, left_out = restore_at_ratios(method, batch, RATIOS, seed=5)
    assert list(found) == [0.5, 0.75, 0.9, 0.95] and not left_out and method.mask_ratio == 0.6
    visible = [part.visible for part in found.values()]
    for lower, higher in pairwise(visible):
        assert not (higher & ~lower).any() and 0 < higher.sum() < lower.sum()
    again, _ = restore_at_ratios(method, batch, [0.75], seed=5)
    torch.testing.assert_close(again[0.75].prediction, found[0.75].prediction)
    assert not found[0.5].prediction.requires_grad


def test_a_ratio_that_leaves_nothing_visible_is_left_out_and_only_ratios_like_that_are_an_error() -> None:
    method = mae()
    batch = {"image": raw_images(method.bands, size=16)}  # 4 patches
    found, left_out = restore_at_ratios(method, batch, [0.95, 0.5], seed=0)
    assert list(found) == [0.5] and "none of the 4 tokens" in left_out[0.95]
    with pytest.raises(UserError, match="none of the 4 tokens"):
        restore_at_ratios(method, batch, [0.95], seed=0)
    assert method.mask_ratio == 0.75


def test_the_ratio_is_put_back_after_any_error() -> None:
    method = mae()
    with pytest.raises(RuntimeError), masked_at(method, 0.9):
        assert method.mask_ratio == 0.9
        raise RuntimeError
    assert method.mask_ratio == 0.75


def test_standard_units_change_nothing_for_mae_and_undo_the_scaling_of_others() -> None:
    method = mae()
    raw = raw_images(method.bands)
    result = method.evaluate({"image": raw}, 0).reconstruction()
    part = restored(result, raw, method)
    assert torch.equal(part.target, result.target) and torch.equal(part.prediction, result.prediction)
    torch.testing.assert_close(to_raw(part.target, method.bands), raw.double(), rtol=1e-5, atol=1e-2)
    other = MinMax(method.bands)
    scaled = restored(other.evaluate({"image": raw}, 0).reconstruction(), raw, other)
    torch.testing.assert_close(scaled.target, part.target, rtol=1e-4, atol=1e-4)
    low = raw.amin((2, 3), keepdim=True)
    wanted = (low + 1.1 * (raw - low)).double()
    torch.testing.assert_close(to_raw(scaled.prediction, method.bands), wanted, rtol=1e-4, atol=0.1)


def test_numbers() -> None:
    bands = SENSORS["sentinel2_10"]
    method = MinMax(bands)
    found, _ = restore_at_ratios(method, {"image": raw_images(bands)}, [0.9, 0.5], seed=0)
    scores = score(found, bands)
    part, own = found[0.9], scores[0.9].method
    assert own is not None and set(scores[0.9].base_lines) == {MEAN, BILINEAR}
    assert own.psnr == pytest.approx(masked_psnr(part.target, part.prediction, part.visible))
    assert scores[0.9].hidden == pytest.approx(0.9, abs=0.01)
    hidden = ~part.visible[:, 3]
    error = (to_raw(part.prediction, bands) - to_raw(part.target, bands))[:, 3][hidden]
    assert own.rmse[3] == pytest.approx(float(error.square().mean().sqrt()), rel=1e-5)
    # The PSNR of all bands is the mean of the squared shares, weighted with the hidden values.
    counts = (~part.visible).sum((0, 2, 3)).double()
    together = float((torch.tensor(own.share).square() * counts).sum() / counts.sum())
    assert own.psnr == pytest.approx(-10 * math.log10(together), abs=1e-6)
    assert own.angle > 0
    borrowed = {0.5: replace(found[0.5], borrows=True)}
    assert score(borrowed, bands)[0.5].method is None


def test_the_angle_is_that_of_raw_spectra() -> None:
    bands = generic(3).with_statistics([9000.0, 200.0, 1500.0], [100.0, 50.0, 10.0])
    noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (bands.means, bands.stds))
    original, guess = noise[0] * std + mean, noise[1] * std + mean
    visible = torch.zeros(2, 3, 4, 4, dtype=torch.bool)
    visible[:, 1] = True
    visible[0, :, 0] = True
    units = [((raw - mean) / std).float() for raw in (original, guess)]
    part = Restored(*units, visible, False)
    pasted = torch.where(visible, original, guess)
    angles = spectral_angle(original, pasted)
    wanted = float(torch.cat([angles[0, 1:].flatten(), angles[1].flatten()]).mean())
    own = score({0.5: part}, bands)[0.5].method
    assert own is not None and own.angle == pytest.approx(wanted, rel=1e-5) and wanted < 2
    found = raw_angle_sum(part.target, part.prediction, visible, bands)
    together = angle_sum(to_raw(part.target, bands), to_raw(part.prediction, bands), visible)
    assert found.count == together.count == 28 and found.total == pytest.approx(together.total, rel=1e-12)
    assert angle_sum(part.target, part.prediction, visible).mean > 20  # what the standardised spectra would give


def test_impossible_ratios_are_named() -> None:
    for ratios in ([0.0], [1.0], [-0.5], [math.nan], [0.5, 0.5]):
        with pytest.raises(UserError, match="--ratios"):
            check_ratios(ratios, "--ratios")
    check_ratios([], "--ratios")


def made_up(bands: Bands, ratios: tuple[float, ...], size: int = 32) -> dict[float, Restored]:
    """White images of which one band of one quarter is hidden, put back as black."""
    target = torch.rand(1, len(bands), size, size, generator=torch.Generator().manual_seed(0))
    visible = torch.ones_like(target, dtype=torch.bool)
    visible[:, bands.rgb[0], : size // 2, : size // 2] = False  # red is lost
    return {ratio: Restored(target, target * 0.5, visible, False) for ratio in ratios}


def draw(bands: Bands, ratios: tuple[float, ...] = RATIOS, **options: Any) -> np.ndarray:
    found = made_up(bands, ratios)
    return ratio_figure(found, score(found, bands, base_lines=False), bands, **options)


def test_a_hidden_band_is_grey_in_that_band_alone() -> None:
    bands = SENSORS["sentinel2_rgb"]
    found = made_up(bands, (0.5,))
    target = found[0.5].target.clone()
    target[:, 1:] = 0.0  # green and blue are flat, drawn as middle grey
    target[:, 0] = 1.0
    target[:, 0, -1] = 0.0
    white = {0.5: replace(found[0.5], target=target, prediction=target)}
    picture = ratio_figure(white, score(white, bands, base_lines=False), bands)
    colours, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    by_colour = {tuple(c.tolist()): int(n) for c, n in zip(colours, counts, strict=True)}
    cell = 160 * 160  # 32 pixels, five times enlarged
    # Masked: a quarter has red at one half, as green and blue are; the rest keeps its full red, but for the last row.
    assert by_colour[(128, 128, 128)] >= cell // 4
    red = by_colour[(255, 128, 128)]
    assert red == pytest.approx(cell * (2 * 31 / 32 + 31 / 32 - 1 / 4), rel=0.01)


@pytest.mark.parametrize("count", [1, 3, 13, 40])
def test_figures_of_any_number_of_bands(count) -> None:
    bands = {3: SENSORS["sentinel2_rgb"], 13: SENSORS["sentinel2_l1c"]}.get(count, generic(count))
    picture = draw(bands, ratios=(0.5, 0.9), text=FigureText("a $title", ("a note.",)))
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.std() > 10
    taller = 164 if bands.false_colour else 0
    plain = draw(bands, ratios=(0.5, 0.9), text=FigureText("a $title", ("a note.",)), false_colour=False)
    assert picture.shape[0] - plain.shape[0] == taller


def test_paste_visible_shows_the_original_where_it_was_seen() -> None:
    bands = SENSORS["sentinel2_rgb"]
    assert not np.array_equal(draw(bands), draw(bands, paste_visible=True))


def test_borrowed_statistics_have_no_numbers_and_no_chart() -> None:
    bands = SENSORS["sentinel2_rgb"]
    found = {r: replace(part, borrows=True) for r, part in made_up(bands, RATIOS).items()}
    picture = ratio_figure(found, score(found, bands), bands)
    assert picture.shape[0] < draw(bands).shape[0] - 150
