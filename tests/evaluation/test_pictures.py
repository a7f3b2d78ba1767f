import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xscale_lightning.data.bands import SENSORS, generic
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.pictures import composite, picture_grid, save_png, shown_channels, stretch_limits


def test_colours_of_a_13_band_image_come_from_the_right_bands() -> None:
    bands = SENSORS["sentinel2_l1c"]
    images = torch.zeros(1, 13, 8, 8)
    ramp = torch.linspace(0, 1, 64).view(8, 8)
    images[0, bands.names.index("B04")] = ramp
    images[0, bands.names.index("B03")] = 10 * ramp.T
    images[0, bands.names.index("B08")] = 1000 * (1 - ramp)
    shown = composite(images, shown_channels(bands))
    assert torch.equal(shown[0, 2], torch.full((8, 8), 0.5))  # flat blue is middle grey
    assert shown[0, 0].flatten().diff().min() >= 0
    torch.testing.assert_close(shown[0, 1], shown[0, 0].T, atol=1e-4, rtol=0)
    infrared = composite(images, shown_channels(bands, false_colour=True))
    torch.testing.assert_close(infrared[0, 1], shown[0, 0])
    assert infrared[0, 0].flatten().diff().max() <= 0


def test_columns_share_the_originals_stretch() -> None:
    original = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 5000
    limits = stretch_limits(original)
    assert limits.shape == (2, 3, 2)
    low, high = np.percentile(original[1, 2].numpy(), [2, 98])
    assert limits[1, 2].tolist() == pytest.approx([low, high], rel=1e-4)
    dark = composite(original / 2, (0, 1, 2), limits)
    assert dark.mean() < composite(original, (0, 1, 2), limits).mean() - 0.2


def test_masked_pixels_are_grey_and_one_band_gives_grey_pictures() -> None:
    images = torch.rand(1, 1, 8, 8)
    visible = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    visible[..., :4, :] = True
    channels = shown_channels(generic(1))
    shown = composite(images, channels, visible=visible)
    assert shown.shape == (1, 3, 8, 8)
    assert torch.equal(shown[:, 0], shown[:, 1]) and torch.equal(shown[:, 0], shown[:, 2])
    assert torch.equal(shown[..., 4:, :], torch.full((1, 3, 4, 8), 0.5))


def test_nan_is_drawn_not_raised() -> None:
    assert torch.isfinite(composite(torch.full((1, 3, 4, 4), torch.nan), (0, 1, 2))).all()


def test_grid_and_png(tmp_path: Path) -> None:
    red = torch.zeros(2, 3, 20, 40)
    red[:, 0] = 1.0
    blue = red.flip(1)
    grid = picture_grid([red, blue], ["original", "a title that is far too long for its column of pixels"])
    assert grid.dtype == np.uint8
    factor = 4  # 40 pixels wide, enlarged to at least 160
    assert grid.shape[1] >= 2 * 40 * factor and grid.shape[0] >= 2 * 20 * factor
    assert (grid == [255, 0, 0]).all(-1).sum() == 2 * 20 * 40 * factor**2
    assert (grid == [0, 0, 255]).all(-1).sum() == 2 * 20 * 40 * factor**2
    path = save_png(grid, tmp_path / "new" / "step_0000000.png")
    assert np.array_equal(np.asarray(Image.open(path)), grid)
    assert os.listdir(path.parent) == ["step_0000000.png"]


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError)):
        save_png(np.zeros((2, 2, 7), np.uint8), tmp_path / "x.png")
    assert os.listdir(tmp_path) == []


def test_wrong_input_is_named() -> None:
    with pytest.raises(UserError, match="columns"):
        picture_grid([torch.zeros(1, 3, 4, 4)], [])
    with pytest.raises(UserError, match="false_colour"):
        shown_channels(SENSORS["sentinel2_rgb"], false_colour=True)
