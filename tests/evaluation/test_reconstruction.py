import math

import numpy as np
import pytest
import torch
from torch import Tensor

from xscale_lightning.errors import UserError
from xscale_lightning.evaluation import reconstruction
from xscale_lightning.evaluation.reconstruction import (
    bilinear_inpainting,
    error_sums,
    masked_psnr,
    mean_fill,
    percentile_range,
    psnr,
)


def patch_mask(batch: int, size: int, patch: int, hidden: float, seed: int = 0) -> Tensor:
    """Random patches hidden: `[B, 1, H, W]`, True where visible."""
    grid = size // patch
    noise = torch.rand(batch, grid * grid, generator=torch.Generator().manual_seed(seed))
    visible = noise.argsort(1).argsort(1) >= round(grid * grid * hidden)
    return visible.view(batch, 1, grid, grid).repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def surface(height: int, width: int, a: float, b: float, c: float, d: float) -> Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return a + b * x + c * y + d * x * y


def test_psnr_against_a_hand_computed_value() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(3, 2, 8, 8, generator=generator) * torch.tensor([1.0, 50.0]).view(1, 2, 1, 1)
    prediction = target + torch.tensor([0.1, 2.0]).view(1, 2, 1, 1)
    visible = patch_mask(3, 8, 4, 0.5).expand_as(target)
    limits = [np.percentile(target[:, c].numpy(), [2, 98]) for c in range(2)]
    ranges = [high - low for low, high in limits]
    expected = -10 * math.log10(((0.1 / ranges[0]) ** 2 + (2.0 / ranges[1]) ** 2) / 2)
    assert percentile_range(target).numpy() == pytest.approx(ranges, rel=1e-4)
    assert masked_psnr(target, prediction, visible) == pytest.approx(expected, abs=1e-3)


def test_psnr_is_the_same_in_raw_and_normalised_units() -> None:
    generator = torch.Generator().manual_seed(0)
    target, prediction = torch.randn(2, 4, 3, 16, 16, generator=generator).unbind(0)
    mean, std = (
        torch.tensor([1000.0, 500.0, 3000.0]).view(1, 3, 1, 1),
        torch.tensor([20.0, 900.0, 4.0]).view(1, 3, 1, 1),
    )
    visible = patch_mask(4, 16, 4, 0.75)
    raw = masked_psnr(target * std + mean, prediction * std + mean, visible)
    assert masked_psnr(target, prediction, visible) == pytest.approx(raw, abs=1e-2)


def test_psnr_of_parts_is_the_psnr_of_the_whole_and_not_a_mean_of_decibels() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(4, 2, 8, 8, generator=generator)
    prediction = target + torch.randn(4, 2, 8, 8, generator=generator) * torch.tensor([0.1, 0.1, 2.0, 2.0]).view(
        4, 1, 1, 1
    )
    visible = patch_mask(4, 8, 2, 0.5).expand_as(target)
    limits = percentile_range(target)
    parts = [error_sums(target[i : i + 2], prediction[i : i + 2], visible[i : i + 2]) for i in (0, 2)]
    whole = masked_psnr(target, prediction, visible)
    assert psnr(parts[0] + parts[1], limits) == pytest.approx(whole)
    assert abs(sum(psnr(part, limits) for part in parts) / 2 - whole) > 3


def test_psnr_ignores_visible_pixels_and_constant_bands() -> None:
    target = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    target[:, 1] = 7.0
    visible = patch_mask(2, 8, 4, 0.5).expand_as(target)
    prediction = target + 0.1
    changed = torch.where(visible, 1e6, prediction)
    changed[:, 1] = -3.0
    assert masked_psnr(target, changed, visible) == pytest.approx(masked_psnr(target, prediction, visible))
    assert masked_psnr(target, target, visible) == math.inf
    assert math.isnan(masked_psnr(target, prediction, torch.ones_like(visible)))


