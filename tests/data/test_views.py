import pytest
import torch

from xscale_lightning.data.views import Views, crop_resize, random_boxes, turn, zoom
from xscale_lightning.errors import UserError

WHOLE = {"scale": (1.0, 1.0), "flip": False, "rot90": False}


def batch(bands=4, height=24, width=24, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, bands, height, width, generator=generator), torch.full((size,), 10.0)


@pytest.mark.parametrize("bands", [1, 3, 4, 13])
@pytest.mark.parametrize(("height", "width"), [(24, 24), (16, 40)])
def test_whole_image_without_turns_is_the_identity(bands, height, width):
    images, gsd = batch(bands, height, width)
    views, new_gsd = Views(**WHOLE)(images, gsd)
    assert torch.equal(views, images)
    assert torch.equal(new_gsd, gsd)


@pytest.mark.parametrize("bands", [1, 3, 4, 13])
@pytest.mark.parametrize("size", [None, 16, 40])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_shape_dtype_and_constants_survive(bands, size, interpolation):
    images = torch.arange(1.0, bands + 1).view(1, bands, 1, 1).expand(5, bands, 20, 28).contiguous()
    views, gsd = Views(size=size, interpolation=interpolation)(images, torch.ones(5))
    assert views.shape == (5, bands, *((20, 28) if size is None else (size, size)))
    assert views.dtype == images.dtype
    assert gsd.shape == (5,)
    torch.testing.assert_close(views, images[:, :, :1, :1].expand_as(views))


@pytest.mark.parametrize(("image", "output"), [((32, 32), (16, 16)), ((20, 60), (20, 60)), ((20, 60), (24, 24))])
def test_boxes_lie_inside_and_have_the_drawn_area_and_ratio(image, output):
    torch.manual_seed(0)
    scale, ratio = (0.2, 0.9), (0.75, 4 / 3)
    top, left, height, width = random_boxes(4000, image, output, scale, ratio).unbind(1)
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= image[0] + 1e-4).all() and (left + width <= image[1] + 1e-4).all()
    distortion = (width / height) / (output[1] / output[0])
    assert distortion.min() >= ratio[0] - 1e-4 and distortion.max() <= ratio[1] + 1e-4
    share = height * width / (image[0] * image[1])
    assert share.max() <= scale[1] + 1e-4
    if image[0] * output[1] == image[1] * output[0]:  # same aspect: every area fits
        assert share.min() >= scale[0] - 1e-4
        assert abs(share.mean() - sum(scale) / 2) < 0.02


def test_gsd_follows_the_zoom():
    images, gsd = batch(height=32, width=32)
    _, shrunk = Views(size=16, **WHOLE)(images, gsd)
    _, enlarged = Views(size=64, **WHOLE)(images, gsd)
    torch.testing.assert_close(shrunk, gsd * 2)
    torch.testing.assert_close(enlarged, gsd / 2)
    _, cropped = Views(scale=(0.25, 0.25), ratio=(1.0, 1.0))(images, gsd)
    torch.testing.assert_close(cropped, gsd / 2)


def test_crop_without_resize_is_a_slice():
    images, _ = batch(height=20, width=30, size=2)
    boxes = torch.tensor([[3.0, 5.0, 8.0, 10.0], [12.0, 20.0, 8.0, 10.0]])
    for interpolation in ("bilinear", "bicubic"):
        views = crop_resize(images, boxes, (8, 10), interpolation)
        torch.testing.assert_close(views[0], images[0, :, 3:11, 5:15])
        torch.testing.assert_close(views[1], images[1, :, 12:20, 20:30])
    torch.testing.assert_close(zoom(boxes, (4, 5)), torch.tensor([2.0, 2.0]))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(10, 7), (48, 60), (12, 60)])
def test_resize_equals_torchs_antialiased_resize(interpolation, size):
    images, _ = batch(height=24, width=30, size=2)
    boxes = torch.tensor([[0.0, 0.0, 24.0, 30.0]]).expand(2, 4)
    expected = torch.nn.functional.interpolate(images, size, mode=interpolation, antialias=True)
    torch.testing.assert_close(crop_resize(images, boxes, size, interpolation), expected, atol=2e-5, rtol=1e-4)


def test_shrinking_does_not_alias():
    checkerboard = (
        (torch.arange(64).view(-1, 1) + torch.arange(64)).remainder(2).float().mul(2).sub(1).expand(1, 1, 64, 64)
    )
    views, _ = Views(size=16, **WHOLE)(checkerboard, torch.ones(1))
    assert views[:, :, 1:-1, 1:-1].abs().max() < 0.05


@pytest.mark.parametrize(("height", "width"), [(12, 12), (8, 14)])
def test_turns_permute_pixels_and_all_of_them_occur(height, width):
    torch.manual_seed(0)
    images = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width).repeat(400, 1, 1, 1)
    views, gsd = Views(scale=(1.0, 1.0))(images, torch.ones(400))
    assert torch.equal(views.flatten(1).sort(dim=1).values, images.flatten(1))
    assert torch.equal(gsd, torch.ones(400))
    assert len(torch.unique(views.flatten(1), dim=0)) == (8 if height == width else 4)


