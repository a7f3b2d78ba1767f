import math

import numpy as np
import pytest
import torch

from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.curves import Curve, plot_curves
from xscale_lightning.evaluation.scales import check_shares, downsample, scale_batch, scaled_sizes, score_names

STANDARD = [1.0, 0.5, 0.25, 0.125]


def raw(height: int, width: int) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 5000


def test_half_the_size_is_the_mean_of_2_x_2_blocks() -> None:
    images = raw(16, 32)
    smaller, factor = downsample(images, 0.5, patch=8)
    blocks = images.view(2, 3, 8, 2, 16, 2).mean(dim=(3, 5))
    torch.testing.assert_close(smaller, blocks)
    assert factor == 0.5


def test_native_size_is_untouched_even_where_the_patch_does_not_divide_it() -> None:
    images = raw(10, 10)
    same, factor = downsample(images, 1.0, patch=8)
    assert same is images and factor == 1.0


@pytest.mark.parametrize(
    ("size", "share", "patch", "new"),
    [
        ((100, 100), 0.125, 8, (16, 16)),  # 12.5 pixels: 16 is nearer than 8
        ((100, 100), 0.11, 8, (8, 8)),
        ((224, 224), 0.25, 16, (64, 64)),  # 56 lies between 48 and 64: upwards
        ((64, 96), 0.25, 16, (16, 32)),  # every side by itself
        ((15, 15), 0.97, 8, (8, 8)),  # 16 would be more than there is
    ],
)
def test_sizes_are_whole_patches_and_the_factor_is_the_true_one(size, share, patch, new) -> None:
    smaller, factor = downsample(raw(*size), share, patch)
    assert tuple(smaller.shape[-2:]) == new
    assert factor == pytest.approx(math.sqrt(new[0] / size[0] * new[1] / size[1]))


def test_low_precision_images_are_averaged_in_full_precision() -> None:
    images = torch.full((1, 1, 64, 64), 1001.0).bfloat16()
    images[..., ::2] += 8
    smaller, _ = downsample(images, 0.125)
    assert smaller.dtype == torch.bfloat16
    assert torch.equal(smaller, images.float().view(1, 1, 8, 8, 8, 8).mean(dim=(3, 5)).bfloat16())


def test_gsd_grows_as_pixels_get_coarser() -> None:
    batch = {"image": raw(100, 100), "gsd": torch.tensor([10.0, 0.3]), "label": torch.tensor([1, 2])}
    scaled = scale_batch(batch, 0.125, patch=8)
    torch.testing.assert_close(scaled["gsd"], torch.tensor([62.5, 1.875]))  # 100 pixels on 16
    assert scaled["label"] is batch["label"] and batch["image"].shape[-1] == 100
    assert "gsd" not in scale_batch({"image": raw(16, 16)}, 0.5, patch=8)


def test_the_native_size_is_always_there_and_first() -> None:
    assert check_shares([0.125, 0.5]) == [1.0, 0.5, 0.125]
    assert check_shares([1.0]) == [1.0]
    assert [score_names(share, "top1") for share in check_shares([1 / 3, *STANDARD])] == [
        *("top1", "scale_50/top1", "scale_33.3333/top1", "scale_25/top1", "scale_12.5/top1")
    ]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([], r"scales: \[\] is not possible"),
        ([0.5, 0.0], r"scales: 0 is not possible; .* above 0 and up to 1"),
        ([12.5], r"scales: 12.5 is not possible; .* such as 0.125"),
        ([math.nan], r"scales: nan is not possible"),
        ([0.5, 1.0, 0.5], r"scales: 0.5 is given twice"),
        ([1.0, 0.99999999], r"scales: 1 is given twice"),  # both would be called 100 %
    ],
)
def test_impossible_shares_are_refused(shares, message) -> None:
    with pytest.raises(UserError, match=message):
        check_shares(shares)


def test_less_than_a_patch_is_refused_with_the_least_possible_scale() -> None:
    with pytest.raises(UserError, match=r"scales: 0.125 of 64 x 64 pixels is 8 x 8, .* patch of 16; give 0.25 or more"):
        scaled_sizes((64, 64), STANDARD, 16)
    assert scaled_sizes((64, 64), STANDARD, 8)[0.125] == (8, 8)
    with pytest.raises(UserError, match=r"0.125 of 256 x 64"):  # the shorter side decides
        scaled_sizes((256, 64), STANDARD, 16)
    # The share in the message must itself be possible.
    with pytest.raises(UserError, match=r"give 0.1429 or more"):
        scaled_sizes((112, 112), [0.1], 16)
    assert scaled_sizes((112, 112), [0.1429], 16) == {0.1429: (16, 16)}


def test_two_scales_of_the_same_size_are_refused() -> None:
    with pytest.raises(UserError, match=r"scales: 1 and 0.75 of 32 x 32 pixels are both 32 x 32"):
        scaled_sizes((32, 32), [1.0, 0.75, 0.5], 16)


def test_the_plot_shows_every_curve() -> None:
    zero = Curve("step 0", dict.fromkeys(STANDARD, 0.5), base_line=True)
    now = Curve("step 9", {1.0: 0.9, 0.5: 0.8, 0.25: 0.7, 0.125: math.nan}, dict.fromkeys(STANDARD, 0.02))
    both = plot_curves([zero, now], "$data: kNN", "top-1", {share: (8, 8) for share in STANDARD})
    assert both.dtype == np.uint8 and both.shape == (480, 720, 3)

    def coloured(picture: np.ndarray) -> int:
        pixels = picture.astype(int)
        return int((pixels[..., 2] - pixels[..., 0] > 80).sum())  # the blue of "now"

    assert coloured(both) > 500
    assert coloured(plot_curves([zero], "data", "top-1")) == 0