def test_mean_fill() -> None:
    target = torch.arange(16.0).view(1, 1, 4, 4).repeat(1, 2, 1, 1)
    visible = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    visible[0, 0, 0] = True  # 0 1 2 3; the second band shows nothing
    filled = mean_fill(target, visible)
    assert torch.equal(filled[0, 0, 0], target[0, 0, 0])
    assert torch.equal(filled[0, 0, 1:], torch.full((3, 4), 1.5))
    assert torch.equal(filled[0, 1], torch.zeros(4, 4))


@pytest.mark.parametrize("size", [(32, 32), (24, 37)])
def test_bilinear_surfaces_are_exact_in_the_interior(size: tuple[int, int]) -> None:
    ramps = [
        surface(*size, 3.0, 2.0, 0.0, 0.0),
        surface(*size, 0.0, 1.0, -5.0, 0.0),
        surface(*size, 1.0, 1.0, 2.0, 4.0),
    ]
    target = torch.stack(ramps).unsqueeze(0)
    visible = torch.ones(1, 1, *size, dtype=torch.bool)
    visible[..., 4:20, 8:24] = False
    visible[..., 10:12, 14:17] = True
    filled = bilinear_inpainting(target, visible, tolerance=1e-7)
    torch.testing.assert_close(filled, target, atol=2e-4, rtol=0)
    assert (mean_fill(target, visible) - target).abs().max() > 0.5


def test_bilinear_inpainting_solves_laplaces_equation() -> None:
    target = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    visible = patch_mask(2, 16, 4, 0.75)  # hidden regions reach the border: flat continuation there
    filled = bilinear_inpainting(target, visible, tolerance=1e-7)
    padded = torch.nn.functional.pad(filled, (1, 1, 1, 1), mode="replicate")
    neighbours = padded[..., 1:-1, 2:] + padded[..., 1:-1, :-2] + padded[..., 2:, 1:-1] + padded[..., :-2, 1:-1]
    assert (neighbours - 4 * filled).masked_fill(visible, 0).abs().max() < 1e-4
    assert torch.equal(filled.masked_fill(~visible, 0), target.masked_fill(~visible, 0))


def test_default_tolerance_is_close_enough() -> None:
    noise = torch.randn(4, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    target = torch.nn.functional.avg_pool2d(noise, 9, 1, 4) * 9
    visible = patch_mask(4, 64, 8, 0.75)
    default = masked_psnr(target, bilinear_inpainting(target, visible), visible)
    assert default == pytest.approx(masked_psnr(target, bilinear_inpainting(target, visible, 1e-7), visible), abs=0.01)
    assert default > masked_psnr(target, mean_fill(target, visible), visible)


def test_hidden_pixels_are_not_looked_at() -> None:
    target = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    visible = patch_mask(2, 16, 4, 0.75)
    spoiled = target.masked_fill(~visible, math.nan)
    assert torch.equal(bilinear_inpainting(target, visible), bilinear_inpainting(spoiled, visible))
    assert torch.equal(mean_fill(target, visible), mean_fill(spoiled, visible))


def test_a_mask_per_band_and_a_band_without_visible_pixels() -> None:
    target = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    visible = torch.cat([patch_mask(1, 16, 4, 0.5, seed) for seed in range(3)], dim=1)
    visible[:, 2] = False
    filled = bilinear_inpainting(target, visible, tolerance=1e-6)
    alone = bilinear_inpainting(target[:, :1], visible[:, :1], tolerance=1e-6)
    torch.testing.assert_close(filled[:, :1], alone, atol=1e-4, rtol=0)
    assert torch.equal(filled[:, 2], torch.zeros(1, 16, 16))


def test_few_iterations_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    # A time limit would fail on a busy machine; at 32 x 13 x 64 x 64 an iteration takes some 3 ms on two idle cores.
    calls = []
    laplacian = reconstruction._laplacian
    monkeypatch.setattr(reconstruction, "_laplacian", lambda *args: calls.append(1) or laplacian(*args))
    target = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    bilinear_inpainting(target, patch_mask(1, 64, 8, 0.75).expand(2, 1, 64, 64))
    assert len(calls) <= 150


def test_wrong_shape_is_named() -> None:
    with pytest.raises(UserError, match="visible"):
        bilinear_inpainting(torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 4, 4, dtype=torch.bool))
