"""The displacement of pairs: none is found where there is none, and one pixel is found where there is one."""

import pytest
import torch
import torch.nn.functional as F

from xscale_lightning.evaluation.alignment import checkerboard, displacement, edge_overlay


def ground(count=8, channels=2, side=160, seed=0):
    """Smooth random ground `[B, C, side, side]` with detail of a few pixels."""
    noise = torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(noise, 5, stride=1, padding=2)


def pair(ratio, rows=0, cols=0, size=24):
    """MR is the area mean; HR's content lies `rows` further down and `cols` further right than it should."""
    image, edge = ground(), 24
    mr = F.avg_pool2d(image[:, :, edge : edge + size * ratio, edge : edge + size * ratio], ratio)
    top, left = edge - rows, edge - cols
    return mr, image[:, :, top : top + size * ratio, left : left + size * ratio]


@pytest.mark.parametrize("ratio", [2, 3, 4])
@pytest.mark.parametrize(("rows", "cols"), [(0, 0), (1, 0), (0, -1), (1, 1), (-2, 1)])
def test_whole_pixels_are_found(ratio, rows, cols):
    found = displacement(*pair(ratio, rows, cols))
    assert found is not None
    assert abs(found.rows - rows) < 0.15 and abs(found.cols - cols) < 0.15
    assert (found.pixels > 0.5) == bool(rows or cols)
    assert found.correlation > 0.95 and found.agreeing == (1.0 if rows or cols else found.agreeing)
    assert found.error < 0.1 and found.windows >= 8 and not found.at_limit


def test_other_bands_and_inverted_contrast_do_not_matter():
    mr, hr = pair(4, 1, 0)
    mixed = torch.cat([500 - 90 * mr[:, :1], mr[:, 1:] * 3 + mr[:, :1], torch.randn_like(mr)], dim=1)
    found = displacement(mixed, 40 * hr[:, :1] + 7)
    assert found is not None and abs(found.rows - 1) < 0.2 and abs(found.cols) < 0.2


def clouds(mr, hr, share):
    """Clouds over a share of the pairs: each band of MR, and HR, sees them from another angle."""
    cloud = F.avg_pool2d(
        60 * torch.randn(len(mr), 1, 200, 200, generator=torch.Generator().manual_seed(9)), 9, stride=1
    )
    ratio, count = hr.shape[-1] // mr.shape[-1], round(share * len(mr))
    mr, hr = mr.clone(), hr.clone()
    side = hr.shape[-1]
    for band in range(mr.shape[1]):
        top = 20 + (2 + 3 * band) * ratio // 2
        seen = F.avg_pool2d(cloud[:, :, top : top + side, 20 : 20 + side], ratio)
        mr[:count, band] += seen[:count, 0]
    hr[:count] += cloud[:count, :, 20 : 20 + side, 20 : 20 + side]
    return mr, hr


def test_clouds_do_not_count_as_a_displacement():
    """Every second pair is cloudy, and all of the displacement that clouds show is the same."""
    mr, hr = pair(2, 0, 0, size=48)
    mr, hr = mr.repeat(2, 1, 1, 1), hr.repeat(2, 1, 1, 1)
    for rows in (0, 1):
        found = displacement(*clouds(mr, torch.roll(hr, rows, 2), 0.5))
        assert found is not None and abs(found.rows - rows) < 0.2 and abs(found.cols) < 0.2
    covered = displacement(*clouds(mr, hr, 1.0))
    assert covered is None or covered.windows < 0.2 * 16 * 9


def test_the_error_grows_with_noise():
    mr, hr = pair(4, 0, 0, size=28)
    clear = displacement(mr, hr)
    noisy = displacement(mr + 0.12 * torch.randn(mr.shape, generator=torch.Generator().manual_seed(1)), hr)
    assert clear is not None and noisy is not None
    assert noisy.error > 2 * clear.error and noisy.pixels < 3 * noisy.error + 0.2


def test_half_a_pixel_is_found_as_half():
    image = ground(side=256)
    hr = F.avg_pool2d(image, 2)  # [.., 128, 128]
    mr = F.avg_pool2d(image[:, :, 1:-3, :-4], 8)  # starts half an HR pixel lower
    found = displacement(mr, hr[:, :, : 4 * mr.shape[2], : 4 * mr.shape[3]])
    assert found is not None and 0.3 < found.rows < 0.7 and abs(found.cols) < 0.2


def test_a_ratio_that_is_no_whole_number():
    image = ground(side=200)
    mr = F.avg_pool2d(image, 10)
    hr = F.avg_pool2d(image, 4)  # ratio 2.5
    found = displacement(mr, hr)
    assert found is not None and found.pixels < 0.3


def test_nothing_to_measure():
    assert displacement(torch.zeros(2, 1, 16, 16), torch.randn(2, 1, 32, 32)) is None
    assert displacement(torch.randn(2, 1, 4, 4), torch.randn(2, 1, 8, 8)) is None
    mr, hr = pair(2)
    assert displacement(mr[:2], hr[:2]) is None  # two windows are too few


def test_pictures_break_where_images_differ():
    a, b = torch.zeros(1, 3, 12, 12), torch.ones(1, 3, 12, 12)
    board = checkerboard(a, b, cells=6)
    assert board[0, 0, 0, :4].tolist() == [0, 0, 1, 1] and board[0, 0, 2, :4].tolist() == [1, 1, 0, 0]
    step = torch.zeros(1, 3, 12, 12)
    step[..., 6:] = 1
    red = edge_overlay(a, step)[0]
    assert red[0, 5, 5:7].tolist() == [1, 1] and red[:, 5, 0].abs().max() == 0