def test_turn_is_rot90_then_mirror():
    images, _ = batch(height=6, width=6, size=4)
    turned = turn(images, torch.arange(4), torch.zeros(4, 2, dtype=torch.bool))
    for k in range(4):
        assert torch.equal(turned[k], torch.rot90(images[k], k, (1, 2)))
    mirror = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
    mirrored = turn(images, torch.zeros(4, dtype=torch.long), mirror)
    assert torch.equal(mirrored[0], images[0].flip(1)) and torch.equal(mirrored[1], images[1].flip(2))
    assert torch.equal(mirrored[2], images[2].flip(1, 2)) and torch.equal(mirrored[3], images[3])


@pytest.mark.parametrize("size", [(24, 24), (16, 16), (30, 40), (10, 20)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_turning_while_cropping_is_turning_after_it(size, interpolation):
    torch.manual_seed(0)
    images, _ = batch(height=24, width=24, size=16)
    boxes = random_boxes(16, (24, 24), size, (0.2, 1.0), (0.75, 1.33))
    quarters = torch.arange(4).repeat(4) if size[0] == size[1] else torch.tensor([0, 2]).repeat(8)
    mirror = torch.tensor([[False, False], [True, False], [False, True], [True, True]]).repeat_interleave(4, dim=0)
    together = crop_resize(images, boxes, size, interpolation, quarters, mirror)
    after = turn(crop_resize(images, boxes, size, interpolation), quarters, mirror)
    torch.testing.assert_close(together, after, atol=1e-4, rtol=1e-4)


def test_long_images_turn_by_180_degrees_only():
    torch.manual_seed(0)
    images = torch.arange(8 * 14, dtype=torch.float32).view(1, 1, 8, 14).repeat(100, 1, 1, 1)
    views, _ = Views(scale=(1.0, 1.0), flip=False)(images, torch.ones(100))
    upright = (views == images).flatten(1).all(1)
    upside_down = (views == images.flip(2, 3)).flatten(1).all(1)
    assert (upright | upside_down).all() and upright.any() and upside_down.any()


def test_same_seed_same_views_other_seed_other_views():
    views = Views(size=16, intensity=0.2, band_dropout=0.3)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(views(*batch())[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_samples_get_their_own_views_and_input_is_left_alone():
    images, gsd = batch(size=1)
    images, gsd = images.repeat(6, 1, 1, 1), gsd.repeat(6)
    before = images.clone()
    views, zoomed = Views(intensity=0.3, band_dropout=0.3)(images, gsd)
    assert torch.equal(images, before)
    assert len(torch.unique(views.flatten(1), dim=0)) == 6
    assert len(zoomed.unique()) > 1


def test_intensity_is_linear_per_band_and_bounded():
    torch.manual_seed(0)
    images, gsd = batch(bands=5, size=16)
    views, _ = Views(**WHOLE, intensity=0.4)(images, gsd)
    x, y = images.flatten(2), views.flatten(2)
    slope = (y[:, :, 1] - y[:, :, 0]) / (x[:, :, 1] - x[:, :, 0])
    offset = y[:, :, 0] - slope * x[:, :, 0]
    torch.testing.assert_close(y, x * slope[..., None] + offset[..., None], atol=1e-3, rtol=1e-3)
    assert (slope - 1).abs().max() <= 0.401 and offset.abs().max() <= 0.401
    assert slope.std(dim=1).min() > 0.01  # bands of one sample differ


@pytest.mark.parametrize("bands", [1, 13])
def test_band_dropout_zeroes_whole_bands_and_keeps_one(bands):
    torch.manual_seed(0)
    images = torch.ones(500, bands, 4, 4)
    views, _ = Views(**WHOLE, band_dropout=0.6)(images, torch.ones(500))
    kept = views.flatten(2).mean(dim=2)
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    assert kept.sum(dim=1).min() >= 1
    if bands == 13:
        assert abs(kept.mean() - 0.4) < 0.03


def test_autocast_does_not_blur():
    images, gsd = batch(height=32, width=32)
    torch.manual_seed(0)
    expected, _ = Views(size=16)(images, gsd)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views, _ = Views(size=16)(images, gsd)
    assert views.dtype == torch.float32
    assert torch.equal(views, expected)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("size", 0),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 1.2)),
        ("scale", (0.9, 0.2)),
        ("ratio", (1.2, 1.5)),
        ("intensity", 1.0),
        ("band_dropout", 1.0),
        ("interpolation", "nearest"),
    ],
)
def test_impossible_arguments_are_named(argument, value):
    with pytest.raises(UserError, match=f"views.{argument}"):
        Views(**{argument: value})


@pytest.mark.parametrize("options", [{"scale": (1.0, 1.0)}, {"scale": (0.2, 1.0)}, {"size": 24, "scale": (0.3, 0.6)}])
def test_class_maps_follow_their_images(options):
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    masks = (rows // 4 * 4 + columns // 4).expand(32, -1, -1)
    images = masks.unsqueeze(1).float()
    views = Views(**options)
    draw = views.draw(images)
    shown, _ = views.apply(draw, images, torch.ones(32))
    maps = views.apply_to_masks(draw, masks)
    assert maps.dtype == torch.int64 and maps.shape == (32, *shown.shape[-2:])
    assert maps.unique().numel() <= 16
    agree = (shown.squeeze(1).round() == maps).float().mean()  # apart from the edges, which the image blurs
    assert agree == 1.0 if options == {"scale": (1.0, 1.0)} else agree > 0.6
    assert not torch.equal(maps[:, :16, :16], masks)
