"""Patches with gaps between them."""

import pytest
import torch

from xscale_lightning.errors import UserError
from xscale_lightning.masking import children
from xscale_lightning.masking_gaps import gap_grid, jitter, take_patches


def image(height, width, channels=2, batch=3):
    """Every pixel says where it is."""
    place = torch.arange(batch * channels * height * width, dtype=torch.float64)
    return place.reshape(batch, channels, height, width)


@pytest.mark.parametrize(("height", "width", "patch", "gap"), [(20, 30, 8, 2), (25, 11, 3, 4), (24, 16, 8, 0)])
def test_patches_are_slices_of_their_cells(height, width, patch, gap):
    images = image(height, width)
    rows, columns = gap_grid(height, width, patch, gap)
    assert (rows, columns) == (height // (patch + gap), width // (patch + gap))
    noise = torch.rand(3, 2, rows * columns, generator=torch.Generator().manual_seed(0))
    offsets = jitter(noise, gap)
    taken = take_patches(images, patch, gap, offsets)
    assert taken.shape == (3, 2, rows * patch, columns * patch)
    assert torch.equal(taken, take_patches(images, patch, gap, jitter(noise, gap)))  # noise is all there is
    top, left = (height - rows * (patch + gap)) // 2, (width - columns * (patch + gap)) // 2
    for b in range(3):
        for cell in range(rows * columns):
            row, column = divmod(cell, columns)
            y = top + row * (patch + gap) + int(offsets[b, 0, cell])
            x = left + column * (patch + gap) + int(offsets[b, 1, cell])
            got = taken[b, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            assert torch.equal(got, images[b, :, y : y + patch, x : x + patch])
    assert taken[0].unique().numel() == taken[0].numel()  # no pixel is in two patches


def test_jitter_covers_the_published_range():
    offsets = jitter(torch.rand(4, 2, 500, generator=torch.Generator().manual_seed(0)), 4)
    assert offsets.dtype == torch.int64 and offsets.unique().tolist() == [0, 1, 2, 3]
    assert jitter(torch.tensor([0.0, 0.2499, 0.25, 0.9999, 1.0]), 4).tolist() == [0, 0, 1, 3, 3]
    assert jitter(torch.rand(3), 0).tolist() == [0, 0, 0]


def test_without_a_gap_the_image_stays_as_it_is():
    images = image(16, 24)
    assert torch.equal(take_patches(images, 8, 0, torch.zeros(3, 2, 6, dtype=torch.long)), images)


def test_an_image_without_room_is_refused():
    with pytest.raises(UserError, match=r"9 x 40 pixels has no room for a patch of 8 pixels and a gap of 2"):
        gap_grid(9, 40, 8, 2)


def test_children_are_the_tokens_under_their_parents():
    assert children(torch.tensor([[0, 1, 2, 3]]), 6, 2)[0].tolist() == [
        *(0, 1, 12, 13, 2, 3, 14, 15),
        *(4, 5, 16, 17, 6, 7, 18, 19),
    ]
    parents = torch.tensor([[7, 2], [0, 11]])  # of a grid of 3 x 4
    fine = torch.arange(9 * 12).reshape(3, 3, 4, 3).permute(0, 2, 1, 3).reshape(12, 9)
    assert torch.equal(children(parents, 4, 3), fine[parents].flatten(1))
